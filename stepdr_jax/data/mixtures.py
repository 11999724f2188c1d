"""seqio Tasks and Mixtures over the corpus: Table 1 (mid-training I), Table 2 (mid-training II) and SFT.

One Task per stage and component, one Mixture per stage with the rates of `config.<stage>.mixture`. A component draws
from two files:
- corpus/reading.jsonl, rows {id, component, capability, lang, loss, text} or {..., prompt, completion}. Text is a
  document; prompt and completion follow each other as they stand, or as one user and one assistant turn of the chat
  format when the row says "chat": true. `loss` is "all" or "completion".
- corpus/trajectories.jsonl, kept `records.Trajectory` rows whose metadata names the component. Their loss is on all
  tokens or on the assistant's alone (`config.<stage>.trajectory_loss`).

The component `copying` is in no file: spans of random ids, each followed by itself until the example is full, from which a
small model learns within a minute to continue what it has seen before (docs/benchmarks.md).

Importing this module imports TensorFlow (seconds, 0.9 GB): only building data does.
"""

import functools
import json
import re
from pathlib import Path

import numpy as np
import pydantic
import seqio
import tensorflow as tf

from stepdr_jax.errors import UserError
from stepdr_jax.records import Message, Trajectory
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

tf.config.set_visible_devices([], "GPU")  # strings and integers only; the accelerator belongs to JAX

BLOCK = 512  # rows tokenised in one call from TensorFlow into Python
READING, TRAJECTORY = b"r", b"t"  # a source row is this letter and a line of the file it names
COPYING = "copying"
COPYING_EXAMPLES, COPYING_TOKENS, COPYING_SPAN = 16_000, 128, (5, 30)  # examples, tokens in one, ids in a span


