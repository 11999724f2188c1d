"""The PPO loop: sample episodes with the current weights, judge them, learn from them, save, again.

    prompts(seed, iteration) -> episodes against live tools -> rewards -> critic and actor updates -> new weights

Everything an iteration does is a function of the state before it and of (seed, iteration), so a run that is killed at any
moment and started again ends with the same parameters as one that was not. Episodes are recorded before they are learned
from; a resumed run takes the recorded ones that are past its checkpoint, and rows of metrics.jsonl replace the old ones.

With ppo.staleness = 1 the episodes of iteration i + 1 are sampled while the learner works on those of iteration i, with the
weights that iteration i began with. Both end before anything else begins, so nothing depends on which was faster; those
weights are part of the state, so a resumed run samples with them, too.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent.tools import Host
from stepdr_jax.errors import UserError
from stepdr_jax.judge.choose import judge_of, settings_of
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.records import RubricSet, Task
from stepdr_jax.rl import guards, hosts, learner, recordings, roles, rollouts, rows, sampling
from stepdr_jax.rl.roles import Roles
from stepdr_jax.rl.sampling import Parts
from stepdr_jax.runtime import checkpoint, distributed, provenance, stages
from stepdr_jax.runtime.compilation import enable_compilation_cache
from stepdr_jax.runtime.distributed import print_once
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.runtime.profiling import Profiler
from stepdr_jax.runtime.watchdog import Watchdog
from stepdr_jax.runtime.writers import StageWriters
from stepdr_jax.sharding import memory
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import state


def home_of(config: ConfigDict) -> Path:
    return RunLayout.from_config(config).stage("ppo").directory


def replay_home_of(config: ConfigDict) -> Path:
    return RunLayout.from_config(config).stage("ppo_replay").directory


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
    layout = RunLayout.from_config(config)
    parent = provenance.require_finished(config, "sft")["params_sha256"]
    model, who = Qwen2Config.from_config(config.model, state.vocab_size(config)), Roles.of(config)
    shardings = who.param_shardings(model) if who.mesh.size > 1 else None
    tokenizer = Tokenizer.load(layout.tokenizer)
    rubric_sets = {rubrics.task_id: rubrics for rubrics in records.read(layout.rubrics, RubricSet)}
    tasks = [
        task
        for task in records.read(layout.tasks, Task)
        if task.split == "train" and task.id in rubric_sets and rubric_sets[task.id].kept
    ]
    if not tasks:
        raise UserError(
            f"{layout.tasks} has no training task with rubrics; delete {layout.corpus} and run "
            f"{stages.command_of('synthesize', config)}"
        )
    tasks.sort(key=lambda task: task.id)
    digest = hashlib.sha256()
    for task in tasks:
        digest.update((task.model_dump_json() + rubric_sets[task.id].model_dump_json()).encode())
    names = {row[lang] for row in files.read_jsonl(layout.entities) for lang in ("en", "zh") if row.get(lang)}
    return Parts(
        tokenizer=tokenizer,
        model=model,
        actor=lambda: state.load_params(config, config.seed, "sft", shardings),
        tasks=tasks,
        rubric_sets=rubric_sets,
        judge=judge_of(config, names),
        origin=f"sft {parent[:16]}, tasks {digest.hexdigest()[:16]}",
    )


def train(config: ConfigDict, parts: Parts) -> dict:
    """Runs the iterations that are left and returns done.json. Raises `distributed.Preempted` when told to end before."""
    return _whole(_train(config, parts, home_of(config), config.ppo.iterations))


def replay(config: ConfigDict, parts: Parts) -> dict:
    """Learns anew, from the SFT policy, from the episodes that the run's PPO recorded; returns done.json.

    Writes to ppo_replay beside ppo. With the settings of the run it ends with the same weights; with others it shows what
    they would have made of the same episodes (which another policy then sampled: watch kl and clip_fraction).
    """
    home = replay_home_of(config)
    recorded = sampling.Recorded(parts, home_of(config) / "iterations")
    return _whole(_train(config, parts, home, min(recorded.count, config.ppo.iterations), recorded))


def _whole(work: Coroutine[Any, Any, dict | None]) -> dict:
    done = asyncio.run(work)
    if done is None:
        raise distributed.Preempted
    return done


async def _train(
    config: ConfigDict, parts: Parts, home: Path, iterations: int, source: sampling.Source | None = None
) -> dict | None:
    """done.json; None when the process was told to end before that."""
    began, settings = time.monotonic(), config.ppo
    if settings.prompts_per_iteration > len(parts.tasks):
        raise UserError(
            f"ppo.prompts_per_iteration: expected at most the {len(parts.tasks)} training tasks there are, got {settings.prompts_per_iteration}; "
            "lower it in the config"
        )
    enable_compilation_cache(RunLayout.from_config(config).compilation_cache)
    asked = provenance.ppo_settings(config, parts.model, settings_of(config), parts.origin)
    layout = RunLayout.from_config(config).stage(home.name)
    provenance.require_same_location(layout)
    if checkpoint.saved_steps(layout.checkpoint_dir):
        provenance.require_same_settings(layout, asked)

    def write_settings() -> None:
        provenance.record_location(layout)
        files.write_json(home / "settings.json", asked)

    distributed.lead_first("ppo settings", write_settings, lambda: None)

    # ---------------------------------------------------------------- state: new or continued
    who = Roles.of(config)
    learning = learner.PPOConfig.from_config(config, parts.model, who.mesh)
    now, restored = roles.begin(parts.actor, parts.model, learning, who, layout.checkpoint_dir, config.seed)
    reference = roles.on_mesh(parts.actor(), who.param_shardings(parts.model)) if settings.kl_coefficient else None
    start, seconds = 0, 0.0
    if restored is not None:
        start, seconds = restored.step, restored.metadata["seconds"]
        print_once(f"ppo  continuing from iteration {start}")

    # ---------------------------------------------------------------- where episodes come from
    mark = provenance.episodes_fingerprint(config, asked)
    if source is None:
        # Iteration i is sampled with the weights of version i - staleness, whatever the timing.
        weights, version = now.get("behaviour", now["params"]), max(start - settings.staleness, 0)
        source = sampling.Live(
            config, parts, weights, version=version, directory=home / "iterations", mark=mark, roles=who
        )

    # ---------------------------------------------------------------- loop
    async def save(done: int, *, emergency: bool = False) -> None:
        metadata = {
            "stage": "ppo",
            "seed": config.seed,
            "model": dataclasses.asdict(parts.model),
            "settings": asked,
            "iteration": done,
            "prompt_cursor": done * settings.prompts_per_iteration,
            "seconds": seconds + time.monotonic() - began,
        }
        keep = dict(keep=settings.keep_checkpoints, keep_every=config.checkpointing.keep_every)
        await asyncio.to_thread(saver.save, done, now, metadata, **keep, emergency=emergency)

    writers = StageWriters(layout, config, start - 1, key="iteration")
    profiler = Profiler(layout, config.profile, writers.write_event)
    watchdog, notice = Watchdog(home / "hangs", config.watchdog), distributed.Preemption()
    progress = Progress("ppo", iterations, "iterations", start=start) if distributed.is_lead() else None
    if start < iterations:
        print_once("ppo  compiling")
    saved, sampling_now = start, None
    with checkpoint.Saver(layout.checkpoint_dir, background=config.checkpointing.background) as saver, notice, watchdog:
        try:
            for iteration in range(start, iterations):
                profiler.before(iteration + 1)
                clock = time.monotonic()
                if not settings.staleness:
                    await source.take(now["params"], iteration)
                sampling_now = sampling_now or sampling.start(source, iteration)
                sampled = await sampling.unless_told(sampling_now, notice)
                if sampled is None:
                    if iteration > saved:
                        await save(iteration, emergency=True)
                    await asyncio.to_thread(saver.wait)
                    writers.write_event("preempted", step=iteration)
                    distributed.barrier(f"ppo saved {iteration}")
                    print_once(f"ppo  told to end: iteration {iteration} is saved; run the same command to continue")
                    return None
                (episodes, seconds_sampling), sampling_now = sampled, None
                batch = rollouts.arrays(episodes, config.agent.max_episode_tokens)
                row = rows.of(iteration, episodes)
                await source.rest()
                if settings.staleness:
                    await source.take(now["params"], iteration)
                    if iteration + 1 < iterations:
                        sampling_now = sampling.start(source, iteration + 1)
                        await asyncio.sleep(0)  # before the learner, it looks for a recording, with all processes
                learning_began = time.monotonic()
                # Nobody else runs programs of all processes until all is saved, in the same order in all.
                async with source.devices:
                    # In a thread: the event loop goes on answering the tool host's pings, and drives the sampler.
                    now, learnt, details = await asyncio.to_thread(
                        learner.update, now, batch, learning, iteration, reference, row
                    )
                    if learnt["skipped_updates"]:
                        writers.write_event("skipped", step=iteration + 1, updates=learnt["skipped_updates"])
                        print_once(
                            f"ppo  iteration {iteration}: skipped {learnt['skipped_updates']:.0f} updates, gradient not finite"
                        )
                    if learnt["guarded_updates"]:
                        writers.write_event("guard", step=iteration + 1, reason=learning.guard.problem(row | learnt))
                        print_once(
                            f"ppo  iteration {iteration}: {learning.guard.problem(row | learnt)}; the actor stays as it was"
                        )
                    row |= learnt | source.stats()
                    row |= {
                        "seconds_sampling": round(seconds_sampling, 3),
                        "seconds_training": round(time.monotonic() - learning_began, 3),
                        "seconds": round(time.monotonic() - clock, 3),
                    }
                    if distributed.is_lead():
                        recordings.add_details(home / "iterations", iteration, episodes, batch, details)
                        progress.update(
                            1,
                            **{name: row[name] for name in ("reward", "success") if row.get(name) is not None},
                            masked=sum(episode.masked is not None for episode in episodes),
                        )
                    writers.write_row(row)
                    watchdog.record_step(time.monotonic() - clock)
                    profiler.after(iteration + 1)
                    if (iteration + 1) % settings.checkpoint_every == 0 or iteration + 1 == iterations:
                        # After its row: a restored run must find its rows up to the checkpoint.
                        await save(iteration + 1)
                        saved = iteration + 1
                    saver.check()
            writers.write_event("end", step=max(start, iterations))
        except guards.Stop as stop:
            writers.write_event("guard", step=iteration + 1, reason=str(stop))
            raise UserError(guards.advice(str(stop), home, iteration, saved)) from None
        finally:
            if sampling_now is not None:
                sampling_now.cancel()
                await asyncio.wait([sampling_now])
            profiler.close(max(start, iterations))
            writers.close()
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
