"""Packing examples of any length into sequences of one length, and the form of a packed sequence on disk.

A sequence holds examples one after another. Segment ids start at 1, 0 is padding; positions restart with each example.
Attention stays within a segment, so no example sees another.
"""

import bisect
from collections.abc import Sequence

import numpy as np

MAX_SEGMENTS = np.iinfo(np.uint16).max  # segment ids are stored in two bytes


def pack_best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
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


def split_windows(tokens_T: np.ndarray, loss_mask_T: np.ndarray, seq_len: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Splits an example into windows of at most `seq_len` tokens so that every token is predicted exactly once.

    Neighboring windows share one token, the last of one and the first of the next. The first token of a window has
    nothing before it to be predicted from, so it is taken out of that window's loss.

    Args:
        tokens_T: int32. loss_mask_T: bool, True where the token is to be predicted.
    """
    pieces = []
    for start in range(0, max(len(tokens_T) - 1, 1), seq_len - 1):
        mask = loss_mask_T[start : start + seq_len].copy()
        mask[:1] = False
        pieces.append((tokens_T[start : start + seq_len], mask))
    return pieces


def sequence_bytes(examples: Sequence[tuple], seq_len: int) -> bytes:
    """Returns a packed sequence as stored: tokens int32[T], segment ids uint16[T], marks uint8[T], little endian.

    The lowest bit of a mark is the loss mask; the others number the capability that the example is for.

    Args:
        examples: (tokens, loss mask) or (tokens, loss mask, capability), whose lengths add up to at most `seq_len`.
            A capability is 1 + its place in `records.CAPABILITIES`, or 0.
    """
    tokens = np.zeros(seq_len, "<i4")
    segments = np.zeros(seq_len, "<u2")
    marks = np.zeros(seq_len, np.uint8)
    start = 0
    for number, (example_tokens, example_mask, *capability) in enumerate(examples, 1):
        end = start + len(example_tokens)
        tokens[start:end], segments[start:end] = example_tokens, number
        marks[start:end] = np.asarray(example_mask, np.uint8) | (sum(capability) << 1)
        start = end
    return tokens.tobytes() + segments.tobytes() + marks.tobytes()


def sequence_from_bytes(data: bytes, seq_len: int) -> dict[str, np.ndarray]:
    """Returns tokens, segment_ids, positions and capability int32[T], loss_mask bool[T].

    Raises ValueError when `data` is not a sequence of `seq_len` tokens.
    """
    if len(data) != 7 * seq_len:
        raise ValueError(f"expected a sequence of {7 * seq_len} bytes for {seq_len} tokens, got {len(data)}")
    return {name: array[0] for name, array in sequences_from_bytes([data], seq_len).items()}


def sequences_from_bytes(stored: Sequence[bytes | None], seq_len: int) -> dict[str, np.ndarray]:
    """Returns tokens, segment_ids, positions, capability int32[B,T], loss_mask bool[B,T] of stored sequences.

    None stands for a sequence of padding.
    """
    raw = np.zeros((len(stored), 7 * seq_len), np.uint8)
    for index, data in enumerate(stored):
        if data is not None:
            raw[index] = np.frombuffer(data, np.uint8)
    segments_BT = np.ascontiguousarray(raw[:, 4 * seq_len : 6 * seq_len]).view("<u2").astype(np.int32)
    new_BT = np.ones_like(segments_BT, bool)
    np.not_equal(segments_BT[:, 1:], segments_BT[:, :-1], out=new_BT[:, 1:])
    index_T = np.arange(seq_len, dtype=np.int32)
    positions_BT = index_T - np.maximum.accumulate(np.where(new_BT, index_T, 0), axis=1)
    return dict(
        tokens=np.ascontiguousarray(raw[:, : 4 * seq_len]).view("<i4").astype(np.int32, copy=False),
        loss_mask=(raw[:, 6 * seq_len :] & 1).astype(bool),
        capability=(raw[:, 6 * seq_len :] >> 1).astype(np.int32),
        segment_ids=segments_BT,
        positions=np.where(segments_BT > 0, positions_BT, 0),
    )
