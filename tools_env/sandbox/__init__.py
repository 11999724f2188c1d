"""Where a model's commands run: namespaces, a system call filter, limits, and terminals that outlive a call."""
