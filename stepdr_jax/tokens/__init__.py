"""Text to ids and back: the tokenizer, the chat format, and the append-only token log of an episode."""
