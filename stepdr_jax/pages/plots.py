"""Plots as small hand-written SVG figures that follow the page's light or dark theme.

A figure is HTML: caption, legend, one `<svg>` in a fixed coordinate system that scales with its column. Colours are
CSS variables (`--c0` ... `--c7`, the Okabe-Ito palette, adjusted for dark backgrounds), so nothing here knows the
theme. Lines also carry their points in a `data-lines` attribute, which the page's script reads to show values under
the pointer.
"""

import dataclasses
import html
import json
import math
import textwrap
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 520, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 36
COLOURS = 8
EMPTY = 'class="plot empty"'


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve. Lines of the same `label` share colour and legend entry (one quantity, several seeds)."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    note: str = ""  # what tells it from lines of the same label: "seed 1"


@dataclasses.dataclass(frozen=True)
class Dot:
    """A value with its interval; `low` and `high` may be NaN. `small` dots are single seeds beside the pooled one."""

    value: float
    low: float = math.nan
    high: float = math.nan
    label: str = ""
    colour: int = 0
    small: bool = False


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str = "",
    y_range: tuple[float, float] | None = None,
    smooth: int = 1,
    zero: bool = False,
    note: str = "",
    marks: Sequence[tuple[float, str]] = (),
    band: tuple[float, float] | None = None,
    log: bool = False,
) -> str:
    """Curves over a common x axis.

    Args:
        y_range: fixed y limits; None takes the data's.
        smooth: running mean over this many points, drawn over the faint raw curve.
        zero: draws a line at y = 0.
        marks: (x, what happened there), each a dashed vertical line; what happened is its tooltip.
        band: normal values (low, high), either of them infinite; shaded.
        log: y in powers of ten; values that are not positive are left out.
    """
    lines = [line for line in lines if any(math.isfinite(v) for v in line.y)]
    if not lines:
        return nothing(title, "no values were logged")
    xs = [v for line in lines for v in line.x]
    scaled = _power if log else float
    ys = [scaled(v) for line in lines for v in line.y if math.isfinite(scaled(v))]
    if not ys:
        return nothing(title, "0 throughout")
    x_axis = Axis.from_range(min(xs), max(xs), LEFT, WIDTH - RIGHT, whole=True)
    low, high = y_range or ((math.floor(min(ys)), math.ceil(max(ys))) if log else _robust(ys))
    y_axis = Axis.from_range(low, high, HEIGHT - BOTTOM, TOP, fixed=y_range is not None, whole=log)
    y_axis = dataclasses.replace(y_axis, powers=log)
    labels = list(dict.fromkeys(line.label for line in lines))
    many = len(lines) > len(labels)
    parts = [_frame(x_axis, y_axis, x_label, y_label)]
    if band is not None:
        floor, ceiling = (min(max(scaled(v), y_axis.low), y_axis.high) for v in band)
        edge = y_axis(ceiling)
        if ceiling > floor:
            parts.append(
                f'<rect class="band" x="{LEFT}" y="{edge:.1f}" width="{WIDTH - RIGHT - LEFT}" '
                f'height="{y_axis(floor) - edge:.1f}"/>'
            )
        note = " ".join(part for part in (note, f"Normal: {_banded(band)}, shaded.") if part)
    if zero and y_axis.low < 0 < y_axis.high:
        parts.append(f'<path class="zero" d="M{LEFT} {y_axis(0):.1f}H{WIDTH - RIGHT}"/>')
    for x, what in marks:
        parts.append(
            f'<path class="mark" d="M{x_axis(x):.1f} {TOP}V{HEIGHT - BOTTOM}"><title>{_text(what)}</title></path>'
        )
    drawn = []
    for line in lines:
        colour = labels.index(line.label) % COLOURS
        if smooth > 1 and len(line.y) > 2 * smooth:
            parts.append(_path(line.x, line.y, x_axis, y_axis, f"raw s{colour}"))
            parts.append(_path(line.x, running_mean(line.y, smooth), x_axis, y_axis, f"line s{colour}"))
        else:
            kind = "thin" if many else "line"
            parts.append(_path(line.x, [scaled(v) for v in line.y], x_axis, y_axis, f"{kind} s{colour}"))
        name = " · ".join(part for part in (line.label, line.note) if part)
        drawn.append([name, colour, [_short(v) for v in line.x], [_short(v) for v in line.y]])
    extra = {
        "data-lines": json.dumps({"x": [x_axis.low, x_axis.high, LEFT, WIDTH - RIGHT], "unit": x_label, "lines": drawn})
    }
    if smooth > 1 and any(len(line.y) > 2 * smooth for line in lines):
        note = " ".join(part for part in (note, f"Thick: running mean over {smooth}.") if part)
    return _figure(
        title, "".join(parts), legend(labels) if len(labels) > 1 else "", note, extra, f"{title}: {', '.join(labels)}"
    )