class BpeVocabulary(seqio.Vocabulary):
    """Our tokenizer as seqio's vocabulary: text in, ordinary ids out, never a control id."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    @property
    def eos_id(self) -> int:
        return self.tokenizer.endoftext

    @property
    def unk_id(self) -> None:
        return None  # bytes cover everything

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        ids = tf.py_function(lambda text: np.asarray(self._encode(text.numpy().decode()), np.int32), [s], tf.int32)
        return tf.ensure_shape(ids, [None])

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        return tf.py_function(lambda array: self._decode(array.numpy().tolist()), [ids], tf.string)


def task_name(stage: str, component: str) -> str:
    return f"stepdr_{stage}_{component}"


def mixture_name(stage: str) -> str:
    return f"stepdr_{stage}"


def register(config, tokenizer: Tokenizer) -> None:
    """Registers every stage's Tasks and its Mixture with seqio, replacing those of an earlier call.

    Examples have `tokens` int32[T], `loss_mask` bool[T] (the token is to be predicted), and for a Task also
    `whole` (bool: must not be split), `capability` and `lang` (bytes).
    """
    features = {
        "tokens": seqio.Feature(BpeVocabulary(tokenizer), add_eos=False),
        "loss_mask": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.bool),
    }
    corpus = Path(config.run_dir) / "corpus"
    for stage in ("midtrain1", "midtrain2", "sft"):
        rates = {component: rate for component, rate in config[stage].mixture.items() if rate > 0}
        loss = config[stage].trajectory_loss
        if loss not in ("all", "assistant"):
            raise UserError(f"expected {stage}.trajectory_loss to be all or assistant, got {loss!r}; change the config")
        for component in rates:
            if component == COPYING:
                read = functools.partial(_copying_source, tokenizer=tokenizer, seed_of_data=config.data_seed)
                preprocessors = []
            else:
                read = functools.partial(_source, corpus=corpus, component=component)
                preprocessors = [functools.partial(_tokenize, tokenizer=tokenizer, trajectory_loss=loss)]
            seqio.TaskRegistry.remove(task_name(stage, component))
            seqio.TaskRegistry.add(
                task_name(stage, component),
                source=seqio.FunctionDataSource(read, splits=["train"]),
                preprocessors=[*preprocessors, seqio.CacheDatasetPlaceholder()],
                output_features=features,
            )
        seqio.MixtureRegistry.remove(mixture_name(stage))
        seqio.MixtureRegistry.add(mixture_name(stage), [(task_name(stage, c), rate) for c, rate in rates.items()])


def component_rows(corpus: Path, component: str) -> dict[str, int]:
    """Returns how many rows each corpus file holds for a component."""
    if component == COPYING:
        return {COPYING: COPYING_EXAMPLES}
    return {path.name: len(_index(path, *_version(path)).get(component, ())) for path in _files(corpus)}


def _files(corpus: Path) -> list[Path]:
    return [corpus / "reading.jsonl", corpus / "trajectories.jsonl"]


def _version(path: Path) -> tuple[int, int]:
    if not path.exists():
        raise UserError(f"{path} does not exist; run launch.synthesize first")
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@functools.lru_cache(maxsize=8)
def _index(path: Path, mtime: int, size: int) -> dict[str, list[tuple[int, int]]]:
    """Checks every row of a corpus file and returns component -> (start, end) bytes of its rows, in file order.

    `mtime` and `size` only make a changed file a new entry of the cache. A torn last line is left out. Raises
    UserError naming file, line and field.
    """
    del mtime, size
    components_of = _trajectory_components if path.name == "trajectories.jsonl" else _reading_components
    rows: dict[str, list[tuple[int, int]]] = {}
    start = 0
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                break
            try:
                components = components_of(line)
            except ValueError as error:
                raise UserError(f"{path} line {number}: {error}; fix or delete that line") from None
            for component in components:
                rows.setdefault(component, []).append((start, start + len(line)))
            start += len(line)
    return rows


def _reading_components(line: bytes) -> list[str]:
    row = json.loads(line)
    if not isinstance(row, dict) or not isinstance(row.get("component"), str):
        raise ValueError("expected an object with a field 'component'")
    fields = ("text",) if "text" in row else ("prompt", "completion")
    if not all(isinstance(row.get(field), str) for field in fields):
        raise ValueError("expected text, or prompt and completion, as strings")
    loss = row.get("loss", "all")
    if loss not in ("all", "completion") or (loss == "completion" and "text" in row):
        raise ValueError(f"expected loss all, or completion for a row with one, got {loss!r}")
    return [row["component"]]


def _trajectory_components(line: bytes) -> list[str]:
    try:
        trajectory = Trajectory.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"field {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from None
    if not trajectory.kept:
        return []
    if not any(message.role == "assistant" for message in trajectory.messages):
        raise ValueError(f"kept trajectory {trajectory.id} has no assistant message")
    return list(dict.fromkeys(trajectory.metadata.get("components", [])))


def _source(split: str, shuffle_files: bool, seed: int | None = None, *, corpus: Path, component: str):
    """The rows of one component as strings, in file order; packing shuffles, so nothing is shuffled here."""
    del split, shuffle_files, seed
    indices = [(path, _index(path, *_version(path)).get(component, [])) for path in _files(corpus)]

    def blocks():
        for path, spans in indices:
            letter = TRAJECTORY if path.name == "trajectories.jsonl" else READING
            with open(path, "rb") as file:
                for first in range(0, len(spans), BLOCK):
                    block = []
                    for start, end in spans[first : first + BLOCK]:
                        file.seek(start)
                        block.append(letter + file.read(end - start))
                    yield np.asarray(block, object)

    spec = tf.TensorSpec([None], tf.string)
    return tf.data.Dataset.from_generator(blocks, output_signature=spec).unbatch().map(lambda row: {"row": row})


def _copying_source(
    split: str, shuffle_files: bool, seed: int | None = None, *, tokenizer: Tokenizer, seed_of_data: int
):
    """Examples of a random span and its repetitions; every id after the first span is a target."""
    del split, shuffle_files, seed

    def examples():
        rng = np.random.default_rng([seed_of_data, 0xC0B1])
        for _ in range(COPYING_EXAMPLES):
            length = int(rng.integers(*COPYING_SPAN))
            span = rng.integers(tokenizer.endoftext, size=length)  # ordinary ids come before the control ids
            yield {
                "tokens": np.resize(span, COPYING_TOKENS).astype(np.int32),
                "loss_mask": np.arange(COPYING_TOKENS) >= length,
                "whole": True,
                "capability": COPYING,
                "lang": "none",
            }

    return tf.data.Dataset.from_generator(
        examples,
        output_signature={
            "tokens": tf.TensorSpec([None], tf.int32),
            "loss_mask": tf.TensorSpec([None], tf.bool),
            "whole": tf.TensorSpec([], tf.bool),
            "capability": tf.TensorSpec([], tf.string),
            "lang": tf.TensorSpec([], tf.string),
        },
    )


def _tokenize(dataset: tf.data.Dataset, *, tokenizer: Tokenizer, trajectory_loss: str) -> tf.data.Dataset:
    """Rows to examples, a block at a time: one call into Python for many rows, ragged tensors back."""

    def examples_of(block):
        examples = [_example(row, tokenizer, trajectory_loss) for row in block]
        tokens, masks, wholes, capabilities, langs = zip(*examples, strict=True)
        return (
            np.concatenate(tokens),
            np.concatenate(masks),
            np.asarray([len(ids) for ids in tokens], np.int64),
            np.asarray(wholes, bool),
            np.asarray(capabilities, object),
            np.asarray(langs, object),
        )

    def ragged(block):
        types = [tf.int32, tf.bool, tf.int64, tf.bool, tf.string, tf.string]
        outputs = tf.numpy_function(examples_of, [block["row"]], types, stateful=False)
        tokens, mask, lengths, whole, capability, lang = (tf.ensure_shape(output, [None]) for output in outputs)
        return {
            "tokens": tf.RaggedTensor.from_row_lengths(tokens, lengths, validate=False),
            "loss_mask": tf.RaggedTensor.from_row_lengths(mask, lengths, validate=False),
            "whole": whole,
            "capability": capability,
            "lang": lang,
        }

    return dataset.batch(BLOCK).map(ragged).unbatch()


def _example(row: bytes, tok: Tokenizer, trajectory_loss: str) -> tuple[np.ndarray, np.ndarray, bool, bytes, bytes]:
    """Returns tokens, loss mask, whole, capability and language of one source row."""
    if row[:1] == TRAJECTORY:
        trajectory = Trajectory.model_validate_json(row[1:])
        arrays = chat.trajectory_tokens(tok, trajectory).arrays()
        mask = arrays["sampled"] if trajectory_loss == "assistant" else np.ones(len(arrays["tokens"]), bool)
        return arrays["tokens"], mask, True, trajectory.capability.encode(), _lang(trajectory).encode()
    row = json.loads(row[1:])
    if "text" in row:
        before, after = [], [*tok.encode(row["text"]), tok.endoftext]
    elif row.get("chat"):
        before = chat.prompt_ids(tok, [Message(role="user", content=row["prompt"])])
        after = chat.assistant_ids(tok, row["completion"])
    else:
        before, after = tok.encode_batch([row["prompt"], row["completion"]])
        after = [*after, tok.endoftext]
    mask = np.ones(len(before) + len(after), bool)
    if row.get("loss") == "completion":
        mask[: len(before)] = False
    tokens = np.asarray(before + after, np.int32)
    return tokens, mask, False, str(row.get("capability", "")).encode(), str(row.get("lang", "")).encode()


def _lang(trajectory: Trajectory) -> str:
    """The language its writer recorded, else that of the question."""
    question = next((message.content for message in trajectory.messages if message.role == "user"), "")
    return trajectory.metadata.get("lang") or ("zh" if re.search(r"[\u4e00-\u9fff]", question) else "en")
