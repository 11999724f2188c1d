"""A run from end to end: which stages there are, one process for each, what is done and how long the rest takes."""
