"""Writes one shard: packs examples into an ArrayRecord file of sequences and describes it in a side file."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from stepdr_jax import files
from stepdr_jax.data import packing
from stepdr_jax.records import CAPABILITIES

POOL_PIECES, POOL_TOKENS = 1 << 16, 1 << 26  # packed together: enough to fill sequences, few enough for memory (0.4 GB)


def write_shard(path: Path, examples: Iterable[tuple], inputs: dict) -> dict:
    """Packs examples into sequences of `inputs["seq_len"]` tokens at `path` and returns the side file's content.

    Beside `path` it writes the number of tokens in each sequence (.npy, int32) and, last, the side file (.json).

    The order of sequences, and of examples in them, is a function of the examples and of `inputs`.

    Args:
        examples: (tokens, loss mask, whole, capability, lang, license, source); the last four are bytes. `whole` ones
            are dropped when they are longer than a sequence, the others are split into windows.
        inputs: what the shard depends on: seed, stage, component, seq_len, tokenizer and more.
    """
    seq_len = inputs["seq_len"]
    naming = {name: inputs[name] for name in ("seed", "stage", "component")} | {"shard": inputs.get("shard", [0, 1])[0]}
    rng = np.random.default_rng(int(digest_of(naming), 16))
    count, dropped, lengths = Counter(), Counter(too_long=0, no_loss=0), Counter()
    by = {name: Counter() for name in ("capability", "lang", "license", "source")}
    path.with_suffix(".json").unlink(missing_ok=True)  # from here to the end the shard is unfinished
    pool: list[tuple[np.ndarray, np.ndarray, int]] = []
    pooled = 0
    sequence_tokens: list[int] = []

    with files.atomic_path(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")

        def write_pool() -> None:
            pool_order = rng.permutation(len(pool))
            shuffled = [pool[index] for index in pool_order]
            bins = packing.pack_best_fit([len(tokens) for tokens, *_ in shuffled], seq_len)
            for index in rng.permutation(len(bins)):
                sequence = [shuffled[i] for i in rng.permutation(bins[index])]
                writer.write(packing.sequence_bytes(sequence, seq_len))
                sequence_tokens.append(sum(len(example[0]) for example in sequence))
            count["sequences"] += len(bins)
            pool.clear()

        for tokens, mask, whole, *labels in examples:
            count["examples"] += 1
            if whole and len(tokens) > seq_len:
                dropped["too_long"] += 1
                continue
            pieces = [piece for piece in packing.split_windows(tokens, mask, seq_len) if piece[1].any()]
            if not pieces:
                dropped["no_loss"] += 1
                continue
            size = sum(len(piece) for piece, _ in pieces)
            count["pieces"] += len(pieces)
            count["tokens"] += size
            count["loss_tokens"] += int(sum(piece_mask.sum() for _, piece_mask in pieces))
            lengths[max(32, 1 << math.ceil(math.log2(len(tokens))))] += 1
            for counter, label in zip(by.values(), labels, strict=True):
                counter[label.decode() or "other"] += len(tokens)
            capability = labels[0].decode()
            number = CAPABILITIES.index(capability) + 1 if capability in CAPABILITIES else 0
            pool += [(*piece, number) for piece in pieces]
            pooled += size
            if len(pool) >= POOL_PIECES or pooled >= POOL_TOKENS:
                write_pool()
                pooled = 0
        write_pool()
        writer.close()
        size = temporary.stat().st_size
    card = dict(
        file=path.name,
        bytes=size,
        dropped=dict(dropped),
        **{name: count[name] for name in ("sequences", "tokens", "loss_tokens", "examples", "pieces")},
        **{f"tokens_by_{name}": dict(sorted(counter.items())) for name, counter in by.items()},
        examples_by_length=[[upper, lengths[upper]] for upper in sorted(lengths)],
        inputs=inputs,
    )
    with files.atomic_path(path.with_suffix(".npy")) as temporary, open(temporary, "wb") as out:
        np.save(out, np.asarray(sequence_tokens, np.int32))
    files.write_json(path.with_suffix(".json"), card)
    return card


def digest_of(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()
