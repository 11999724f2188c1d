"""Builds what the loader reads: ArrayRecord shards of packed rows for each mixture component of a stage.

In three passes, each of tasks that write a file whole or not at all, so a build that is killed anywhere goes on where it
was, and one whose inputs have not changed does nothing:
1. survey: every part of every source is looked at (`survey`).
2. selection: each component's rows are chosen and cut into shards (`selection`), here.
3. packing: each shard is read through its seqio Task, tokenised, packed and written.

data/<stage>/<component>-<k>-of-<n>.arecord holds rows, the .json beside it says what they are and is written last;
data/<stage>/<component>.json adds a component's shards up, and <component>.npy has the number of tokens in each row.
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
from stepdr_jax.data import rates, selection, sources, survey, workers
from stepdr_jax.data.card import added
from stepdr_jax.data.shard import digest_of, pack
from stepdr_jax.errors import UserError
from stepdr_jax.tokens.tokenizer import Tokenizer

STAGES = ("midtrain1", "midtrain2", "sft")
LAYOUT = 4  # raise when rows on disk change their meaning
GENERATED = "copying"  # the component that is in no source (mixtures.COPYING)


def build(
    config, stages: Sequence[str] = STAGES, *, runner: str = workers.IN_PROCESS, options: Sequence[str] = ()
) -> dict[str, dict[str, dict]]:
    """Builds every component of the stages' mixtures and returns stage -> component -> card.

    Text longer than the context is split into windows; trajectories longer than it are dropped and counted.
    Raises UserError when a source or the tokenizer is absent, at a bad row if so configured, and for a component without examples.
    """
    folder = Path(config.run_dir) / "data"
    failures = folder / "failed"
    hands = dict(failures=failures, runner=runner, options=options)
    policy = selection.Policy(
        config.data.exact_duplicates,
        config.data.near_duplicates,
        config.data.contaminated,
        int(config.data.shard_mib * 2**20),
    )
    look = survey.Look(
        exact=policy.exact_duplicates != "off",
        near=policy.near_duplicates != "off",
        evaluation=dict(config.data.evaluation_sets),
        stop=config.data.on_bad_row == "stop",
    )
    found = sources.of(config)
    parts = survey.parts_of(found, folder / "survey", policy.shard_bytes)
    todo = [part for part in parts if not survey.finished(part, look)]
    workers.run(todo, functools.partial(survey.make, look=look), **hands)

    wanted = {stage: rates.components(config[stage], stage) for stage in stages}
    chosen = {}
    for component in sorted({name for names in wanted.values() for name in names} - {GENERATED}):
        chosen[component] = selection.select(parts, component, policy, folder / "plan")
        if not chosen[component].plans:
            stage = next(stage for stage in stages if component in wanted[stage])
            dropped = chosen[component].facts["dropped"] | chosen[component].facts["bad_rows"]
            raise UserError(
                f"expected rows of component {component!r} of {stage}.mixture in the sources "
                f"{', '.join(source.name for source in found)}, found none{f' to keep ({dropped})' if dropped else ''}; run "
                f"launch.synthesize again, add a source of it to config.data.sources, or take it out of the mixture"
            )
    shards = {}  # (stage, component) -> [(path, inputs)]
    for stage in stages:
        for component in wanted[stage]:
            shards[stage, component] = _shards(config, stage, component, chosen.get(component))
    tasks = [(path, inputs) for listed in shards.values() for path, inputs in listed if not _finished(path, inputs)]
    plans = {component: [plan for plan, _ in selected.plans] for component, selected in chosen.items()}
    workers.run(tasks, functools.partial(_pack_task, config=config, plans=plans), **hands)

    built: dict[str, dict[str, dict]] = {stage: {} for stage in stages}
    for (stage, component), listed in shards.items():
        facts = chosen[component].facts if component in chosen else {}
        family = next((source.family for source in found if source.component == component and source.family), "")
        cards = [files.read_json(side_path(path)) for path, _ in listed]
        built[stage][component] = write_component(folder / stage, component, cards, facts | {"family": family})
    return built


def side_path(path: Path) -> Path:
    """The JSON beside an ArrayRecord."""
    return path.with_suffix(".json")


def _shards(config, stage: str, component: str, selected: selection.Selected | None) -> list[tuple[Path, dict]]:
    """Returns path and inputs of each shard that a component has in a stage."""
    folder = Path(config.run_dir) / "data" / stage
    tokenizer = Tokenizer.load(Path(config.run_dir) / "tokenizer" / "tokenizer.json")
    plans = selected.plans if selected else [(Path(f"{component}-00000-of-00001"), GENERATED)]
    shared = dict(
        layout=LAYOUT,
        tokenizer=tokenizer.fingerprint(),
        context=config[stage].seq_len,
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


def _finished(path: Path, inputs: dict) -> bool:
    try:
        card = json.loads(side_path(path).read_text())
        return card["inputs"] == inputs and card["bytes"] == path.stat().st_size and path.with_suffix(".npy").exists()
    except (OSError, ValueError, KeyError):
        return False


def _pack_task(task: tuple[Path, dict], *, config, plans: dict[str, list[Path]]) -> None:
    path, inputs = task
    pack(path, _examples(config, plans, inputs["stage"], inputs["component"], *inputs["shard"]), inputs)


def _examples(config, plans: dict[str, list[Path]], stage: str, component: str, index: int, of: int) -> Iterable[tuple]:
    """Yields (tokens, loss mask, whole, capability, lang, licence, source) of one shard of a seqio Task."""
    with quiet_stderr():  # TensorFlow takes ten seconds to import, so a build with nothing to do must not reach it
        import seqio

        from stepdr_jax.data import mixtures

    tokenizer = Tokenizer.load(Path(config.run_dir) / "tokenizer" / "tokenizer.json")
    mixtures.register(config, tokenizer, plans)
    task = seqio.get_mixture_or_task(mixtures.task_name(stage, component))
    shard = seqio.ShardInfo(index, of) if of > 1 else None
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
    """Holds back what TensorFlow's C++ says about absent GPUs when it is imported; shown if the import fails."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # it speeds up no string or integer op, and announces itself
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


