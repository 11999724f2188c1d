"""The tools, one a module, and the list of them."""
