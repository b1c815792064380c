"""Probes in; their table, few-shot curve, and the sentence that says how they were made out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.charts import Line, chart
from pathcli.evals.linear import EPOCHS, LR
from pathcli.evals.patch_report import NAMES, interval_text
from pathcli.report import Section

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.evals.probe import Level

_APART = 0.5
_DRAWN = ("balanced_accuracy", "auroc")


def level_rows(levels: Sequence[Level]) -> list[dict[str, Any]]:
    """Return a row a level of plain JSON values."""
    return [
        {
            "shots": "all" if level.shots is None else level.shots,
            "images": level.images,
            "draws": len(level.fitted),
            "strengths": [one.strength for one in level.fitted],
            "chosen": sorted({one.chosen for one in level.fitted if one.chosen}),
        }
        | {
            name: {"value": _plain(i.value), "low": _plain(i.low), "high": _plain(i.high)}
            | {"n": i.n, "sd": _plain(level.spread[name])}
            for name, i in level.numbers.items()
        }
        for level in levels
    ]


def level_table(levels: Sequence[Level]) -> list[dict[str, Any]]:
    """Return a row a level for people: values with interval, and the spread of draws."""
    rows = []
    for level in levels:
        row: dict[str, Any] = {"images a class": "all" if level.shots is None else str(level.shots)}
        row |= {"learnt from": f"{level.images:,}", "draws": len(level.fitted)}
        for name, found in level.numbers.items():
            row[NAMES[name]] = interval_text(found, level.spread[name])
        if level.fitted[0].strength is not None:
            used = sorted({one.strength or 0 for one in level.fitted})
            row["strength"] = " ".join(f"{value:g}" for value in used)
        rows.append(row)
    return rows


def level_section(levels: Sequence[Level]) -> Section:
    """Return the section of few-shot draws: the table, and a curve where there are points."""
    text = (
        "Mean over random draws of images to learn from; in brackets the 95 % interval with test "
        "groups drawn anew (draws held fixed), sd is over draws. The sections below are of the "
        "first draw of the last row."
    )
    several = len(levels) > 1
    charts = [_curve(levels)] if several else []
    return Section(
        "By number of images to learn from", text, rows=level_table(levels), charts=charts
    )


def _curve(levels: Sequence[Level]) -> str:
    classes = levels[0].chances[0].shape[1]
    ticks: dict[float, str] = {}
    for level in levels:  # "all" come last, and beside the others even where they are as few
        place = math.log2(level.shots or level.images / classes)
        ticks[max([place, *(last + _APART for last in ticks)])] = str(level.shots or "all")
    lines = []
    for name in _DRAWN:
        found = [level.numbers[name] for level in levels]
        bounds = ([i.low for i in found], [i.high for i in found])
        lines.append(Line(NAMES[name], [*ticks], [i.value for i in found], *bounds))
    return chart(lines, x="images a class to learn from", y="on the test images", ticks=ticks)


def made_how(method: str, level: Level) -> str:
    """Return in words how the first classifier of a level was made."""
    first = level.fitted[0]
    if first.strength is None:
        return f"AdamW at a learning rate of {LR:g}, {EPOCHS} epochs"
    return f"{method} regression of strength {first.strength:g}, chosen {first.chosen}"


def _plain(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
