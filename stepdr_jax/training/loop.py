"""The training loop of mid-training I, mid-training II and SFT.

Data order, initialization and the state in a checkpoint are functions of (config, seed, step), so a run that is killed
at any moment and started again ends with the same bits as an uninterrupted one. A rollback after a loss spike
(`guards`) restores a checkpoint exactly as a restart does.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models.flops import peak_flops, training_flops
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.records import CAPABILITIES
from stepdr_jax.runtime import checkpoint, distributed, provenance, stages, storage
from stepdr_jax.runtime.compilation import enable_compilation_cache
from stepdr_jax.runtime.distributed import print_once
from stepdr_jax.runtime.layout import RunLayout, StageLayout
from stepdr_jax.runtime.profiling import Profiler
from stepdr_jax.runtime.watchdog import Stragglers, Watchdog
from stepdr_jax.runtime.writers import StageWriters, truncate_rows
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.sharding.rules import replicated
from stepdr_jax.training import guards, metrics, state
from stepdr_jax.training.optimizer import make_optimizer, make_schedule
from stepdr_jax.training.program import eval_program, resolve_parallel, token_order, train_program
from stepdr_jax.training.step import TrainState, arrange


class BatchSource(Protocol):
    """What the loop needs of a loader (`data.loader.Loader`).

    sources: names of the mixture components, numbered by a batch's `source`; families: the family of each, for learning
    curves, or (). heldout_batches: how many batches of sequences that are never trained on `heldout_batch` can give.
    """

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def families(self) -> Sequence[str]: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def heldout_batches(self) -> int: ...

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]: ...

    def heldout_batch(self, index: int) -> dict[str, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class TrainingRun:
    """What stays the same while a stage trains in this process.

    settings: what decides the stage's numbers (`provenance.training_settings`).
    order: permutation of each sequence's tokens, or None (`program.token_order`).
    local: the sequences of a batch that this process reads.
    """

    config: ConfigDict
    layout: StageLayout
    settings: dict[str, Any]
    model: Qwen2Config
    loader: BatchSource
    mesh: jax.sharding.Mesh
    program: jax.stages.Wrapped
    eval_program: jax.stages.Wrapped
    abstract_state: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]
    order: np.ndarray | None
    local: slice
    saver: checkpoint.Saver
    watchdog: Watchdog
    stragglers: Stragglers
    on_eval_checkpoint: Callable[[int], dict[str, Any]] | None

    @property
    def stage(self) -> str:
        return self.layout.name

    @property
    def stage_config(self) -> ConfigDict:
        return self.config[self.stage]


@dataclasses.dataclass
class Attempt:
    """Training from a checkpoint to the end of the stage or to the next rollback.

    step, tokens: done since the start of the stage; tokens as of the last log row.
    began: monotonic time at which the stage began, the time between processes left out.
    batch: of the next step; None at the end of the stage.
    """

    state: TrainState
    step: int
    tokens: int
    began: float
    rollbacks: list[guards.Rollback]
    monitor: guards.LossMonitor
    writers: StageWriters
    throughput: metrics.ThroughputMeter
    profiler: Profiler
    batch: dict[str, np.ndarray] | None = None
    capabilities: tuple[str, ...] = ()
    bar: Progress | None = None  # from the first step on, which compiles


def train(
    config: ConfigDict,
    stage: str,
    *,
    loader: BatchSource | None = None,
    vocab_size: int | None = None,
    on_eval_checkpoint: Callable[[int], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Trains one stage to its end, from wherever it stopped, and returns its done.json.

    Args:
        config: the run's config.
        stage: midtrain1, midtrain2 or sft.
        loader: batches by step; default the run's data on disk.
        vocab_size: default `state.vocab_size`.
        on_eval_checkpoint: evaluates the evaluation checkpoint of a step and returns its row
            (`evaluation.checkpoints`); None leaves that to another job.

    Raises:
        UserError: missing or damaged input, a config that differs from the one the run directory was made with, a full
            disk, a loss that stays non-finite.
        distributed.Preempted: the run was preempted and everything is saved.
    """
    began = time.monotonic()
    run_layout = RunLayout.from_config(config)
    layout = run_layout.stage(stage)
    finished = files.read_json(layout.done) if layout.done.exists() else None
    if finished is not None and loader is None and not (run_layout.data / stage).exists():
        return finished  # data may be deleted to save space once a stage is done
    provenance.require_parent(config, stage)
    if on_eval_checkpoint and jax.process_count() > 1:
        raise UserError(
            "eval.inline: one process cannot sample from parameters that others hold parts of; set "
            f"--config.eval.inline=false and run {stages.command_of('evaluate', config, '--watch')} beside this run"
        )
    loader = _open_data(config, stage) if loader is None else loader
    vocab_size = state.vocab_size(config) if vocab_size is None else vocab_size
    model = Qwen2Config.from_config(config.model, vocab_size)
    settings = provenance.training_settings(config, stage, model, loader.fingerprint)
    provenance.require_same_location(layout)
    if finished is not None or checkpoint.saved_steps(layout.checkpoint_dir):
        provenance.require_same_settings(layout, settings)
    if finished is not None:
        return finished

    enable_compilation_cache(run_layout.compilation_cache)
    run = _prepare_run(config, layout, settings, model, loader, on_eval_checkpoint)
    steps = run.stage_config.steps
    preemption = distributed.Preemption()
    with jax.transfer_guard("disallow"), run.saver, preemption, run.watchdog:  # every transfer is explicit
        attempt = _start_attempt(run, began)
        while attempt.step < steps:
            _take_step(run, attempt)
            last, tokens_before = attempt.step == steps, attempt.tokens
            if logged := attempt.step % run.stage_config.log_every == 0 or last:
                row, problem = _log_row(run, attempt, last=last)
                if problem and _record_problem(run, attempt, row, problem):
                    _close_attempt(run, attempt)
                    del attempt  # frees its state before an older one is restored
                    attempt = _start_attempt(run, began)
                    continue
            _show_progress(attempt)
            evaluated = _crosses_multiple(config.eval.every_tokens, tokens_before, attempt.tokens)
            if evaluated:  # before the checkpoint of this step: a run resumed from there does not come past it again
                _save_eval_checkpoint(run, attempt)
            scheduled = attempt.step % run.stage_config.checkpoint_every == 0 or last
            preempted = preemption.reached() and not last
            if scheduled or preempted:  # after the log row: a resumed run needs the rows up to its checkpoint
                _save_checkpoint(run, attempt, scheduled=scheduled, checked=logged)
            if preempted:
                _stop_preempted(run, attempt)
            run.saver.check()
            if evaluated:
                _evaluate_checkpoints(run, attempt.writers)
        done = _finish(run, attempt)

    distributed.lead_first(f"{stage} done", lambda: files.write_json(layout.done, done), lambda: None)
    return files.read_json(layout.done)


