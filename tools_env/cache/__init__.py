"""The retrieval cache, its stores, and joining of concurrent work."""
