"""Metrics of an iteration's rollouts: the first part of a row of PPO's metrics.jsonl (docs/ppo.md)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stepdr_jax.records import Finish
from stepdr_jax.rl.rollouts import Rollout
from stepdr_jax.text import repetition

# Only these may differ between an interrupted run and an uninterrupted one: times, and totals of one process.
TIMINGS = (
    "seconds",
    "seconds_sampling",
    "seconds_training",
    "tool_host_restarts",
    "sampler_evictions",
    "sampler_pages_peak",
)
REPETITION_EPISODES = 256  # checked in an iteration, evenly spaced: about 10 a second at 100K tokens


def rollout_metrics(iteration: int, episodes: Sequence[Rollout]) -> dict[str, Any]:
    """Metric name -> value. Means are over unmasked episodes; None when there is none."""
    kept = [episode for episode in episodes if episode.masked is None]
    rewards = [episode.scored.reward for episode in kept if episode.scored.reward is not None]

    def stat(name: str, among: Sequence[Rollout] = kept) -> float | None:
        return _mean(episode.trajectory.stats[name] for episode in among if name in episode.trajectory.stats)

    verdicts = [episode.scored.verdict for episode in kept if episode.scored.verdict is not None]
    row: dict[str, Any] = {
        "iteration": iteration,
        "episodes": len(episodes),
        "reward": _mean(rewards),
        "reward_std": float(np.std(rewards)) if rewards else None,
        "success": _mean(float(verdict.correct) for verdict in verdicts if verdict.correct is not None),
        "cited": _mean(float(verdict.cited) for verdict in verdicts if verdict.cited is not None),
    }
    for kind in sorted({episode.task.kind for episode in kept}):
        row[f"reward/{kind}"] = _mean(r for r, episode in zip(rewards, kept, strict=True) if episode.task.kind == kind)
    finishes = Counter(str(episode.trajectory.finish) for episode in episodes)
    for finish in Finish:
        if finish.is_policy_outcome:
            row[f"finish/{finish}"] = finishes[str(finish)] / len(episodes)
            with_finish = [episode for episode in kept if episode.trajectory.finish == finish]
            if with_finish:
                row[f"tokens_by_finish/{finish}"] = stat("sampled_tokens", with_finish)
    masked = Counter(episode.masked for episode in episodes if episode.masked is not None)
    causes = [str(finish) for finish in Finish if not finish.is_policy_outcome and finish != Finish.CANCELLED]
    for cause in [*causes, *sorted(set(masked) - set(causes))]:
        row[f"masked/{cause}"] = masked[cause]
    row["masked_share"] = sum(masked.values()) / len(episodes)
    for name in ("turns", "tool_calls", "tool_errors", "format_errors", "sampled_tokens", "observed_tokens"):
        row[name] = stat(name)
    read = [kept[place] for place in evenly_spaced(len(kept), REPETITION_EPISODES)]
    row["repetition"] = _mean(map(_repeats, read))
    return row | _staleness(iteration, kept)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0..count-1, evenly spaced."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None


def _repeats(episode: Rollout) -> bool:
    written = (message.content for message in episode.trajectory.messages if message.role == "assistant")
    return any(repetition.degenerate_reason(text) for text in written)


def _staleness(iteration: int, kept: Sequence[Rollout]) -> dict[str, float | None]:
    """Iterations between the weights that sampled a token and those that learn from it, over sampled tokens."""
    logs = [episode.log.arrays() for episode in kept if episode.log is not None]
    staleness_A = iteration - np.concatenate([np.zeros(0, np.int32), *(log["version"][log["sampled"]] for log in logs)])
    return {
        "staleness/mean": _mean(staleness_A),
        "staleness/max": int(staleness_A.max()) if len(staleness_A) else None,
    }
