"""The training loop of mid-training I, mid-training II and SFT, in the order in which things happen.

One function, read from top to bottom: what is to be done -> data -> model -> mesh -> step -> resume -> loop -> done.
Data order, initialisation and the state in a checkpoint are functions of (config, seed, step), so a run that is killed
at any moment and started again ends with the same bits as one that was not.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.progress import Progress
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.sharding.rules import replicated
from stepdr_jax.training import checkpoint, metrics, state
from stepdr_jax.training.compilation import keep_compiled
from stepdr_jax.training.optimizer import optimizer_of, schedule_of
from stepdr_jax.training.program import order_of, parallel_of, train_program
from stepdr_jax.training.step import TrainState, arrange, empty_window

# These change when a run stops, logs and how it computes, not what it computes.
FREE = ("checkpoint_every", "keep_checkpoints", "loss_chunk")


class Batches(Protocol):
    """What the loop needs of a loader (`data.loader.Loader`)."""

    sources: list[str]
    fingerprint: str

    def batch(self, step: int) -> dict[str, np.ndarray]: ...


def train(config, stage: str, *, loader: Batches | None = None, vocab_size: int | None = None) -> dict:
    """Trains one stage to its end, from wherever it stopped, and returns its done.json.

    Args:
        config: the run's config.
        stage: midtrain1, midtrain2 or sft.
        loader: batches by step; default the run's data on disk.
        vocab_size: default `state.vocab_size`.

    Raises:
        UserError: missing or damaged input, a config that differs from the one the run directory was made with, a full
            disk, a loss that stays non-finite.
    """
    began = time.monotonic()
    home = state.stage_dir(config, config.seed, stage)
    settings = config[stage]

    # ---------------------------------------------------------------- what is to be done
    finished = files.read_json(home / "done.json") if (home / "done.json").exists() else None
    if finished is not None and loader is None and not (Path(config.run_dir) / "data" / stage).exists():
        return finished  # data may be deleted to save space once a stage is done
    if stage != "midtrain1":
        _require_parent(config, stage)

    # ---------------------------------------------------------------- data
    if loader is None:
        loader = _open_data(config, stage)
    if vocab_size is None:
        vocab_size = state.vocab_size(config)

    # ---------------------------------------------------------------- settings
    model = Qwen2Config.from_config(config.model, vocab_size)
    asked = _settings(config, stage, model, loader)
    have_checkpoint = bool(checkpoint.steps(home / "checkpoints"))
    if (home / "settings.json").exists() and (finished or have_checkpoint):
        _require_same(files.read_json(home / "settings.json"), asked, home)
    if finished is not None:
        return finished
    files.write_json(home / "settings.json", asked)

    # ---------------------------------------------------------------- mesh, optimiser, step
    keep_compiled(Path(config.run_dir) / ".jax_cache")
    mesh = make_mesh(**config.mesh)
    schedule = schedule_of(settings)
    sources = loader.sources
    program, abstract, abstract_batch = train_program(
        config, stage, mesh, vocab_size=model.vocab_size, num_sources=len(sources)
    )
    parallel = parallel_of(config, stage, mesh, model)
    order = order_of(parallel, settings.context)
    if mesh.size > 1:
        _say(f"{stage}  {mesh.size} devices, context strategy {parallel.strategy}: {parallel.reason}")

    # ---------------------------------------------------------------- resume
    restored = checkpoint.restore(home / "checkpoints", state.as_tree(abstract))
    if restored is None:
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        params = state.start_of(config, stage, model, placed.params)
        now = jax.device_put(state.new_state(params, optimizer_of(settings), len(sources)), placed)
        start, tokens, seconds = 0, 0, 0.0
    else:
        now, start = TrainState(**restored.tree), restored.step
        tokens, seconds = restored.metadata["tokens"], restored.metadata["seconds"]
        _say(f"{stage}  continuing from step {start}")
    rows = metrics.rewind(home / "metrics.jsonl", start)

    # ---------------------------------------------------------------- loop
    def put(batch):
        return {name: jax.device_put(a, abstract_batch[name].sharding) for name, a in arrange(batch, order).items()}

    def real_tokens(batch):
        return int(np.count_nonzero(batch["segment_ids"]))

    progress, timed_from, timed_tokens = None, None, 0  # begun after the first step, which compiles
    batch = loader.batch(start) if start < settings.steps else None
    if batch is not None:
        _say(f"{stage}  compiling")
    # Nothing moves between host and devices unless the code below says so.
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, settings.steps + 1):
            in_step = real_tokens(batch)
            now = program(now, put(batch))
            batch = loader.batch(step) if step < settings.steps else None  # while the devices work
            jax.block_until_ready(now.step)
            if progress is None:
                timed_from = time.monotonic()
                progress = Progress(stage, settings.steps, start=start)
            else:
                timed_tokens += in_step

            if step % settings.log_every == 0 or step == settings.steps:
                window = jax.device_get(now.window)
                tokens += int(window["tokens"])
                rate = float(jax.device_get(_rate(schedule, step - 1)))
                row = metrics.row_of(window, sources, step=step, learning_rate=rate, tokens=tokens)
                elapsed = time.monotonic() - timed_from
                row["tokens_per_second"] = round(timed_tokens / elapsed, 1) if timed_tokens else None
                timed_from, timed_tokens = time.monotonic(), 0
                files.append_jsonl(home / "metrics.jsonl", row)
                rows.append(row)
                _report_skips(row, stage, window, settings)
                now = dataclasses.replace(now, window=jax.device_put(_zeros(len(sources)), replicated(mesh)))
            latest = rows[-1] if rows else {}
            shown = {"loss": latest["loss"]} if latest.get("loss") is not None else {}
            speed = {"tok/s": int(latest["tokens_per_second"])} if latest.get("tokens_per_second") else {}
            progress.update(1, **shown, **speed)

            if step % settings.checkpoint_every == 0 or step == settings.steps:
                # After the row of this step: a restored run must find its rows up to the checkpoint.
                spent = seconds + time.monotonic() - began
                metadata = {
                    "stage": stage,
                    "seed": config.seed,
                    "model": dataclasses.asdict(model),
                    "settings": asked,
                    "tokens": tokens,
                    "seconds": spent,
                }
                checkpoint.save(
                    home / "checkpoints", step, state.as_tree(now), metadata, keep=settings.keep_checkpoints
                )

    # ---------------------------------------------------------------- done
    done = {
        "steps": settings.steps,
        "final_loss": rows[-1]["loss"] if rows else None,
        "params_sha256": checkpoint.params_sha256(now.params),
        "seconds": round(seconds + time.monotonic() - began, 2),
        "tokens": tokens,
    }
    files.write_json(home / "done.json", done)
    return done


def _open_data(config, stage: str) -> Batches:
    from stepdr_jax.data.loader import Loader  # here: grain takes a second to import
    from stepdr_jax.tokens.tokenizer import Tokenizer

    run_dir = Path(config.run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer" / "tokenizer.json")
    settings = config[stage]
    return Loader(
        run_dir / "data",
        stage,
        dict(settings.mixture),
        batch=settings.batch,
        seed=config.seed,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        opening=(settings.opening, settings.opening_steps),
    )


def _settings(config, stage: str, model: Qwen2Config, loader: Batches) -> dict:
    """All that decides the numbers of a stage; kept beside it and compared on every start."""
    section = json.loads(config[stage].to_json_best_effort())
    flat = {f"{stage}.{name}": value for name, value in section.items() if name not in FREE}
    flat |= {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    flat["seed"] = config.seed
    flat["data"] = loader.fingerprint
    flat["initial_checkpoint"] = config.initial_checkpoint if stage == "midtrain1" else ""
    parent = state.PARENT[stage]
    if parent != "init":
        flat[parent] = files.read_json(state.stage_dir(config, config.seed, parent) / "done.json")["params_sha256"]
    return flat


def _require_parent(config, stage: str) -> None:
    parent = state.PARENT[stage]
    home = state.stage_dir(config, config.seed, parent)
    if not (home / "done.json").exists():
        raise UserError(
            f"stage {stage} starts from {parent}, which is not finished in {home}; run {state.COMMAND[parent]} "
            f"--config.run_dir={config.run_dir} --config.seed={config.seed} first"
        )


def _require_same(before: dict, asked: dict, home: Path) -> None:
    for name in sorted(before.keys() | asked.keys()):
        old, new = before.get(name), asked.get(name)
        if old == new:
            continue
        if name == "data":
            what = "was trained on other data than the run directory has now"
        elif name in state.COMMAND:
            what = f"started from another {name} than the run directory has now"
        else:
            what = f"was made with {name} = {old}, this config has {new}"
        raise UserError(f"{home} {what}; choose another --config.run_dir, or delete {home} to train this stage again")


def _report_skips(row: dict, stage: str, window: dict, settings) -> None:
    if not row["skipped"]:
        return
    if not int(window["steps"]):
        raise UserError(
            f"{stage}: no gradient of the last {row['skipped']} steps up to step {row['step']} was finite; lower "
            f"--config.{stage}.learning_rate (now {settings.learning_rate}), then delete the stage's directory"
        )
    _say(f"{stage}  step {row['step']}: skipped {row['skipped']} steps whose gradient was not finite")


def _rate(schedule, step: int):
    with jax.transfer_guard("allow"):  # a schedule is host arithmetic on Python numbers
        return jax.numpy.asarray(schedule(step))


def _zeros(num_sources: int) -> dict:
    with jax.transfer_guard("allow"):
        return jax.device_get(empty_window(num_sources))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