def share_chart(
    x: Sequence[float], shares: Mapping[str, Sequence[float]], *, title: str, x_label: str, note: str = ""
) -> str:
    """Stacked shares that add up to 1 at every x, first name at the bottom."""
    shares = {name: values for name, values in shares.items() if any(v > 0 for v in values)}
    if not shares or not x:
        return nothing(title, "no values were logged")
    x_axis = Axis.from_range(min(x), max(x), LEFT, WIDTH - RIGHT, whole=True)
    y_axis = Axis.from_range(0, 1, HEIGHT - BOTTOM, TOP, fixed=True)
    parts = [_frame(x_axis, y_axis, x_label, "share")]
    floor = [0.0] * len(x)
    drawn = []
    for index, (name, values) in enumerate(shares.items()):
        ceiling = [a + b for a, b in zip(floor, values, strict=True)]
        upper = [f"{x_axis(a):.1f} {y_axis(b):.1f}" for a, b in zip(x, ceiling, strict=True)]
        lower = [f"{x_axis(a):.1f} {y_axis(b):.1f}" for a, b in zip(x, floor, strict=True)]
        parts.append(f'<path class="area f{index % COLOURS}" d="M{"L".join(upper + lower[::-1])}Z"/>')
        drawn.append([name, index % COLOURS, [_short(v) for v in x], [_short(v) for v in values]])
        floor = ceiling
    extra = {
        "data-lines": json.dumps({"x": [x_axis.low, x_axis.high, LEFT, WIDTH - RIGHT], "unit": x_label, "lines": drawn})
    }
    return _figure(title, "".join(parts), legend(list(shares)), note, extra, f"{title}: {', '.join(shares)}")


def dot_chart(
    rows: Sequence[tuple[str, Sequence[Dot]]],
    *,
    title: str,
    x_label: str,
    x_range: tuple[float, float] | None = None,
    zero: bool = False,
    names: Sequence[str] = (),
    note: str = "",
) -> str:
    """One row per name with its dots and their intervals, read from top to bottom.

    Args:
        names: legend, in order of `Dot.colour`.
        zero: draws a line at 0 (differences).
    """
    finite = [v for _, dots in rows for dot in dots for v in (dot.value, dot.low, dot.high) if math.isfinite(v)]
    if not finite:
        return nothing(title, "nothing was measured")
    left = 16 + 6.6 * max(len(name) for name, _ in rows)
    step = max(26, 9 * max(len(dots) for _, dots in rows))
    height = TOP + step * len(rows) + BOTTOM
    low, high = x_range or (min([*finite, 0.0] if zero else finite), max([*finite, 0.0] if zero else finite))
    x_axis = Axis.from_range(low, high, left, WIDTH - RIGHT - 6, fixed=x_range is not None)
    floor = height - BOTTOM
    parts = [_x_axis(x_axis, floor, x_label, TOP)]
    if zero and x_axis.low <= 0 <= x_axis.high:
        parts.append(f'<path class="zero" d="M{x_axis(0):.1f} {TOP}V{floor}"/>')
    for index, (name, dots) in enumerate(rows):
        middle = TOP + step * (index + 0.5)
        parts.append(
            f'<text class="name" x="{left - 10:.1f}" y="{middle + 4:.1f}" text-anchor="end">{_text(name)}</text>'
        )
        spread = min(9.0, (step - 8) / max(len(dots), 1))
        for place, dot in enumerate(dots):
            if not math.isfinite(dot.value):
                continue
            y = middle + (place - (len(dots) - 1) / 2) * spread
            told = f"{name}{', ' + dot.label if dot.label else ''}: {number(dot.value)}"
            if math.isfinite(dot.low):
                told += f" ({number(dot.low)} to {number(dot.high)})"
                parts.append(
                    f'<path class="{"whisker thin" if dot.small else "whisker"} s{dot.colour}" '
                    f'd="M{x_axis(dot.low):.1f} {y:.1f}H{x_axis(dot.high):.1f}"/>'
                )
            radius = 2.6 if dot.small else 4.6
            parts.append(
                f'<circle class="dot f{dot.colour}" cx="{x_axis(dot.value):.1f}" cy="{y:.1f}" r="{radius}">'
                f"<title>{_text(told)}</title></circle>"
            )
    return _figure(title, "".join(parts), legend(names), note, {}, title, height=height)


