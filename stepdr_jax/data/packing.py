"""Packing: examples of any length into rows of one length, and a row's form on disk.

A row holds whole examples one after another. Segment ids start at 1, 0 is padding; positions restart with each
example, so no example sees another.
"""

import bisect
from collections.abc import Sequence

import numpy as np

MAX_SEGMENTS = np.iinfo(np.uint16).max  # a row's segment ids are stored in two bytes


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: returns bins of indices into `lengths`; each bin's lengths add up to at most `capacity`.

    Equal lengths keep their order, so a shuffled input gives shuffled bins. Raises ValueError for a length outside
    1..capacity. Time is O(n (log n + log of distinct free sizes)).
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    if order and not (0 < lengths[order[-1]] and lengths[order[0]] <= capacity):
        raise ValueError(f"expected lengths in 1..{capacity}, got {lengths[order[-1]]}..{lengths[order[0]]}")
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}  # free tokens -> bins that have exactly so many left
    free_sizes: list[int] = []  # keys of open_bins, ascending
    for index in order:
        length = lengths[index]
        where = bisect.bisect_left(free_sizes, length)
        if where == len(free_sizes):
            chosen, free = len(bins), capacity
            bins.append([])
        else:
            free = free_sizes[where]
            chosen = open_bins[free].pop()
            if not open_bins[free]:
                del open_bins[free], free_sizes[where]
        bins[chosen].append(index)
        if (left := free - length) and len(bins[chosen]) < MAX_SEGMENTS:
            if left not in open_bins:
                bisect.insort(free_sizes, left)
                open_bins[left] = []
            open_bins[left].append(chosen)
    return bins


def windows(tokens_T: np.ndarray, loss_mask_T: np.ndarray, context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits an example into windows of at most `context` tokens so that every target is a target exactly once.

    Neighbouring windows share one token: the last of one is the first of the next, where nothing predicts it.
    The first token of each window is taken out of the loss for the same reason.

    Args:
        tokens_T: int32. loss_mask_T: bool, True where the token is to be predicted.
    """
    pieces = []
    for start in range(0, max(len(tokens_T) - 1, 1), context - 1):
        mask = loss_mask_T[start : start + context].copy()
        mask[:1] = False
        pieces.append((tokens_T[start : start + context], mask))
    return pieces


def row_bytes(examples: Sequence[tuple], context: int) -> bytes:
    """Returns a row's form on disk: tokens int32[T], segment ids uint16[T], marks uint8[T], little endian.

    The lowest bit of a mark is the loss mask; the others number the capability that the example is for.

    Args:
        examples: (tokens, loss mask) or (tokens, loss mask, capability), whose lengths add up to at most `context`.
            A capability is 1 + its place in `records.CAPABILITIES`, or 0.
    """
    tokens = np.zeros(context, "<i4")
    segments = np.zeros(context, "<u2")
    marks = np.zeros(context, np.uint8)
    start = 0
    for number, (example_tokens, example_mask, *capability) in enumerate(examples, 1):
        end = start + len(example_tokens)
        tokens[start:end], segments[start:end] = example_tokens, number
        marks[start:end] = np.asarray(example_mask, np.uint8) | (sum(capability) << 1)
        start = end
    return tokens.tobytes() + segments.tobytes() + marks.tobytes()


def row_from_bytes(data: bytes, context: int) -> dict[str, np.ndarray]:
    """Returns tokens, segment_ids, positions and capability int32[T], loss_mask bool[T].

    Raises ValueError when `data` is not a row of `context` tokens.
    """
    if len(data) != 7 * context:
        raise ValueError(f"expected a row of {7 * context} bytes for {context} tokens, got {len(data)}")
    return {name: array[0] for name, array in rows_from_bytes([data], context).items()}


def rows_from_bytes(stored: Sequence[bytes | None], context: int) -> dict[str, np.ndarray]:
    """Returns tokens, segment_ids, positions, capability int32[B,T], loss_mask bool[B,T] of stored rows; None is a row of padding."""
    raw = np.zeros((len(stored), 7 * context), np.uint8)
    for row, data in enumerate(stored):
        if data is not None:
            raw[row] = np.frombuffer(data, np.uint8)
    segments_BT = np.ascontiguousarray(raw[:, 4 * context : 6 * context]).view("<u2").astype(np.int32)
    new_BT = np.ones_like(segments_BT, bool)
    np.not_equal(segments_BT[:, 1:], segments_BT[:, :-1], out=new_BT[:, 1:])
    index_T = np.arange(context, dtype=np.int32)
    positions_BT = index_T - np.maximum.accumulate(np.where(new_BT, index_T, 0), axis=1)
    return dict(
        tokens=np.ascontiguousarray(raw[:, : 4 * context]).view("<i4").astype(np.int32, copy=False),
        loss_mask=(raw[:, 6 * context :] & 1).astype(bool),
        capability=(raw[:, 6 * context :] >> 1).astype(np.int32),
        segment_ids=segments_BT,
        positions=np.where(segments_BT > 0, positions_BT, 0),
    )
