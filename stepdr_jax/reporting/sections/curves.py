"""Charts of metrics over steps or iterations, for every stage that logs them."""

import math
import re
from collections.abc import Callable, Mapping

from stepdr_jax.pages import plots
from stepdr_jax.pages.plots import Line
from stepdr_jax.reporting.collect import Curves, Run


def metric_chart(
    run: Run,
    stage: str,
    pick: Callable[[str], str | None],
    *,
    kept: Mapping[int, Mapping[str, Curves]] | None = None,
    sparse: bool = False,
    **settings,
) -> tuple[str, set[str]]:
    """A line chart of every metric that `pick` gives a label, over all seeds; and the metric names it used.

    Labels that are 0 throughout are left out.

    Args:
        kept: seed -> stage -> curves; default the rows of metrics.jsonl.
        sparse: lines are drawn through rows that lack the metric.
    """
    found: list[tuple[str, int, Curves, str]] = []
    for seed in run.seeds:
        curves = (run.curves if kept is None else kept).get(seed, {}).get(stage)
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
    if found and not labels and any(value == 0 for *_, curves, name in found for value in curves.values[name]):
        return plots.nothing(settings["title"], "0 throughout"), names
    if not one_metric:
        found = [row for row in found if row[0] in labels]
    labels = list(dict.fromkeys(label for label, *_ in found))
    seeds = list(dict.fromkeys(seed for _, seed, *_ in found))
    lines = []
    for label, seed, curves, name in found:
        points = [(x, y) for x, y in zip(curves.x, curves.values[name], strict=True) if math.isfinite(y) or not sparse]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        if len(labels) == 1 and len(seeds) > 1:  # colour tells seeds apart
            lines.append(Line(f"seed {seed}" if one_metric else f"{label}, seed {seed}", xs, ys))
        else:
            lines.append(Line(label, xs, ys, f"seed {seed}" if len(seeds) > 1 else ""))
    return plots.line_chart(lines, **settings), names


def match_metrics(pattern: str, label: str | None = None) -> Callable[[str], str | None]:
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


def remaining_charts(run: Run, stage: str, used: set[str], x_label: str) -> list[str]:
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
            figure, _ = metric_chart(
                run, stage, match_metrics(re.escape(name), name), title=name.replace("_", " "), x_label=x_label
            )
            out.append(figure)
    return out
