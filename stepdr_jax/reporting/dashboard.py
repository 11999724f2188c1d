"""The terminal dashboard: progress of every seed, and its metrics as numbers and sparklines, side by side."""

import math
from collections.abc import Mapping, Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from stepdr_jax.pages.plots import number
from stepdr_jax.progress import clock
from stepdr_jax.reporting import measures
from stepdr_jax.reporting.following import FollowedRun, FollowedStage
from stepdr_jax.runtime import stages

BLOCKS, PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*#@"
LABELS, VALUE, NORMAL = (20, 30), 9, 12  # columns; the wider labels from WIDE on
WIDE = 120
SHORTEST, LONGEST = 5, 40  # of a sparkline
NOT_NEWS = ("start", "end", "eval_checkpoint")


def render_dashboard(
    watched: FollowedRun,
    console: Console,
    *,
    stage: str = "",
    totals: Mapping[str, int] | None = None,
    now: float | None = None,
    whole: bool = False,
) -> Group:
    """What the terminal shows.

    Args:
        console: its width, height and encoding are kept to.
        stage: the one to show; "" the one whose rows came last.
        totals: iterations or steps that a stage will have, where that is known.
        now: seconds since 1970.
        whole: show all metrics, whatever the height.
    """
    stage = stage or watched.latest() or ""
    shown = watched.stages_named(stage) if stage else []
    if not shown:
        what = f"{stage} has" if stage else "no stage has"
        return Group(Text(f"{watched.layout.root}: {what} written metrics yet; waiting", style="yellow"))
    plain = console.options.ascii_only
    fitting = max(1, (console.width - LABELS[0]) // (VALUE + SHORTEST + 2))
    columns, hidden = shown[:fitting], shown[fitting:]
    head = [_title(watched, stage, plain), *(_standing(one, totals or {}, now, plain) for one in shown)]
    tail = _events(shown, plain)
    if hidden:
        tail.append(Text(f"no room for {', '.join(f'seed {one.seed}' for one in hidden)}: make the terminal wider"))
    room = None if whole else console.height - len(head) - len(tail) - 3
    return Group(*head, Text(""), _table(stage, columns, console.width, room, plain), *tail)


def _title(watched: FollowedRun, stage: str, plain: bool) -> Text:
    cut = "crop" if plain else "ellipsis"
    out = Text(str(watched.layout.root), style="bold", no_wrap=True, overflow=cut)
    for name in stages.with_metrics():
        made = watched.stages_named(name)
        if made:
            all_done = all(one.done for one in made)
            mark = ("done" if plain else "✓") if all_done else "…" if not plain else "..."
            out.append(f"  {stages.title_of(name)} {mark}", style="bold cyan" if name == stage else "dim")
    return out


def _standing(one: FollowedStage, totals: Mapping[str, int], now: float | None, plain: bool) -> Text:
    """One line on one seed: how far, how fast, and whether rows still come."""
    total = totals.get(one.stage)
    cut = "crop" if plain else "ellipsis"
    out = Text(f"seed {one.seed}  ", style="bold", no_wrap=True, overflow=cut)
    out.append(f"{one.unit} {one.made:,}" + (f" of {total:,}" if total and total >= one.made else ""), style="")
    ago = clock(one.age(now))
    if one.done:
        out.append(f"  finished {ago} ago", style="green")
    elif one.silent(now):
        out.append(f"  no row for {ago} and not finished: stopped, or stuck", style="bold red")
    else:
        out.append(f"  last row {ago} ago", style="")
        left = _seconds_left(one, total)
        if left is not None:
            out.append(f"  {clock(left)} left", style="cyan")
    if one.unreadable:
        out.append(f"  {one.unreadable} unreadable lines", style="yellow")
    return out


def _seconds_left(one: FollowedStage, total: int | None) -> float | None:
    told, pace = one.last.get("eta_seconds", math.nan), one.row_seconds()
    if math.isfinite(told):
        return told
    return pace * (total - one.made) if one.unit == "iteration" and total and pace else None


def _events(shown: Sequence[FollowedStage], plain: bool, most: int = 3) -> list[Text]:
    """The last things that guards did."""
    news = [
        (event.get("time", 0.0), one.seed, event)
        for one in shown
        for event in one.events
        if isinstance(event, dict) and event.get("event") not in NOT_NEWS
    ]
    out, cut = [], "crop" if plain else "ellipsis"
    for _, seed, event in sorted(news, key=lambda item: item[:2])[-most:]:
        said = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "event"))
        out.append(Text(f"seed {seed}: {event.get('event')} ({said})", style="yellow", no_wrap=True, overflow=cut))
    return out


def _table(stage: str, columns: Sequence[FollowedStage], width: int, room: int | None, plain: bool) -> Table:
    label = LABELS[width >= WIDE]
    each = (width - label) // len(columns)
    with_normal = each * len(columns) - NORMAL - 1 >= len(columns) * (VALUE + 2 + 12)
    if with_normal:
        each = (width - label - NORMAL - 1) // len(columns)
    spark = min(LONGEST, each - VALUE - 2)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("", width=label - 1, no_wrap=True, overflow="crop" if plain else "ellipsis")
    for one in columns:
        table.add_column(f"seed {one.seed}", width=VALUE, justify="right", no_wrap=True)
        table.add_column("", width=max(spark, 1), no_wrap=True)
    if with_normal:
        table.add_column("normal", width=NORMAL, no_wrap=True, style="dim")
    names = [name for one in columns for row in one.rows.values() for name in row]
    group, left = None, room
    for name, title, measure in measures.arrange_metrics(stage, names):
        series = [one.series(name) for one in columns]
        if measure.quiet and not any(value and math.isfinite(value) for values in series for value in values):
            continue
        if left is not None and left <= 0:
            break
        left = None if left is None else left - 1
        style = "bold" if measure.group != group else ""
        group = measure.group
        cells: list[Text] = [Text(title, style=style)]
        for values in series:
            last = next((value for value in reversed(values) if math.isfinite(value)), math.nan)
            odd = measure.odd(last)
            cells += [
                Text(
                    (number(last) if math.isfinite(last) else "-") + ("!" if odd else " "),
                    style="bold yellow" if odd else "",
                ),
                Text(sparkline(values, max(spark, 1), PLAIN if plain else BLOCKS), style="yellow" if odd else "cyan"),
            ]
        table.add_row(*cells, *([Text(measure.normal)] if with_normal else []))
    return table


def sparkline(values: Sequence[float], width: int, steps: str = BLOCKS) -> str:
    """The course of `values` in at most `width` characters, each the mean of its share. Blank where there is none."""
    there = [value for value in values if math.isfinite(value)]
    if 2 * len(there) < len(values):  # measured now and then
        values = there
    if not values:
        return ""
    count = min(width, len(values))
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = []
    for start, end in zip(edges, edges[1:], strict=False):
        finite = [value for value in values[start:end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return " " * count
    low, span = min(finite), max(finite) - min(finite)
    return "".join(
        " " if math.isnan(value) else steps[round((value - low) / span * (len(steps) - 1)) if span > 0 else 0]
        for value in means
    )
