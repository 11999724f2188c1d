"""Which sequence of which component comes where: exact shares of tokens, by integer arithmetic on the position.

Each component has its own endless order: all its sequences, shuffled again every epoch, whatever it is mixed with. A
sequence is due when half of its tokens are, at (tokens before it + half its own) / rate. The sequences of all
components come in the order in which they are due (ties: by component). So at any moment each component is within
about one sequence of its share of tokens. The sequences at any position are found by bisection: nothing is replayed
and no state is kept. A seek costs milliseconds, or a shuffle of the epoch that it lands in.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

BLOCK = 4096  # sequences ordered at a time
_SCALE = 1 << 16  # integer units of the highest rate's token: rates are exact to 1e-5


class ComponentOrder:
    """The sequences of a component in the order in which they are drawn. Draws count from 0; tokens are counted
    double, so that half a sequence is an integer."""

    def __init__(self, tokens_N: np.ndarray, seed: int, ids_N: np.ndarray | None = None):
        """`tokens_N`: tokens (above 0) in each sequence; `ids_N`: the sequences' numbers, default 0..N-1."""
        self._tokens_N, self._seed = np.asarray(tokens_N, np.int64), seed
        self._ids_N = np.arange(len(tokens_N), dtype=np.int64) if ids_N is None else ids_N
        self.epoch_sequences, self.epoch_tokens = len(self._tokens_N), 2 * int(self._tokens_N.sum())
        self._epoch = functools.lru_cache(maxsize=3)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The sequence numbers of an epoch in order, and twice the tokens up to the middle of each."""
        permutation = np.random.default_rng([self._seed, epoch]).permutation(self.epoch_sequences)
        tokens_N = self._tokens_N[permutation]
        return self._ids_N[permutation], 2 * np.cumsum(tokens_N) - tokens_N

    def due(self, tokens: int) -> int:
        """How many sequences have their middle at or before `tokens`."""
        epoch, rest = divmod(tokens, self.epoch_tokens)
        return epoch * self.epoch_sequences + int(np.searchsorted(self._epoch(epoch)[1], rest, side="right"))

    def before(self, draw: int) -> int:
        """Tokens before a draw."""
        epoch, index = divmod(draw, self.epoch_sequences)
        permutation = np.random.default_rng([self._seed, epoch]).permutation(self.epoch_sequences)
        return epoch * self.epoch_tokens + 2 * int(self._tokens_N[permutation[:index]].sum())

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequence numbers and middles of draws first..last - 1; middles count from the start of the first epoch."""
        ids, middles = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        start = first // self.epoch_sequences
        for epoch in range(start, -(-last // self.epoch_sequences)):
            cut = slice(max(first - epoch * self.epoch_sequences, 0), last - epoch * self.epoch_sequences)
            found = self._epoch(epoch)
            ids.append(found[0][cut])
            middles.append(found[1][cut] + (epoch - start) * self.epoch_tokens)
        return np.concatenate(ids), np.concatenate(middles)


class MergedOrder:
    """The endless order of the sequences of all components at fixed rates. `first`: each component's first draw."""

    def __init__(self, orders: Sequence[ComponentOrder], rates: Sequence[float], first: Sequence[int]):
        self._orders, self._first = orders, list(first)
        self._strides = [round(_SCALE * max(rates) / rate) if rate > 0 else 0 for rate in rates]
        self._offsets = [order.before(draw) for order, draw in zip(orders, first, strict=True)]
        self._speed = sum(  # sequences for each unit of due time, on average
            order.epoch_sequences / order.epoch_tokens / stride
            for order, stride in zip(orders, self._strides, strict=True)
            if stride
        )
        self.block = functools.lru_cache(maxsize=2)(self._block)

    def counts(self, total: int) -> list[int]:
        """Returns how many of the first `total` sequences are each component's."""
        due, counts = self._last_due(total)
        left = total - sum(counts)
        for component, count in enumerate(self._due_counts(due + 1)):  # ties go by component
            more = min(left, count - counts[component])
            counts[component] += more
            left -= more
        return counts

    def _due_counts(self, due: int) -> list[int]:
        """How many sequences of each component are due by `due`."""
        return [
            order.due(offset + due // stride) - first if stride and due >= 0 else 0
            for order, offset, stride, first in zip(
                self._orders, self._offsets, self._strides, self._first, strict=True
            )
        ]

    def _last_due(self, total: int) -> tuple[int, list[int]]:
        """The last moment by which at most `total` sequences are due, and their counts."""
        guess = int(total / self._speed)
        width = int(8 / self._speed) + 1  # small, as a distant probe might shuffle another epoch
        low, high = guess - width, guess + width
        while low >= 0 and sum(self._due_counts(low)) > total:
            width *= 2
            low -= width
        while sum(self._due_counts(high)) <= total:
            width *= 2
            high += width
        low = max(low, -1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._due_counts(middle)) <= total else (low, middle)
        return low, self._due_counts(low)

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns component int32[BLOCK] and sequence number int64[BLOCK] from position number * BLOCK on."""
        first = number * BLOCK
        start, before = self._last_due(first)
        after = self._due_counts(self._last_due(first + BLOCK)[0] + 1)
        due, component, sequence = [], [], []
        for index, (order, stride) in enumerate(zip(self._orders, self._strides, strict=True)):
            if stride:
                draw = self._first[index] + before[index]
                ids, middles = order.draws(draw, self._first[index] + after[index])
                # due = (middle - offset) stride - start, whose terms may be large and whose value is small
                whole, rest = divmod(start, stride)
                passed = self._offsets[index] + whole - draw // order.epoch_sequences * order.epoch_tokens
                due.append((middles - passed) * stride - rest)
                component.append(np.full(len(ids), index, np.int32))
                sequence.append(ids)
        order = np.lexsort((np.concatenate(component), np.concatenate(due)))
        order = order[first - sum(before) :][:BLOCK]
        return np.concatenate(component)[order], np.concatenate(sequence)[order]


class BatchSchedule:
    """The sequences of every step under a schedule of rates; each component continues when rates change."""

    def __init__(
        self, schedule: Sequence[tuple[int, Mapping[str, float]]], orders: Mapping[str, ComponentOrder], batch_size: int
    ):
        """`schedule`: (first step, component -> rate), as `rates.rate_schedule` returns it; `orders`: by component."""
        self._batch_size = batch_size
        self._first_steps = [step for step, _ in schedule]
        self._merged: list[MergedOrder] = []
        draws = [0] * len(orders)
        for (step, rates), end in zip(schedule, [*self._first_steps[1:], None], strict=True):
            merged = MergedOrder(list(orders.values()), [rates.get(name, 0.0) for name in orders], draws)
            self._merged.append(merged)
            if end is not None:
                draws = [a + b for a, b in zip(draws, merged.counts((end - step) * batch_size), strict=True)]

    def sequences(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns component int32[B] and sequence number int64[B] of the batch of a step."""
        phase = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        first = (step - self._first_steps[phase]) * self._batch_size
        components, sequences, count = [], [], 0
        while count < self._batch_size:
            block, offset = divmod(first + count, BLOCK)
            component, sequence = (
                part[offset:][: self._batch_size - count] for part in self._merged[phase].block(block)
            )
            components.append(component)
            sequences.append(sequence)
            count += len(sequence)
        return np.concatenate(components), np.concatenate(sequences)
