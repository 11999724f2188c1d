"""The sections of the run report as plain values for its template: sentences, tables and figures from collected data."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stepdr_jax.evaluation import results, statistics
from stepdr_jax.evaluation.statistics import Interval
from stepdr_jax.progress import clock
from stepdr_jax.reporting import plots
from stepdr_jax.reporting.collect import TITLES, TRAINED, Curves, Run
from stepdr_jax.reporting.plots import Dot, Line

Section = dict[str, Any]
KIND_TITLES = {
    "fact": "single fact",
    "deep_search": "deep search",
    "doc_walk": "document walk",
    "verification": "verification",
    "report": "report",
}
PERCENT = "\u00a0%"
LANG_TITLES = {"en": "English", "zh": "Chinese"}


# --------------------------------------------------------------------------------------------------------- wording


def shown(value: float | None, unit: str = "score") -> str:
    """A value in the words of its unit."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit in ("share", "ratio"):
        return f"{100 * value:.1f}\u00a0%"
    if unit == "tokens":
        return f"{value:,.0f}"
    if unit == "count":
        return f"{value:.2f}"
    if unit == "price":
        return plots.number(1000 * value)
    if unit == "difference":
        return "0.000" if round(value, 3) == 0 else f"{value:+.3f}".replace("-", "−")
    return f"{value:.3f}".replace("-", "−")


def ranged(interval: Interval, unit: str = "score") -> dict[str, str]:
    """A table cell: the value and its interval."""
    if interval.n == 0:
        return {"value": "–", "range": ""}
    low, high = shown(interval.low, unit), shown(interval.high, unit)
    span = "" if math.isnan(interval.low) else f"{low.removesuffix(PERCENT)} to {high}"
    return {"value": shown(interval.mean, unit), "range": span}


def counted(n: int, singular: str, plural: str | None = None) -> str:
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def listed(words: Sequence[str]) -> str:
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", numeric: bool = True):
    cells = [{"cells": list(row)} for row in rows]
    return {"head": list(head), "rows": cells, "caption": caption, "numeric": numeric, "dense": False}


# -------------------------------------------------------------------------------------------------------- headline


def result_sentences(run: Run, differences: Mapping[tuple[str, str], Mapping[str, statistics.Paired]]) -> Section:
    """The main result in words. `tone` is good only when PPO's interval over SFT lies above zero."""
    if not run.evaluated:
        return {"tone": "open", "sentences": ["Nothing has been evaluated yet, so there is no result."]}
    sentences, tone = [], "open"
    step = differences.get(("sft", "ppo"))
    if step:
        before = results.measure(run.evaluated["sft"], results.BY_NAME["reward"])
        after = results.measure(run.evaluated["ppo"], results.BY_NAME["reward"])
        gain = step["reward"].crossed
        seeds = len(step["reward"].per_seed)
        span = (
            f"{shown(gain.mean, 'difference')}, 95\u00a0% interval {shown(gain.low, 'difference')} to "
            f"{shown(gain.high, 'difference')}, paired over {counted(gain.clusters, 'held-out task')}"
            + (f" and {seeds} seeds" if seeds > 1 else "")
        )
        levels = f"from {shown(before.mean)} after SFT to {shown(after.mean)} after PPO"
        if gain.low > 0:
            tone = "good"
            sentences.append(f"PPO raised the mean held-out reward {levels} ({span}).")
        elif gain.high < 0:
            tone = "bad"
            sentences.append(f"PPO did not improve over SFT: it lowered the mean held-out reward {levels} ({span}).")
        else:
            tone = "flat"
            sentences.append(
                f"PPO did not measurably improve over SFT: the mean held-out reward went {levels}, and the interval of the "
                f"difference includes zero ({span})."
            )
        fixed = step["reward"].fixed_seeds
        if seeds > 1 and fixed.excludes_zero != gain.excludes_zero:
            sentences.append(
                f"For exactly these {seeds} trainings, resampling tasks only, the interval is "
                f"{shown(fixed.low, 'difference')} to {shown(fixed.high, 'difference')}: "
                + (
                    "the seeds differ too much to expect the same of another training."
                    if fixed.excludes_zero
                    else "less certain."
                )
            )
    else:
        last = list(run.evaluated)[-1]
        reward = results.measure(run.evaluated[last], results.BY_NAME["reward"])
        sentences.append(
            f"The last evaluated stage is {TITLES[last]}, with a mean held-out reward of {shown(reward.mean)} "
            f"(95\u00a0% interval {shown(reward.low)} to {shown(reward.high)})."
        )
        missing = [TITLES[stage] for stage in ("sft", "ppo") if stage not in run.evaluated]
        if missing:
            sentences.append(f"{listed(missing)} {'has' if len(missing) == 1 else 'have'} not been evaluated yet.")
    step = differences.get(("midtrain2", "sft"))
    if step:
        gain = step["correct"].crossed
        before = results.measure(run.evaluated["midtrain2"], results.BY_NAME["correct"])
        after = results.measure(run.evaluated["sft"], results.BY_NAME["correct"])
        if gain.n:
            verb = "raised" if gain.low > 0 else "lowered" if gain.high < 0 else "did not measurably change"
            sentences.append(
                f"SFT {verb} the share of correct answers: {shown(before.mean, 'share')} after mid-training, "
                f"{shown(after.mean, 'share')} after SFT (95\u00a0% interval of the difference "
                f"{shown(gain.low, 'difference')} to {shown(gain.high, 'difference')})."
            )
    return {"tone": tone, "sentences": sentences}


