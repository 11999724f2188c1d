"""The gRPC interface: tools.proto and the stubs generated from it."""