def bar_chart(
    rows: Sequence[tuple[str, Sequence[float]]], *, title: str, x_label: str, names: Sequence[str] = (), note: str = ""
) -> str:
    """Horizontal bars; several values of a row stand under each other in the order of `names`."""
    rows = [(name, values) for name, values in rows if values]
    top = max((v for _, values in rows for v in values if math.isfinite(v)), default=0)
    if top <= 0:
        return nothing(title, "nothing to show")
    thick = 14 if max(len(values) for _, values in rows) == 1 else 9
    wrapped = [textwrap.wrap(name, 30) or [""] for name, _ in rows]
    left = 16 + 6.4 * max(len(line) for lines in wrapped for line in lines)
    steps = [max(thick * len(values), 13 * len(lines)) + 9 for (_, values), lines in zip(rows, wrapped, strict=True)]
    height = TOP + sum(steps) + BOTTOM
    axis = Axis.from_range(0, top, left, WIDTH - RIGHT - 44)
    parts = [_x_axis(axis, height - BOTTOM, x_label, TOP)]
    y = TOP + 4.5
    for (_, values), lines, step in zip(rows, wrapped, steps, strict=True):
        middle = y + (step - 9) / 2
        for index, line in enumerate(lines):
            base = middle + 4 + 13 * (index - (len(lines) - 1) / 2)
            parts.append(
                f'<text class="name" x="{left - 10:.1f}" y="{base:.1f}" text-anchor="end">{_text(line)}</text>'
            )
        bars = middle - thick * len(values) / 2
        for index, value in enumerate(values):
            if not math.isfinite(value):
                continue
            width = max(axis(value) - left, 0.5)
            top_edge = bars + index * thick
            parts.append(
                f'<rect class="f{index}" x="{left:.1f}" y="{top_edge:.1f}" width="{width:.1f}" '
                f'height="{thick - 1.5}" rx="1.5"/>'
                f'<text class="value" x="{left + width + 4:.1f}" y="{top_edge + thick / 2 + 3:.1f}">'
                f"{number(value)}</text>"
            )
        y += step
    return _figure(title, "".join(parts), legend(names), note, {}, title, height=height)


def nothing(title: str, reason: str) -> str:
    """A figure's place when there is nothing to draw."""
    return f"<figure {EMPTY}><figcaption>{_text(title)}</figcaption><p>{_text(reason)}</p></figure>"


# ------------------------------------------------------------------------------------------------------------ parts


