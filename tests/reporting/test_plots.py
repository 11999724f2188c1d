"""Plots: ticks, numbers, gaps, untrusted names, well-formed SVG."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from stepdr_jax.pages import plots
from stepdr_jax.pages.plots import Dot, Line


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (0, 700, (0, 200, 400, 600)),
        (-1, 1, (-1, -0.5, 0, 0.5, 1)),
    ],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert plots.ticks(low, high) == pytest.approx(expected)


def test_ticks_of_a_narrow_range_far_from_zero():
    ticks = plots.ticks(1000.1, 1000.2)
    assert len(ticks) >= 3 and all(1000.1 <= tick <= 1000.2 for tick in ticks)


def test_whole_ticks_are_integers():
    assert all(tick == int(tick) for tick in plots.ticks(0, 3, whole=True))


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1,234"), (0.1234, "0.123"), (3e-4, "3e-4"), (math.nan, "–"), (12.0, "12")]
)
def test_numbers_for_people(value, text):
    assert plots.number(value) == text


def test_running_mean_leaves_gaps_out():
    assert plots.running_mean([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]


def svg(figure):
    return ET.fromstring(figure[figure.index("<svg") : figure.index("</svg>") + 6])


def test_line_chart_breaks_at_nan_and_shares_colour_by_label():
    lines = [Line("a", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0], "seed 0"), Line("a", [0, 1], [1.0, 2.0], "seed 1")]
    root = svg(plots.line_chart(lines, title="t", x_label="step"))
    paths = [p for p in root.iter("path") if "s0" in p.get("class", "")]
    assert len(paths) == 2
    assert paths[0].get("d").count("M") == 2
    assert "NaN" not in root.get("data-lines") and "seed 1" in root.get("data-lines")


def test_names_are_escaped_everywhere():
    evil = '"><script>alert(1)</script>'
    figures = [
        plots.line_chart([Line(evil, [0, 1], [0.0, 1.0])], title=evil, x_label=evil, y_label=evil, note=evil),
        plots.dot_chart([(evil, [Dot(0.5, 0.4, 0.6, evil)])], title=evil, x_label=evil, names=[evil]),
        plots.bar_chart([(evil, [1.0])], title=evil, x_label=evil),
        plots.share_chart([0, 1], {evil: [1.0, 1.0]}, title=evil, x_label=evil),
        plots.nothing(evil, evil),
    ]
    for figure in figures:
        assert "<script" not in figure
    for figure in figures[:-1]:
        svg(figure)


def test_empty_data_says_so():
    for figure in (
        plots.line_chart([], title="t", x_label="x"),
        plots.line_chart([Line("a", [0], [math.nan])], title="t", x_label="x"),
        plots.dot_chart([("a", [Dot(math.nan)])], title="t", x_label="x"),
        plots.bar_chart([("a", [0.0])], title="t", x_label="x"),
        plots.share_chart([], {}, title="t", x_label="x"),
    ):
        assert "<svg" not in figure and "plot empty" in figure


def test_constant_curves_have_an_axis():
    svg(plots.line_chart([Line("a", [0, 1, 2], [0.5, 0.5, 0.5])], title="t", x_label="x"))
    svg(plots.line_chart([Line("a", [3], [0.0])], title="t", x_label="x"))


def test_one_spike_does_not_flatten_the_curve():
    values = [1.0 + 0.01 * i for i in range(100)]
    values[50] = 1e6
    figure = plots.line_chart([Line("a", list(range(100)), values)], title="t", x_label="x")
    assert "1e+06" not in "".join(svg(figure).itertext())


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 1.0, ["0.0", "0.5", "1.0"]),
        (307.0, 316.0, ["310", "315"]),
        (0, 3e-5, ["0", "1e-5"]),
        (-1, 1, ["−1"]),
    ],
)
def test_ticks_are_told_apart(low, high, texts):
    axis = plots.Axis.from_range(low, high, 200, 100, fixed=True)
    told = [axis.text(tick) for tick in axis.ticks]
    assert len(set(told)) == len(told) and set(texts) <= set(told)


def test_texts_of_large_ticks_do_not_touch():
    axis = plots.Axis.from_range(0, 3_043_549, 180, 480)
    widest = max(5.5 * len(axis.text(tick)) for tick in axis.ticks)
    gaps = [axis(right) - axis(left) for left, right in zip(axis.ticks, axis.ticks[1:], strict=False)]
    assert len(axis.ticks) >= 2 and min(gaps) > widest + 6


def test_a_log_axis_has_powers_of_ten_and_leaves_out_what_has_none():
    chart = plots.line_chart(
        [plots.Line("a", [0, 1, 2, 3], [1e-6, 0.0, 1e-2, math.nan])], title="t", x_label="x", log=True
    )
    for tick in ("1e-6", "1e-5", "1e-4", ">0.01<"):
        assert tick in chart
    assert re.search(r'class="line s0" d="M[\d. ]+M[\d. ]+"', chart)
    assert "0 throughout" in plots.line_chart([plots.Line("a", [0], [0.0])], title="t", x_label="x", log=True)


def test_what_is_normal_is_shaded_within_the_axes():
    def shaded(band, values=(0.0, 1.0)):
        chart = plots.line_chart([plots.Line("a", [0, 1], values)], title="t", x_label="x", y_range=(0, 1), band=band)
        found = re.search(r'class="band" x="64" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"', chart)
        return (float(found[1]), float(found[2]), chart) if found else (None, None, chart)

    top, bottom = plots.TOP, plots.HEIGHT - plots.BOTTOM
    assert shaded((0.5, math.inf))[:2] == ((top + bottom) / 2 - (bottom - top) / 2, (bottom - top) / 2)
    assert shaded((-math.inf, 0.5))[:2] == ((top + bottom) / 2, (bottom - top) / 2)
    assert shaded((2.0, 3.0))[0] is None
    assert "Normal: below 0.5, shaded." in shaded((-math.inf, 0.5))[2]
