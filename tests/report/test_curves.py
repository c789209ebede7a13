"""Curves: axes with names, limits, and nothing that hides behind something else."""

import re
from importlib.resources import files

import numpy as np
import pytest

from moa_dist.observe.metrics import PartNorms
from moa_dist.report.charts import NARROW, WIDE
from moa_dist.report.lines import TIME, Axes, Limit, Line, line_chart
from moa_dist.report.series import Series, smoothed
from tests.report.outline import Outline, labels_of, outline

STEPS = np.arange(1, 201)
FALLING = 2.0 + 8.0 * np.exp(-STEPS / 10)
RNG = np.random.default_rng(0)


def chart(*values, axes: Axes | None = None, **options) -> str:
    lines = [
        Line(f"run {i}", Series.of(STEPS[: len(each)], each), i, **options)
        for i, each in enumerate(values)
    ]
    return line_chart("Loss", lines, axes or Axes("nats"))


def curves_of(drawn: str) -> list[tuple[str, str, str]]:
    """Class, dashes and path of every curve."""
    found = re.findall(r'<path class="line ([\w ]+)"((?: stroke-\w+="[^"]*")*) d="([^"]*)"', drawn)
    return [(css, dashes, path) for css, dashes, path in found]


def test_axes_have_names():
    drawn = chart(FALLING, axes=Axes("nats per token"))
    assert Outline(drawn).texts("name") == ["nats per token", "step"]
    drawn = chart(FALLING, axes=Axes("nats", TIME))
    assert Outline(drawn).texts("name") == ["nats", "time"]
    assert "1m40s" in Outline(drawn).texts("mid")


def test_more_rows_of_labels_below_the_axis():
    clock = {"tokens": "{} tok", "time": "{} s"}
    axes = Axes("nats", clock=lambda at: {k: [t.format(s) for s in at] for k, t in clock.items()})
    found = Outline(chart(FALLING, axes=axes))
    assert found.texts("name") == ["nats", "step", "tokens", "time"]
    assert {"100", "100 tok", "100 s"} <= set(found.texts("mid"))


@pytest.mark.parametrize(("limit", "is_drawn"), [(1.0, True), (60.0, True), (1e6, False)])
def test_the_clipping_line_is_drawn_unless_it_would_flatten_the_curve(limit, is_drawn):
    axes = Axes("norm", limits=[Limit(limit, "clipped to it")])
    drawn = chart(FALLING, axes=axes)
    assert ("clipped to it" in Outline(drawn).texts("limit")) == is_drawn
    assert drawn.count('class="limit"') == is_drawn


def test_a_limit_has_the_color_of_its_curve():
    assert 'class="limit s3"' in chart(FALLING, axes=Axes("", limits=[Limit(3.0, "", color=3)]))


def test_curves_that_coincide_are_dashed_in_turn():
    below, middle, above = curves_of(chart(FALLING, FALLING, FALLING + 1e-3))
    assert below[1] == ""
    patterns = [re.findall(r'"([-\d]+) ?(\d*)"', dashes) for dashes in (middle[1], above[1])]
    ((dash, gap), (first, _)), ((_, same), (second, _)) = patterns
    # Each leaves gaps for all others, and begins where the one before ends.
    assert int(gap) == int(same) == 2 * int(dash)
    assert (-int(first), -int(second)) == (int(dash), 2 * int(dash))
    assert [dashes for _, dashes, _ in curves_of(chart(FALLING, FALLING + 3))] == ["", ""]
    half = np.where(STEPS < 100, FALLING, FALLING + 3)
    assert [bool(dashes) for _, dashes, _ in curves_of(chart(FALLING, half))] == [False, True]


def test_noise_does_not_hide_the_trend():
    noisy = FALLING + RNG.normal(size=200)
    (faint, _, every), (bold, _, average) = curves_of(chart(noisy, is_noisy=True))
    assert (faint, bold) == ("faint s0", "s0")
    assert every != average
    assert len(curves_of(chart(noisy[:20], is_noisy=True))) == 1  # too few for an average
    smooth = smoothed(Series.of(STEPS, noisy))
    assert np.abs(smooth.values[50:] - FALLING[50:]).std() < 0.6
    constant = smoothed(Series.of(STEPS, np.full(200, 3.0)))
    assert constant.values == pytest.approx(np.full(200, 3.0))


