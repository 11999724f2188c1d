"""Curves of reinforcement learning."""

import math

from stepdr_jax.pages import plots
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.measures import band
from stepdr_jax.reporting.sections.curves import matching, rest, several
from stepdr_jax.reporting.sections.wording import Section, listed

PPO_PANELS = (
    ("Reward of training episodes", r"reward", "mean reward", {"smooth": 5, "y_label": "reward"}),
    ("Correct and cited training episodes", r"(success|cited)", None, {"smooth": 5, "y_label": "share"}),
    ("Reward by kind of task", r"reward/(.+)", None, {"smooth": 5, "y_label": "reward"}),
    ("Deviation of the reward", r"reward_std", "reward_std", {"y_label": "reward", "band": band("reward_std")}),
    ("KL to the policy that sampled", r"kl(?:/(.+))?", None, {"y_label": "nats"}),
    ("KL of the whole update", r"kl_after", "KL after", {"y_label": "nats"}),
    ("Entropy of the policy", r"entropy", "entropy", {"y_label": "nats per token"}),
    (
        "Explained variance of the critic",
        r"explained_variance",
        "explained variance",
        {"y_range": (-1, 1), "zero": True, "band": band("explained_variance")},
    ),
    (
        "Share of tokens whose ratio was clipped",
        r"clip_fraction",
        "clipped",
        {"y_label": "share", "band": band("clip_fraction")},
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
    ("Updates that were not made", r"(skipped|guarded)_updates", None, {}),
    ("Importance of what was sampled", r"importance/(.+)", None, {"y_label": "weight, share"}),
    ("Age of what was sampled", r"(?:age|staleness)(?:/(.+))?", None, {"y_label": "versions"}),
    ("Episodes that repeat themselves", r"repetition(?:/(.+))?", None, {"smooth": 5, "y_label": "share"}),
    ("Masked episodes by cause", r"masked/(.+)", None, {"y_label": "episodes"}),
    ("Share of masked episodes", r"masked_share", "masked", {"y_label": "share", "band": band("masked_share")}),
    ("Turns and tool calls per episode", r"(turns|tool_calls)", None, {"smooth": 5}),
    ("Errors per episode", r"(format_errors|tool_errors)", None, {"smooth": 5}),
    ("Tokens per episode", r"(sampled_tokens|observed_tokens)", None, {"smooth": 5, "y_label": "tokens"}),
    ("Tokens sampled, by how the episode ended", r"tokens_by_finish/(.+)", None, {"y_label": "tokens"}),
    ("Gradient norms before clipping", r"(actor|critic)_grad_norm", None, {"y_label": "norm"}),
    ("Losses", r"(policy|value)_loss", None, {}),
    ("Seconds per iteration", r"seconds_(sampling|training)", None, {"y_label": "seconds"}),
)
FINISHES_AFTER = 1  # the panel of shares stands behind this many others


def section(run: Run) -> Section:
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
        figure, names = several(run, "ppo", matching(pattern, label), title=title, x_label="iteration", **settings)
        if names:
            section["figures"].append(figure)
            used |= names
    section["figures"].sort(
        key=lambda figure: plots.EMPTY in figure
    )  # stable: charts first, what is 0 throughout behind
    section["more"] = rest(run, "ppo", used, "iteration")
    lengths = [len(run.curves[seed]["ppo"].x) for seed in run.seeds if "ppo" in run.curves.get(seed, {})]
    section["sentence"] = (
        f"{listed([f'{n:,}' for n in dict.fromkeys(lengths)])} iterations of sampling and updating"
        + (f", {len(lengths)} seeds" if len(lengths) > 1 else "")
        + ". What is normal, and what each curve means, is told in docs/ppo.md. Episodes here are on training tasks and sampled at the training temperature; the evaluation below is what counts. "
        "Masked episodes are those that our own system broke: they carry no reward and no gradient."
    )
    return section


def _finishes(run: Run) -> tuple[str, set[str]]:
    """Shares of finish reasons over iterations, averaged over seeds."""
    pick = matching(r"(?:rollout/)?finish(?:_share)?[/_](.+)")
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
