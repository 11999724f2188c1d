"""PPO: its curves."""

import math

from stepdr_jax.pages import plots
from stepdr_jax.pages.wording import join_and
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.measures import normal_band
from stepdr_jax.reporting.sections.curves import match_metrics, metric_chart, remaining_charts
from stepdr_jax.reporting.sections.wording import Section

PPO_PANELS = (
    ("Reward of training episodes", r"reward", "mean reward", {"smooth": 5, "y_label": "reward"}),
    ("Correct and cited training episodes", r"(success|cited)", None, {"smooth": 5, "y_label": "share"}),
    ("Reward by kind of task", r"reward/(.+)", None, {"smooth": 5, "y_label": "reward"}),
    (
        "Standard deviation of the reward",
        r"reward_std",
        "reward_std",
        {"y_label": "reward", "band": normal_band("reward_std")},
    ),
    ("KL to the sampling policy", r"kl(?:/(.+))?", None, {"y_label": "nats"}),
    ("KL of the complete update", r"kl_after", "KL after", {"y_label": "nats"}),
    ("Entropy of the policy", r"entropy", "entropy", {"y_label": "nats per token"}),
    (
        "Explained variance of the critic",
        r"explained_variance",
        "explained variance",
        {"y_range": (-1, 1), "zero": True, "band": normal_band("explained_variance")},
    ),
    (
        "Share of tokens with a clipped ratio",
        r"clip_fraction",
        "clipped",
        {"y_label": "share", "band": normal_band("clip_fraction")},
    ),
    (
        "Log-probability gap, sampler against trainer",
        r"logprob_gap/(.+)",
        None,
        {
            "y_label": "nats",
            "log": True,
            "note": "Normal: float32 below 1e-4 in the mean and 1e-3 at most, bfloat16 below 0.02 in the mean.",
        },
    ),
    ("Updates that were skipped", r"(skipped|guarded)_updates", None, {}),
    ("Importance weights", r"importance/(.+)", None, {"y_label": "weight, share"}),
    ("Staleness of the episodes", r"(?:age|staleness)(?:/(.+))?", None, {"y_label": "versions"}),
    ("Episodes that repeat themselves", r"repetition(?:/(.+))?", None, {"smooth": 5, "y_label": "share"}),
    ("Masked episodes by cause", r"masked/(.+)", None, {"y_label": "episodes"}),
    ("Share of masked episodes", r"masked_share", "masked", {"y_label": "share", "band": normal_band("masked_share")}),
    ("Turns and tool calls per episode", r"(turns|tool_calls)", None, {"smooth": 5}),
    ("Errors per episode", r"(format_errors|tool_errors)", None, {"smooth": 5}),
    ("Tokens per episode", r"(sampled_tokens|observed_tokens)", None, {"smooth": 5, "y_label": "tokens"}),
    ("Tokens sampled, by how the episode ended", r"tokens_by_finish/(.+)", None, {"y_label": "tokens"}),
    ("Gradient norms before clipping", r"(actor|critic)_grad_norm", None, {"y_label": "norm"}),
    ("Losses", r"(policy|value)_loss", None, {}),
    ("Seconds per iteration", r"seconds_(sampling|training)", None, {"y_label": "seconds"}),
)
FINISHES_AFTER = 1  # the chart of finish reasons comes after this many others


def ppo_section(run: Run) -> Section:
    section: Section = {"figures": [], "more": [], "sentence": ""}
    if not any("ppo" in run.curves.get(seed, {}) for seed in run.seeds):
        return section
    used: set[str] = set()
    for index, (title, pattern, label, settings) in enumerate(PPO_PANELS):
        if index == FINISHES_AFTER:
            figure, names = _finishes(run)
            if names:
                section["figures"].append(figure)
                used |= names
        figure, names = metric_chart(
            run, "ppo", match_metrics(pattern, label), title=title, x_label="iteration", **settings
        )
        if names:
            section["figures"].append(figure)
            used |= names
    section["figures"].sort(key=lambda figure: plots.EMPTY in figure)  # stable: empty charts come last
    section["more"] = remaining_charts(run, "ppo", used, "iteration")
    lengths = [len(run.curves[seed]["ppo"].x) for seed in run.seeds if "ppo" in run.curves.get(seed, {})]
    section["sentence"] = (
        f"{join_and([f'{n:,}' for n in dict.fromkeys(lengths)])} iterations of sampling and updating"
        + (f", {len(lengths)} seeds" if len(lengths) > 1 else "")
        + ". docs/ppo.md explains each curve and its normal values. These episodes are on training tasks, sampled at "
        "the training temperature; the result is the held-out evaluation below. Masked episodes failed because of the "
        "tool host, the judge or the sampler: they have no reward and no gradient."
    )
    return section


def _finishes(run: Run) -> tuple[str, set[str]]:
    """Shares of finish reasons over iterations, averaged over seeds."""
    pick = match_metrics(r"(?:rollout/)?finish(?:_share)?[/_](.+)")
    sums: dict[str, dict[float, float]] = {}
    used: set[str] = set()
    for seed in run.seeds:
        curves = run.curves.get(seed, {}).get("ppo")
        for name in curves.values if curves else ():
            label = pick(name)
            if label is None:
                continue
            used.add(name)
            for x, value in zip(curves.x, curves.values[name], strict=True):
                at = sums.setdefault(label, {})
                at[x] = at.get(x, 0.0) + (value if math.isfinite(value) else 0.0)
    xs = sorted({x for at in sums.values() for x in at})
    totals = {x: sum(at.get(x, 0.0) for at in sums.values()) or 1.0 for x in xs}
    order = sorted(sums, key=lambda label: (label != "answered", label))
    shares = {label: [sums[label].get(x, 0.0) / totals[x] for x in xs] for label in order}
    return plots.share_chart(xs, shares, title="How episodes ended", x_label="iteration"), used
