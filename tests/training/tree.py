"""A small tree of arrays to save."""

import numpy as np

TREE = {
    "params": {"a": np.arange(6000, dtype=np.float32), "b": np.ones((3, 4), np.int32)},
    "step": np.full((), 7, np.int32),
}