# ------------------------------------------------------------------------------------------------------- preparation


def _open_data(config: ConfigDict, stage: str) -> BatchSource:
    from stepdr_jax.data.loader import Loader  # here: grain takes a second to import
    from stepdr_jax.tokens.tokenizer import Tokenizer

    run = RunLayout.from_config(config)
    tokenizer = Tokenizer.load(run.tokenizer)
    settings = config[stage]
    return Loader(
        run.data,
        stage,
        dict(settings.mixture),
        batch_size=settings.batch_size,
        seed=config.seed,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        warmup_data=(settings.warmup_data, settings.warmup_data_steps),
        heldout_sequences=settings.heldout_sequences,
        mixture_schedule=settings.mixture_schedule,
        on_damage=config.data.on_damage,
    )


def _prepare_run(
    config: ConfigDict,
    layout: StageLayout,
    settings: dict[str, Any],
    model: Qwen2Config,
    loader: BatchSource,
    on_eval_checkpoint: Callable[[int], dict[str, Any]] | None,
) -> TrainingRun:
    """Records the settings; makes the mesh, the compiled programs and what watches and saves the run."""
    distributed.lead_first("settings", lambda: provenance.record_stage(config, layout, settings), lambda: None)
    stage, mesh = layout.name, make_mesh(**config.mesh)
    sizes = dict(vocab_size=model.vocab_size, num_sources=len(loader.sources))
    program, abstract_state, abstract_batch = train_program(config, stage, mesh, **sizes)
    parallel = resolve_parallel(config, stage, mesh, model)
    if mesh.size > 1:
        print_once(f"{stage}  {mesh.size} devices, context strategy {parallel.strategy}: {parallel.reason}")
    tokens = abstract_batch["tokens"]
    return TrainingRun(
        config=config,
        layout=layout,
        settings=settings,
        model=model,
        loader=loader,
        mesh=mesh,
        program=program,
        eval_program=eval_program(config, stage, mesh, **sizes)[0],
        abstract_state=abstract_state,
        abstract_batch=abstract_batch,
        order=token_order(parallel, config[stage].seq_len),
        local=distributed.local_batch_slice(tokens.sharding, tokens.shape),
        saver=checkpoint.Saver(layout.checkpoint_dir, background=config.checkpointing.background),
        watchdog=Watchdog(layout.hangs, config.watchdog),
        stragglers=Stragglers(),
        on_eval_checkpoint=on_eval_checkpoint,
    )