def test_averages_that_coincide_are_dashed_whatever_the_noise():
    steps = np.arange(2000)
    noisy = [Series.of(steps, 5 - steps / 500 + RNG.normal(0, 0.2, 2000)) for _ in range(2)]
    lines = [Line(f"run {i}", series, i, is_noisy=True) for i, series in enumerate(noisy)]
    drawn = curves_of(line_chart("Loss", lines, Axes("nats")))
    assert [css for css, _, _ in drawn] == ["faint s0", "s0", "faint s1", "s1"]
    assert [bool(dashes) for _, dashes, _ in drawn] == [False, False, False, True]


def test_an_average_does_not_bridge_values_that_are_not_finite():
    values = FALLING.copy()
    values[100:110] = np.nan
    assert np.isnan(smoothed(Series.of(STEPS, values)).values[100:110]).all()
    assert [path.count("M") for _, _, path in curves_of(chart(values, is_noisy=True))] == [2, 2]


def test_a_high_beginning_does_not_flatten_the_rest():
    def height(beginning: float) -> float:
        drawn = chart(FALLING, axes=Axes("nats", beginning=beginning))
        ((_, _, path),) = curves_of(drawn)
        y = [float(y) for _, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
        assert len(Outline(drawn).texts("limit")) == (beginning > 0)  # it says how high it begins
        return max(y[-150:]) - min(y[-150:])

    assert height(0.1) > 2 * height(0.0)
    # What is low at the beginning stays in the picture.
    ((_, _, path),) = curves_of(chart(12 - FALLING, axes=Axes("nats", beginning=0.1)))
    assert path.count("L") == 199


def test_a_single_point_is_a_dot():
    assert chart([3.0]).count("<circle") == 1
    assert chart([np.nan, 3.0, np.nan]).count("<circle") == 1
    assert chart([3.0, 4.0]).count("<circle") == 0


def test_results_of_tasks_have_curves(write_run):
    folder = write_run(validation={"tasks": {"lambada/accuracy": 0.25, "<b>/f1": 0.5}})
    found = outline(folder)
    assert ["lambada/accuracy", "<b>/f1"] in labels_of(found)
    assert found.texts("name").count("result") == 1


def test_parts_have_curves_where_they_were_measured(write_run):
    parts = {"routers": PartNorms(0.5, 1e-3), "ffn_experts": PartNorms(0.7, float("nan"))}
    found = outline(write_run(parts=parts))
    assert labels_of(found).count(["routers", "ffn experts"]) == 2
    assert ["routers", "ffn experts"] not in labels_of(outline(write_run("b")))


def font_sizes(style: str, selector: str) -> list[float]:
    return [
        float(size)
        for size in re.findall(rf"{re.escape(selector)} {{ font-size: ([\d.]+)px", style)
    ]


def test_text_in_pictures_is_readable_at_any_width():
    """Pictures shrink and grow with the page: in pixels their text stays between 9 and 15."""
    style = files("moa_dist.report").joinpath("style.css").read_text()
    (narrow_wide, narrow_only) = style.split("@media screen and (max-width: 900px)")
    at_1160 = font_sizes(narrow_wide, "\n.wide svg text")[0] * (1160 - 40 - 34) / WIDE[0]
    at_700 = font_sizes(narrow_only, "  .wide svg text")[0] * (700 - 24 - 34) / WIDE[0]
    half = font_sizes(narrow_only, "  .grid:not(.quarters) > :not(.wide) svg text")[0]
    one_column = half * (700 - 24 - 34) / NARROW[0]
    two_columns = font_sizes(narrow_wide, "\nsvg text")[0] * ((1160 - 40 - 14) / 2 - 34) / NARROW[0]
    for size in (at_1160, at_700, one_column, two_columns):
        assert 9 < size < 15
