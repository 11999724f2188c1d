"""The PPO loop: sample episodes with the current weights, judge them, learn from them, save, again.

    prompts(seed, iteration) -> episodes against live tools -> rewards -> critic and actor updates -> new weights

Everything an iteration does is a function of the state before it and of (seed, iteration), so a run that is killed at any
moment and started again ends with the same parameters as one that was not. Episodes are recorded before they are learned
from; a resumed run takes the recorded ones that are past its checkpoint, and rows of metrics.jsonl replace the old ones.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent.tools import Host
from stepdr_jax.errors import UserError
from stepdr_jax.judge.choose import judge_of, settings_of
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.records import Finish, RubricSet, Task
from stepdr_jax.rl import hosts, learner, recordings, roles, rollouts, sampling
from stepdr_jax.rl.roles import Roles
from stepdr_jax.rl.rollouts import Episode
from stepdr_jax.rl.sampling import Parts
from stepdr_jax.sharding import memory
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import checkpoint, distributed, metrics, state
from stepdr_jax.training.compilation import keep_compiled
from stepdr_jax.training.distributed import say as _say

# These change when a run ends, saves and how it computes, not what it computes.
FREE = ("iterations", "checkpoint_every", "keep_checkpoints", "max_masked_share", "remat")


def home_of(config: ConfigDict) -> Path:
    return state.stage_dir(config, config.seed, "ppo")


def replay_home_of(config: ConfigDict) -> Path:
    return state.stage_dir(config, config.seed, "ppo_replay")


def finished(config: ConfigDict) -> dict | None:
    """The stage's done.json if it has all of the config's iterations."""
    path = home_of(config) / "done.json"
    done = files.read_json(path) if path.exists() else None
    return done if done and done["iterations"] >= config.ppo.iterations else None


def run(config: ConfigDict, start_host: Callable[[], contextlib.AbstractContextManager[Host | None]]) -> dict:
    """Trains the run's SFT policy with PPO from wherever it stopped; returns its done.json.

    Args:
        config: the run's config.
        start_host: starts a tool host for the time of the run, ours to restart; gives None where config.tools.address
            names one that someone else runs. Called when everything else is known to be there.

    Raises:
        UserError: SFT is not finished, the corpus is missing, the config differs from the one the run was started with,
            too many episodes stay masked, or the disk is full. The state on disk is whole in every case.
    """
    done = finished(config)
    if done is not None:
        return done
    parts = prepare(config)
    with hosts.tools_of(config, start_host) as tools:
        return train(config, dataclasses.replace(parts, tools=tools))


def prepare(config: ConfigDict) -> Parts:
    """Reads the parts of a run from its directory; raises UserError naming what is missing and the command that makes it."""
    run_dir = Path(config.run_dir)
    model, who = Qwen2Config.from_config(config.model, state.vocab_size(config)), Roles.of(config)
    actor = state.load_params(config, config.seed, "sft", who.param_shardings(model) if who.mesh.size > 1 else None)
    tokenizer = Tokenizer.load(run_dir / "tokenizer" / "tokenizer.json")
    corpus = run_dir / "corpus"
    rubric_sets = {rubrics.task_id: rubrics for rubrics in records.read(corpus / "rubrics.jsonl", RubricSet)}
    tasks = [
        task
        for task in records.read(corpus / "tasks.jsonl", Task)
        if task.split == "train" and task.id in rubric_sets and rubric_sets[task.id].kept
    ]
    if not tasks:
        raise UserError(
            f"{corpus}/tasks.jsonl has no training task with rubrics; delete {corpus} and run python -m launch.synthesize"
        )
    tasks.sort(key=lambda task: task.id)
    digest = hashlib.sha256()
    for task in tasks:
        digest.update((task.model_dump_json() + rubric_sets[task.id].model_dump_json()).encode())
    parent = files.read_json(state.stage_dir(config, config.seed, "sft") / "done.json")["params_sha256"]
    entities = run_dir / "world" / "entities.jsonl"
    names = {row[lang] for row in files.read_jsonl(entities) for lang in ("en", "zh") if row.get(lang)}
    return Parts(
        tokenizer=tokenizer,
        model=model,
        actor=actor,
        tasks=tasks,
        rubric_sets=rubric_sets,
        judge=judge_of(config, names),
        origin=f"sft {parent[:16]}, tasks {digest.hexdigest()[:16]}",
    )


def train(config: ConfigDict, parts: Parts) -> dict:
    """Runs the iterations that are left and returns done.json."""
    return asyncio.run(_train(config, parts, home_of(config), config.ppo.iterations))


def replay(config: ConfigDict, parts: Parts) -> dict:
    """Learns anew, from the SFT policy, from the episodes that the run's PPO recorded; returns done.json.

    Writes to ppo_replay beside ppo. With the settings of the run it ends with the same weights; with others it shows what
    they would have made of the same episodes (which another policy then sampled: watch kl and clip_fraction).
    """
    home = replay_home_of(config)
    recorded = sampling.Recorded(parts, home_of(config) / "iterations")
    return asyncio.run(_train(config, parts, home, min(recorded.count, config.ppo.iterations), recorded))


async def _train(
    config: ConfigDict, parts: Parts, home: Path, iterations: int, source: sampling.Source | None = None
) -> dict:
    began, settings = time.monotonic(), config.ppo
    if settings.prompts > len(parts.tasks):
        raise UserError(
            f"ppo.prompts: expected at most the {len(parts.tasks)} training tasks there are, got {settings.prompts}; "
            "lower it in the config"
        )
    keep_compiled(Path(config.run_dir) / ".jax_cache")
    asked = _settings(config, parts)
    _require_same(home, asked)
    distributed.lead_first("ppo settings", lambda: files.write_json(home / "settings.json", asked), lambda: None)

    # ---------------------------------------------------------------- state: new or continued
    who = Roles.of(config)
    learning = learner.PPOConfig.from_config(config, parts.model, who.mesh)
    now, restored = roles.begin(parts.actor, parts.model, learning, who, home / "checkpoints", config.seed)
    reference = roles.on_mesh(parts.actor, who.param_shardings(parts.model)) if settings.kl_coefficient else None
    start, seconds = 0, 0.0
    if restored is not None:
        start, seconds = restored.step, restored.metadata["seconds"]
        _say(f"ppo  continuing from iteration {start}")
    if distributed.is_lead():
        metrics.rewind(home / "metrics.jsonl", start - 1, key="iteration")

    # ---------------------------------------------------------------- where episodes come from
    mark = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    if source is None:
        directory = home / "iterations"
        source = sampling.Live(config, parts, now["params"], version=start, directory=directory, mark=mark, roles=who)

    # ---------------------------------------------------------------- loop
    progress = Progress("ppo", iterations, "iterations", start=start) if distributed.is_lead() else None
    if start < iterations:
        _say("ppo  compiling")
    try:
        for iteration in range(start, iterations):
            clock = time.monotonic()
            episodes = await source.episodes(iteration)
            sampled = time.monotonic()

            batch = rollouts.arrays(episodes, config.agent.max_episode_tokens)
            await source.rest()
            # In a thread: the event loop goes on answering the tool host's pings.
            now, learnt, details = await asyncio.to_thread(learner.update, now, batch, learning, iteration, reference)
            if learnt["skipped_updates"]:
                _say(
                    f"ppo  iteration {iteration}: skipped {learnt['skipped_updates']:.0f} updates, gradient not finite"
                )
            trained = iteration >= settings.critic_only_iterations
            await source.learnt(now["params"], iteration + 1 if trained else None)

            row = _row(iteration, episodes) | learnt
            row |= source.stats() | {
                "seconds_sampling": round(sampled - clock, 3),
                "seconds_training": round(time.monotonic() - sampled, 3),
            }
            if distributed.is_lead():
                recordings.add_details(home / "iterations", iteration, episodes, batch, details)
                files.append_jsonl(home / "metrics.jsonl", row)
                progress.update(
                    1,
                    **{name: row[name] for name in ("reward", "success") if row.get(name) is not None},
                    masked=sum(episode.masked is not None for episode in episodes),
                )
            if (iteration + 1) % settings.checkpoint_every == 0 or iteration + 1 == iterations:
                metadata = {
                    "stage": "ppo",
                    "seed": config.seed,
                    "model": dataclasses.asdict(parts.model),
                    "settings": asked,
                    "iteration": iteration + 1,
                    "prompt_cursor": (iteration + 1) * settings.prompts,
                    "seconds": seconds + time.monotonic() - began,
                }
                directory = home / "checkpoints"
                checkpoint.save(directory, iteration + 1, now, metadata, keep=settings.keep_checkpoints)
    finally:
        await source.close()

    # ---------------------------------------------------------------- done
    done = {
        "iterations": max(start, iterations),
        "iteration": max(start, iterations),
        "params_sha256": checkpoint.params_sha256(memory.copied(now["params"], memory.DEVICE)),
        "seconds": round(seconds + time.monotonic() - began, 2),
    }
    distributed.lead_first("ppo done", lambda: files.write_json(home / "done.json", done), lambda: None)
    return done


def _row(iteration: int, episodes: Sequence[Episode]) -> dict[str, Any]:
    """What the episodes were, before any learning. Rewards are of unmasked episodes; None when there is none."""
    kept = [episode for episode in episodes if episode.masked is None]
    rewards = [episode.scored.reward for episode in kept]

    def mean(values) -> float | None:
        values = list(values)
        return float(np.mean(values)) if values else None

    def stat(name: str, among=kept) -> float | None:
        return mean(episode.trajectory.stats[name] for episode in among if name in episode.trajectory.stats)

    verdicts = [episode.scored.verdict for episode in kept if episode.scored.verdict is not None]
    row: dict[str, Any] = {
        "iteration": iteration,
        "episodes": len(episodes),
        "reward": mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else None,
        "success": mean(float(verdict.correct) for verdict in verdicts if verdict.correct is not None),
        "cited": mean(float(verdict.cited) for verdict in verdicts if verdict.cited is not None),
    }
    for kind in sorted({episode.task.kind for episode in kept}):
        row[f"reward/{kind}"] = mean(episode.scored.reward for episode in kept if episode.task.kind == kind)
    finishes = Counter(str(episode.trajectory.finish) for episode in episodes)
    for finish in Finish:
        if finish.is_policy_outcome:
            row[f"finish/{finish}"] = finishes[str(finish)] / len(episodes)
            with_finish = [episode for episode in kept if episode.trajectory.finish == finish]
            if with_finish:
                row[f"tokens_by_finish/{finish}"] = stat("sampled_tokens", with_finish)
    masked = Counter(episode.masked for episode in episodes if episode.masked is not None)
    causes = [str(finish) for finish in Finish if not finish.is_policy_outcome and finish != Finish.CANCELLED]
    for cause in [*causes, *sorted(set(masked) - set(causes))]:
        row[f"masked/{cause}"] = masked[cause]
    row["masked_share"] = sum(masked.values()) / len(episodes)
    for name in ("turns", "tool_calls", "tool_errors", "format_errors", "sampled_tokens", "given_tokens"):
        row[name] = stat(name)
    return row


def _settings(config: ConfigDict, parts: Parts) -> dict[str, Any]:
    """All that decides the numbers of the stage; kept beside it and compared on every start."""

    def flat(section: str) -> dict[str, Any]:
        return {f"{section}.{name}": value for name, value in json.loads(config[section].to_json_best_effort()).items()}

    settings = {name: value for name, value in flat("ppo").items() if name.removeprefix("ppo.") not in FREE}
    settings |= (
        flat("agent")
        | settings_of(config)
        | {f"model.{name}": value for name, value in dataclasses.asdict(parts.model).items()}
    )
    return settings | {"seed": config.seed, "world.as_of": config.world.as_of, "origin": parts.origin}


def _require_same(home: Path, asked: dict[str, Any]) -> None:
    if not checkpoint.steps(home / "checkpoints") or not (home / "settings.json").exists():
        return
    before = files.read_json(home / "settings.json")
    for name in sorted(before.keys() | asked.keys()):
        if before.get(name) != asked.get(name):
            what = (
                "started from another SFT checkpoint or other tasks than the run directory has now"
                if name == "origin"
                else f"was made with {name} = {before.get(name)}, this config has {asked.get(name)}"
            )
            raise UserError(
                f"{home} {what}; choose another --config.run_dir, or delete {home} to train this stage again"
            )