def tiles(run: Run, summaries: Mapping[str, Mapping[str, Interval]], seconds: float | None) -> list[dict[str, str]]:
    out = []
    if summaries:
        last = list(summaries)[-1]
        out.append(
            {"value": shown(summaries[last]["reward"].mean), "label": f"mean held-out reward after {TITLES[last]}"}
        )
        out.append({"value": shown(summaries[last]["correct"].mean, "share"), "label": f"correct after {TITLES[last]}"})
        out.append({"value": shown(summaries[last]["cited"].mean, "share"), "label": "with citations that all resolve"})
    if seconds:
        out.append(
            {
                "value": clock(seconds),
                "label": f"for all stages{f' of {len(run.seeds)} seeds' if len(run.seeds) > 1 else ''}",
            }
        )
    prepared = run.data.get("prepared")
    if prepared:
        out.append({"value": _compact(prepared["tokens"]), "label": "prepared training tokens"})
    trajectories = run.data.get("trajectories")
    if trajectories:
        out.append({"value": f"{trajectories['kept']:,}", "label": "teacher trajectories kept"})
    return out


def _compact(n: float) -> str:
    return f"{n / 1e6:.1f} M" if n >= 1e6 else f"{n / 1e3:.0f} k" if n >= 1e4 else f"{n:,.0f}"


