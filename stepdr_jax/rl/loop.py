"""The PPO loop: sample episodes with the current weights, judge them, learn from them, save, again.

    prompts(seed, iteration) -> episodes against live tools -> rewards -> critic and actor updates -> new weights

Everything an iteration does is a function of the state before it and of (seed, iteration), so a run that is killed at any
moment and started again ends with the same parameters as one that was not. Rows of metrics.jsonl and the files in
iterations/ that a resumed run makes again replace the old ones.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent import react
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.tools import Host, Tools
from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import Judge, ProgrammaticJudge
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.records import Finish, RubricSet, Task
from stepdr_jax.rl import learner, rollouts
from stepdr_jax.rl.rollouts import Episode
from stepdr_jax.sharding import rules
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import checkpoint, metrics, state
from stepdr_jax.training.compilation import keep_compiled
from tools_env.client import ToolInfraError

DETAILED_EPISODES = 4  # of an iteration, written with every token's value, advantage and log-probability
ROUNDS = 3  # times an iteration's masked episodes are sampled again before the run stops
READY_SECONDS = 30.0  # given to a tool host that is not ours to come back between rounds
# These change when a run ends, saves and how it computes, not what it computes.
FREE = ("iterations", "checkpoint_every", "keep_checkpoints", "slots", "shards", "max_masked_share", "remat")


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with; `prepare` reads it from a run directory.

    actor: initial policy parameters. origin: a name for them and for the tasks, compared when a run is continued.
    """

    tokenizer: Tokenizer
    model: Qwen2Config
    actor: dict
    tasks: Sequence[Task]
    rubric_sets: dict[str, RubricSet]
    judge: Judge
    origin: str
    tools: Callable[[], Tools] | None = None  # known once the tool host runs
    run_episode: Any = react.run_episode


def home_of(config: ConfigDict) -> Path:
    return state.stage_dir(config, config.seed, "ppo")


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
    with start_host() as host:
        return train(config, dataclasses.replace(parts, tools=lambda: Tools.of(config, host)))


def prepare(config: ConfigDict) -> Parts:
    """Reads the parts of a run from its directory; raises UserError naming what is missing and the command that makes it."""
    run_dir = Path(config.run_dir)
    actor = state.load_params(config, config.seed, "sft")
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
        model=Qwen2Config.from_config(config.model, state.vocab_size(config)),
        actor=actor,
        tasks=tasks,
        rubric_sets=rubric_sets,
        judge=ProgrammaticJudge(names),
        origin=f"sft {parent[:16]}, tasks {digest.hexdigest()[:16]}",
    )


def train(config: ConfigDict, parts: Parts) -> dict:
    """Runs the iterations that are left and returns done.json."""
    return asyncio.run(_train(config, parts))


async def _train(config: ConfigDict, parts: Parts) -> dict:
    began = time.monotonic()
    home, settings = home_of(config), config.ppo
    if settings.prompts > len(parts.tasks):
        raise UserError(
            f"ppo.prompts: expected at most the {len(parts.tasks)} training tasks there are, got {settings.prompts}; "
            "lower it in the config"
        )
    keep_compiled(Path(config.run_dir) / ".jax_cache")
    asked = _settings(config, parts)
    _require_same(home, asked)
    files.write_json(home / "settings.json", asked)

    # ---------------------------------------------------------------- state: new or continued
    mesh = make_mesh(**config.mesh)
    learning = learner.PPOConfig.from_config(config, parts.model, mesh)
    fresh = learner.init_state(parts.actor, learning, jax.random.key(config.seed))
    fresh = jax.device_put(fresh, rules.param_shardings(fresh, mesh))
    restored = checkpoint.restore(home / "checkpoints", fresh)
    now, start, seconds = fresh, 0, 0.0
    if restored is not None:
        now, start, seconds = restored.tree, restored.step, restored.metadata["seconds"]
        _say(f"ppo  continuing from iteration {start}")
    metrics.rewind(home / "metrics.jsonl", start - 1, key="iteration")

    # ---------------------------------------------------------------- sampler and episodes
    engine = JaxEngine(
        now["params"],
        parts.model,
        slots=settings.slots,
        shards=settings.shards,
        max_len=config.agent.max_episode_tokens,
        stop_ids=(parts.tokenizer.im_end, parts.tokenizer.endoftext),
        version=start,
    )
    tools = parts.tools()
    collect = functools.partial(
        rollouts.collect,
        policy=EnginePolicy(engine, parts.tokenizer, settings.temperature, name="ppo"),
        tools=tools.client,
        judge=parts.judge,
        rubric_sets=parts.rubric_sets,
        limits=Limits.from_config(config.agent),
        prompt=config.agent.prompt,
        as_of=config.world.as_of,
        concurrency=settings.slots,
        unfinished=settings.unfinished,
        run_episode=parts.run_episode,
    )

    # ---------------------------------------------------------------- loop
    progress = Progress("ppo", settings.iterations, "iterations", start=start)
    if start < settings.iterations:
        _say("ppo  compiling")
    try:
        for iteration in range(start, settings.iterations):
            clock = time.monotonic()
            chosen = rollouts.choose_tasks(len(parts.tasks), settings.prompts, seed=config.seed, iteration=iteration)
            tasks = [parts.tasks[index] for index in chosen for _ in range(settings.samples)]
            seeds = [rollouts.episode_seed(config.seed, iteration, index) for index in range(len(tasks))]
            episodes = await _collect_enough(collect, tasks, seeds, tools, config, iteration)
            sampled = time.monotonic()

            batch = rollouts.arrays(episodes, config.agent.max_episode_tokens)
            # In a thread: the event loop goes on answering the tool host's pings.
            now, learnt, details = await asyncio.to_thread(
                learner.update, now, batch, learning, iteration, parts.actor if settings.kl_coefficient else None
            )
            if learnt["skipped_updates"]:
                _say(
                    f"ppo  iteration {iteration}: skipped {learnt['skipped_updates']:.0f} updates, gradient not finite"
                )
            if iteration >= settings.critic_only_iterations:
                await engine.update_weights(now["params"], iteration + 1)

            row = _row(iteration, episodes) | learnt
            row |= {
                "tool_host_restarts": tools.restarts,
                "sampler_evictions": engine.stats()["evictions"],
                "seconds_sampling": round(sampled - clock, 3),
                "seconds_training": round(time.monotonic() - sampled, 3),
            }
            _write_episodes(home / "iterations" / f"{iteration:04d}.jsonl", iteration, episodes, batch, details)
            files.append_jsonl(home / "metrics.jsonl", row)
            progress.update(
                1,
                **{name: row[name] for name in ("reward", "success") if row.get(name) is not None},
                masked=sum(episode.masked is not None for episode in episodes),
            )
            if (iteration + 1) % settings.checkpoint_every == 0 or iteration + 1 == settings.iterations:
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
        await tools.close()

    # ---------------------------------------------------------------- done
    done = {
        "iterations": max(start, settings.iterations),
        "iteration": max(start, settings.iterations),
        "params_sha256": checkpoint.params_sha256(now["params"]),
        "seconds": round(seconds + time.monotonic() - began, 2),
    }
    files.write_json(home / "done.json", done)
    return done


