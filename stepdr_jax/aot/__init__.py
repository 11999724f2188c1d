"""Compiling every program of a config for a TPU pod without a TPU: does it fit, and does it overlap."""
