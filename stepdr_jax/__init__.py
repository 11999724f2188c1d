"""A JAX/TPU reproduction of the Step-DeepResearch recipe (arXiv 2512.20491)."""
