"""Charts say what they were given: every value is in a title, inside the picture, whatever its range."""

import math
import random
from xml.etree import ElementTree

import pytest

from configs.program.page.charts import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Line,
    Mark,
    heatmap,
    intervals,
    line_chart,
    nice_ticks,
    short,
    timeline,
)


def parsed(markup: str) -> ElementTree.Element:
    return ElementTree.fromstring(markup)


def titles(markup: str) -> list[str]:
    return [element.text or "" for element in parsed(markup).iter("title")]


def test_every_point_of_a_short_line_is_said_and_lies_in_the_picture() -> None:
    chart = line_chart([Line("loss", [(1, 2.5), (2, 2.25), (4, 1.0)])], label="Loss")
    assert titles(chart) == ["Loss", "loss, step 1: 2.5", "loss, step 2: 2.25", "loss, step 4: 1"]
    circles = [(float(c.get("cx", 0)), float(c.get("cy", 0))) for c in parsed(chart).iter("circle")]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in circles)
    assert circles[0][0] < circles[1][0] < circles[2][0]
    assert circles[0][1] < circles[1][1] < circles[2][1]  # less is lower, and y grows downwards


def test_a_long_line_keeps_its_extremes() -> None:
    points = [(step, 1.0) for step in range(20_000)]
    points[777] = (777, 9.0)
    chart = line_chart([Line("loss", points)], label="Loss")
    assert len(list(parsed(chart).iter("circle"))) <= MOST_POINTS
    (band,) = parsed(chart).iter("polygon")
    heights = [float(corner.split(",")[1]) for corner in (band.get("points") or "").split()]
    assert min(heights) < HEIGHT / 3


def test_what_is_not_finite_leaves_a_gap() -> None:
    chart = line_chart([Line("norm", [(1, 1.0), (2, math.nan), (3, 2.0), (4, math.inf), (5, 1.0)])], label="Norm")
    (path,) = parsed(chart).iter("path")
    assert (path.get("d") or "").count("M") == 3
    assert "Nothing yet" in line_chart([Line("norm", [(1, math.nan)])], label="Norm")
    assert "Nothing yet" in line_chart([], label="Norm")


def test_marks_and_texts_are_escaped() -> None:
    chart = line_chart([Line("<b>", [(0, 1.0), (9, 2.0)])], marks=[Mark(5, "a & <script>")], label='"x"')
    assert "a & <script>" in titles(chart)
    assert "<script>" not in chart
    assert "a & b" in titles(timeline(9, [Mark(3, "a & b")], [], label="t"))


def test_a_heatmap_has_a_cell_for_each_number() -> None:
    chart = heatmap([[0.5, None], [0.0, 1.0]], names=["first", "second"], label="Load")
    said = titles(chart)[1:]
    assert said == ["first, expert 0: 0.5", "first, expert 1: none", "second, expert 0: 0", "second, expert 1: 1"]
    steps = heatmap([[1.0, 2.0]], names=["layer 0"], label="Entropy", columns=("step", [10, 1200]), highest=4.0)
    assert titles(steps)[1:] == ["layer 0, step 10: 1", "layer 0, step 1,200: 2"]
    assert "var(--accent) 50%" in steps  # of the highest that there can be
    small = heatmap([[0.00715, 12345.0]], names=["layer 0"], label="Movement")  # neither fits its cell in full
    assert "layer 0, expert 0: 0.00715" in titles(small)
    assert ">0.007<" in small
    assert ">12.3k<" in small
    assert "Nothing yet" in heatmap([], names=[], label="Load")


def test_intervals_reach_two_errors_to_both_sides() -> None:
    chart = intervals([("arc", [("tuned", 60.0, 1.5), ("base", 58.0, 1.5)])], low=0, high=100, label="Scores")
    assert "arc, tuned: 60.00 ± 1.50" in titles(chart)
    assert ">0<" in intervals([("arc", [("tuned", 1.0, 2.0)])], low=0, high=100, label="Scores")  # and nothing below
    assert ">-" not in intervals([("arc", [("tuned", 1.0, 2.0)])], low=0, high=100, label="Scores")
    assert "Nothing yet" in intervals([], low=0, high=100, label="Scores")


@pytest.mark.parametrize("seed", range(20))
def test_ticks_are_round_and_hold_all_values(seed: int) -> None:
    draw = random.Random(seed)
    low = draw.uniform(-1, 1) * 10 ** draw.randrange(-6, 9)
    high = low + draw.random() * 10 ** draw.randrange(-6, 9)
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9 * abs(low)
    assert ticks[-1] >= high - 1e-9 * abs(high)
    assert 2 <= len(ticks) <= 8
    assert nice_ticks(3.0, 3.0)[0] < 3.0 < nice_ticks(3.0, 3.0)[-1]


def test_short_numbers() -> None:
    assert [short(value) for value in (0.015, 1200, 2_500_000, 3e9, 0)] == ["0.015", "1.2k", "2.5M", "3G", "0"]
