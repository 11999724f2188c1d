"""How long training waits for its checkpoints; `launch.bench saving` runs it."""

import statistics
import tempfile
import time

import jax
import jax.numpy as jnp

from stepdr_jax.runtime import checkpoint


def measure(gigabytes: float, steps: int = 160, every: int = 40) -> dict:
    """Steps that change a state of so many GB in place, with a checkpoint every forty steps, with and without waiting.

    Returns:
        median step without a checkpoint, and per kind of saving the longest a step and its save took, seconds.
    """
    size = int(gigabytes * 1e9 / 4 / 8)
    work = jax.jit(lambda tree: jax.tree.map(lambda a: a * 1.0001 + jnp.tanh(a) * 1e-4, tree), donate_argnums=0)
    found: dict = {"gigabytes": gigabytes}
    for background in (False, True):
        keys = jax.random.split(jax.random.key(0), 8)  # numbers that do not compress
        now = {f"a{i}": jax.random.normal(key, (size,)) for i, key in enumerate(keys)}
        now, plain, saving = jax.block_until_ready(work(now)), [], []
        with tempfile.TemporaryDirectory() as folder, checkpoint.Saver(folder, background=background) as saver:
            for step in range(1, steps + 1):
                began = time.monotonic()
                now = jax.block_until_ready(work(now))
                if step % every == 0:
                    saver.save(step, now, {}, keep=2)
                (saving if step % every == 0 else plain).append(time.monotonic() - began)
        kind = "background" if background else "waiting"
        found[kind] = {
            "median_step": round(statistics.median(plain), 4),
            "median_step_with_save": round(statistics.median(saving), 4),
            "longest_step_with_save": round(max(saving), 4),
        }
    return found