@dataclasses.dataclass(frozen=True)
class Axis:
    """Maps data values to a coordinate; `ticks` are round numbers within [low, high]."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    powers: bool = False  # values are powers of ten

    @classmethod
    def from_range(
        cls, low: float, high: float, start: float, end: float, *, fixed: bool = False, whole: bool = False
    ) -> "Axis":
        if high - low < 1e-12 * max(abs(low), abs(high), 1.0):
            pad = abs(low) * 0.1 or 1.0
            low, high = low - pad, high + pad
        if not fixed and not whole:
            pad = 0.04 * (high - low)
            low, high = (low - pad if low != 0 else low), high + pad
        # Units that a tick's text takes beside, or above, the next one: about 5.5 a character.
        label = max(46, 16 + 5.5 * len(f"{high:,.0f}")) if end > start else 30
        room = max(1, min(6, int(abs(end - start) / label)))
        return cls(low, high, start, end, ticks(low, high, count=room, whole=whole))

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, -0.02), 1.02) * (self.end - self.start)

    def text(self, tick: float) -> str:
        """A tick with as many decimals as it takes to tell it from the next."""
        if self.powers:
            return number(10**tick)
        step = self.ticks[1] - self.ticks[0] if len(self.ticks) > 1 else abs(tick)
        most = max(map(abs, self.ticks))
        if step <= 0 or step < 1e-4 or most >= 1e6:
            return number(tick)
        decimals = next(d for d in range(6) if abs(round(step, d) - step) < 1e-9 * max(step, 1) or d == 5)
        return f"{tick:,.{decimals}f}".replace("-", "−")


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> tuple[float, ...]:
    """About `count` round numbers within [low, high]; integers only if `whole`."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough))
    step = size * next(m for m in (1, 2, 2.5, 5, 10) if m * size >= rough * 0.85)
    if whole:
        step = max(1.0, math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return tuple(round(i * step, 12) + 0.0 for i in range(first, last + 1))


def number(value: float | None) -> str:
    """A number for people: three significant digits, thousands separated, exponents only where they must be."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 100 or value == round(value):
        return f"{value:,.0f}" if size < 1e7 else f"{value:.2e}"
    if size >= 1e-3:
        return f"{value:.3g}"
    return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` points, fewer at the ends; NaN values are left out."""
    half = window // 2
    out = []
    for index in range(len(values)):
        near = [v for v in values[max(0, index - half) : index + half + 1] if math.isfinite(v)]
        out.append(sum(near) / len(near) if near else math.nan)
    return out


def legend(names: Sequence[str]) -> str:
    if not names:
        return ""
    entries = "".join(f'<li><i class="b{i % COLOURS}"></i>{_text(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{entries}</ul>'


def _power(value: float) -> float:
    """Its power of ten; infinity stays, what has none is NaN."""
    return math.inf if value == math.inf else math.log10(value) if value > 0 else -math.inf if value < 0 else math.nan


def _banded(band: tuple[float, float]) -> str:
    low, high = band
    if low == high:
        return number(low)
    if math.isinf(low):
        return f"below {number(high)}"
    return f"above {number(low)}" if math.isinf(high) else f"{number(low)} to {number(high)}"


def _robust(values: Sequence[float]) -> tuple[float, float]:
    """Limits that ignore a few outliers (a first step, a spike): values beyond 4 times the 2-98 % span are cut."""
    ordered = sorted(values)
    inner_low, inner_high = ordered[int(0.02 * (len(ordered) - 1))], ordered[math.ceil(0.98 * (len(ordered) - 1))]
    span = inner_high - inner_low
    if span <= 0:
        return ordered[0], ordered[-1]
    return max(ordered[0], inner_low - 3 * span), min(ordered[-1], inner_high + 3 * span)


def _path(x: Sequence[float], y: Sequence[float], x_axis: Axis, y_axis: Axis, kind: str) -> str:
    out, pen = [], "M"
    for a, b in zip(x, y, strict=True):
        if not math.isfinite(b):
            pen = "M"
            continue
        out.append(f"{pen}{x_axis(a):.1f} {y_axis(b):.1f}")
        pen = "L"
    return f'<path class="{kind}" d="{"".join(out)}"/>'


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{y_axis.text(tick)}</text>')
    if y_label:
        middle = (TOP + floor) / 2
        parts.append(
            f'<text class="axis" transform="translate(9 {middle}) rotate(-90)" text-anchor="middle">'
            f"{_text(y_label)}</text>"
        )
    parts.append(_x_axis(x_axis, floor, x_label))
    return "".join(parts)


def _x_axis(axis: Axis, floor: float, label: str, grid_top: float | None = None) -> str:
    parts = [f'<path class="base" d="M{axis.start:.1f} {floor}H{axis.end:.1f}"/>']
    for tick in axis.ticks:
        x = axis(tick)
        if grid_top is not None:
            parts.append(f'<path class="grid" d="M{x:.1f} {grid_top}V{floor}"/>')
        parts.append(f'<text x="{x:.1f}" y="{floor + 15}" text-anchor="middle">{axis.text(tick)}</text>')
    middle = (axis.start + axis.end) / 2
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{floor + 31}" text-anchor="middle">{_text(label)}</text>')
    return "".join(parts)


def _figure(
    title: str, body: str, legend_html: str, note: str, extra: Mapping[str, str], told: str, *, height: float = HEIGHT
) -> str:
    attributes = "".join(f' {name}="{html.escape(value)}"' for name, value in extra.items())
    caption = f'<p class="note">{_text(note)}</p>' if note else ""
    return (
        f'<figure class="plot"><figcaption>{_text(title)}</figcaption>{legend_html}'
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(told)}"{attributes}>{body}'
        f"</svg>{caption}</figure>"
    )


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _text(value: str) -> str:
    return html.escape(value, quote=False)
