"""Reinforcement learning: rollouts against live tools, rewards, advantages, PPO with a learned critic, and the loop."""
