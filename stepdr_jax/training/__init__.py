"""Mid-training and supervised fine-tuning: one step, one loop, checkpoints that survive anything."""
