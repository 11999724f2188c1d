"""Wall-clock time of PPO iterations on policy against one step off (`ppo.staleness`), on a run's own world and SFT
policy.

Both sides go on in turns, SEGMENT iterations at a time, against the same tool host. The first and last iteration of a
segment are left out: the first waits for its episodes, and beside the last nothing is sampled.
"""

import dataclasses
import os
import statistics
import tempfile

from launch import tool_host
from stepdr_jax import files
from stepdr_jax.agent.tools import Tools

SEGMENT = 5


def measure(config, rounds: int) -> dict:
    """Medians of seconds an iteration, and of what it is made of, after a segment that is not counted."""
    from stepdr_jax.rl import loop

    parts = loop.read_inputs(config)
    with tool_host.start_if_needed(config, "bench") as host, tempfile.TemporaryDirectory() as folder:
        parts = dataclasses.replace(parts, connect_tools=lambda: Tools.from_config(config, host))
        for number in range(1, rounds + 2):
            for staleness in (0, 1):
                loop.train_ppo(_side(config, folder, staleness, number * SEGMENT), parts)
        sides = {}
        for staleness in (0, 1):
            rows = files.read_jsonl(loop.ppo_layout(_side(config, folder, staleness, 1)).metrics)[SEGMENT:]
            rows = [row for row in rows if 0 < row["iteration"] % SEGMENT < SEGMENT - 1]
            sides[f"staleness {staleness}"] = {
                name: round(statistics.median(row[name] for row in rows), 3)
                for name in ("seconds", "seconds_sampling", "seconds_training")
            } | {"iterations": len(rows)}
    ratio = sides["staleness 0"]["seconds"] / sides["staleness 1"]["seconds"]
    return {
        "what": "ahead",
        **sides,
        "speedup": round(ratio, 3),
        "episodes": config.ppo.prompts_per_iteration * config.ppo.samples_per_prompt,
        "load": [round(load, 1) for load in os.getloadavg()],
        "cores": os.cpu_count(),
    }


def _side(config, folder: str, staleness: int, iterations: int):
    side = config.copy_and_resolve_references().unlock()
    side.run_dir = f"{folder}/{staleness}"
    side.ppo.update(
        dict(
            staleness=staleness,
            tis_cap=2.0,
            iterations=iterations,
            checkpoint_every=SEGMENT,
            critic_warmup_iterations=0,
        )
    )
    return side.lock()
