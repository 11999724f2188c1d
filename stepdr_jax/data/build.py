"""Builds what the loader reads: ArrayRecord shards of packed sequences for each mixture component of a stage.

There are three passes. Their tasks write files atomically, so a killed build continues where it was, and a build whose
inputs have not changed does nothing:
1. scan: every part of every source is read (`scan`).
2. selection: each component's rows are chosen and divided into shards (`selection`), in this process.
3. packing: each shard is read through its seqio Task, tokenized, packed and written (`shard`).

data/<stage>/<component>-<k>-of-<n>.arecord holds sequences; the .json beside it describes them and is written last.
data/<stage>/<component>.json has the sums over a component's shards, <component>.npy the tokens in each sequence.
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.data import beam_runner, rates, scan, selection, sources
from stepdr_jax.data.card import SELECTION_COUNTS, sum_counts
from stepdr_jax.data.shard import digest_of, write_shard
from stepdr_jax.errors import UserError
from stepdr_jax.tokens.tokenizer import Tokenizer

STAGES = ("midtrain1", "midtrain2", "sft")
LAYOUT = 5  # raise when the content of shards or their side files changes its meaning
GENERATED = "copying"  # the component that no source has (mixtures.COPYING)


def build_training_data(
    config, stages: Sequence[str] = STAGES, *, runner: str = beam_runner.IN_PROCESS, beam_options: Sequence[str] = ()
) -> dict[str, dict[str, dict]]:
    """Builds every component of the stages' mixtures and returns stage -> component -> card.

    Text longer than seq_len is split into windows; trajectories longer than it are dropped and counted.

    Raises UserError when a source or the tokenizer is absent, at a bad row if so configured, and for a component
    without examples.
    """
    folder = Path(config.run_dir) / "data"
    options = beam_runner.RunnerOptions(folder / "failed", runner, beam_options)
    policy = selection.SelectionPolicy(
        config.data.exact_duplicates,
        config.data.near_duplicates,
        config.data.contaminated,
        int(config.data.shard_mib * 2**20),
    )
    found = sources.list_sources(config)
    parts = scan.list_parts(found, folder / "scan", policy.shard_bytes)
    _scan_parts(config, parts, policy, options)
    wanted = {stage: rates.stage_components(config[stage], stage) for stage in stages}
    selected = {}
    for component in sorted({name for names in wanted.values() for name in names} - {GENERATED}):
        selected[component] = selection.select_rows(parts, component, policy, folder / "plan")
        if not selected[component].plans:
            stage = next(stage for stage in stages if component in wanted[stage])
            raise _no_rows_error(component, stage, selected[component].facts, found)
    shards = {  # (stage, component) -> [(path, inputs)]
        (stage, component): _list_shards(config, stage, component, selected.get(component))
        for stage in stages
        for component in wanted[stage]
    }
    tasks = [(path, inputs) for listed in shards.values() for path, inputs in listed if not _is_built(path, inputs)]
    plans = {component: [plan for plan, _ in chosen.plans] for component, chosen in selected.items()}
    beam_runner.run_tasks(tasks, functools.partial(_pack_shard, config=config, plans=plans), options)

    built: dict[str, dict[str, dict]] = {stage: {} for stage in stages}
    for (stage, component), listed in shards.items():
        facts = selected[component].facts if component in selected else {}
        family = next((source.family for source in found if source.component == component and source.family), "")
        cards = [files.read_json(side_path(path)) for path, _ in listed]
        built[stage][component] = write_component_card(folder / stage, component, cards, facts | {"family": family})
    return built


def _scan_parts(
    config, parts: list[scan.Part], policy: selection.SelectionPolicy, options: beam_runner.RunnerOptions
) -> None:
    scan_options = scan.ScanOptions(
        exact=policy.exact_duplicates != "off",
        near=policy.near_duplicates != "off",
        evaluation_sets=dict(config.data.evaluation_sets),
        stop=config.data.on_bad_row == "stop",
    )
    todo = [part for part in parts if not scan.is_scanned(part, scan_options)]
    beam_runner.run_tasks(todo, functools.partial(scan.scan_part, options=scan_options), options)


def _no_rows_error(component: str, stage: str, facts: dict, found: list[sources.DataSource]) -> UserError:
    dropped = facts["dropped"] | facts["bad_rows"]
    return UserError(
        f"expected rows of component {component!r} of {stage}.mixture in the sources "
        f"{', '.join(source.name for source in found)}, found none{f' to keep ({dropped})' if dropped else ''}; run "
        f"launch.synthesize again, add a source of it to config.data.sources, or take it out of the mixture"
    )


def side_path(path: Path) -> Path:
    """The JSON file beside an ArrayRecord file."""
    return path.with_suffix(".json")


def _list_shards(config, stage: str, component: str, selected: selection.Selection | None) -> list[tuple[Path, dict]]:
    """Returns the path and inputs of each shard of a component in a stage."""
    folder = Path(config.run_dir) / "data" / stage
    tokenizer = Tokenizer.load(Path(config.run_dir) / "tokenizer" / "tokenizer.json")
    plans = selected.plans if selected else [(Path(f"{component}-00000-of-00001"), GENERATED)]
    shared = dict(
        layout=LAYOUT,
        tokenizer=tokenizer.fingerprint(),
        seq_len=config[stage].seq_len,
        seed=config.data_seed,
        trajectory_loss=config[stage].trajectory_loss,
        stage=stage,
        component=component,
    )
    return [
        (
            folder / f"{plan.name.removesuffix('.npz')}.arecord",
            shared | dict(shard=[index, len(plans)], content=content),
        )
        for index, (plan, content) in enumerate(plans)
    ]


def _is_built(path: Path, inputs: dict) -> bool:
    try:
        card = json.loads(side_path(path).read_text())
        return card["inputs"] == inputs and card["bytes"] == path.stat().st_size and path.with_suffix(".npy").exists()
    except (OSError, ValueError, KeyError):
        return False


def _pack_shard(task: tuple[Path, dict], *, config, plans: dict[str, list[Path]]) -> None:
    path, inputs = task
    write_shard(path, _read_examples(config, plans, inputs["stage"], inputs["component"], *inputs["shard"]), inputs)


def _read_examples(
    config, plans: dict[str, list[Path]], stage: str, component: str, index: int, num_shards: int
) -> Iterable[tuple]:
    """Yields (tokens, loss mask, whole, capability, lang, license, source) of one shard of a seqio Task."""
    with quiet_stderr():  # importing TensorFlow takes ten seconds, so a build with nothing to do must not reach it
        import seqio

        from stepdr_jax.data import mixtures

    tokenizer = Tokenizer.load(Path(config.run_dir) / "tokenizer" / "tokenizer.json")
    mixtures.register_mixtures(config, tokenizer, plans)
    task = seqio.get_mixture_or_task(mixtures.task_name(stage, component))
    shard = seqio.ShardInfo(index, num_shards) if num_shards > 1 else None
    dataset = task.get_dataset(sequence_length=None, split="train", shuffle=False, shard_info=shard)
    for batch in dataset.ragged_batch(mixtures.BLOCK):
        splits = batch["tokens"].row_splits.numpy()[1:-1]
        yield from zip(
            np.split(batch["tokens"].values.numpy(), splits),
            np.split(batch["loss_mask"].values.numpy(), splits),
            batch["whole"].numpy(),
            *(batch[name].numpy() for name in mixtures.LABELS),
            strict=True,
        )


@contextlib.contextmanager
def quiet_stderr():
    """Hides the messages about absent GPUs of TensorFlow's C++ code at import; shown if the import fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it speeds up no string or integer op, and prints a message
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def write_component_card(folder: Path, component: str, cards: list[dict], facts: dict) -> dict:
    """Sums the cards of a component's shards, adds the counts of selection, writes folder/<component>.json, returns it.

    Shards of an earlier build that are no longer part of the component are removed.
    """
    inputs = cards[0]["inputs"]
    total = {
        name: sum(card[name] for card in cards)
        for name in ("sequences", "tokens", "loss_tokens", "examples", "pieces", "bytes")
    }
    if not total["sequences"]:
        dropped = sum_counts(card["dropped"] for card in cards)
        raise UserError(
            f"component {component!r} of {inputs['stage']}.mixture has {total['examples']} examples and none is usable "
            f"(longer than seq_len={inputs['seq_len']}: {dropped['too_long']}, no tokens to train on: "
            f"{dropped['no_loss']}); raise {inputs['stage']}.seq_len or take it out of the mixture"
        )
    lengths = sum((Counter(dict(card["examples_by_length"])) for card in cards), Counter())
    card = total | dict(
        stage=inputs["stage"],
        component=component,
        seq_len=inputs["seq_len"],
        tokenizer=inputs["tokenizer"],
        family=facts.get("family", ""),
        dropped=sum_counts([*(card["dropped"] for card in cards), facts.get("dropped", {})]),
        fill=round(total["tokens"] / (total["sequences"] * inputs["seq_len"]), 4),
        examples_by_length=sorted(lengths.items()),
        **{name: sum_counts(card[name] for card in cards) for name in cards[0] if name.startswith("tokens_by_")},
        **{name: facts[name] for name in SELECTION_COUNTS if name in facts},
        shards=[{name: card[name] for name in ("file", "sequences", "tokens", "bytes")} for card in cards],
        fingerprint=digest_of([card["inputs"] for card in cards]),
    )
    current = {Path(shard["file"]).stem for shard in card["shards"]}
    for old in [*folder.glob(f"{component}-?????-of-?????.*"), folder / f"{component}.arecord"]:
        if old.stem not in current:
            old.unlink(missing_ok=True)
    tokens = [np.load(folder / f"{stem}.npy") for stem in sorted(current)]
    with files.atomic_path(folder / f"{component}.npy") as temporary, open(temporary, "wb") as out:
        np.save(out, np.concatenate(tokens))  # a second copy, as the order of all sequences must survive a lost shard
    card = json.loads(json.dumps(card))
    path = folder / f"{component}.json"
    if not (
        path.exists() and path.read_text() == json.dumps(card, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    ):
        files.write_json(path, card)
    return card
