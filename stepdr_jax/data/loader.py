"""The loader: packed batches as a pure function of (seed, step), through grain over ArrayRecord.

Each component is shuffled anew every epoch and repeated for ever; components are interleaved by their rates with
deterministic counts. Resuming at a step is indexing with it. TensorFlow is never imported here.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsIndex

import grain
import numpy as np

from stepdr_jax import files
from stepdr_jax.data import packing
from stepdr_jax.errors import UserError


class _Rows:
    """grain's view of one component: random access to parsed rows, with errors that name the file."""

    def __init__(self, path: Path, card: dict, source: int):
        self._path, self._context, self._source = path, card["context"], source
        try:
            self._records = grain.sources.ArrayRecordDataSource(str(path))
            rows = len(self._records)
        except Exception as error:  # the reader raises RuntimeError or ValueError by the kind of damage
            raise self._damaged(error) from None
        if rows != card["rows"]:
            raise self._damaged(f"expected {card['rows']} rows, got {rows}")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: SupportsIndex) -> dict[str, np.ndarray]:
        try:
            row = packing.row_from_bytes(self._records[index], self._context)
        except Exception as error:
            raise self._damaged(error) from None
        return row | dict(source=np.int32(self._source))

    def _damaged(self, reason) -> UserError:
        short = (str(reason) or repr(reason)).splitlines()[0][:160]
        return UserError(f"{self._path} is damaged ({short}); delete it and run launch.build_data again")


class Loader:
    """Batches of one stage.

    Attributes:
        sources: component names; a batch's `source` values index this list.
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
    ):
        """Opens data_dir/<stage>/<component>.arecord for each component with a positive rate.

        `opening` is a curriculum of two parts: (component, n) draws the first n batches from that component alone.
        `heldout_rows` of each component, at most a quarter, are never drawn: its last ones, which are any, as rows are
        shuffled when they are built. Long texts and renamed copies of an episode may still have parts in both.

        Raises UserError when a file is absent, damaged, or built with another tokenizer.
        """
        rates = {name: float(rate) for name, rate in sorted(mixture.items()) if rate > 0}
        if not rates:
            raise UserError(f"expected at least one positive rate in {stage}.mixture, got none; set one in the config")
        self.sources = list(rates)
        cards = {name: _card(Path(data_dir) / stage, name, tokenizer_fingerprint) for name in self.sources}
        contexts = {card["context"] for card in cards.values()}
        if len(contexts) > 1:
            raise UserError(f"{Path(data_dir) / stage} mixes rows of {sorted(contexts)} tokens; run launch.build_data")
        self.context = contexts.pop()
        self.rows = {name: card["rows"] for name, card in cards.items()}
        self.fingerprint = _hash(
            stage, rates, batch, seed, [cards[name]["fingerprint"] for name in rates], opening, heldout_rows
        )
        self.families = [name.removeprefix("sft_") for name in self.sources] if stage == "sft" else []
        components, self._heldout = [], []
        for index, name in enumerate(self.sources):
            rows = _Rows(Path(data_dir) / stage / f"{name}.arecord", cards[name], index)
            trained = len(rows) - min(heldout_rows, len(rows) // 4)
            self._heldout += [(rows, row) for row in range(trained, len(rows))]
            component_seed = int(_hash(seed, stage, name)[:8], 16)
            components.append(grain.MapDataset.source(rows)[:trained].seed(component_seed).shuffle().repeat())
        mixed = grain.MapDataset.mix(components, weights=list(rates.values()))
        self._size = batch
        self._mixed = mixed
        component, self._opening_steps = opening
        if self._opening_steps:
            if component not in rates:
                raise UserError(
                    f"expected {stage}.opening to be a component of its mixture ({', '.join(rates)}), got {component!r}"
                )
            self._opening = components[self.sources.index(component)]

    def batch(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Returns the batch of `step` (from 0): tokens, segment_ids, positions, capability int32[B,T], loss_mask bool[B,T],
        source int32[B]. The same (seed, step) gives the same batch in any process and order of calls.

        Args:
            rows: which rows of the whole batch to read, for a host that feeds only those; None = all of them.
        """
        opening = step < self._opening_steps
        drawn, first = (self._opening, step) if opening else (self._mixed, step - self._opening_steps)
        chosen = range(self._size)[rows or slice(None)]
        if not chosen:
            raise ValueError(f"expected rows of a batch of {self._size}, got {rows}, which has none")
        read = [drawn[first * self._size + row] for row in chosen]
        return {name: np.stack([row[name] for row in read]) for name in read[0]}

    @property
    def heldout_batches(self) -> int:
        """How many batches the rows that are never drawn make."""
        return -(-len(self._heldout) // self._size)

    def heldout_batch(self, index: int) -> dict[str, np.ndarray]:
        """Batch `index` of the rows that are never drawn, component by component; padding fills the last one."""
        chosen = self._heldout[index * self._size : (index + 1) * self._size]
        rows = [rows[row] for rows, row in chosen]
        rows += [{name: np.zeros_like(value) for name, value in rows[0].items()}] * (self._size - len(rows))
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _card(folder: Path, name: str, tokenizer_fingerprint: str) -> dict:
    path = folder / f"{name}.json"
    if not (path.exists() and path.with_suffix(".arecord").exists()):
        raise UserError(f"expected {path.with_suffix('.arecord')} and {path.name}; run launch.build_data first")
    card = files.read_json(path)
    if card.get("tokenizer") != tokenizer_fingerprint:
        raise UserError(
            f"{path.with_suffix('.arecord')} was built with tokenizer {card.get('tokenizer')}, "
            f"this run has {tokenizer_fingerprint}; run launch.build_data again"
        )
    return card


def _hash(*parts) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
