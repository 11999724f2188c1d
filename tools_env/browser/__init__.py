"""A real Chromium for agents: its process in a sandbox, and what a model reads of a page."""
