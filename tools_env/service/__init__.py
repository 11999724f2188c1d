"""The gRPC service: settings, sessions, limits, authentication, worker processes, metrics and tracing."""
