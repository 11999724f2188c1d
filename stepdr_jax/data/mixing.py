"""Which row of which component stands where: token-exact shares as integer arithmetic on the position.

Every row of a component costs its mean number of tokens; a component with rate w and rows of t tokens is due again every t / w
tokens. Row j of component c is due at (j + 1/2) t_c / w_c, and all rows stand in the order in which they are due (ties by
component). So at every moment each component is within a row of its share, row j of a component is the same row whatever the other
rates are, and the position of any row is found by bisection: nothing is replayed and no state is kept.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

BLOCK = 4096  # rows laid out at a time
_SCALE = 1 << 24  # integer units of the shortest period: shares are exact to 3e-8


class Merge:
    """The endless sequence of rows at fixed rates."""

    def __init__(self, periods: Sequence[float]):
        """`periods`: tokens from one row of a component to its next, t / w; inf where the rate is 0."""
        shortest = min(periods)
        self._strides = [0 if period == float("inf") else round(_SCALE * period / shortest) for period in periods]
        self.block = functools.lru_cache(maxsize=2)(self._block)

    def counts(self, rows: int) -> list[int]:
        """Returns how many of the first `rows` rows are each component's."""
        due, counts = self._due(rows)
        for component, stride in enumerate(self._strides):  # those due at the same moment, by component
            if sum(counts) < rows and stride and (due + 1) % stride == 0 and (due + 1) // stride % 2:
                counts[component] += 1
        return counts

    def _at(self, due: int) -> list[int]:
        """How many rows of each component are due by `due`: row j is, when stride (2 j + 1) <= due."""
        return [(due // stride + 1) // 2 if stride else 0 for stride in self._strides]

    def _due(self, rows: int) -> tuple[int, list[int]]:
        """The last moment by which at most `rows` rows are due, and their counts."""
        low, high = 0, 2 * _SCALE * (rows + 1)  # the component with the shortest period alone has more by then
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._at(middle)) <= rows else (low, middle)
        return low, self._at(low)

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns component int32[BLOCK] and row number within it int64[BLOCK] of the rows from number * BLOCK on."""
        first = number * BLOCK
        start, before = self._due(first)
        after = [count + 1 for count in self._due(first + BLOCK)[1]]
        due, component, row = [], [], []
        for index, stride in enumerate(self._strides):
            if stride:
                rows = np.arange(before[index], after[index] + 1, dtype=np.int64)
                due.append((stride * (2 * before[index] + 1) - start) + 2 * stride * (rows - before[index]))
                component.append(np.full(len(rows), index, np.int32))
                row.append(rows)
        order = np.lexsort((np.concatenate(component), np.concatenate(due)))
        order = order[first - sum(before) :][:BLOCK]
        return np.concatenate(component)[order], np.concatenate(row)[order]


class Schedule:
    """The rows of every step over stages of rates; a component goes on where the stage before left it."""

    def __init__(
        self, stages: Sequence[tuple[int, Mapping[str, float]]], tokens_per_row: Mapping[str, float], batch: int
    ):
        """`stages`: (first step, component -> rate); `tokens_per_row`: mean of a component, which fixes the order of `row`'s."""
        self._batch = batch
        self._first = [step for step, _ in stages]
        self._merges, self._bases = [], []
        base = [0] * len(tokens_per_row)
        for (step, rates), end in zip(stages, [*self._first[1:], None], strict=True):
            periods = [
                tokens / rates[name] if rates.get(name, 0) > 0 else float("inf")
                for name, tokens in tokens_per_row.items()
            ]
            self._merges.append(Merge(periods))
            self._bases.append(np.asarray(base, np.int64))
            if end is not None:
                base = [a + b for a, b in zip(base, self._merges[-1].counts((end - step) * batch), strict=True)]

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns component int32[B] and how many of its rows were drawn before, int64[B], of the batch of a step."""
        stage = int(np.searchsorted(self._first, step, side="right")) - 1
        merge, base = self._merges[stage], self._bases[stage]
        first = (step - self._first[stage]) * self._batch
        components, rows = [], []
        while (left := self._batch - sum(map(len, rows))) > 0:
            block, offset = divmod(first + self._batch - left, BLOCK)
            component, row = merge.block(block)
            components.append(component[offset : offset + left])
            rows.append(row[offset : offset + left])
        component = np.concatenate(components)
        return component, np.concatenate(rows) + base[component]
