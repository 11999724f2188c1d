"""Checks and benchmarks of a tool host: compliance, load, chaos, and one benchmark per tool."""
