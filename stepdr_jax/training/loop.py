"""The training loop of mid-training I, mid-training II and SFT, in the order in which things happen.

One function, read from top to bottom: what is to be done -> data -> model -> mesh -> step -> resume -> loop -> done.
Data order, initialisation and the state in a checkpoint are functions of (config, seed, step), so a run that is killed
at any moment and started again ends with the same bits as one that was not. Going back after a spike (`guards`) is the
same as being killed: what follows is read from disk.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np

from stepdr_jax import configuration, files
from stepdr_jax.errors import UserError
from stepdr_jax.models.flops import peak_flops, training_flops
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.records import CAPABILITIES
from stepdr_jax.runtime import checkpoint, distributed, provenance, stages, storage
from stepdr_jax.runtime.compilation import keep_compiled
from stepdr_jax.runtime.distributed import say as _say
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.runtime.profiling import Profiler
from stepdr_jax.runtime.watchdog import Stragglers, Watchdog
from stepdr_jax.runtime.writers import Journal, truncate_rows
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.sharding.rules import replicated
from stepdr_jax.training import guards, metrics, state
from stepdr_jax.training.optimizer import optimizer_of, schedule_of
from stepdr_jax.training.program import eval_program, order_of, parallel_of, train_program
from stepdr_jax.training.step import TrainState, arrange, empty_window


class Batches(Protocol):
    """What the loop needs of a loader (`data.loader.Loader`).

    sources: mixture components, numbered by a batch's `source`; families: of each of them, for learning curves, or ().
    heldout_batches: how many batches of rows that training never reads `heldout_batch` can give.
    """

    sources: list[str]
    families: list[str]
    fingerprint: str
    heldout_batches: int

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]: ...

    def heldout_batch(self, index: int) -> dict[str, np.ndarray]: ...


def train(
    config,
    stage: str,
    *,
    loader: Batches | None = None,
    vocab_size: int | None = None,
    on_milestone: Callable[[int], dict] | None = None,
) -> dict:
    """Trains one stage to its end, from wherever it stopped, and returns its done.json.

    Args:
        config: the run's config.
        stage: midtrain1, midtrain2 or sft.
        loader: batches by step; default the run's data on disk.
        vocab_size: default `state.vocab_size`.
        on_milestone: evaluates the parameters that have been laid down at a step, every config.eval.every_tokens
            tokens (`evaluation.checkpoints`); None leaves that to another job.

    Raises:
        UserError: missing or damaged input, a config that differs from the one the run directory was made with, a full
            disk, a loss that stays non-finite.
    """
    began = time.monotonic()
    run = RunLayout.from_config(config)
    layout = run.stage(stage)
    home = layout.directory
    settings = config[stage]

    # ---------------------------------------------------------------- what is to be done
    finished = files.read_json(layout.done) if layout.done.exists() else None
    if finished is not None and loader is None and not (run.data / stage).exists():
        return finished  # data may be deleted to save space once a stage is done
    provenance.require_parent(config, stage)

    if on_milestone and jax.process_count() > 1:
        raise UserError(
            "eval.inline: one process cannot sample from parameters that others hold parts of; set "
            f"--config.eval.inline=false and run {stages.command_of('evaluate', config, '--watch')} beside this run"
        )

    # ---------------------------------------------------------------- data
    if loader is None:
        loader = _open_data(config, stage)
    if vocab_size is None:
        vocab_size = state.vocab_size(config)

    # ---------------------------------------------------------------- settings
    model = Qwen2Config.from_config(config.model, vocab_size)
    asked = provenance.training_settings(config, stage, model, loader.fingerprint)
    provenance.require_same_location(layout)
    have_checkpoint = bool(checkpoint.steps(layout.checkpoint_dir))
    if finished or have_checkpoint:
        provenance.require_same_settings(layout, asked)
    if finished is not None:
        return finished

    def write_settings() -> None:
        provenance.record_location(layout)
        files.write_json(layout.settings, asked)
        configuration.save(config, layout.directory)

    distributed.lead_first("settings", write_settings, lambda: None)

    # ---------------------------------------------------------------- mesh, optimiser, step
    keep_compiled(run.compilation_cache)
    mesh = make_mesh(**config.mesh)
    schedule = schedule_of(settings)
    sources = loader.sources
    program, abstract, abstract_batch = train_program(
        config, stage, mesh, vocab_size=model.vocab_size, num_sources=len(sources)
    )
    evaluate = eval_program(config, stage, mesh, vocab_size=model.vocab_size, num_sources=len(sources))[0]
    parallel = parallel_of(config, stage, mesh, model)
    order = order_of(parallel, settings.seq_len)
    if mesh.size > 1:
        _say(f"{stage}  {mesh.size} devices, context strategy {parallel.strategy}: {parallel.reason}")

    # ---------------------------------------------------------------- resume
    def begin() -> tuple[TrainState, dict]:
        """State and metadata of the latest checkpoint, else of the start of the stage."""
        restored = checkpoint.restore(layout.checkpoint_dir, state.as_tree(abstract))
        if restored is not None:
            return TrainState(**restored.tree), restored.metadata | {"step": restored.step}
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = state.start_of(config, stage, model, placed.params)
        fresh = jax.jit(
            lambda params: state.new_state(params, optimizer_of(settings), len(sources)),
            donate_argnums=0,
            out_shardings=placed,
        )
        return fresh(params), {"step": 0, "tokens": 0, "seconds": 0.0, "productive": 0.0, "watch": {}}

    tokens_like = abstract_batch["tokens"]
    rows = distributed.own_rows(tokens_like.sharding, tokens_like.shape)  # of a batch, that this process makes

    def put(batch):
        like = abstract_batch
        return {name: distributed.place_rows(a, rows, like[name]) for name, a in arrange(batch, order).items()}

    def undo(to: int) -> None:
        checkpoint.remove_after(layout.checkpoint_dir, to)
        for later in (step for step in layout.eval_steps() if step > to):
            storage.remove(layout.eval_checkpoint(later), quietly=True)
        truncate_rows(layout.qa_rows, to)

    def heldout_loss(params) -> dict[str, float]:
        sums = None
        for index in range(loader.heldout_batches):
            batch = {name: a[rows] for name, a in loader.heldout_batch(index).items()}
            part = jax.device_get(evaluate(params, put(batch)))
            sums = part if sums is None else jax.tree.map(np.add, sums, part)
        return metrics.mean_by(sources, sums["loss"], sums["weight"])

    # ---------------------------------------------------------------- loop
    saver = checkpoint.Saver(layout.checkpoint_dir, background=config.checkpointing.background)
    notice = distributed.Notice()
    watchdog = Watchdog(layout.hangs, config.watchdog)
    stragglers = Stragglers()

    def evaluate_milestones(journal: Journal) -> None:
        known = {row["step"] for row in truncate_rows(layout.qa_rows, settings.steps)} if on_milestone else set()
        for step in layout.eval_steps() if on_milestone else ():
            if step not in known:
                with jax.transfer_guard("allow"), watchdog.paused():
                    journal.measured(on_milestone(step))

    def advance() -> dict | None:
        """Trains from what is on disk to the end of the stage and returns its done.json; None when it had to go back."""
        rewinds = distributed.lead_first(
            f"{stage} rewinds", lambda: guards.complete(home, undo), lambda: guards.read_rewinds(home)
        )
        with jax.transfer_guard("allow"):
            now, saved = begin()
        step, tokens, seconds = saved["step"], saved["tokens"], saved["seconds"]
        watch = guards.Watch.after(rewinds, saved["watch"])
        if step:
            _say(f"{stage}  continuing from step {step}")
        journal = Journal(home, config, stage, step)
        pace = metrics.Pace(
            productive=saved["productive"],
            first_start=journal.first_start,
            peak_flops=peak_flops(list(mesh.devices.flat)),
        )
        profiler = Profiler(home, config.profile, journal.event)
        evaluate_milestones(journal)  # one that a killed process did not come to

        def next_batch():
            return loader.batch(guards.data_position(rewinds, step), rows) if step < settings.steps else None

        batch, progress = next_batch(), None  # progress begins after the first step, which compiles
        names = dict(families=loader.families)
        if batch is not None:
            _say(f"{stage}  compiling")
            names["capabilities"] = ("other", *CAPABILITIES) if "capability" in batch else ()
        while step < settings.steps:
            step += 1
            profiler.before(step)
            stepped = time.monotonic()
            now = program(now, put(batch))
            batch = next_batch()  # while the devices work
            dispatched = time.monotonic()
            jax.block_until_ready(now.step)
            ended = time.monotonic()
            pace.step(ended - stepped)
            watchdog.step(ended - stepped)
            stragglers.step(ended - stepped, waited=ended - dispatched)
            profiler.after(step)
            progress = progress or Progress(stage, settings.steps, start=step - 1)

            row, last = None, step == settings.steps
            if step % settings.log_every == 0 or last:
                window = jax.device_get(now.window)
                rate = float(jax.device_get(_rate(schedule, step - 1)))
                before, tokens = tokens, tokens + int(window["tokens"])
                row = metrics.row_of(window, sources, step=step, learning_rate=rate, tokens=tokens, **names)
                if loader.heldout_batches and _crossed(settings.heldout_every, step - settings.log_every, step, last):
                    row["heldout_loss"] = heldout_loss(now.params)
                row |= pace.row(
                    steps=sum(int(window[name]) for name in ("steps", "skipped", "spikes")),
                    tokens=float(window["tokens"]),
                    flops=training_flops(model, tokens=float(window["tokens"]), pairs=float(window["pairs"])),
                    left=settings.steps - step,
                )
                if slowest := stragglers.slowest():
                    row["slowest_host"] = slowest
                journal.row(row)
                _report_skips(row, stage, journal)
                weights = dict(zip(sources, map(float, window["weight"]), strict=True))
                if reason := watch.judge(settings.guard, row, weights):
                    rewind = guards.Rewind(step, watch.good, reason)
                    back = guards.go_back(home, stage, settings.guard, rewinds, rewind, row)
                    journal.event(
                        "rewind" if back else "spike", step=step, to=watch.good if back else step, reason=reason
                    )
                    _say(f"{stage}  step {step}: {reason}" + (f"; going back to step {watch.good}" if back else ""))
                    if back:
                        profiler.close(step)
                        journal.close()
                        saver.wait()
                        return None
                zeros = _zeros(len(sources))
                placed = jax.tree.map(lambda _: replicated(mesh), zeros)
                now = dataclasses.replace(now, window=distributed.place(zeros, placed))
            latest = journal.rows[-1] if journal.rows else {}
            shown = {"loss": latest["loss"]} if latest.get("loss") is not None else {}
            speed = {"tok/s": int(latest["tokens_per_second"])} if latest.get("tokens_per_second") else {}
            if distributed.is_lead():
                progress.update(1, **shown, **speed)

            metadata = {"stage": stage, "seed": config.seed, "model": dataclasses.asdict(model), "tokens": tokens}
            if milestone := row is not None and _crossed(config.eval.every_tokens, before, tokens):
                # Before the checkpoint of this step: a run that continues from there does not pass it again.
                saver.wait()  # one at a time
                checkpoint.save(layout.eval_checkpoint(step), step, {"params": now.params}, metadata, keep=1)
                journal.event("milestone", step=step, tokens=tokens)
            scheduled = step % settings.checkpoint_every == 0 or last
            preempted = notice.reached() and not last
            if scheduled or preempted:
                # After the row of this step: a restored run must find its rows up to the checkpoint.
                if scheduled:
                    watch.saved(step, judged=row is not None)
                progress_so_far = {
                    "settings": asked,
                    "seconds": seconds + time.monotonic() - began,
                    "productive": pace.productive,
                    "watch": watch.as_dict(),
                }
                saver.save(
                    step,
                    state.as_tree(now),
                    metadata | progress_so_far,
                    keep=settings.keep_checkpoints,
                    keep_every=config.checkpointing.keep_every,
                    spare=(watch.good,),
                    emergency=not scheduled,
                )
            if preempted:
                saver.close()
                journal.event("preempted", step=step)
                journal.close()
                distributed.barrier(f"{stage} saved {step}")
                _say(f"{stage}  told to end: step {step} is saved; run the same command to continue")
                raise distributed.Preempted
            saver.check()
            if milestone:
                evaluate_milestones(journal)
        profiler.close(step)
        saver.wait()
        journal.event("end", step=step)
        journal.close()
        return {
            "steps": settings.steps,
            "final_loss": journal.rows[-1]["loss"] if journal.rows else None,
            "params_sha256": checkpoint.params_sha256(now.params),
            "seconds": round(seconds + time.monotonic() - began, 2),
            "tokens": tokens,
        }

    # Nothing moves between host and devices unless the code says so.
    with jax.transfer_guard("disallow"), saver, notice, watchdog:
        while (finished := advance()) is None:
            pass

    # ---------------------------------------------------------------- done
    def write_done() -> dict:
        files.write_json(layout.done, finished)
        return finished

    return distributed.lead_first(f"{stage} done", write_done, lambda: files.read_json(layout.done))


def _open_data(config, stage: str) -> Batches:
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
        heldout_rows=settings.heldout_rows,
        mixture_schedule=settings.mixture_schedule,
        on_damage=config.data.on_damage,
    )


def _report_skips(row: dict, stage: str, journal: Journal) -> None:
    for name, what in (("skipped", "whose gradient was not finite"), ("spikes", "whose gradient was a spike")):
        if row[name]:
            journal.event(name, step=row["step"], steps=row[name])
            _say(f"{stage}  step {row['step']}: skipped {row[name]} steps {what}")


def _crossed(every: int, before: int, now: int, last: bool = False) -> bool:
    """Whether a multiple of `every` lies in (before, now]; at the last step too. Never when `every` is 0."""
    return bool(every) and (last or now // every > before // every)


def _rate(schedule, step: int):
    with jax.transfer_guard("allow"):  # a schedule is host arithmetic on Python numbers
        return jax.numpy.asarray(schedule(step))


def _zeros(num_sources: int) -> dict:
    with jax.transfer_guard("allow"):
        return jax.device_get(empty_window(num_sources))