def overview(run: Run, summaries: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    if not summaries:
        return []
    out = []
    for name in ("reward", "correct"):
        metric = results.BY_NAME[name]
        rows = [(TITLES[stage], stage_dots(run, stage, metric)) for stage in summaries]
        out.append(
            plots.dot_chart(
                rows,
                title=f"{metric.title} on held-out tasks",
                x_label="mean reward" if name == "reward" else "share of tasks with a known answer",
                x_range=(0, 1) if metric.unit == "share" else None,
                note=_interval_note(run),
            )
        )
    return out


def _interval_note(run: Run) -> str:
    seeds = len(run.seeds)
    return "Whiskers: 95\u00a0% interval." + (" Small dots: single seeds." if seeds > 1 else "")


def stage_dots(run: Run, stage: str, metric: results.Metric) -> list[Dot]:
    """The pooled value and, with several seeds, one small dot per seed."""
    rows = run.evaluated[stage]
    pooled = results.measure(rows, metric)
    dots = [Dot(pooled.mean, pooled.low, pooled.high)]
    seeds = sorted({row.seed for row in rows})
    if len(seeds) > 1:
        for seed in seeds:
            one = results.measure(
                [row for row in rows if row.seed == seed], metric, resamples=results.BREAKDOWN_RESAMPLES
            )
            dots.append(Dot(one.mean, one.low, one.high, f"seed {seed}", 6, small=True))
    return dots


# ------------------------------------------------------------------------------------------------------------ data


def data(run: Run) -> Section:
    found = run.data
    section: Section = {
        "present": "tasks" in found or "trajectories" in found,
        "figures": [],
        "tables": [],
        "notes": [],
    }
    section["prepared"] = "prepared" in found
    counts = []
    if found.get("documents"):
        counts.append(counted(found["documents"], "document"))
    tasks = found.get("tasks", [])
    if tasks:
        heldout = sum(row["count"] for row in tasks if row["split"] == "heldout")
        counts.append(f"{counted(sum(row['count'] for row in tasks), 'task')}, {heldout:,} of them held out by entity")
    trajectories = found.get("trajectories")
    if trajectories:
        counts.append(
            f"{counted(trajectories['kept'] + trajectories['dropped'], 'teacher episode')}, {trajectories['kept']:,} kept"
        )
    if found.get("reading"):
        counts.append(counted(sum(found["reading"].values()), "reading row"))
    if found.get("tokenizer"):
        counts.append(f"a byte-level BPE of {found['tokenizer']:,} ids learned from them")
    section["sentence"] = (f"The run made {'; '.join(counts)}." if counts else "") + (
        " Held-out tasks are about entities that no training task asks about." if tasks else ""
    )
    if tasks:
        kinds = list(dict.fromkeys(row["kind"] for row in tasks))
        columns = [(split, lang) for split in ("train", "heldout") for lang in ("en", "zh")]
        names = [f"{'held out' if split == 'heldout' else 'training'}, {LANG_TITLES[lang]}" for split, lang in columns]
        at = {(row["kind"], row["split"], row["lang"]): row["count"] for row in tasks}
        rows = [(KIND_TITLES.get(kind, kind), [at.get((kind, *column), 0) for column in columns]) for kind in kinds]
        section["figures"].append(
            plots.bar_chart(rows, title="Tasks by kind, language and split", x_label="tasks", names=names)
        )
    if trajectories:
        kept = sorted(trajectories["kept_by_capability"].items(), key=_most)
        rows = [(name.replace("_", " "), [count]) for name, count in kept]
        section["figures"].append(
            plots.bar_chart(rows, title="Teacher episodes kept, by capability", x_label="episodes")
        )
        if trajectories["dropped"]:
            rows = [(name.replace("_", " "), [count]) for name, count in trajectories["dropped_by_reason"].items()]
            section["figures"].append(
                plots.bar_chart(rows, title="Teacher episodes dropped, by reason", x_label="episodes")
            )
    if found.get("reading"):
        rows = [(name.replace("_", " "), [count]) for name, count in sorted(found["reading"].items(), key=_most)]
        section["figures"].append(plots.bar_chart(rows, title="Reading rows by mixture component", x_label="rows"))
    for stage, card in found.get("prepared", {}).get("stages", {}).items():
        section["tables"].append(_mixture_table(stage, card))
    copies = found.get("card", {}).get("trajectories", {}).get("renamed copies")
    if copies:
        section["notes"].append(f"Beside the kept episodes, training reads {copies:,} copies of them with other names.")
    if section["prepared"]:
        section["notes"].append(
            "Rate: share of rows that training draws from a component, as configured. Share of tokens: what the component is on "
            "disk. Fill: used positions of a packed row."
        )
    return section


def _most(item: tuple[str, int]) -> int:
    return -item[1]


def _mixture_table(stage: str, card: Mapping[str, Any]) -> Section:
    rows = []
    for name, part in sorted(card["components"].items(), key=lambda item: -item[1]["rate"]):
        dropped = sum(part["dropped"].values())
        rows.append(
            [
                name.replace("_", " "),
                f"{100 * part['rate']:.0f}\u00a0%",
                f"{100 * part['share_of_tokens']:.0f}\u00a0%",
                f"{part['examples']:,}",
                f"{part['rows']:,}",
                f"{part['tokens']:,}",
                f"{100 * part['loss_tokens'] / max(part['tokens'], 1):.0f}\u00a0%",
                f"{100 * part['fill']:.0f}\u00a0%",
                f"{dropped:,}",
            ]
        )
    head = ["Component", "Rate", "Share of tokens", "Examples", "Rows", "Tokens", "Trained on", "Fill", "Too long"]
    return table(head, rows, caption=f"{TITLES[stage]}: rows of {card['context']} tokens")


# -------------------------------------------------------------------------------------------------------- training


def _several(run: Run, stage: str, pick: Callable[[str], str | None], **settings) -> tuple[str, set[str]]:
    """A line chart of every metric that `pick` gives a label, over all seeds; and the metric names it used.

    Of several labels those that are 0 throughout are left out.
    """
    found: list[tuple[str, int, Curves, str]] = []
    for seed in run.seeds:
        curves = run.curves.get(seed, {}).get(stage)
        for name in curves.values if curves else ():
            label = pick(name)
            if label is not None:
                found.append((label, seed, curves, name))
    names = {name for *_, name in found}
    one_metric = len({label for label, *_ in found}) == 1
    labels = list(
        dict.fromkeys(
            label for label, _, curves, name in found if any(v and math.isfinite(v) for v in curves.values[name])
        )
    )
    if not one_metric:
        if found and not labels:
            return plots.nothing(settings["title"], "0 throughout"), names
        found = [row for row in found if row[0] in labels]
    labels = list(dict.fromkeys(label for label, *_ in found))
    seeds = list(dict.fromkeys(seed for _, seed, *_ in found))
    lines = []
    for label, seed, curves, name in found:
        if len(labels) == 1 and len(seeds) > 1:  # colour tells seeds apart
            lines.append(Line(f"seed {seed}" if one_metric else f"{label}, seed {seed}", curves.x, curves.values[name]))
        else:
            lines.append(Line(label, curves.x, curves.values[name], f"seed {seed}" if len(seeds) > 1 else ""))
    return plots.line_chart(lines, **settings), names


def matching(pattern: str, label: str | None = None) -> Callable[[str], str | None]:
    """Picks metrics by a regular expression; the label is its first group, or given."""
    compiled = re.compile(pattern)

    def pick(name: str) -> str | None:
        match = compiled.fullmatch(name)
        if not match:
            return None
        found = (match.group(1) if match.groups() else "") or name
        return label or LABELS.get(found, found.replace("_", " "))

    return pick


LABELS = {"success": "correct"}
HIDDEN = re.compile(r"(.*/)?(step|iteration|time|timestamp|wall_time|.*seconds.*|tokens|tokens_seen|.*_total)")


def training(run: Run, command: Callable[[str], str]) -> list[Section]:
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
            figure, names = _several(run, stage, matching(pattern, label), title=title, x_label="step", **settings)
            if names:
                section["figures"].append(figure)
                used |= names
        section["more"] = _rest(run, stage, used, "step")
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


def made(curves: Curves, unit: str) -> str:
    """How far a stage came: rows are numbered from 0 or 1, by what the first of them is."""
    return counted(int(curves.x[-1]) + (curves.x[0] == 0), unit)


def _rest(run: Run, stage: str, used: set[str], x_label: str) -> list[str]:
    """A small chart for every metric that no panel showed and that is not bookkeeping or constant."""
    names = dict.fromkeys(
        name for seed in run.seeds if stage in run.curves.get(seed, {}) for name in run.curves[seed][stage].values
    )
    out = []
    for name in names:
        if name in used or HIDDEN.fullmatch(name):
            continue
        values = [
            v for seed in run.seeds if stage in run.curves[seed] for v in run.curves[seed][stage].values.get(name, ())
        ]
        if len({v for v in values if math.isfinite(v)}) > 1:
            figure, _ = _several(
                run, stage, matching(re.escape(name), name), title=name.replace("_", " "), x_label=x_label
            )
            out.append(figure)
    return out


# -------------------------------------------------------------------------------------------------------------- ppo

PPO_PANELS = (
    ("Reward of training episodes", r"reward", "mean reward", {"smooth": 5, "y_label": "reward"}),
    ("Correct and cited training episodes", r"(success|cited)", None, {"smooth": 5, "y_label": "share"}),
    ("Reward by kind of task", r"reward/(.+)", None, {"smooth": 5, "y_label": "reward"}),
    ("KL to the policy that sampled", r"kl(?:/(.+))?", None, {"y_label": "nats"}),
    ("Entropy of the policy", r"entropy", "entropy", {"y_label": "nats per token"}),
    (
        "Explained variance of the critic",
        r"explained_variance",
        "explained variance",
        {"y_range": (-1, 1), "zero": True},
    ),
    ("Masked episodes by cause", r"masked/(.+)", None, {"y_label": "episodes"}),
    ("Log-probability gap, sampler against trainer", r"logprob_gap/(.+)", None, {"y_label": "nats"}),
    ("Turns and tool calls per episode", r"(turns|tool_calls)", None, {"smooth": 5}),
    ("Tokens per episode", r"(sampled_tokens|given_tokens)", None, {"smooth": 5, "y_label": "tokens"}),
    ("Tokens sampled, by how the episode ended", r"tokens_by_finish/(.+)", None, {"y_label": "tokens"}),
    ("Seconds per iteration", r"seconds_(sampling|training)", None, {"y_label": "seconds"}),
)
FINISHES_AFTER = 1  # the panel of shares stands behind this many others


def ppo(run: Run) -> Section:
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
        figure, names = _several(run, "ppo", matching(pattern, label), title=title, x_label="iteration", **settings)
        if names:
            section["figures"].append(figure)
            used |= names
    section["more"] = _rest(run, "ppo", used, "iteration")
    lengths = [len(run.curves[seed]["ppo"].x) for seed in run.seeds if "ppo" in run.curves.get(seed, {})]
    section["sentence"] = (
        f"{listed([f'{n:,}' for n in dict.fromkeys(lengths)])} iterations of sampling and updating"
        + (f", {len(lengths)} seeds" if len(lengths) > 1 else "")
        + ". Episodes here are on training tasks and sampled at the training temperature; the evaluation below is what counts. "
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


# ------------------------------------------------------------------------------------------------------- evaluation


def differences(run: Run) -> dict[tuple[str, str], dict[str, statistics.Paired]]:
    """(before, after) -> metric -> paired difference, for neighbouring evaluated stages, and init to the last."""
    stages = list(run.evaluated)
    pairs = list(zip(stages, stages[1:], strict=False))
    return {
        (before, after): {
            name: statistics.paired(
                results.values(run.evaluated[before], results.BY_NAME[name]),
                results.values(run.evaluated[after], results.BY_NAME[name]),
            )
            for name in ("reward", "correct", "cited", "turns", "tokens")
        }
        for before, after in pairs
    }


def evaluation(
    run: Run,
    summaries: Mapping[str, Mapping[str, Interval]],
    paired: Mapping[tuple[str, str], Mapping[str, statistics.Paired]],
    breakdowns: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Interval]]]],
) -> Section:
    if not run.evaluated:
        return {"present": False}
    seeds = sorted({row.seed for rows in run.evaluated.values() for row in rows})
    tasks = len({row.task_id for rows in run.evaluated.values() for row in rows})
    several = len(seeds) > 1
    section: Section = {"present": True, "several_seeds": several, "notes": []}
    section["sentence"] = (
        f"The same {counted(tasks, 'held-out task')} for every stage"
        + (f" and each of {len(seeds)} seeds" if several else "")
        + ", through the same episode loop, tools, budgets and judge. Correct: the answer states the known value (open report tasks "
        "have none). Cited: the answer has citations and all of them resolve to a passage the episode observed. Recovered: of tool "
        "errors and malformed turns, the share that a successful call or the answer followed."
    )
    head = ["Stage", *(metric.title for metric in results.METRICS), "Episodes"]
    rows = []
    for stage, summary in summaries.items():
        measured = sum(row.missing is None for row in run.evaluated[stage])
        rows.append(
            [
                TITLES[stage],
                *(ranged(summary[metric.name], metric.unit) for metric in results.METRICS),
                {"value": f"{measured:,}", "range": _missing(len(run.evaluated[stage]) - measured)},
            ]
        )
    section["table"] = table(head, rows) | {"dense": True}
    section["notes"].append(
        "Under each value its 95\u00a0% interval, by bootstrap over tasks"
        + (" and seeds" if several else "")
        + ". Cost of 1,000 "
        "episodes: tokens times the configured price, in an arbitrary unit."
    )
    for stage, evaluated in run.evaluated.items():
        causes = results.missing_causes(evaluated)
        if causes:
            told = "; ".join(f"{cause} ({count})" for cause, count in causes.items())
            section["notes"].append(
                f"{TITLES[stage]}: episodes without a measurement, left out rather than counted as 0: {told}."
            )
    section["figures"] = [
        plots.dot_chart(
            [(TITLES[stage], stage_dots(run, stage, metric)) for stage in run.evaluated],
            title=metric.title,
            x_label={"share": "share of episodes", "ratio": "share of errors"}.get(metric.unit, metric.title.lower()),
            x_range=(0, 1) if metric.unit in ("share", "ratio") else None,
            note=_interval_note(run),
        )
        for metric in (results.BY_NAME[name] for name in ("cited", "answered", "recovered", "turns"))
    ]
    section["differences"] = _difference_table(paired) if paired else None
    section["paired_figures"] = _difference_figures(paired) if ("sft", "ppo") in paired else []
    section["breakdowns"] = [
        _breakdown_table(breakdowns, field, titles, head)
        for field, titles, head in (("kind", KIND_TITLES, "Kind"), ("lang", LANG_TITLES, "Language"))
    ]
    return section


