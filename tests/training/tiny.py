"""A tiny training run on data made in memory; also runs as a process that a test can kill.

python tests/training/tiny.py RUN_DIR STAGE [field=value ...]
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from configs import miniature  # noqa: E402

VOCAB = 64


class Memory:
    """Batches of counting sequences: a function of (seed, step), like the loader's."""

    sources = ["up", "down"]
    families = ["search", "research"]
    fingerprint = "counting"
    heldout_batches = 2

    def __init__(self, batch=4, context=32, seed=0):
        self.shape, self.seed = (batch, context), seed

    def batch(self, step, rows=None):
        rng = np.random.default_rng((self.seed, step))
        B, T = self.shape
        source = rng.integers(0, 2, B).astype(np.int32)
        direction = np.where(source == 0, 1, -1)[:, None]
        cut = T // 2
        positions = np.concatenate([np.arange(cut), np.arange(T - cut)])[None].repeat(B, 0).astype(np.int32)
        segments = np.concatenate([np.full(cut, 1), np.full(T - cut, 2)])[None].repeat(B, 0).astype(np.int32)
        segments[:, -2:] = 0
        tokens = (rng.integers(0, VOCAB, (B, 1)) + direction * np.arange(T)) % VOCAB
        mask = (segments > 0) & (positions > 0)
        whole = dict(
            tokens=tokens.astype(np.int32),
            loss_mask=mask,
            segment_ids=segments,
            positions=positions,
            source=source,
            capability=segments,
        )
        return {name: a[rows or slice(None)] for name, a in whole.items()}

    def heldout_batch(self, index):
        return Memory(*self.shape, seed=self.seed + 1).batch(index)


def tiny_config(run_dir, **overrides):
    config = miniature.get_config()
    config.run_dir = str(run_dir)
    config.model.update(
        dict(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32)
    )
    for stage in ("midtrain1", "midtrain2", "sft"):
        config[stage].update(
            dict(batch_size=4, seq_len=32, steps=12, warmup_steps=3, log_every=3, checkpoint_every=5, loss_chunk=64)
        )
    for name, value in overrides.items():
        *sections, leaf = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[leaf] = value
    return config


def main(argv):
    from launch import entry
    from stepdr_jax.training import loop

    run_dir, stage, *fields = argv
    overrides = {name: json.loads(value) for name, value in (field.split("=") for field in fields)}
    config = tiny_config(run_dir, **overrides)

    def work(config):
        print(json.dumps(loop.train(config, stage, loader=Memory(config[stage].batch_size), vocab_size=VOCAB)))

    sys.exit(entry.among_others(lambda: config, work))


if __name__ == "__main__":
    main(sys.argv[1:])
