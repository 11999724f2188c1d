"""Chromium for agents: the sandboxed process, page snapshots and screenshots."""