def write_component(folder: Path, component: str, cards: list[dict], facts: dict) -> dict:
    """Adds up the cards of a component's shards with what selection counted, writes folder/<component>.json and returns it.

    Shards of an earlier build that are no longer part of the component are removed.
    """
    inputs = cards[0]["inputs"]
    total = {
        name: sum(card[name] for card in cards)
        for name in ("rows", "tokens", "loss_tokens", "examples", "pieces", "bytes")
    }
    if not total["rows"]:
        dropped = added(card["dropped"] for card in cards)
        raise UserError(
            f"component {component!r} of {inputs['stage']}.mixture has {total['examples']} examples and none is usable (longer "
            f"than context={inputs['context']}: {dropped['too_long']}, nothing to learn: {dropped['no_loss']}); raise "
            f"{inputs['stage']}.seq_len or take it out of the mixture"
        )
    card = total | dict(
        stage=inputs["stage"],
        component=component,
        context=inputs["context"],
        tokenizer=inputs["tokenizer"],
        family=facts.get("family", ""),
        dropped=added([*(card["dropped"] for card in cards), facts.get("dropped", {})]),
        fill=round(total["tokens"] / (total["rows"] * inputs["context"]), 4),
        examples_by_length=sorted(Counter({k: v for k, v in _lengths(cards).items()}).items()),
        **{name: added(card[name] for card in cards) for name in cards[0] if name.startswith("tokens_by_")},
        **{
            name: facts[name]
            for name in ("bad_rows", "bad_named", "left_out", "rows_by_source", "duplicates", "contaminated")
            if name in facts
        },
        shards=[{name: card[name] for name in ("file", "rows", "tokens", "bytes")} for card in cards],
        fingerprint=digest_of([card["inputs"] for card in cards]),
    )
    current = {Path(shard["file"]).stem for shard in card["shards"]}
    for old in [*folder.glob(f"{component}-?????-of-?????.*"), folder / f"{component}.arecord"]:
        if old.stem not in current:
            old.unlink(missing_ok=True)
    tokens = [np.load(folder / f"{stem}.npy") for stem in sorted(current)]
    with files.atomic_path(folder / f"{component}.npy") as temporary, open(temporary, "wb") as out:
        np.save(out, np.concatenate(tokens))  # here too, as the order of all rows must outlive a lost shard
    card = json.loads(json.dumps(card))
    path = folder / f"{component}.json"
    if not (
        path.exists() and path.read_text() == json.dumps(card, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
    ):
        files.write_json(path, card)
    return card


def _lengths(cards: list[dict]) -> Counter:
    total = Counter()
    for card in cards:
        total.update(dict(card["examples_by_length"]))
    return total
