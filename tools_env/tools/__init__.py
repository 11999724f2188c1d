"""The tools, one module each. `optional` lists those that a host serves only on request."""
