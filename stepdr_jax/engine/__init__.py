"""The sampler: continuous batching over a key/value cache, in JAX, and a scripted double of it."""
