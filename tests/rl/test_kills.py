"""One kill of `tests.rl.kills`, which kills many times: signal 9 while a checkpoint is being written."""

import json
import shutil
import sys

from stepdr_jax.rl import loop
from tests.rl import kills, toy, toy_process

FIELDS = {"mesh.fsdp": 1, "checkpointing.background": True, "ppo.iterations": 3}


def config_of(run_dir):
    config = toy.config(run_dir, checkpoint_every=1).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(toy_process.FIELDS | FIELDS)
    return config.lock()


def test_killed_while_it_saves_it_ends_as_one_that_was_not(tmp_path):
    whole, killed = (
        kills.Job(
            tmp_path / name,
            [sys.executable, "-m", "tests.rl.toy_process", str(tmp_path / name)]
            + [f"{field}={json.dumps(value)}" for field, value in FIELDS.items()],
        )
        for name in ("whole", "killed")
    )
    expected = loop.train_ppo(config_of(whole.run_dir), toy.inputs(config_of(whole.run_dir)))
    if (whole.run_dir / ".jax_cache").exists():  # the killed one need not compile everything again
        shutil.copytree(whole.run_dir / ".jax_cache", killed.run_dir / ".jax_cache")
    assert kills.strike(killed, "saving", skip=0, delay=0.0).startswith("saving: struck while")
    assert not (killed.home / "done.json").exists()
    done = loop.train_ppo(config_of(killed.run_dir), toy.inputs(config_of(killed.run_dir)))
    assert done["params_sha256"] == expected["params_sha256"]
    assert len(whole.rows()) == 3 and kills.same(whole, killed)
