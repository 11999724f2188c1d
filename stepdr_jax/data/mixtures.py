"""seqio Tasks and Mixtures over the sources: Table 1 (mid-training I), Table 2 (mid-training II) and SFT.

There is one Task for each stage and component, and one Mixture for each stage with the rates of
`config.<stage>.mixture`. A Task reads the component's plans (`selection`): rows of any source format (`sources`). A
text is one document. Prompt and completion are concatenated, or become a user and an assistant turn of the chat
format when the row has "chat": true; `loss` is "all" or "completion". In trajectories all tokens are trained on, or
the assistant's only (`config.<stage>.trajectory_loss`).

The component `copying` is generated: a span of random ids, repeated until the example is full. From it a small model
learns within a minute to continue what it has seen before (docs/benchmarks.md).

Importing this module imports TensorFlow (seconds, 0.9 GB): only building data does.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from stepdr_jax.data import rates, selection
from stepdr_jax.errors import UserError
from stepdr_jax.records import Message, Trajectory
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

tf.config.set_visible_devices([], "GPU")  # strings and integers only; the accelerator belongs to JAX

BLOCK = 512  # rows tokenised in one call from TensorFlow into Python
LABELS = ("capability", "lang", "license", "source")  # strings of a row that are passed on with its example
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


class PlannedRows(seqio.DataSource):
    """The rows of a component's plans as JSON, in order; packing shuffles them later."""

    def __init__(self, plans: Sequence[Path]):
        super().__init__(splits=["train"])
        self._plans = [str(plan) for plan in plans]

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        return self._plans

    def get_dataset(
        self,
        split="train",
        shuffle=False,
        seed=None,
        shard_info=None,
        *,
        sequence_length=None,
        use_cached=False,
        num_epochs=1,
    ):
        plans = self._plans[shard_info.index :: shard_info.num_shards] if shard_info else self._plans

        def blocks():
            for plan in plans:
                block = []
                for row in selection.read_plan_rows(Path(plan)):
                    block.append(json.dumps(row, ensure_ascii=False).encode(errors="replace"))
                    if len(block) == BLOCK:
                        yield np.asarray(block, object)
                        block = []
                if block:
                    yield np.asarray(block, object)

        spec = tf.TensorSpec([None], tf.string)
        return tf.data.Dataset.from_generator(blocks, output_signature=spec).unbatch().map(lambda row: {"row": row})


def register_mixtures(config, tokenizer: Tokenizer, plans: Mapping[str, Sequence[Path]]) -> None:
    """Registers every stage's Tasks and its Mixture with seqio, replacing those of an earlier call.

    Examples have `tokens` int32[T] and `loss_mask` bool[T] (the token is to be predicted). Those of a Task also have
    `whole` (bool: must not be split) and `capability`, `lang`, `license`, `source` (bytes).

    Args:
        plans: component -> its plans; a component without any gets no Task.
    """
    features = {
        "tokens": seqio.Feature(BpeVocabulary(tokenizer), add_eos=False),
        "loss_mask": seqio.Feature(seqio.PassThroughVocabulary(2), add_eos=False, dtype=tf.bool),
    }
    for stage in ("midtrain1", "midtrain2", "sft"):
        loss = config[stage].trajectory_loss
        if loss not in ("all", "assistant"):
            raise UserError(f"expected {stage}.trajectory_loss to be all or assistant, got {loss!r}; change the config")
        present = [c for c in rates.stage_components(config[stage]) if c == COPYING or plans.get(c)]
        for component in present:
            if component == COPYING:
                read = functools.partial(_copying_source, tokenizer=tokenizer, seed_of_data=config.data_seed)
                source, preprocessors = seqio.FunctionDataSource(read, splits=["train"]), []
            else:
                source = PlannedRows(plans[component])
                preprocessors = [functools.partial(_tokenize, tokenizer=tokenizer, trajectory_loss=loss)]
            seqio.TaskRegistry.remove(task_name(stage, component))
            seqio.TaskRegistry.add(
                task_name(stage, component),
                source=source,
                preprocessors=[*preprocessors, seqio.CacheDatasetPlaceholder()],
                output_features=features,
            )
        seqio.MixtureRegistry.remove(mixture_name(stage))
        shares = [
            (task_name(stage, c), config[stage].mixture[c]) for c in present if config[stage].mixture.get(c, 0) > 0
        ]
        if shares:
            seqio.MixtureRegistry.add(mixture_name(stage), shares)


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
                "license": "none",
                "source": COPYING,
            }

    return tf.data.Dataset.from_generator(
        examples,
        output_signature={
            "tokens": tf.TensorSpec([None], tf.int32),
            "loss_mask": tf.TensorSpec([None], tf.bool),
            "whole": tf.TensorSpec([], tf.bool),
            "capability": tf.TensorSpec([], tf.string),
            **{name: tf.TensorSpec([], tf.string) for name in ("lang", "license", "source")},
        },
    )


def _tokenize(dataset: tf.data.Dataset, *, tokenizer: Tokenizer, trajectory_loss: str) -> tf.data.Dataset:
    """Rows to examples, a block at a time: one call into Python for many rows returns ragged tensors."""

    def examples_of(block):
        examples = [_row_to_example(json.loads(row), tokenizer, trajectory_loss) for row in block]
        tokens, masks, wholes, *labels = zip(*examples, strict=True)
        return (
            np.concatenate(tokens),
            np.concatenate(masks),
            np.asarray([len(ids) for ids in tokens], np.int64),
            np.asarray(wholes, bool),
            *(np.asarray(label, object) for label in labels),
        )

    def ragged(block):
        types = [tf.int32, tf.bool, tf.int64, tf.bool, *[tf.string] * len(LABELS)]
        outputs = tf.numpy_function(examples_of, [block["row"]], types, stateful=False)
        tokens, mask, lengths, whole, *labels = (tf.ensure_shape(output, [None]) for output in outputs)
        return {
            "tokens": tf.RaggedTensor.from_row_lengths(tokens, lengths, validate=False),
            "loss_mask": tf.RaggedTensor.from_row_lengths(mask, lengths, validate=False),
            "whole": whole,
            **dict(zip(LABELS, labels, strict=True)),
        }

    return dataset.batch(BLOCK).map(ragged).unbatch()


def _row_to_example(row: dict, tok: Tokenizer, trajectory_loss: str) -> tuple:
    """Returns tokens, loss mask, whole and LABELS of one row."""
    labels = tuple(str(row.get(name, "")).encode() for name in LABELS)
    if "trajectory" in row:
        arrays = chat.trajectory_tokens(tok, Trajectory.model_validate(row["trajectory"])).arrays()
        mask = arrays["sampled"] if trajectory_loss == "assistant" else np.ones(len(arrays["tokens"]), bool)
        return arrays["tokens"], mask, True, *labels
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
    return np.asarray(before + after, np.int32), mask, False, *labels
