"""PPO on a real run's data while everything around it breaks, compared to the same PPO without faults.

    python -m tests.rl.breakage --run_dir=runs/miniature --what=faults
    python -m tests.rl.breakage --run_dir=runs/miniature --what=kills --kills=9

faults: a tenth of the replies of tools is lost on its way and asked for again, a tenth of the episodes finds its tools
broken for good (half of them after one call, which many never exceed), the judge fails on a twentieth of the reports
and leaves a twentieth of the rubrics without a verdict ("machinery"); and, in another run, a tenth of all calls goes
wrong besides, in ways that the model sees ("machinery and tools"). The weights must be, bit for bit, those that the
surviving episodes make alone.

kills: signal 9 at random moments, an iteration apart, to the trainer, its tool host and its judge, in turn; the judge
is an endpoint of `judge_server` that answers a twentieth of the requests wrongly at first. A killed trainer is started
again, a judge two seconds after its end. Then the weights and rewards must be, bit for bit, those of a run that nobody
touched.

Both start from the run's SFT checkpoint, in a copy; the run itself is only read.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from configs import miniature
from launch import tool_host
from stepdr_jax import files
from stepdr_jax.rl import loop, recordings
from tests.kept import Kept, free_port
from tests.rl import faulty

ROOT = Path(__file__).parents[2]
OF_THE_PROCESS = ("seconds", "seconds_sampling", "seconds_training", "tool_host_restarts", "sampler_evictions")


def copy_of(run_dir: Path, folder: Path) -> Path:
    """What PPO reads of a run, in a directory of its own."""
    for part in ("world", "corpus", "tokenizer", "seed0/sft"):
        shutil.copytree(run_dir / part, folder / part)
    return folder


def config_of(run_dir: Path, iterations: int, **ppo):
    config = miniature.get_config().unlock()
    config.run_dir = str(run_dir)
    config.ppo.update(dict(iterations=iterations) | ppo)
    return config.lock()


def rows(config) -> list[dict]:
    found = files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in OF_THE_PROCESS} for row in found]


# ------------------------------------------------------------------------------------------------------------- faults


class Faulty(faulty.FaultyJudge):
    """The run's programmatic judge, failing."""

    def __init__(self, judge):
        super().__init__(judge._names, fails=0.05, drops=0.05, max_missing=0.3)


def with_faults(config, visible: dict | None) -> dict:
    parts, made = loop.read_inputs(config), []

    def tools(host):
        made.append(faulty.FaultyTools(host.address, host=host, lost=0.1, broken=0.1, visible=visible))
        return made[-1]

    judge = Faulty(parts.judge)
    with tool_host.start_if_needed(config, "breakage") as host:
        done = loop.train_ppo(config, dataclasses.replace(parts, judge=judge, connect_tools=lambda: tools(host)))
    return done | {"replies_lost": made[0].faulty.replies_lost, "rubrics_without_a_verdict": judge.dropped}


def of_survivors(config, folder: Path) -> tuple[dict, int, int]:
    """PPO from the unmasked episodes of a run alone: (done.json, episodes that survived, and that did not)."""
    alone, kept, masked = config_of(copy_of(Path(config.run_dir), folder), config.ppo.iterations), 0, 0
    parts = loop.read_inputs(alone)
    tasks = {task.id: task for task in parts.tasks}
    for iteration in range(config.ppo.iterations):
        episodes = recordings.load_rollouts(loop.ppo_layout(config).directory / "iterations", iteration, tasks)
        survived = [episode for episode in episodes if episode.masked is None]
        kept, masked = kept + len(survived), masked + len(episodes) - len(survived)
        renumbered = [dataclasses.replace(episode, index=index) for index, episode in enumerate(survived)]
        recordings.save_rollouts(loop.ppo_layout(alone).directory / "iterations", iteration, renumbered, "survivors")
    return loop.replay_ppo(alone, parts), kept, masked


def faults(run_dir: Path, iterations: int, folder: Path) -> dict:
    peace = config_of(copy_of(run_dir, folder / "peace"), iterations)
    loop.run_ppo(peace, lambda: tool_host.start_if_needed(peace, "peace"))
    result = {"iterations": iterations, "in peace": {"reward": reward_of(peace)}}
    for name, visible in (("machinery", None), ("machinery and tools", faulty.VISIBLE)):
        struck = config_of(copy_of(run_dir, folder / name), iterations)
        done = with_faults(struck, visible)
        alone, kept, masked = of_survivors(struck, folder / f"{name}, survivors")
        causes = [cause for cause in rows(struck)[0] if cause.startswith("masked/")]
        result[name] = {
            "reward": reward_of(struck),
            "episodes": kept + masked,
            "masked": {cause.removeprefix("masked/"): sum(row[cause] for row in rows(struck)) for cause in causes},
            "replies_lost_and_asked_for_again": done["replies_lost"],
            "rubrics_without_a_verdict": done["rubrics_without_a_verdict"],
            "tool_errors_an_episode": round(sum(row["tool_errors"] for row in rows(struck)) / iterations, 3),
            "survivors_alone_bit_for_bit": alone["params_sha256"] == done["params_sha256"],
        }
    return result


def reward_of(config) -> dict[str, float]:
    """Mean over the first and the last five iterations."""
    rewards = [row["reward"] for row in rows(config)]
    return {"first five": round(sum(rewards[:5]) / 5, 3), "last five": round(sum(rewards[-5:]) / 5, 3)}


# -------------------------------------------------------------------------------------------------------------- kills


