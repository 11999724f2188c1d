"""The append-only token log of one episode: what the model observed and what it sampled, id by id.

Training uses these ids as they were produced; text is rendered from them, and nothing is ever tokenised again.
"""

from collections.abc import Sequence

import numpy as np

TEACHER = -1  # weight version of tokens that a teacher wrote: trainable, but no log-probability was recorded


class TokenLog:
    """Spans of `observed` ids (prompt, tool results) and `sampled` ids (actions). Grows at the end only."""

    def __init__(self):
        self._tokens: list[int] = []
        self._sampled: list[bool] = []
        self._logprobs: list[float] = []
        self._version: list[int] = []

    @classmethod
    def of_arrays(cls, *, tokens, sampled, logprobs, version) -> "TokenLog":
        """Returns the log whose `arrays()` these are."""
        log = cls()
        log._tokens, log._sampled = np.asarray(tokens).tolist(), np.asarray(sampled).tolist()
        log._logprobs, log._version = np.asarray(logprobs).tolist(), np.asarray(version).tolist()
        return log

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All ids so far, in order."""
        return tuple(self._tokens)

    @property
    def sampled_count(self) -> int:
        return sum(self._sampled)

    def observed(self, ids: Sequence[int]) -> None:
        """Appends ids that the policy only reads: prompt and tool results."""
        self._extend(ids, False, [0.0] * len(ids), 0)

    def sampled(self, ids: Sequence[int], logprobs: Sequence[float], version: int) -> None:
        """Appends ids that the policy with weights `version` sampled with these natural-log probabilities.

        Raises ValueError when the lengths differ.
        """
        if len(ids) != len(logprobs):
            raise ValueError(f"expected one logprob per id, got {len(logprobs)} for {len(ids)} ids")
        self._extend(ids, True, logprobs, version)

    def supervised(self, ids: Sequence[int]) -> None:
        """Appends ids that a teacher wrote: trainable, log-probability recorded as 0, version TEACHER."""
        self._extend(ids, True, [0.0] * len(ids), TEACHER)

    def _extend(self, ids: Sequence[int], sampled: bool, logprobs: Sequence[float], version: int) -> None:
        self._tokens.extend(int(id_) for id_ in ids)
        self._sampled.extend([sampled] * len(ids))
        self._logprobs.extend(float(value) for value in logprobs)
        self._version.extend([version if sampled else 0] * len(ids))

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns copies: tokens int32[T], sampled bool[T], logprobs float32[T] (0 if observed), version int32[T]."""
        return dict(
            tokens=np.asarray(self._tokens, np.int32),
            sampled=np.asarray(self._sampled, bool),
            logprobs=np.asarray(self._logprobs, np.float32),
            version=np.asarray(self._version, np.int32),
        )

    def spans(self) -> list[tuple[int, int, bool]]:
        """Returns (start, end, sampled) for each maximal run of one kind."""
        edges = [i for i in range(1, len(self)) if self._sampled[i] != self._sampled[i - 1]]
        starts = [0, *edges] if len(self) else []
        ends = [*edges, len(self)] if len(self) else []
        return [(start, end, self._sampled[start]) for start, end in zip(starts, ends, strict=True)]
