"""Measures the loader against plain tf.data and Hugging Face datasets doing the same work, on one core.

The work: tokenized examples of three components are read from disk, shuffled, mixed by weights, packed to sequences
with segment ids and positions, and batched. Our loader reads sequences that were packed when the data was built
(`packing once`); the others pack while they read, with a shuffle buffer. All run on one core, one after another.
Seconds are CPU seconds over all threads of the process, so that other work on the machine does not count.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import flags

from launch import entry
from stepdr_jax.data import build, packing
from stepdr_jax.data.loader import Loader
from stepdr_jax.data.shard import write_shard

WEIGHTS = {"long": 0.5, "middle": 0.3, "short": 0.2}  # shares of tokens for us, of examples for the others
MEANS = {"long": 8.0, "middle": 6.5, "short": 5.0}  # of the logarithm of an example's length; its deviation is 1
SHUFFLE, POOL, WARM_UP = 2000, 1000, 3

_SEQ_LEN = flags.DEFINE_integer("seq_len", 2048, "tokens in a sequence")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "sequences in a batch")
_BATCHES = flags.DEFINE_integer("batches", 400, "batches to measure")
_TOKENS = flags.DEFINE_integer("tokens", 4_000_000, "tokens of each component on disk")


def main(config) -> None:
    del config
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    seq_len, batch_size, batches = _SEQ_LEN.value, _BATCH_SIZE.value, _BATCHES.value
    examples = {name: _examples(name, _TOKENS.value, seq_len) for name in WEIGHTS}
    print(
        f"sequences of {seq_len} tokens, {batches} batches of {batch_size}, "
        f"{len(WEIGHTS)} components of {_TOKENS.value:,} tokens"
    )
    print(f"one core of this machine, load {os.getloadavg()[0]:.1f}\n")
    print(f"{'loader':<24}{'tokens/CPU s':>14}{'fill':>12}{'first batch s':>16}")
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("ours", _ours), ("tf.data", _tf_data), ("Hugging Face datasets", _datasets)):
            try:
                began = time.process_time()
                stream = make(Path(folder) / name.split()[0], examples, seq_len, batch_size)
                if name == "ours":
                    packed = time.process_time() - began
                began = time.perf_counter()
                next(stream)
            except ImportError as error:
                print(f"{name:<24}  skipped: {error}")
                continue
            first = time.perf_counter() - began
            for _ in range(WARM_UP):
                next(stream)
            tokens, began = 0, time.process_time()
            for _ in range(batches):
                tokens += int((next(stream)["segment_ids"] > 0).sum())
            rates[name] = tokens / (time.process_time() - began)
            print(
                f"{name:<24}{rates[name]:>14,.0f}{tokens / (batches * batch_size * seq_len):>12.1%}{first:>16.2f}",
                flush=True,
            )
    total = sum(len(tokens) for rows in examples.values() for tokens in rows)
    print(f"\npacking once (ours): {total / packed:,.0f} tokens/CPU s")
    for name, rate in rates.items():
        if name != "ours":
            with_packing = 1 / (1 / rates["ours"] + packed / total)
            print(
                f"ours over {name}: {rates['ours'] / rate:.1f}x; "
                f"in the first epoch, with packing: {with_packing / rate:.1f}x"
            )


def _examples(name: str, total: int, seq_len: int) -> list[np.ndarray]:
    rng = np.random.default_rng(len(name))
    lengths = []
    while sum(lengths) < total:
        lengths.append(int(np.clip(rng.lognormal(MEANS[name], 1), 16, seq_len)))
    return [rng.integers(1, 150_000, length, dtype=np.int32) for length in lengths]


def _ours(folder: Path, examples: dict, seq_len: int, batch_size: int) -> Iterator[dict]:
    for name, rows in examples.items():
        labels = (b"", b"en", b"", name.encode())
        inputs = dict(stage="midtrain1", component=name, seq_len=seq_len, seed=0, tokenizer="bench")
        path = folder / "midtrain1" / f"{name}-00000-of-00001.arecord"
        card = write_shard(path, ((row, np.ones(len(row), bool), False, *labels) for row in rows), inputs)
        build.write_component_card(folder / "midtrain1", name, [card], {})
    loader = Loader(folder, "midtrain1", WEIGHTS, batch_size, 0, "bench")
    return (loader.batch(step) for step in range(sys.maxsize))


def _tf_data(folder: Path, examples: dict, seq_len: int, batch_size: int) -> Iterator[dict]:
    with build.quiet_stderr():
        import seqio
        import tensorflow as tf
    folder.mkdir()
    tf.config.set_visible_devices([], "GPU")
    components = []
    for name, rows in examples.items():
        path = str(folder / f"{name}.tfrecord")
        with tf.io.TFRecordWriter(path) as writer:
            for row in rows:
                writer.write(row.tobytes())
        dataset = tf.data.TFRecordDataset(path).repeat().shuffle(SHUFFLE, seed=0)
        components.append(dataset.map(lambda row: {"tokens": tf.io.decode_raw(row, tf.int32)}))
    mixed = tf.data.Dataset.sample_from_datasets(components, list(WEIGHTS.values()), seed=0)
    # it packs as many examples at a time as a sequence has tokens: read enough batches to see its mean speed
    packed = seqio.trim_and_pack_dataset(mixed, {"tokens": seq_len}, use_custom_ops=False)
    for row in packed.batch(batch_size).as_numpy_iterator():
        yield dict(tokens=row["tokens"], segment_ids=row["tokens_segment_ids"], positions=row["tokens_positions"])


def _datasets(folder: Path, examples: dict, seq_len: int, batch_size: int) -> Iterator[dict]:
    import datasets

    components = []
    for name, rows in examples.items():
        datasets.Dataset.from_dict({"tokens": rows}).save_to_disk(str(folder / name))
        stored = datasets.load_from_disk(str(folder / name)).with_format("numpy")
        components.append(stored.to_iterable_dataset().shuffle(seed=0, buffer_size=SHUFFLE).repeat(None))
    mixed = datasets.interleave_datasets(components, probabilities=list(WEIGHTS.values()), seed=0)

    def packed(block: dict) -> dict:
        rows = block["tokens"]
        found = {"tokens": [], "segment_ids": [], "positions": []}
        for chosen in packing.pack_best_fit([len(row) for row in rows], seq_len):
            row = {name: np.zeros(seq_len, np.int32) for name in found}
            start = 0
            for number, index in enumerate(chosen, 1):
                end = start + len(rows[index])
                row["tokens"][start:end], row["segment_ids"][start:end] = rows[index], number
                row["positions"][start:end] = np.arange(end - start)
                start = end
            for name in found:
                found[name].append(row[name])
        return found

    features = datasets.Features(
        {n: datasets.Sequence(datasets.Value("int32")) for n in ("tokens", "segment_ids", "positions")}
    )
    ready = mixed.map(packed, batched=True, batch_size=POOL, features=features).with_format("numpy")
    for row in ready.batch(batch_size):
        yield {name: np.stack(list(row[name])) for name in ("tokens", "segment_ids", "positions")}


if __name__ == "__main__":
    entry.run(main, __doc__)
