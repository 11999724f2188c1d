"""Which row of which component stands where: token-exact shares as integer arithmetic on the position.

A component has its own endless order: all its rows, shuffled anew every epoch, whatever else is mixed with it. A row is due when
half of its tokens are, at (tokens before it + its own / 2) / rate, and all rows stand in the order in which they are due (ties by
component). So at every moment each component is within about a row of its share of tokens, and the rows at any position are found by
bisection: nothing is replayed and no state is kept. A seek costs milliseconds, or a shuffle of the epoch that it lands in.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

BLOCK = 4096  # rows laid out at a time
_SCALE = 1 << 16  # integer units of the highest rate's token: rates are exact to 1e-5


class Order:
    """A component's rows in the order in which they are drawn. Positions are draws from 0; tokens are counted double."""

    def __init__(self, tokens_N: np.ndarray, seed: int, rows_N: np.ndarray | None = None):
        """`tokens_N`: tokens above 0 in each row; `rows_N`: the rows' numbers, default 0..N-1."""
        self._tokens_N, self._seed = np.asarray(tokens_N, np.int64), seed
        self._rows_N = np.arange(len(tokens_N), dtype=np.int64) if rows_N is None else rows_N
        self.epoch_rows, self.epoch_tokens = len(self._tokens_N), 2 * int(self._tokens_N.sum())
        self._epoch = functools.lru_cache(maxsize=3)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of an epoch in their order, and twice the tokens up to each row's middle."""
        permutation = np.random.default_rng([self._seed, epoch]).permutation(self.epoch_rows)
        tokens_N = self._tokens_N[permutation]
        return self._rows_N[permutation], 2 * np.cumsum(tokens_N) - tokens_N

    def due(self, tokens: int) -> int:
        """How many rows have their middle at or before `tokens`."""
        epoch, rest = divmod(tokens, self.epoch_tokens)
        return epoch * self.epoch_rows + int(np.searchsorted(self._epoch(epoch)[1], rest, side="right"))

    def before(self, draw: int) -> int:
        """Tokens before a draw."""
        epoch, index = divmod(draw, self.epoch_rows)
        permutation = np.random.default_rng([self._seed, epoch]).permutation(self.epoch_rows)
        return epoch * self.epoch_tokens + 2 * int(self._tokens_N[permutation[:index]].sum())

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers and middles, less the tokens of the epochs before the first's, of draws first..last - 1."""
        rows, middles = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        start = first // self.epoch_rows
        for epoch in range(start, -(-last // self.epoch_rows)):
            cut = slice(max(first - epoch * self.epoch_rows, 0), last - epoch * self.epoch_rows)
            found = self._epoch(epoch)
            rows.append(found[0][cut])
            middles.append(found[1][cut] + (epoch - start) * self.epoch_tokens)
        return np.concatenate(rows), np.concatenate(middles)


class Merge:
    """The endless sequence of rows at fixed rates, each component from a draw of its own on."""

    def __init__(self, orders: Sequence[Order], rates: Sequence[float], first: Sequence[int]):
        self._orders, self._first = orders, list(first)
        self._strides = [round(_SCALE * max(rates) / rate) if rate > 0 else 0 for rate in rates]
        self._offsets = [order.before(draw) for order, draw in zip(orders, first, strict=True)]
        self._speed = sum(  # rows for each unit of due time, on average
            order.epoch_rows / order.epoch_tokens / stride
            for order, stride in zip(orders, self._strides, strict=True)
            if stride
        )
        self.block = functools.lru_cache(maxsize=2)(self._block)

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows are each component's."""
        due, counts = self._due(rows)
        left = rows - sum(counts)
        for component, count in enumerate(self._at(due + 1)):  # those due at the same moment, by component
            more = min(left, count - counts[component])
            counts[component] += more
            left -= more
        return counts

    def _at(self, due: int) -> list[int]:
        """How many rows of each component are due by `due`."""
        return [
            order.due(offset + due // stride) - first if stride and due >= 0 else 0
            for order, offset, stride, first in zip(
                self._orders, self._offsets, self._strides, self._first, strict=True
            )
        ]

    def _due(self, rows: int) -> tuple[int, list[int]]:
        """The last moment by which at most `rows` rows are due, and their counts."""
        guess, width = (
            int(rows / self._speed),
            int(8 / self._speed) + 1,
        )  # so near, or a probe might shuffle a far epoch
        low, high = guess - width, guess + width
        while low >= 0 and sum(self._at(low)) > rows:
            width *= 2
            low -= width
        while sum(self._at(high)) <= rows:
            width *= 2
            high += width
        low = max(low, -1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._at(middle)) <= rows else (low, middle)
        return low, self._at(low)

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns component int32[BLOCK] and row number int64[BLOCK] of the rows from number * BLOCK on."""
        first = number * BLOCK
        start, before = self._due(first)
        after = self._at(self._due(first + BLOCK)[0] + 1)
        due, component, row = [], [], []
        for index, (order, stride) in enumerate(zip(self._orders, self._strides, strict=True)):
            if stride:
                draw = self._first[index] + before[index]
                rows, middles = order.draws(draw, self._first[index] + after[index])
                # due = (middle - offset) stride - start, whose terms may be large and whose value is small
                whole, rest = divmod(start, stride)
                passed = self._offsets[index] + whole - draw // order.epoch_rows * order.epoch_tokens
                due.append((middles - passed) * stride - rest)
                component.append(np.full(len(rows), index, np.int32))
                row.append(rows)
        order = np.lexsort((np.concatenate(component), np.concatenate(due)))
        order = order[first - sum(before) :][:BLOCK]
        return np.concatenate(component)[order], np.concatenate(row)[order]


class Schedule:
    """The rows of every step over stages of rates; a component goes on where the stage before left it."""

    def __init__(self, stages: Sequence[tuple[int, Mapping[str, float]]], orders: Mapping[str, Order], batch: int):
        """`stages`: (first step, component -> rate), as `rates.stages` gives them; `orders`: of each component."""
        self._batch = batch
        self._first = [step for step, _ in stages]
        self._merges: list[Merge] = []
        draws = [0] * len(orders)
        for (step, rates), end in zip(stages, [*self._first[1:], None], strict=True):
            merge = Merge(list(orders.values()), [rates.get(name, 0.0) for name in orders], draws)
            self._merges.append(merge)
            if end is not None:
                draws = [a + b for a, b in zip(draws, merge.counts((end - step) * batch), strict=True)]

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns component int32[B] and row number int64[B] of the batch of a step."""
        stage = int(np.searchsorted(self._first, step, side="right")) - 1
        first = (step - self._first[stage]) * self._batch
        components, rows, count = [], [], 0
        while count < self._batch:
            block, offset = divmod(first + count, BLOCK)
            component, row = (part[offset:][: self._batch - count] for part in self._merges[stage].block(block))
            components.append(component)
            rows.append(row)
            count += len(row)
        return np.concatenate(components), np.concatenate(rows)