def _missing(count: int) -> str:
    return f"{count} missing" if count else ""


def _difference_table(paired: Mapping[tuple[str, str], Mapping[str, statistics.Paired]]) -> Section:
    rows = []
    for (before, after), by_metric in paired.items():
        row: list[Any] = [f"{TITLES[before]} → {TITLES[after]}"]
        for name in ("reward", "correct", "cited"):
            row.append(ranged(by_metric[name].crossed, "difference"))
        for name in ("turns", "tokens"):
            interval = by_metric[name].crossed
            row.append(
                {"value": _signed(interval.mean), "range": f"{_signed(interval.low)} to {_signed(interval.high)}"}
            )
        rows.append(row)
    return table(["Step", "Reward", "Correct", "Cited", "Turns", "Tokens"], rows)


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:+,.{digits}f}".replace("-", "−")


def _difference_figures(paired: Mapping[tuple[str, str], Mapping[str, statistics.Paired]]) -> list[str]:
    out = []
    for name in ("reward", "correct"):
        found = paired[("sft", "ppo")][name]
        several = len(found.per_seed) > 1
        rows = [(f"seed {seed}", [Dot(i.mean, i.low, i.high)]) for seed, i in found.per_seed.items()]
        if several:
            fixed, crossed = found.fixed_seeds, found.crossed
            rows.append(("all seeds, tasks drawn", [Dot(fixed.mean, fixed.low, fixed.high, colour=2)]))
            rows.append(("all seeds, both drawn", [Dot(crossed.mean, crossed.low, crossed.high, colour=1)]))
        title = f"PPO minus SFT: {results.BY_NAME[name].title.lower()}"
        out.append(
            plots.dot_chart(
                rows, title=title, x_label="paired difference", zero=True, note="Whiskers: 95\u00a0% interval."
            )
        )
    return out