def _start_attempt(run: TrainingRun, began: float) -> Attempt:
    """Restores the latest checkpoint, after completing a rollback, and opens the stage's logs from there.

    Args:
        began: monotonic time at which this process began.
    """
    layout, stage = run.layout, run.stage
    rollbacks = distributed.lead_first(
        f"{stage} rollbacks",
        lambda: guards.complete_rollback(layout, lambda step: _remove_after(layout, step)),
        lambda: guards.read_rollbacks(layout),
    )
    with jax.transfer_guard("allow"):
        train_state, saved = _restore_state(run)
    step = saved["step"]
    if step:
        print_once(f"{stage}  continuing from step {step}")
    writers = StageWriters(layout, run.config, step)
    attempt = Attempt(
        state=train_state,
        step=step,
        tokens=saved["tokens"],
        began=began - saved["seconds"],
        rollbacks=rollbacks,
        monitor=guards.LossMonitor.restore(saved["monitor"], rollbacks),
        writers=writers,
        throughput=metrics.ThroughputMeter(
            productive=saved["productive"],
            first_start=writers.first_start,
            peak_flops=peak_flops(list(run.mesh.devices.flat)),
        ),
        profiler=Profiler(layout, run.config.profile, writers.write_event),
    )
    _evaluate_checkpoints(run, writers)  # those that a killed process saved and did not evaluate
    attempt.batch = _next_batch(run, attempt)
    if attempt.batch is not None:
        print_once(f"{stage}  compiling")
        attempt.capabilities = ("other", *CAPABILITIES) if "capability" in attempt.batch else ()
    return attempt


def _restore_state(run: TrainingRun) -> tuple[TrainState, dict[str, Any]]:
    """State and metadata of the latest checkpoint, or of the start of the stage."""
    restored = checkpoint.restore_checkpoint(run.layout.checkpoint_dir, state.as_tree(run.abstract_state))
    if restored is not None:
        return TrainState(**restored.tree), restored.metadata | {"step": restored.step}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.abstract_state)
    params = state.starting_params(run.config, run.stage, run.model, shardings.params)
    init_state = jax.jit(
        lambda params: state.new_state(params, make_optimizer(run.stage_config), len(run.loader.sources)),
        donate_argnums=0,
        out_shardings=shardings,
    )
    return init_state(params), {"step": 0, "tokens": 0, "seconds": 0.0, "productive": 0.0, "monitor": {}}


def _remove_after(layout: StageLayout, step: int) -> None:
    """Removes the checkpoints, evaluation checkpoints and evaluation rows of steps after `step`."""
    checkpoint.remove_after(layout.checkpoint_dir, step)
    for later in (other for other in layout.eval_steps() if other > step):
        storage.remove(layout.eval_checkpoint(later), quietly=True)
    truncate_rows(layout.qa_rows, step)


# -------------------------------------------------------------------------------------------------------------- steps


def _next_batch(run: TrainingRun, attempt: Attempt) -> dict[str, np.ndarray] | None:
    """This process's part of the batch of the next step; None at the end of the stage."""
    if attempt.step >= run.stage_config.steps:
        return None
    return run.loader.batch(guards.data_position(attempt.rollbacks, attempt.step), run.local)


