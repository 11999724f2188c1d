"""From ternary verdicts to numbers: the strict and the ternary mapping, and the weighted reward.

A verdict is about the criterion's text. For a positive rubric `satisfied` is good; a negative rubric names a flaw, so
`satisfied` means the flaw is there. `error` is a judge that failed: it is left out of both sums, never counted as 0
(a 0 would pass every negative rubric).
"""

from collections.abc import Collection, Iterable
from typing import Literal

from stepdr_jax.records import Judgment

ScoreMapping = Literal["strict", "ternary"]
TERNARY = {"satisfied": 1.0, "partial": 0.5, "not_satisfied": 0.0}


def strict_score(role: str, verdict: str) -> float | None:
    """The paper's asymmetric binary mapping (section 4.3.2).

    A positive rubric earns 1 only when fully satisfied. A negative rubric stays 0 only when the flaw is clearly absent
    (`not_satisfied`); a partial flaw is a flaw. Returns None for `error`.
    """
    if verdict == "error":
        return None
    if verdict not in TERNARY:
        raise ValueError(f"expected a verdict among {[*TERNARY, 'error']}, got {verdict!r}")
    if role == "negative":
        return 0.0 if verdict == "not_satisfied" else 1.0
    return 1.0 if verdict == "satisfied" else 0.0


def ternary_score(role: str, verdict: str) -> float | None:
    """The ablation: satisfied 1, partial 0.5, not_satisfied 0, for both signs. Returns None for `error`."""
    if verdict == "error":
        return None
    if verdict not in TERNARY:
        raise ValueError(f"expected a verdict among {[*TERNARY, 'error']}, got {verdict!r}")
    return TERNARY[verdict]


SCORES = {"strict": strict_score, "ternary": ternary_score}


def aggregate_reward(
    judgments: Iterable[Judgment],
    mapping: ScoreMapping = "strict",
    max_missing: float = 0.1,
    *,
    fatal: Collection[str] = (),
    clip: bool = False,
) -> float | None:
    """Adds verdicts up to one reward R = sum(w b) / sum(w of positive rubrics), failed verdicts left out of both sums.

    Args:
        judgments: one per rubric.
        mapping: `strict` (the paper's) or `ternary` (the ablation).
        max_missing: above this share of failed verdicts there is no reward.
        fatal: ids of negative rubrics whose flaw zeroes the whole report.
        clip: keep the reward within [0, 1]; off, penalties may push it below 0.

    Returns:
        The reward, at most 1, or None when too many verdicts failed or no positive rubric was judged. None means
        "mask this episode", never 0.
    """
    score = SCORES[mapping]
    judgments = list(judgments)
    scored = [(judgment, score(judgment.role, judgment.verdict)) for judgment in judgments]
    missing = sum(value is None for _, value in scored)
    if not judgments or missing > max_missing * len(judgments):
        return None
    # a failed fatal rubric leaves open whether the report is worth anything
    if any(value is None and judgment.rid in fatal for judgment, value in scored):
        return None
    available = sum(judgment.weight for judgment, value in scored if value is not None and judgment.weight > 0)
    if available <= 0:
        return None
    if any(value and judgment.rid in fatal for judgment, value in scored):
        return 0.0
    reward = sum(judgment.weight * value for judgment, value in scored if value is not None) / available
    return min(max(reward, 0.0), 1.0) if clip else reward
