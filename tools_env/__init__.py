"""The tool environment: a gRPC service of research tools, with its own offline web. Never imports jax or stepdr_jax."""