def _place_batch(run: TrainingRun, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's part of a batch as global arrays, the inputs of the programs."""
    inputs, like = arrange(batch, run.order), run.abstract_batch
    return {name: distributed.make_global_batch(array, run.local, like[name]) for name, array in inputs.items()}


def _take_step(run: TrainingRun, attempt: Attempt) -> None:
    """One optimizer step; the next batch is read while the devices work."""
    assert attempt.batch is not None
    attempt.step += 1
    attempt.profiler.before(attempt.step)
    started = time.monotonic()
    attempt.state = run.program(attempt.state, _place_batch(run, attempt.batch))
    attempt.batch = _next_batch(run, attempt)
    dispatched = time.monotonic()
    jax.block_until_ready(attempt.state.step)
    ended = time.monotonic()
    attempt.throughput.record_step(ended - started)
    run.watchdog.record_step(ended - started)
    run.stragglers.record_step(ended - started, waited=ended - dispatched)
    attempt.profiler.after(attempt.step)
    attempt.bar = attempt.bar or Progress(run.stage, run.stage_config.steps, start=attempt.step - 1)


def _log_row(run: TrainingRun, attempt: Attempt, *, last: bool) -> tuple[dict[str, Any], str | None]:
    """Writes a row for the steps since the last one and clears their sums. Returns (row, reason to roll back)."""
    settings, sources, step = run.stage_config, run.loader.sources, attempt.step
    window = jax.device_get(attempt.state.window)
    attempt.tokens += int(window["tokens"])
    with jax.transfer_guard("allow"):  # a schedule is host arithmetic on Python numbers
        learning_rate = float(jax.numpy.asarray(make_schedule(settings)(step - 1)))
    row = metrics.metrics_row(
        window,
        sources,
        step=step,
        learning_rate=learning_rate,
        tokens=attempt.tokens,
        families=run.loader.families,
        capabilities=attempt.capabilities,
    )
    heldout_due = last or _crosses_multiple(settings.heldout_every, step - settings.log_every, step)
    if run.loader.heldout_batches and settings.heldout_every and heldout_due:
        row["heldout_loss"] = _heldout_loss(run, attempt.state.params)
    row |= attempt.throughput.timings(
        steps=sum(int(window[name]) for name in ("steps", "skipped", "spikes")),
        tokens=float(window["tokens"]),
        flops=training_flops(run.model, tokens=float(window["tokens"]), pairs=float(window["pairs"])),
        remaining=settings.steps - step,
    )
    if slowest := run.stragglers.slowest():
        row["slowest_host"] = slowest
    attempt.writers.write_row(row)
    for name, what in (("skipped", "a gradient that was not finite"), ("spikes", "a gradient spike")):
        if row[name]:
            attempt.writers.write_event(name, step=step, steps=row[name])
            print_once(f"{run.stage}  step {step}: skipped {row[name]} steps with {what}")
    zeros = jax.tree.map(np.zeros_like, window)
    shardings = jax.tree.map(lambda _: replicated(run.mesh), zeros)
    attempt.state = dataclasses.replace(attempt.state, window=distributed.place_global(zeros, shardings))
    weights = dict(zip(sources, map(float, window["weight"]), strict=True))
    return row, attempt.monitor.check(settings.guard, row, weights)


def _heldout_loss(run: TrainingRun, params: dict[str, Any]) -> dict[str, float]:
    """Mean loss of each source on sequences that are never trained on."""
    parts = []
    for index in range(run.loader.heldout_batches):
        batch = {name: array[run.local] for name, array in run.loader.heldout_batch(index).items()}
        parts.append(jax.device_get(run.eval_program(params, _place_batch(run, batch))))
    sums = jax.tree.map(lambda *values: functools.reduce(np.add, values), *parts)
    return metrics.mean_losses(run.loader.sources, sums["loss"], sums["weight"])


def _record_problem(run: TrainingRun, attempt: Attempt, row: dict[str, Any], problem: str) -> bool:
    """Records a log row that failed the check. Returns whether to roll back."""
    step, good = attempt.step, attempt.monitor.good_step
    rollback = guards.Rollback(step, good, problem)
    rolls_back = guards.record_rollback(run.layout, run.stage_config.guard, attempt.rollbacks, rollback, row)
    event, to = ("rollback", good) if rolls_back else ("spike", step)
    attempt.writers.write_event(event, step=step, to=to, reason=problem)
    print_once(f"{run.stage}  step {step}: {problem}" + (f"; rolling back to step {good}" if rolls_back else ""))
    return rolls_back


def _show_progress(attempt: Attempt) -> None:
    latest = attempt.writers.rows[-1] if attempt.writers.rows else {}
    shown = {"loss": latest["loss"]} if latest.get("loss") is not None else {}
    speed = {"tok/s": int(latest["tokens_per_second"])} if latest.get("tokens_per_second") else {}
    if distributed.is_lead() and attempt.bar:
        attempt.bar.update(1, **shown, **speed)


def _crosses_multiple(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]. Never when `every` is 0."""
    return bool(every) and now // every > before // every


# -------------------------------------------------------------------------------------------- checkpoints and endings


def _checkpoint_metadata(run: TrainingRun, attempt: Attempt) -> dict[str, Any]:
    model = dataclasses.asdict(run.model)
    return {"stage": run.stage, "seed": run.config.seed, "model": model, "tokens": attempt.tokens}


def _save_eval_checkpoint(run: TrainingRun, attempt: Attempt) -> None:
    """Saves the parameters for evaluation."""
    run.saver.wait()  # one save at a time
    where, metadata = run.layout.eval_checkpoint(attempt.step), _checkpoint_metadata(run, attempt)
    checkpoint.save_checkpoint(where, attempt.step, {"params": attempt.state.params}, metadata, keep=1)
    attempt.writers.write_event("eval_checkpoint", step=attempt.step, tokens=attempt.tokens)


def _save_checkpoint(run: TrainingRun, attempt: Attempt, *, scheduled: bool, checked: bool) -> None:
    """Saves the state; `checked` when a log row ends at this step."""
    if scheduled:
        attempt.monitor.checkpoint_saved(attempt.step, checked=checked)
    progress = {
        "settings": run.settings,
        "seconds": time.monotonic() - attempt.began,
        "productive": attempt.throughput.productive,
        "monitor": attempt.monitor.as_dict(),
    }
    run.saver.save(
        attempt.step,
        state.as_tree(attempt.state),
        _checkpoint_metadata(run, attempt) | progress,
        keep=run.stage_config.keep_checkpoints,
        keep_every=run.config.checkpointing.keep_every,
        spare=(attempt.monitor.good_step,),
        emergency=not scheduled,
    )


def _evaluate_checkpoints(run: TrainingRun, writers: StageWriters) -> None:
    """Evaluates the evaluation checkpoints that have no row yet."""
    if run.on_eval_checkpoint is None:
        return
    known = {row["step"] for row in truncate_rows(run.layout.qa_rows, run.stage_config.steps)}
    for step in run.layout.eval_steps():
        if step not in known:
            with jax.transfer_guard("allow"), run.watchdog.paused():
                writers.write_evaluation(run.on_eval_checkpoint(step))


def _close_attempt(run: TrainingRun, attempt: Attempt) -> None:
    attempt.profiler.close(attempt.step)
    attempt.writers.close()
    run.saver.wait()


def _stop_preempted(run: TrainingRun, attempt: Attempt) -> None:
    """Raises `distributed.Preempted` once the checkpoint of this step is written by all processes."""
    run.saver.close()
    attempt.writers.write_event("preempted", step=attempt.step)
    attempt.writers.close()
    distributed.barrier(f"{run.stage} saved {attempt.step}")
    print_once(f"{run.stage}  preempted: step {attempt.step} is saved; run the same command to continue")
    raise distributed.Preempted


def _finish(run: TrainingRun, attempt: Attempt) -> dict[str, Any]:
    """Waits for the last checkpoint and returns the content of done.json."""
    attempt.profiler.close(attempt.step)
    run.saver.wait()
    attempt.writers.write_event("end", step=attempt.step)
    attempt.writers.close()
    return {
        "steps": run.stage_config.steps,
        "final_loss": attempt.writers.rows[-1]["loss"] if attempt.writers.rows else None,
        "params_sha256": checkpoint.params_sha256(attempt.state.params),
        "seconds": round(time.monotonic() - attempt.began, 2),
        "tokens": attempt.tokens,
    }
