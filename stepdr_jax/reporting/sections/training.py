"""Curves of mid-training and SFT."""

import math
from collections.abc import Callable

from stepdr_jax.reporting.collect import TITLES, TRAINED, Run
from stepdr_jax.reporting.sections.curves import matching, rest, several
from stepdr_jax.reporting.sections.wording import Section, made


def sections(run: Run, command: Callable[[str], str]) -> list[Section]:
    out = []
    for stage in TRAINED:
        section: Section = {
            "title": TITLES[stage],
            "command": command(stage),
            "figures": [],
            "more": [],
            "sentence": "",
        }
        out.append(section)
        if not any(stage in run.curves.get(seed, {}) for seed in run.seeds):
            continue
        used: set[str] = set()
        for title, pattern, label, settings in TRAINING_PANELS:
            figure, names = several(run, stage, matching(pattern, label), title=title, x_label="step", **settings)
            if names:
                section["figures"].append(figure)
                used |= names
        section["more"] = rest(run, stage, used, "step")
        section["sentence"] = " ".join(_training_sentence(run, stage, seed) for seed in run.seeds).strip()
    return out


TRAINING_PANELS = (
    ("Loss", r"(?:train/)?loss", "loss", {"y_label": "nats per token"}),
    (
        "Loss by mixture component",
        r"(?:train/)?(?:loss_by_source|source_loss|loss)/(.+)",
        None,
        {"y_label": "nats per token"},
    ),
    ("Learning rate", r"(?:train/)?(?:learning_rate|lr)", "learning rate", {"y_label": "rate"}),
    ("Gradient norm before clipping", r"(?:train/)?(?:grad|gradient)_norm", "gradient norm", {"y_label": "norm"}),
)


def _training_sentence(run: Run, stage: str, seed: int) -> str:
    curves = run.curves.get(seed, {}).get(stage)
    if not curves or "loss" not in curves.values or not curves.x:
        return ""
    losses = [v for v in curves.values["loss"] if math.isfinite(v)]
    if not losses:
        return ""
    tail = losses[-max(1, len(losses) // 20) :]
    who = f"Seed {seed}: " if len(run.seeds) > 1 else ""
    return f"{who}{made(curves, 'step')}, loss {losses[0]:.2f} to {sum(tail) / len(tail):.3f}."
