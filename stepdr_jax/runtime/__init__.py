"""What every trainer stands on: processes, checkpoints and where they lie, watchdog, profiling, metrics on disk."""
