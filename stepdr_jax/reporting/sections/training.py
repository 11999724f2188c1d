"""Mid-training and SFT: their curves, held-out questions on the way, and what interrupted them."""

import collections
import math
from collections.abc import Callable

from stepdr_jax.pages.wording import count_of, join_and
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.sections.curves import match_metrics, metric_chart, remaining_charts
from stepdr_jax.reporting.sections.wording import Section, progress_text
from stepdr_jax.runtime.stages import title_of, trained

NATS = {"y_label": "nats per token"}
PANELS = (  # title, pattern of metrics, label, settings of the chart
    ("Loss", r"(?:train/)?loss", "loss", NATS),
    ("Loss by mixture component", r"(?:train/)?(?:loss_by_source|source_loss|loss)/(.+)", None, NATS),
    ("Held-out loss by component", r"heldout_loss/(.+)", None, NATS | {"sparse": True}),
    ("Loss by capability", r"capability_loss/(.+)", None, NATS),
    ("Loss by data family", r"family_loss/(.+)", None, NATS),
    ("Learning rate", r"(?:train/)?(?:learning_rate|lr)", "learning rate", {"y_label": "rate"}),
    ("Gradient norm before clipping", r"(?:train/)?(?:grad|gradient)_norm", "gradient norm", {"y_label": "norm"}),
    ("Model FLOPs over the devices' peak", r"mfu", "MFU", {"y_label": "share"}),
)
MORE = (
    ("Seconds per step", r"step_seconds/(.+)", None, {"y_label": "seconds"}),
    ("Tokens per second", r"tokens_per_second", "tokens per second", {}),
    ("Goodput: share of wall-clock time in steps that count", r"goodput", "goodput", {"y_label": "share"}),
)
QA = (
    ("Held-out tasks while training", r"(reward|correct|cited)", {"y_label": "mean"}),
    (
        "Share of sampled output that is well-formed",
        r"format/(tool_calls|turns|answer|citations)",
        {"y_label": "share", "y_range": (0, 1)},
    ),
)


def training_sections(run: Run, command: Callable[[str], str]) -> list[Section]:
    """One section a stage, empty where it has not run."""
    out = []
    for stage in trained():
        section: Section = {
            "title": title_of(stage),
            "command": command(stage),
            "figures": [],
            "more": [],
            "sentence": "",
        }
        out.append(section)
        if not any(stage in run.curves.get(seed, {}) for seed in run.seeds):
            continue
        section["figures"], used = _charts(run, stage, PANELS)
        for title, pattern, settings in QA:
            figure, names = metric_chart(
                run, stage, match_metrics(pattern), kept=run.qa, title=title, x_label="training tokens", **settings
            )
            section["figures"] += [figure] if names else []
        section["more"], more_used = _charts(run, stage, MORE)
        section["more"] += remaining_charts(run, stage, used | more_used, "step")
        section["sentence"] = " ".join(_sentence(run, stage, seed) for seed in run.seeds).strip()
    return out


def _charts(run: Run, stage: str, panels) -> tuple[list[str], set[str]]:
    """Charts of the panels that have values, with marks at rollbacks; and the metrics used."""
    marks = [
        (row["to"], f"rolled back to here from step {row['step']}: {row['reason']}")
        for seed in run.seeds
        for row in _rollbacks(run, stage, seed)
    ]
    figures, used = [], set()
    for title, pattern, label, settings in panels:
        figure, names = metric_chart(
            run, stage, match_metrics(pattern, label), title=title, x_label="step", marks=marks, **settings
        )
        used |= names
        values = (
            value
            for seed in run.seeds
            for name in names
            if stage in run.curves.get(seed, {})
            for value in run.curves[seed][stage].values.get(name, ())
        )
        if any(map(math.isfinite, values)):
            figures.append(figure)
    return figures, used


def _rollbacks(run: Run, stage: str, seed: int) -> list[dict]:
    """Each rollback once, although a run that was killed during one logs it twice."""
    events = run.events.get(seed, {}).get(stage, ())
    return list({(row["step"], row["to"]): row for row in events if row["event"] == "rollback"}.values())


def _sentence(run: Run, stage: str, seed: int) -> str:
    curves = run.curves.get(seed, {}).get(stage)
    if not curves or "loss" not in curves.values or not curves.x:
        return ""
    losses = [v for v in curves.values["loss"] if math.isfinite(v)]
    if not losses:
        return ""
    tail = losses[-max(1, len(losses) // 20) :]
    who = f"Seed {seed}: " if len(run.seeds) > 1 else ""
    said = [f"{who}{progress_text(curves, 'step')}, loss {losses[0]:.2f} to {sum(tail) / len(tail):.3f}."]
    skipped = {
        "not finite": sum(v for v in curves.values.get("skipped", ()) if math.isfinite(v)),
        "a spike": sum(v for v in curves.values.get("spikes", ()) if math.isfinite(v)),
    }
    if any(skipped.values()):
        why = join_and([f"{count:.0f} whose gradient was {what}" for what, count in skipped.items() if count])
        said.append(f"Of its steps, {why} were skipped.")
    said += [
        f"At step {row['step']} it rolled back to step {row['to']} ({row['reason']}) and skipped the data in between."
        for row in _rollbacks(run, stage, seed)
    ]
    happened = collections.Counter(row["event"] for row in run.events.get(seed, {}).get(stage, ()))
    starts = happened["start"] - happened["rollback"]
    if starts > 1:
        said.append(f"It was started {count_of(starts, 'time')}.")
    goodput = [v for v in curves.values.get("goodput", ()) if math.isfinite(v)]
    if goodput:
        said.append(f"Goodput {100 * goodput[-1]:.0f}\u00a0%: share of wall-clock time spent in steps that count.")
    return " ".join(said)
