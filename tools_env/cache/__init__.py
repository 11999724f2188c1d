"""The retrieval cache, its stores, and single-flight execution of shared work."""
