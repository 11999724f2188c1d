"""Training data: seqio mixtures over the corpus, packed sequences in ArrayRecord, and the loader that serves them.

`mixtures` imports TensorFlow; `packing` and `loader` never do, so training processes stay light.
"""