def command(config, port: int) -> list[str]:
    fields = {
        "run_dir": config.run_dir,
        "ppo.iterations": config.ppo.iterations,
        "ppo.checkpoint_every": 2,
        "ppo.max_masked_share": 0.001,  # whatever a kill masks is sampled again: nothing may be missing at the end
        "judge.kind": "endpoint",
        "judge.url": f"http://127.0.0.1:{port}",
        "judge.model": "drawn",
        "judge.checks": False,
        "judge.timeout": 5.0,
        "judge.keep_replies": False,
    }
    return [sys.executable, "-m", "launch.ppo", *(f"--config.{name}={value}" for name, value in fields.items())]


def trainer(config, port: int) -> subprocess.Popen:
    log = open(Path(config.run_dir) / "ppo.log", "ab")
    return subprocess.Popen(command(config, port), cwd=ROOT, stdout=log, stderr=log)


def last_words(config) -> str:
    return "\n".join((Path(config.run_dir) / "ppo.log").read_text().splitlines()[-20:])


def tool_host_of(pid: int) -> int | None:
    """The tool host among a process's children."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        if b"tools_env.server" in Path(f"/proc/{child}/cmdline").read_bytes():
            return int(child)
    return None


def torture(config, port: int, endpoint: Kept, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Kills the trainer, the tool host and the judge in turn, then lets the run end.

    Returns a line for each kill, and what the trainer said where it stopped by itself.
    """
    rng, lines, stops, process = random.Random(seed), [], [], trainer(config, port)
    home = loop.ppo_layout(config).directory

    def iterations() -> int:
        return len(list((home / "iterations").glob("*.npz")))

    while len(lines) < count:
        seen, patience = iterations(), time.monotonic() + 60.0
        while iterations() == seen and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.05)
        time.sleep(rng.uniform(0.0, 3.0))  # in the middle of the next iteration, wherever that is
        if process.poll() == 0:
            raise RuntimeError("the run ended before it had been killed often enough; give it more --iterations")
        if process.poll() is not None:  # it said why in one line; the same command goes on
            stops.append(last_words(config).splitlines()[-1])
            print(f"the trainer stopped: {stops[-1]}", file=sys.stderr, flush=True)
            process = trainer(config, port)
        kind = ("tool host", "judge", "trainer")[len(lines) % 3]
        target = {"trainer": process.pid, "judge": endpoint.process.pid, "tool host": tool_host_of(process.pid)}[kind]
        if target is None:  # the trainer has not come so far
            continue
        os.kill(target, signal.SIGKILL)
        lines.append(f"{kind} killed after {iterations()} iterations")
        print(lines[-1], file=sys.stderr, flush=True)
        if kind == "trainer":
            process.wait()
            process = trainer(config, port)
            while tool_host_of(process.pid) is None and process.poll() is None:
                time.sleep(0.2)
    while process.wait(3600):
        if len(stops) > count:
            raise RuntimeError(f"the last start ended with {process.returncode}: {last_words(config)}")
        stops.append(last_words(config).splitlines()[-1])
        process = trainer(config, port)
    return lines, stops


def kills(run_dir: Path, iterations: int, folder: Path, count: int, seed: int) -> dict:
    port = free_port()
    whole = config_of(copy_of(run_dir, folder / "whole"), iterations)
    struck = config_of(copy_of(run_dir, folder / "struck"), iterations)
    with Kept("tests.rl.judge_server", port):
        began = time.monotonic()
        if trainer(whole, port).wait(3600):
            raise RuntimeError(f"the run in peace failed: {last_words(whole)}")
        peace = time.monotonic() - began
    with Kept("tests.rl.judge_server", port, "--faults=0.05", away=2.0) as endpoint:
        began = time.monotonic()
        lines, stops = torture(struck, port, endpoint, count, seed)
        torn = time.monotonic() - began
    done = [
        files.read_json(loop.ppo_layout(config).directory / "done.json")["params_sha256"] for config in (whole, struck)
    ]
    return {
        "iterations": iterations,
        "kills": {kind: sum(line.startswith(kind) for line in lines) for kind in ("trainer", "tool host", "judge")},
        "stopped_by_itself": stops,
        "seconds_in_peace_and_killed": [round(peace), round(torn)],
        "same_weights": done[0] == done[1],
        "fields_that_differ": sorted(
            {
                name
                for a, b in zip(rows(whole), rows(struck), strict=True)
                for name in a.keys() | b.keys()
                if a.get(name) != b.get(name)
            }
        ),
    }


def main(_) -> None:
    run_dir = Path(_RUN_DIR.value)
    with tempfile.TemporaryDirectory() as folder:
        if _WHAT.value == "faults":
            result = faults(run_dir, _ITERATIONS.value, Path(folder))
            good = all(arm.get("survivors_alone_bit_for_bit", True) for arm in result.values() if isinstance(arm, dict))
        else:
            result = kills(run_dir, _ITERATIONS.value, Path(folder), _KILLS.value, _SEED.value)
            good = result["same_weights"] and not result["fields_that_differ"]
        print(json.dumps(result, indent=1))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    _RUN_DIR = flags.DEFINE_string("run_dir", None, "a run with a finished SFT stage; it is only read", required=True)
    _WHAT = flags.DEFINE_enum("what", "faults", ["faults", "kills"], "what happens")
    _ITERATIONS = flags.DEFINE_integer("iterations", 20, "of PPO, at least 5")
    _KILLS = flags.DEFINE_integer("kills", 9, "how many")
    _SEED = flags.DEFINE_integer("kill_seed", 0, "of the moments")
    app.run(main)