def _breakdown_table(breakdowns, field: str, titles: Mapping[str, str], head: str) -> Section:
    stages = list(breakdowns)
    keys = list(dict.fromkeys(key for stage in stages for key in breakdowns[stage][field]))
    rows = []
    for key in keys:
        for name in ("reward", "correct"):
            cells = [breakdowns[stage][field].get(key, {}).get(name, statistics.NOTHING) for stage in stages]
            if all(cell.n == 0 for cell in cells):
                continue
            metric = results.BY_NAME[name]
            label = {
                "value": f"{titles.get(key, key)}: {metric.title.lower()}",
                "range": counted(max(cell.clusters for cell in cells), "task"),
            }
            rows.append([label, *(ranged(cell, metric.unit) for cell in cells)])
    return table([head, *(TITLES[stage] for stage in stages)], rows)


LIMITS = (
    "The model is tiny and its world is small and templated: pages are written from a few sentence patterns over real facts. That it "
    "learns to search and cite here says that the recipe's parts work together, not how well any of them works at scale.",
    "The judge is a program that reads answers for known values and citations. It cannot weigh style, depth or reasoning, and a "
    "high reward here means that its criteria are met, no more.",
    "Held-out tasks ask about entities that no training task asks about, but in the same sentence patterns, relations and tools.",
    "A few seeds and one world: the intervals carry the choice of tasks and, with several seeds, of trainings; they do not carry the "
    "choice of world, templates or settings.",
    "None of these numbers can be compared with published results of large models.",
    "Cost and time are of this machine and this model size.",
)
