"""Benchmarks; docs/benchmarks.md has their commands and figures."""
