"""A tiny run that asks for traces by config, by file and by signal: python tests/training/traced.py RUN_DIR

A process of its own, because jax's profiler ends those that look for a TPU where there is none.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.training import tiny  # noqa: E402


class Asking(tiny.Memory):
    """Asks for a trace while training runs."""

    def __init__(self, home):
        super().__init__()
        self.home = home

    def batch(self, step, rows=None):
        if step == 4:
            (self.home / "profile").touch()
        if step == 9:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().batch(step, rows)


def main(run_dir):
    from stepdr_jax.training import loop

    config = tiny.tiny_config(run_dir, **{"log.tensorboard": True, "profile.steps": (2, 3), "profile.length": 1})
    config.midtrain1.heldout_every = 6
    home = Path(run_dir) / "seed0" / "midtrain1"
    before = signal.getsignal(signal.SIGUSR1)
    done = loop.train(config, "midtrain1", loader=Asking(home), vocab_size=tiny.VOCAB)
    assert signal.getsignal(signal.SIGUSR1) == before
    print(json.dumps(done))


if __name__ == "__main__":
    main(sys.argv[1])
