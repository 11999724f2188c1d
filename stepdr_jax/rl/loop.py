"""The PPO loop: sample episodes with the current weights, judge them, update critic and actor, save, repeat.

An iteration is a function of the state before it and of (seed, iteration), so a run that is killed at any moment and
continued ends with the same parameters as an uninterrupted one. Rollouts are recorded before they are used; a resumed
run reads those recorded after its checkpoint, and its rows of metrics.jsonl replace the old ones.

With ppo.staleness = 1 the episodes of iteration i + 1 are sampled while the learner works on those of iteration i, with
the weights at the start of iteration i. The next iteration starts when both are done, so nothing depends on which is
faster. Those weights are part of the state, so a resumed run samples with them, too.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent.tools import Host
from stepdr_jax.errors import UserError
from stepdr_jax.judge.choose import judge_settings, make_judge
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.records import RubricSet, Task
from stepdr_jax.rl import guards, hosts, learner, placement, recordings, rollouts, sampling
from stepdr_jax.rl.learner import LearnerState, Params, PPOConfig
from stepdr_jax.rl.placement import DevicePlacement
from stepdr_jax.rl.rollout_metrics import rollout_metrics
from stepdr_jax.rl.rollouts import Rollout
from stepdr_jax.rl.sampling import OnlineRollouts, PPOInputs, ReplayedRollouts, RolloutSource
from stepdr_jax.runtime import checkpoint, distributed, provenance, stages
from stepdr_jax.runtime.compilation import enable_compilation_cache
from stepdr_jax.runtime.layout import RunLayout, StageLayout
from stepdr_jax.runtime.profiling import Profiler
from stepdr_jax.runtime.watchdog import Watchdog
from stepdr_jax.runtime.writers import StageWriters
from stepdr_jax.sharding import memory
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import state


def ppo_layout(config: ConfigDict) -> StageLayout:
    return RunLayout.from_config(config).stage("ppo")


def replay_layout(config: ConfigDict) -> StageLayout:
    return RunLayout.from_config(config).stage("ppo_replay")


def finished(config: ConfigDict) -> dict | None:
    """The stage's done.json if it has all of the config's iterations."""
    path = ppo_layout(config).done
    done = files.read_json(path) if path.exists() else None
    return done if done and done["iterations"] >= config.ppo.iterations else None


def run_ppo(config: ConfigDict, start_host: Callable[[], contextlib.AbstractContextManager[Host | None]]) -> dict:
    """Trains the run's SFT policy with PPO from wherever it stopped; returns its done.json.

    Args:
        config: the run's config.
        start_host: starts a tool host for the duration of the run and restarts it if it dies; yields None if
            config.tools.address names a host that others run. Called after everything else has been checked.

    Raises:
        UserError: SFT is not finished, the corpus is missing, the config differs from the one the run was started with,
            too many episodes stay masked, or the disk is full. The state on disk is complete in every case.
    """
    done = finished(config)
    if done is not None:
        return done
    inputs = read_inputs(config)
    with hosts.tools_for_process(config, start_host) as connect_tools:
        return train_ppo(config, dataclasses.replace(inputs, connect_tools=connect_tools))


def read_inputs(config: ConfigDict) -> PPOInputs:
    """Reads PPO's inputs from the run directory. Raises UserError naming what is missing and how to make it."""
    run = RunLayout.from_config(config)
    parent = stages.parent_of(config, "ppo")
    parent_sha256 = provenance.require_finished(config, parent)["params_sha256"]
    model, devices = (
        Qwen2Config.from_config(config.model, state.vocab_size(config)),
        DevicePlacement.from_config(config),
    )
    shardings = devices.param_shardings(model) if devices.mesh.size > 1 else None
    tokenizer = Tokenizer.load(run.tokenizer)
    rubric_sets = {rubrics.task_id: rubrics for rubrics in records.read_records(run.rubrics, RubricSet)}
    tasks = [
        task
        for task in records.read_records(run.tasks, Task)
        if task.split == "train" and task.id in rubric_sets and rubric_sets[task.id].kept
    ]
    if not tasks:
        raise UserError(
            f"{run.tasks} has no training task with rubrics; delete {run.corpus} and run "
            f"{stages.command_of('synthesize', config)}"
        )
    tasks.sort(key=lambda task: task.id)
    digest = hashlib.sha256()
    for task in tasks:
        digest.update((task.model_dump_json() + rubric_sets[task.id].model_dump_json()).encode())
    names = {row[lang] for row in files.read_jsonl(run.entities) for lang in ("en", "zh") if row.get(lang)}
    return PPOInputs(
        tokenizer=tokenizer,
        model=model,
        read_actor=lambda: state.load_params(config, config.seed, parent, shardings),
        tasks=tasks,
        rubric_sets=rubric_sets,
        judge=make_judge(config, names),
        origin=f"{parent} {parent_sha256[:16]}, tasks {digest.hexdigest()[:16]}",
    )


