"""Model definitions as pure functions on parameter trees, with NNX modules at the edge."""
