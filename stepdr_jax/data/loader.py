"""The loader: packed batches as a pure function of (seed, step), from ArrayRecord shards.

Each component is shuffled anew every epoch and repeated for ever; `mixing` says which row of which component stands where, so
that tokens come at the rates. `grain.MapDataset.source(loader)` is the same batches for pipelines of grain. Resuming at a step, on any number of hosts, is indexing with it.
TensorFlow is never imported here.
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
from stepdr_jax.data import rates as rates_of
from stepdr_jax.data.component import Component
from stepdr_jax.errors import UserError


class Loader:
    """Batches of one stage.

    Attributes:
        sources: component names; a batch's `source` values index this list.
        families: data family of each source, for learning curves of SFT; else [].
        context: tokens in a row.
        rows: component -> rows on disk (one epoch of it).
        fingerprint: changes when the data, the mixture, the batch size or the seed change; kept beside a checkpoint it
            tells whether a resumed run would see the same batches.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike,
        stage: str,
        mixture: Mapping[str, float],
        batch: int,
        seed: int,
        tokenizer_fingerprint: str,
        opening: tuple[str, int] = ("", 0),
        heldout_rows: int = 0,
        remix: Sequence = (),
        on_damage: str = "stop",
    ):
        """Opens data_dir/<stage>/<component>.json and its shards for each component that is read at any step.

        Rates are shares of tokens. `opening` and `remix` change them by step (`rates.stages`). `heldout_rows` of each component,
        at most a quarter, are never drawn; they are spread evenly over it. Long texts and renamed copies of an episode may
        still have parts in both.

        Raises UserError when a file is absent, damaged (with on_damage stop), or built with another tokenizer.
        """
        stages = rates_of.stages(mixture, remix, opening, stage)
        self.sources = sorted({name for _, rates in stages for name in rates})
        folder = Path(data_dir) / stage
        cards = {name: _card(folder, name, tokenizer_fingerprint) for name in self.sources}
        contexts = {card["context"] for card in cards.values()}
        if len(contexts) > 1:
            raise UserError(f"{folder} mixes rows of {sorted(contexts)} tokens; run launch.build_data")
        self.context = contexts.pop()
        self.rows = {name: card["rows"] for name, card in cards.items()}
        self.fingerprint = _hash(
            stage, stages, batch, seed, [cards[n]["fingerprint"] for n in self.sources], heldout_rows
        )
        self.families = []
        if stage == "sft":
            self.families = [cards[name].get("family") or name.removeprefix("sft_") for name in self.sources]
        self._components = [Component(folder, cards[name], on_damage) for name in self.sources]
        self._heldout = [_spread(len(rows), min(heldout_rows, len(rows) // 4)) for rows in self._components]
        orders = {}
        for name, held in zip(self.sources, self._heldout, strict=True):
            trained = np.delete(np.arange(self.rows[name]), held)
            orders[name] = mixing.Order(
                _tokens(folder, cards[name])[trained], int(_hash(seed, stage, name), 16), trained
            )
        self._size = batch
        self._schedule = mixing.Schedule(stages, orders, batch)

    @property
    def damaged(self) -> dict[str, int]:
        """Rows that were padding so far because their shard is damaged or missing, by file."""
        return {file: rows for component in self._components for file, rows in component.damaged.items()}

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Returns the batch of `step` (from 0): tokens, segment_ids, positions, capability int32[B,T], loss_mask bool[B,T],
        source int32[B]. The same (seed, step) gives the same batch in any process and order of calls.

        Args:
            rows: which rows of the whole batch to read, for a host that feeds only those; None = all of them.
        """
        source_B, row_B = (array[rows or slice(None)] for array in self._schedule.rows(step))
        if not len(source_B):
            raise ValueError(f"expected rows of a batch of {self._size}, got {rows}, which has none")
        return self._read(source_B, row_B)

    def __len__(self) -> int:
        """Batches that there can be: for grain, which wants a length; a loader does not end."""
        return sys.maxsize

    def __getitem__(self, step: SupportsIndex) -> dict[str, np.ndarray]:
        return self.batch(int(step))

    @property
    def heldout_batches(self) -> int:
        """How many batches the rows that are never drawn make."""
        return -(-sum(map(len, self._heldout)) // self._size)

    def heldout_batch(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index` of the rows that are never drawn, component by component; padding fills the last one."""
        source_N = np.repeat(np.arange(len(self.sources), dtype=np.int32), [len(held) for held in self._heldout])
        chosen = slice(index * self._size, (index + 1) * self._size)
        batch = self._read(source_N[chosen], np.concatenate(self._heldout)[chosen])
        missing = self._size - len(batch["source"])
        return {name: np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for name, array in batch.items()}

    def _read(self, source_B: np.ndarray, row_B: np.ndarray) -> dict[str, np.ndarray]:
        stored: list[bytes | None] = [None] * len(source_B)
        for source in np.unique(source_B):
            places = np.flatnonzero(source_B == source)
            for place, data in zip(places, self._components[source].read(row_B[places]), strict=True):
                stored[place] = data
        batch = packing.rows_from_bytes(stored, self.context)
        return batch | dict(source=source_B.astype(np.int32))


def _tokens(folder: Path, card: dict) -> np.ndarray:
    """Tokens in each row of a component, int32[rows]. Raises UserError when they are not those of the card."""
    path = folder / f"{card['component']}.npy"
    try:
        tokens_N = np.load(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged ({error}); run launch.build_data again") from None
    if len(tokens_N) != card["rows"] or int(tokens_N.sum()) != card["tokens"]:
        raise UserError(
            f"{path} is damaged (expected {card['rows']} rows of {card['tokens']} tokens); run launch.build_data"
        )
    return tokens_N


def _spread(rows: int, count: int) -> np.ndarray:
    """Returns `count` of `rows` row numbers, ascending and evenly spaced."""
    return (np.arange(count, dtype=np.int64) * rows + rows // 2) // max(count, 1)


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
    if "shards" not in card:
        raise UserError(f"{path} is of an older build; run launch.build_data again")
    return card


def _hash(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