def train_ppo(config: ConfigDict, inputs: PPOInputs) -> dict:
    """Runs the remaining iterations and returns done.json. Raises `distributed.Preempted` when preempted before."""
    return _require_done(asyncio.run(_train(config, inputs, ppo_layout(config), config.ppo.iterations)))


def replay_ppo(config: ConfigDict, inputs: PPOInputs) -> dict:
    """Trains from the SFT policy on the rollouts that the run's PPO recorded; returns done.json.

    Writes to ppo_replay beside ppo. With the run's settings it ends with the same weights; with others it shows their
    effect on the same rollouts (which are then off-policy: watch kl and clip_fraction).
    """
    recorded = ReplayedRollouts(inputs, ppo_layout(config).iterations, command=stages.command_of("ppo", config))
    iterations = min(recorded.count, config.ppo.iterations)
    return _require_done(asyncio.run(_train(config, inputs, replay_layout(config), iterations, recorded)))


def _require_done(done: dict | None) -> dict:
    if done is None:
        raise distributed.Preempted
    return done


@dataclasses.dataclass
class _Run:
    """What the iterations of one process share. `state`, `saved` and `pending` change."""

    config: ConfigDict
    inputs: PPOInputs
    layout: StageLayout
    iterations: int
    settings: dict[str, Any]  # of the stage, as in settings.json
    learning: PPOConfig
    reference: Params | None
    source: RolloutSource
    state: LearnerState
    start: int  # iterations done before this process
    seconds: float  # taken by them
    began: float
    writers: StageWriters
    profiler: Profiler
    watchdog: Watchdog
    preemption: distributed.Preemption
    saver: checkpoint.Saver
    progress: Progress | None
    saved: int  # iterations in the latest checkpoint
    pending: asyncio.Task[sampling.Timed] | None = None  # sampling in progress

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.began


async def _train(
    config: ConfigDict, inputs: PPOInputs, layout: StageLayout, iterations: int, source: RolloutSource | None = None
) -> dict | None:
    """done.json; None when the process is preempted before the end. Without a `source` rollouts are sampled online."""
    run = _start(config, inputs, layout, iterations, source)
    if run.start < iterations:
        distributed.print_once("ppo  compiling")
    iteration = run.start
    with run.saver, run.preemption, run.watchdog:
        try:
            for iteration in range(run.start, iterations):
                run.profiler.before(iteration + 1)
                began = time.monotonic()
                sampled = await _sample(run, iteration)
                if sampled is None:
                    await _save_preempted(run, iteration)
                    return None
                episodes, seconds_sampling = sampled
                batch = rollouts.rollout_arrays(episodes, config.agent.max_episode_tokens)
                row = rollout_metrics(iteration, episodes)
                await _hand_over_to_learner(run, iteration)
                began_learning = time.monotonic()
                # Held until all is saved: programs of all processes must run in the same order everywhere.
                async with run.source.collective_lock:
                    details = await _learn(run, iteration, batch, row)
                    row |= {
                        "seconds_sampling": round(seconds_sampling, 3),
                        "seconds_training": round(time.monotonic() - began_learning, 3),
                        "seconds": round(time.monotonic() - began, 3),
                    }
                    _report(run, iteration, episodes, batch, details, row)
                    run.watchdog.record_step(time.monotonic() - began)
                    run.profiler.after(iteration + 1)
                    if (iteration + 1) % config.ppo.checkpoint_every == 0 or iteration + 1 == iterations:
                        await _save(run, iteration + 1)  # after its row: a restored run must find all rows before it
                    run.saver.check()
            run.writers.write_event("end", step=max(run.start, iterations))
        except guards.GuardStop as stop:
            run.writers.write_event("guard", step=iteration + 1, reason=str(stop))
            raise UserError(guards.advice(str(stop), layout.directory, iteration, run.saved)) from None
        finally:
            if run.pending is not None:
                await sampling.cancel_sampling(run.pending)
            run.profiler.close(max(run.start, iterations))
            run.writers.close()
            await run.source.close()
    return _write_done(run)


