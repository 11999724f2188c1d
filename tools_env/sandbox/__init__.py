"""Isolation of shell commands: namespaces, a system call filter, resource limits and persistent terminals."""