async def _collect_enough(collect, tasks, seeds, tools: Tools, config: ConfigDict, iteration: int) -> list[Episode]:
    """Collects an iteration; while too large a share is masked, the masked episodes are sampled again, with their seeds.

    Raises UserError after ROUNDS rounds: a batch of what happened to survive is a biased one.
    """
    episodes = await collect(tasks, seeds)
    for tried in range(1, ROUNDS + 1):
        masked = [episode.index for episode in episodes if episode.masked is not None]
        if len(masked) <= config.ppo.max_masked_share * len(episodes):
            return episodes
        causes = Counter(_cause(episodes[index]) for index in masked).most_common(1)
        share = (
            f"{len(masked)} of {len(episodes)} episodes of iteration {iteration} are masked, mostly by {causes[0][0]}"
        )
        if tried == ROUNDS:
            break
        _say(f"ppo  {share}; sampling them again")
        try:
            await (await tools.client()).wait_ready(READY_SECONDS)
        except ToolInfraError as error:
            raise UserError(f"{share}; {error}; start the tool host again and run the same command") from None
        again = await collect([tasks[index] for index in masked], [seeds[index] for index in masked])
        for index, episode in zip(masked, again, strict=True):
            episodes[index] = dataclasses.replace(episode, index=index)
    raise UserError(
        f"{share}, more than ppo.max_masked_share = {config.ppo.max_masked_share} after {ROUNDS} rounds; see the tool "
        "host's log, then run the same command: it continues from the last checkpoint"
    )


def _cause(episode: Episode) -> str:
    return f"{episode.masked} ({episode.trajectory.metadata.get('cause', 'no cause given')})"


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


def _write_episodes(path: Path, iteration: int, episodes: Sequence[Episode], batch, details) -> None:
    """One row an episode; a few, evenly spaced, with every token's numbers."""
    kept = [episode.index for episode in episodes if episode.masked is None]
    places = np.linspace(0, len(kept) - 1, min(DETAILED_EPISODES, len(kept))).round().astype(int)
    detailed = {kept[place] for place in places}

    def rows():
        for episode in episodes:
            row = {
                "iteration": iteration,
                "index": episode.index,
                "task_id": episode.task.id,
                "seed": episode.seed,
                "reward": episode.scored.reward,
                "masked": episode.masked,
                "finish": str(episode.trajectory.finish),
                "trajectory": episode.trajectory.model_dump(mode="json", exclude_defaults=True),
                "verdict": None if episode.scored.verdict is None else episode.scored.verdict.model_dump(mode="json"),
            }
            if episode.index in detailed:
                length = int(batch.lengths_E[episode.index])
                log = episode.log.arrays()
                row |= {
                    "tokens": log["tokens"][:length].tolist(),
                    "sampled": log["sampled"][:length].tolist(),
                    "version": log["version"][:length].tolist(),
                    "logprobs": _short(details.logprobs_ET[episode.index, :length]),
                    "values": _short(details.values_ET[episode.index, :length]),
                    "advantages": _short(details.advantages_ET[episode.index, :length]),
                }
            yield row

    files.write_jsonl(path, rows())


def _short(values_T: np.ndarray) -> list[float]:
    return [round(float(value), 5) for value in values_T]


def _settings(config: ConfigDict, parts: Parts) -> dict[str, Any]:
    """All that decides the numbers of the stage; kept beside it and compared on every start."""

    def flat(section: str) -> dict[str, Any]:
        return {f"{section}.{name}": value for name, value in json.loads(config[section].to_json_best_effort()).items()}

    settings = {name: value for name, value in flat("ppo").items() if name.removeprefix("ppo.") not in FREE}
    settings |= flat("agent") | {f"model.{name}": value for name, value in dataclasses.asdict(parts.model).items()}
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
