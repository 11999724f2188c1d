"""The gRPC service: sessions, limits, routing between worker processes, metrics and tracing."""