def _start(
    config: ConfigDict, inputs: PPOInputs, layout: StageLayout, iterations: int, source: RolloutSource | None
) -> _Run:
    """Checks the settings, restores or initializes the state and opens what the iterations write to."""
    began = time.monotonic()
    if config.ppo.prompts_per_iteration > len(inputs.tasks):
        raise UserError(
            f"ppo.prompts_per_iteration: expected at most the {len(inputs.tasks)} training tasks there are, got "
            f"{config.ppo.prompts_per_iteration}; lower it in the config"
        )
    enable_compilation_cache(RunLayout.from_config(config).compilation_cache)
    settings = _check_settings(config, inputs, layout)
    devices = DevicePlacement.from_config(config)
    learning = PPOConfig.from_config(config, inputs.model, devices.mesh)
    params, restored = placement.restore_or_init_state(
        inputs.read_actor, inputs.model, learning, devices, layout.checkpoint_dir, config.seed
    )
    reference = None
    if config.ppo.kl_coefficient:
        reference = placement.on_mesh(inputs.read_actor(), devices.param_shardings(inputs.model))
    start = 0 if restored is None else restored.step
    if restored is not None:
        distributed.print_once(f"ppo  continuing from iteration {start}")
    if source is None:
        # Iteration i is sampled with the weights of version i - staleness, whatever the timing.
        version, behavior = max(start - config.ppo.staleness, 0), params.get("behaviour", params["params"])
        engine = sampling.build_engine(config, inputs, behavior, version=version, placement=devices)
        fingerprint = provenance.episodes_fingerprint(config, settings)
        source = OnlineRollouts(
            config, inputs, engine, directory=layout.iterations, fingerprint=fingerprint, placement=devices
        )
    writers = StageWriters(layout, config, start - 1, key="iteration")
    return _Run(
        config=config,
        inputs=inputs,
        layout=layout,
        iterations=iterations,
        settings=settings,
        learning=learning,
        reference=reference,
        source=source,
        state=params,
        start=start,
        seconds=0.0 if restored is None else restored.metadata["seconds"],
        began=began,
        writers=writers,
        profiler=Profiler(layout, config.profile, writers.write_event),
        watchdog=Watchdog(layout.hangs, config.watchdog),
        preemption=distributed.Preemption(),
        saver=checkpoint.Saver(layout.checkpoint_dir, background=config.checkpointing.background),
        progress=Progress("ppo", iterations, "iterations", start=start) if distributed.is_lead() else None,
        saved=start,
    )


def _check_settings(config: ConfigDict, inputs: PPOInputs, layout: StageLayout) -> dict[str, Any]:
    """The stage's settings, written beside it. Raises UserError when its checkpoints were made with others."""
    settings = provenance.ppo_settings(config, inputs.model, judge_settings(config), inputs.origin)
    provenance.require_same_location(layout)
    if checkpoint.saved_steps(layout.checkpoint_dir):
        provenance.require_same_settings(layout, settings)
    distributed.lead_first("ppo settings", lambda: provenance.record_stage(config, layout, settings), lambda: None)
    return settings


