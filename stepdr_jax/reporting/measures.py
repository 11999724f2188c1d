"""Titles, order and normal ranges of the metrics of a stage, for the dashboard and the report.

docs/ppo.md and docs/training.md explain each metric. Metrics that are not listed here are shown after these under their
own names.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from stepdr_jax.runtime import stages


@dataclasses.dataclass(frozen=True)
class Measure:
    """One metric, or several that match `pattern`; {} in `title` is what the pattern captured."""

    group: str
    pattern: str
    title: str
    low: float = -math.inf  # normal range
    high: float = math.inf
    quiet: bool = False  # hidden while all values are 0

    @property
    def normal(self) -> str:
        """The normal range as text, "" without one."""
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.low) and math.isinf(self.high):
            return ""
        if math.isinf(self.high):
            return f"above {self.low:g}"
        return f"below {self.high:g}" if self.low == -math.inf else f"{self.low:g} to {self.high:g}"

    def odd(self, value: float) -> bool:
        return math.isfinite(value) and not self.low <= value <= self.high


PPO = (  # the most important first: a low terminal shows only those
    Measure("learning", r"reward", "reward"),
    Measure("learning", r"success", "correct"),
    Measure("learning", r"cited", "cited"),
    Measure("learning", r"reward_std", "reward std", low=0.01),
    Measure("health", r"kl", "KL, nats"),
    Measure("health", r"kl_after", "KL after, nats"),
    Measure("health", r"entropy", "entropy, nats"),
    Measure("health", r"explained_variance", "explained variance", low=0.0, high=1.0),
    Measure("health", r"logprob_gap/mean", "log-prob gap, mean", high=0.02),
    Measure("health", r"logprob_gap/max", "log-prob gap, max"),
    Measure("health", r"clip_fraction", "clipped", high=0.2),
    Measure("health", r"masked_share", "masked", high=0.02),
    Measure("health", r"masked/(.+)", "masked, {}", quiet=True),
    Measure("health", r"skipped_updates", "skipped updates", low=0, high=0),
    Measure("health", r"guarded_updates", "guarded updates", low=0, high=0),
    Measure("health", r"repetition(?:/(.+))?", "repetition {}"),
    Measure("health", r"staleness(?:/(.+))?", "staleness of samples {}", quiet=True),
    Measure("health", r"importance/(.+)", "importance {}"),
    Measure("ends", r"finish/(.+)", "{}", quiet=True),
    Measure("episode", r"turns", "turns"),
    Measure("episode", r"tool_calls", "tool calls"),
    Measure("episode", r"format_errors", "format errors"),
    Measure("episode", r"tool_errors", "tool errors", quiet=True),
    Measure("episode", r"sampled_tokens", "sampled tokens"),
    Measure("episode", r"observed_tokens", "observed tokens"),
    Measure("speed", r"seconds", "s per iteration"),
    Measure("speed", r"seconds_sampling", "s sampling"),
    Measure("speed", r"seconds_training", "s training"),
    Measure("speed", r"sampled_per_second", "sampled tokens/s"),
    Measure("speed", r"(?:sampler_)?pages?(?:[_/](.+))?", "sampler pages {}", quiet=True),
    Measure("speed", r"sampler_evictions", "evictions", quiet=True),
    Measure("speed", r"tool_host_restarts", "tool host restarts", low=0, high=0, quiet=True),
    Measure("kinds", r"reward/(.+)", "reward, {}"),
    Measure("learner", r"policy_loss", "policy loss"),
    Measure("learner", r"value_loss", "value loss"),
    Measure("learner", r"value_mean", "mean value"),
    Measure("learner", r"advantage_std", "advantage std"),
    Measure("learner", r"(actor|critic)_grad_norm", "{} gradient norm"),
    Measure("lengths", r"tokens_by_finish/(.+)", "tokens, {}", quiet=True),
)
TRAINING = (
    Measure("learning", r"loss", "loss, nats"),
    Measure("learning", r"heldout_loss/(.+)", "held out, {}"),
    Measure("learning", r"grad_norm", "gradient norm"),
    Measure("learning", r"learning_rate", "learning rate"),
    Measure("speed", r"tokens_per_second", "tokens/s"),
    Measure("speed", r"mfu", "MFU", quiet=True),
    Measure("speed", r"goodput", "goodput", low=0.5),
    Measure("speed", r"step_seconds/(.+)", "s per step, {}"),
    Measure("guards", r"skipped", "skipped, not finite", low=0, high=0),
    Measure("guards", r"spikes", "skipped, spikes"),
    Measure("sources", r"source_loss/(.+)", "source, {}"),
    Measure("capabilities", r"capability_loss/(.+)", "capability, {}"),
    Measure("families", r"family_loss/(.+)", "family, {}"),
)
NOT_SHOWN = re.compile(r"iteration|step|episodes|eta_seconds|slowest_host(/.*)?")


def arrange_metrics(stage: str, names: Iterable[str]) -> list[tuple[str, str, Measure]]:
    """(metric, title, measure) for every metric of `names` that is shown, in order; unknown ones last."""
    known, names = PPO if stages.stage_named(stage).program == "ppo" else TRAINING, list(dict.fromkeys(names))
    out, used = [], set()
    for measure in known:
        for name in names:
            match = re.fullmatch(measure.pattern, name)
            if match and name not in used:
                part = match[1] if match.groups() and match[1] else ""
                out.append((name, measure.title.format(part.replace("_", " ")).strip(" ,"), measure))
                used.add(name)
    for name in names:
        if name not in used and not NOT_SHOWN.fullmatch(name):
            out.append((name, name.replace("_", " "), Measure("other", re.escape(name), name)))
    return out


def normal_band(metric: str) -> tuple[float, float] | None:
    """The normal range of a PPO metric; None without one."""
    found = next((one for one in PPO if re.fullmatch(one.pattern, metric)), None)
    return (found.low, found.high) if found is not None and found.normal else None


def flatten_row(row: dict, prefix: str = "") -> dict[str, float]:
    """Numbers of a row of metrics.jsonl under slash-joined names; null is NaN, other values are left out."""
    out: dict[str, float] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            out |= flatten_row(value, f"{prefix}{key}/")
        elif isinstance(value, bool | int | float):
            out[prefix + key] = float(value)
        elif value is None:
            out[prefix + key] = math.nan
    return out


def derived_rates(row: Mapping[str, float]) -> dict[str, float]:
    """Rates computed from the numbers of a PPO row."""
    tokens, episodes, seconds = (row.get(name) for name in ("sampled_tokens", "episodes", "seconds_sampling"))
    if not tokens or not episodes or not seconds or not math.isfinite(tokens * episodes / seconds):
        return {}
    return {"sampled_per_second": tokens * episodes / seconds}
