"""Adapters from other protocols to the tool service."""