async def _sample(run: _Run, iteration: int) -> sampling.Timed | None:
    """The iteration's rollouts, started here or during the previous iteration; None when the process is preempted."""
    if not run.config.ppo.staleness:
        await run.source.update_weights(run.state["params"], iteration)
    run.pending = run.pending or sampling.start_sampling(run.source, iteration)
    sampled = await sampling.wait_unless_preempted(run.pending, run.preemption)
    run.pending = None
    return sampled


async def _hand_over_to_learner(run: _Run, iteration: int) -> None:
    """Frees the sampler's memory if it shares devices; with staleness starts to sample the next iteration."""
    await run.source.sleep()
    if run.config.ppo.staleness:
        await run.source.update_weights(run.state["params"], iteration)
        if iteration + 1 < run.iterations:
            run.pending = sampling.start_sampling(run.source, iteration + 1)
            await asyncio.sleep(0)  # it looks for a recording, with all processes, before the learner starts


async def _learn(run: _Run, iteration: int, batch: rollouts.EpisodeArrays, row: dict[str, Any]) -> learner.Details:
    """Updates `run.state` and adds the learner's metrics to `row`."""
    # In a thread: the event loop must keep answering the tool host's pings and driving the sampler.
    run.state, metrics, details = await asyncio.to_thread(
        learner.update, run.state, batch, run.learning, iteration, run.reference, row
    )
    if metrics["skipped_updates"]:
        run.writers.write_event("skipped", step=iteration + 1, updates=metrics["skipped_updates"])
        distributed.print_once(
            f"ppo  iteration {iteration}: skipped {metrics['skipped_updates']:.0f} updates, gradient not finite"
        )
    if metrics["guarded_updates"]:
        reason = run.learning.guard.problem(row | metrics)
        run.writers.write_event("guard", step=iteration + 1, reason=reason)
        distributed.print_once(f"ppo  iteration {iteration}: {reason}; the actor is unchanged")
    row |= metrics | run.source.stats()
    return details


def _report(
    run: _Run,
    iteration: int,
    episodes: Sequence[Rollout],
    batch: rollouts.EpisodeArrays,
    details: learner.Details,
    row: dict[str, Any],
) -> None:
    """Writes the learner's values of a few episodes, the progress line and the row of metrics.jsonl."""
    if run.progress is not None:
        recordings.add_details(run.layout.iterations, iteration, episodes, batch, details)
        run.progress.update(
            1,
            **{name: row[name] for name in ("reward", "success") if row.get(name) is not None},
            masked=sum(episode.masked is not None for episode in episodes),
        )
    run.writers.write_row(row)


async def _save(run: _Run, done: int, *, emergency: bool = False) -> None:
    """Saves the state after `done` iterations."""
    metadata = {
        "stage": "ppo",
        "seed": run.config.seed,
        "model": dataclasses.asdict(run.inputs.model),
        "settings": run.settings,
        "iteration": done,
        "prompt_cursor": done * run.config.ppo.prompts_per_iteration,
        "seconds": run.elapsed(),
    }
    keep, keep_every = run.config.ppo.keep_checkpoints, run.config.checkpointing.keep_every
    await asyncio.to_thread(
        run.saver.save, done, run.state, metadata, keep=keep, keep_every=keep_every, emergency=emergency
    )
    run.saved = done


async def _save_preempted(run: _Run, iteration: int) -> None:
    if iteration > run.saved:
        await _save(run, iteration, emergency=True)
    await asyncio.to_thread(run.saver.wait)
    run.writers.write_event("preempted", step=iteration)
    distributed.barrier(f"ppo saved {iteration}")
    distributed.print_once(f"ppo  preempted: iteration {iteration} is saved; run the same command to continue")


def _write_done(run: _Run) -> dict[str, Any]:
    iterations = max(run.start, run.iterations)
    done = {
        "iterations": iterations,
        "iteration": iterations,
        "params_sha256": checkpoint.params_sha256(memory.copied(run.state["params"], memory.DEVICE)),
        "seconds": round(run.elapsed(), 2),
    }
    distributed.lead_first("ppo done", lambda: files.write_json(run.layout.done, done), lambda: None)
    return done
