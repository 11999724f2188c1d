"""The loader: packed batches as a pure function of (seed, step), from ArrayRecord shards.

Each component is shuffled again every epoch and repeated endlessly; `mixing` decides which sequence of which component
comes where, so that tokens come at the rates. To resume at a step, on any number of hosts, is to index with it.
`grain.MapDataset.source(loader)` gives the same batches to grain pipelines. TensorFlow is never imported here.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from stepdr_jax import files
from stepdr_jax.data import mixing, packing
from stepdr_jax.data.component import ComponentReader
from stepdr_jax.data.rates import rate_schedule
from stepdr_jax.errors import UserError


class Loader:
    """Batches of one stage.

    Attributes:
        sources: component names; a batch's `source` values index this list.
        families: data family of each source, for learning curves of SFT; else [].
        seq_len: tokens in a sequence.
        sequences: component -> sequences on disk (one epoch of it).
        fingerprint: changes when the data, the mixture, the batch size or the seed change; kept beside a checkpoint it
            tells whether a resumed run would see the same batches.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike,
        stage: str,
        mixture: Mapping[str, float],
        batch_size: int,
        seed: int,
        tokenizer_fingerprint: str,
        warmup_data: tuple[str, int] = ("", 0),
        heldout_sequences: int = 0,
        mixture_schedule: Sequence = (),
        on_damage: str = "stop",
    ):
        """Opens data_dir/<stage>/<component>.json and its shards for each component that is read at any step.

        Rates are shares of tokens; `warmup_data` and `mixture_schedule` change them by step (`rates.rate_schedule`).
        `heldout_sequences` sequences of each component, at most a quarter of it, are never drawn; they are spread
        evenly over it. Parts of one long text, and renamed copies of one episode, may be on both sides.

        Raises UserError when a file is absent, damaged (with on_damage stop), or built with another tokenizer.
        """
        schedule = rate_schedule(mixture, mixture_schedule, warmup_data, stage)
        self.sources = sorted({name for _, rates in schedule for name in rates})
        folder = Path(data_dir) / stage
        cards = {name: _card(folder, name, tokenizer_fingerprint) for name in self.sources}
        lengths = {card["seq_len"] for card in cards.values()}
        if len(lengths) > 1:
            raise UserError(f"{folder} mixes sequences of {sorted(lengths)} tokens; run launch.build_data")
        self.seq_len = lengths.pop()
        self.sequences = {name: card["sequences"] for name, card in cards.items()}
        self.fingerprint = _hash(
            stage, schedule, batch_size, seed, [cards[n]["fingerprint"] for n in self.sources], heldout_sequences
        )
        self.families = []
        if stage == "sft":
            self.families = [cards[name].get("family") or name.removeprefix("sft_") for name in self.sources]
        self._components = [ComponentReader(folder, cards[name], on_damage) for name in self.sources]
        self._heldout = [_spread(len(one), min(heldout_sequences, len(one) // 4)) for one in self._components]
        orders = {}
        for name, held in zip(self.sources, self._heldout, strict=True):
            trained = np.delete(np.arange(self.sequences[name]), held)
            orders[name] = mixing.ComponentOrder(
                _tokens(folder, cards[name])[trained], int(_hash(seed, stage, name), 16), trained
            )
        self._batch_size = batch_size
        self._schedule = mixing.BatchSchedule(schedule, orders, batch_size)

    @property
    def damaged(self) -> dict[str, int]:
        """Sequences read as padding so far because their shard is damaged or missing, by file."""
        return {file: count for component in self._components for file, count in component.damaged.items()}

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Returns the batch of `step` (from 0): tokens, segment_ids, positions, capability int32[B,T], loss_mask
        bool[B,T], source int32[B]. The same (seed, step) gives the same batch in any process and order of calls.

        Args:
            rows: which part of the whole batch to read, for a host that feeds only that; None = all of it.
        """
        source_B, id_B = (array[rows or slice(None)] for array in self._schedule.sequences(step))
        if not len(source_B):
            raise ValueError(f"expected part of a batch of {self._batch_size} sequences, got {rows}, which is empty")
        return self._read(source_B, id_B)

    def __len__(self) -> int:
        """grain requires a length; a loader does not end."""
        return sys.maxsize

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        return self.batch(int(step))

    @property
    def heldout_batches(self) -> int:
        """Number of batches of the held-out sequences."""
        return -(-sum(map(len, self._heldout)) // self._batch_size)

    def heldout_batch(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index` of the held-out sequences, component by component; padding fills the last one."""
        source_N = np.repeat(np.arange(len(self.sources), dtype=np.int32), [len(held) for held in self._heldout])
        chosen = slice(index * self._batch_size, (index + 1) * self._batch_size)
        batch = self._read(source_N[chosen], np.concatenate(self._heldout)[chosen])
        missing = self._batch_size - len(batch["source"])
        return {name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in batch.items()}

    def _read(self, source_B: np.ndarray, id_B: np.ndarray) -> dict[str, np.ndarray]:
        stored: list[bytes | None] = [None] * len(source_B)
        for source in np.unique(source_B):
            places = np.flatnonzero(source_B == source)
            for place, data in zip(places, self._components[source].read(id_B[places]), strict=True):
                stored[place] = data
        batch = packing.sequences_from_bytes(stored, self.seq_len)
        return batch | dict(source=source_B.astype(np.int32))


def _tokens(folder: Path, card: dict) -> np.ndarray:
    """Tokens in each sequence of a component, int32[N]. Raises UserError when they disagree with the card."""
    path = folder / f"{card['component']}.npy"
    try:
        tokens_N = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); run launch.build_data again") from None
    if len(tokens_N) != card["sequences"] or int(tokens_N.sum()) != card["tokens"]:
        raise UserError(
            f"{path} is damaged (expected {card['sequences']} sequences of {card['tokens']} tokens); "
            f"run launch.build_data again"
        )
    return tokens_N


def _spread(total: int, count: int) -> np.ndarray:
    """Returns `count` of the numbers 0..total - 1, ascending and evenly spaced."""
    return (np.arange(count, dtype=np.int64) * total + total // 2) // max(count, 1)


def _card(folder: Path, name: str, tokenizer_fingerprint: str) -> dict:
    path = folder / f"{name}.json"
    if not path.exists():
        raise UserError(f"expected {path} and its shards; run launch.build_data first")
    card = files.read_json(path)
    if card.get("tokenizer") != tokenizer_fingerprint:
        raise UserError(
            f"{path} was built with tokenizer {card.get('tokenizer')}, this run has {tokenizer_fingerprint}; "
            f"run launch.build_data again"
        )
    if "shards" not in card or "seq_len" not in card:
        raise UserError(f"{path} was written by an older version; run launch.build_data again")
    return card


def _hash(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
