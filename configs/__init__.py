"""Configs are Python functions that return a locked `ml_collections.ConfigDict`."""
