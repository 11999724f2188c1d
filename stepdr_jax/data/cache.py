"""Builds what the loader reads: one ArrayRecord of packed rows for each mixture component of a stage.

data/<stage>/<component>.arecord holds the rows, data/<stage>/<component>.json says what they are; the second file is
written last, so where it stands the first is whole. A finished component whose inputs have not changed is left alone.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from stepdr_jax import files
from stepdr_jax.data import packing
from stepdr_jax.errors import UserError
from stepdr_jax.records import CAPABILITIES
from stepdr_jax.tokens.tokenizer import Tokenizer

STAGES = ("midtrain1", "midtrain2", "sft")
LAYOUT = 2  # raise when rows on disk change their meaning
POOL = 1 << 16  # examples packed together: enough to fill rows, few enough for memory


def build(config, stage: str) -> dict[str, dict]:
    """Builds every component of `config.<stage>.mixture` and returns component -> its side file's content.

    Reading text longer than the context is split into windows; trajectories longer than it are dropped and counted.
    Raises UserError when a corpus file or the tokenizer is absent or a component has no examples.
    """
    run = Path(config.run_dir)
    tokenizer = Tokenizer.load(run / "tokenizer" / "tokenizer.json")
    context = config[stage].context
    shared = dict(
        layout=LAYOUT,
        tokenizer=tokenizer.fingerprint(),
        context=context,
        seed=config.data_seed,
        trajectory_loss=config[stage].trajectory_loss,
        reading=_file_hash(run / "corpus" / "reading.jsonl"),
        trajectories=_file_hash(run / "corpus" / "trajectories.jsonl"),
    )
    built = {}
    examples_of = None
    for component in sorted(name for name, rate in config[stage].mixture.items() if rate > 0):
        path = run / "data" / stage / f"{component}.arecord"
        inputs = shared | dict(stage=stage, component=component)
        if (card := _finished(path, inputs)) is None:
            # TensorFlow takes ten seconds to import, so a build with nothing to do must not reach it.
            examples_of = examples_of or _seqio_examples(config, tokenizer)
            card = _build_component(path, examples_of(stage, component), inputs)
        built[component] = card
    return built


def side_path(path: Path) -> Path:
    """The JSON beside an ArrayRecord."""
    return path.with_suffix(".json")


def _finished(path: Path, inputs: dict) -> dict | None:
    if not (path.exists() and side_path(path).exists()):
        return None
    try:
        card = json.loads(side_path(path).read_text())
    except ValueError:
        return None
    return card if card.get("inputs") == inputs and card.get("bytes") == path.stat().st_size else None


def _file_hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run launch.synthesize first") from None


def _seqio_examples(config, tokenizer: Tokenizer):
    """Returns (stage, component) -> iterator of (tokens, loss mask, whole, capability, lang)."""
    with _quiet_stderr():
        import seqio

        from stepdr_jax.data import mixtures

    mixtures.register(config, tokenizer)
    corpus = Path(config.run_dir) / "corpus"

    def examples(stage: str, component: str):
        rows = mixtures.component_rows(corpus, component)
        if not sum(rows.values()):
            raise UserError(
                f"expected rows of component {component!r} of {stage}.mixture in {corpus}/"
                f"{' or '.join(rows)}, found none; run launch.synthesize again or take it out of the mixture"
            )
        task = seqio.get_mixture_or_task(mixtures.task_name(stage, component))
        dataset = task.get_dataset(sequence_length=None, split="train", shuffle=False)
        for batch in dataset.ragged_batch(mixtures.BLOCK):
            splits = batch["tokens"].row_splits.numpy()[1:-1]
            yield from zip(
                np.split(batch["tokens"].values.numpy(), splits),
                np.split(batch["loss_mask"].values.numpy(), splits),
                batch["whole"].numpy(),
                batch["capability"].numpy(),
                batch["lang"].numpy(),
                strict=True,
            )

    return examples


@contextlib.contextmanager
def _quiet_stderr():
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


def _build_component(path: Path, examples, inputs: dict) -> dict:
    """Packs one component into `path`, writes its side file and returns its content."""
    context = inputs["context"]
    seed = int(_digest(dict(seed=inputs["seed"], stage=inputs["stage"], component=inputs["component"])), 16)
    rng = np.random.default_rng(seed)
    count, dropped, lengths = Counter(), Counter(too_long=0, no_loss=0), Counter()
    by_capability, by_lang = Counter(), Counter()
    side_path(path).unlink(missing_ok=True)  # from here to the end of the build the component is unfinished
    pool: list[tuple[np.ndarray, np.ndarray, int]] = []

    with files.atomic_path(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")

        def write_pool() -> None:
            pool_order = rng.permutation(len(pool))
            shuffled = [pool[index] for index in pool_order]
            bins = packing.best_fit([len(tokens) for tokens, *_ in shuffled], context)
            for index in rng.permutation(len(bins)):
                writer.write(packing.row_bytes([shuffled[i] for i in rng.permutation(bins[index])], context))
            count["rows"] += len(bins)
            pool.clear()

        for tokens, mask, whole, capability, lang in examples:
            count["examples"] += 1
            if whole and len(tokens) > context:
                dropped["too_long"] += 1
                continue
            pieces = [piece for piece in packing.windows(tokens, mask, context) if piece[1].any()]
            if not pieces:
                dropped["no_loss"] += 1
                continue
            count["pieces"] += len(pieces)
            count["tokens"] += sum(len(piece) for piece, _ in pieces)
            count["loss_tokens"] += int(sum(piece_mask.sum() for _, piece_mask in pieces))
            lengths[max(32, 1 << math.ceil(math.log2(len(tokens))))] += 1
            by_capability[capability.decode() or "unnamed"] += len(tokens)
            by_lang[lang.decode() or "unnamed"] += len(tokens)
            name = capability.decode()
            number = CAPABILITIES.index(name) + 1 if name in CAPABILITIES else 0
            pool += [(*piece, number) for piece in pieces]
            if len(pool) >= POOL:
                write_pool()
        write_pool()
        writer.close()
        if not count["rows"]:
            raise UserError(
                f"component {inputs['component']!r} of {inputs['stage']}.mixture has {count['examples']} examples and "
                f"none is usable (longer than context={context}: {dropped['too_long']}, nothing to learn: "
                f"{dropped['no_loss']}); raise {inputs['stage']}.context or take it out of the mixture"
            )
        size = temporary.stat().st_size
    card = dict(
        stage=inputs["stage"],
        component=inputs["component"],
        context=context,
        rows=count["rows"],
        tokens=count["tokens"],
        loss_tokens=count["loss_tokens"],
        examples=count["examples"],
        pieces=count["pieces"],
        dropped=dict(dropped),
        fill=round(count["tokens"] / (count["rows"] * context), 4),
        tokens_by_capability=dict(sorted(by_capability.items())),
        tokens_by_lang=dict(sorted(by_lang.items())),
        examples_by_length=[[upper, lengths[upper]] for upper in sorted(lengths)],
        bytes=size,
        tokenizer=inputs["tokenizer"],
        inputs=inputs,
        fingerprint=_digest(inputs),
    )
    files.write_json(side_path(path), card)
    return card


def _digest(value: dict) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
