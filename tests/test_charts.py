"""Charts are well-formed SVG, the same every time, whatever the lines are called."""

from __future__ import annotations

import math
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

from pathcli.charts import COLOURS, Line, chart

SVG = "{http://www.w3.org/2000/svg}"
CALL = (
    "from pathcli.charts import Line, chart\n"
    "line = Line('a', [0, 1, 2], [1, 2, 4], [0, 1, 3], [2, 3, 5])\n"
    "print(chart([line], x='x', y='y', title='t', diagonal=True))"
)


def texts(svg: str) -> list[str]:
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314


def paths(svg: str, colour: str) -> list[str]:
    nodes = ET.fromstring(svg).iter(f"{SVG}path")  # noqa: S314
    return [n.attrib["d"] for n in nodes if f"stroke: {colour}" in n.attrib.get("style", "")]


@pytest.mark.parametrize(
    "name",
    [
        "training",
        "a<b> & \"c\" 'd'",
        "</svg><script>",
        "a--b -->",
        "$x_1$",
        "$\\foo$",
        "病理",
        "_x",
    ],
)
def test_a_name_is_text_whatever_it_is(name: str) -> None:
    svg = chart([Line(name, [0, 1, 2], [1, 2, 3])], x=name, y=f"y {name}", title=name)
    assert svg.startswith("<svg")
    assert "<script" not in svg
    found = texts(svg)
    assert found.count(name) >= 2  # the axis and the title; the legend hides a leading underscore
    assert f"y {name}" in found


def test_every_line_has_a_colour_and_a_place_in_the_legend() -> None:
    lines = [Line(f"line {i}", [0, 1, 2], [i, i, i]) for i in range(10)]
    svg = chart(lines, x="x", y="y")
    assert {f"line {i}" for i in range(10)} <= set(texts(svg))
    assert all(paths(svg, colour) for colour in COLOURS)


def test_a_line_goes_up_where_its_values_do() -> None:
    svg = chart([Line("a", [0, 1, 2], [0, 2, 1])], x="x", y="y")
    numbers = [
        float(x) for x in paths(svg, COLOURS[0])[0].replace("M", "").replace("L", "").split()
    ]
    (x0, x1, x2), (y0, y1, y2) = numbers[0::2], numbers[1::2]
    assert x1 - x0 == pytest.approx(x2 - x1)
    assert (y0 - y2) / (y0 - y1) == pytest.approx(0.5)  # SVG's y points down
    assert y0 > y2 > y1


def test_a_band_is_drawn_where_there_is_one() -> None:
    without = chart([Line("a", [0, 1], [1, 2])], x="x", y="y")
    within = chart([Line("a", [0, 1], [1, 2], [0, 1], [2, 3])], x="x", y="y")
    assert "FillBetween" in within or within.count("<path") > without.count("<path")


@pytest.mark.parametrize("values", [[], [0.5], [math.nan, 0.5, math.nan], [math.nan] * 3])
def test_few_or_undefined_values_are_drawn_too(values: list[float]) -> None:
    svg = chart([Line("a", list(range(len(values))), values)], x="x", y="y", unit=True)
    assert "a" in texts(svg)


def test_what_is_written_below_the_axis_stands_at_its_place() -> None:
    svg = chart([Line("a", [0, 3], [1, 2])], x="x", y="y", ticks={0: "one", 3: "all"})
    found = texts(svg)
    assert [t for t in found if t in {"one", "all"}] == ["one", "all"]
    assert "1.5" not in found[:3]


def test_a_chart_is_the_same_in_every_process() -> None:
    done = [
        subprocess.run([sys.executable, "-c", CALL], capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert done[0].stdout == done[1].stdout
    assert "<dc:date>" not in done[0].stdout
