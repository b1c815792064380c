"""Survival curves, or true and predicted values, in; an SVG picture out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pathcli.charts import COLOURS, drawing
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from pathcli.mil.outcome_task import Said

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Survived:
    """A survival curve: its name, times and survival [k], steps or straight lines, its band."""

    name: str
    times: Sequence[float]
    survival: Sequence[float]
    steps: bool = True
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def survival_chart(curves: Sequence[Survived], unit: str, title: str = "") -> str:
    """Return an SVG of survival curves from time 0 on, in a unit of time."""

    def draw(axes: Axes) -> None:
        for curve, colour in zip(curves, COLOURS * len(curves), strict=False):
            style = "steps-post" if curve.steps else "default"
            axes.plot(curve.times, curve.survival, color=colour, label=curve.name, drawstyle=style)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(
                    curve.times,
                    curve.low,
                    curve.high,
                    step="post" if curve.steps else None,
                    color=colour,
                    alpha=0.15,
                    lw=0,
                )
        axes.set(xlabel="time" + f" ({unit})" * bool(unit), ylabel="survival", title=title)
        axes.set(ylim=(-0.01, 1.01))
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    return drawing((5.6, 3.8), draw)


def scatter_chart(points: Mapping[str, tuple[Floats, Floats]], what: str) -> str:
    """Return an SVG of true and predicted values by name, with the diagonal."""

    def draw(axes: Axes) -> None:
        every = [x for pair in points.values() for row in pair for x in row.tolist()]
        ends = [min(every), max(every)]
        axes.plot(ends, ends, color="#b0b4ba", linewidth=1, linestyle="--")
        for (name, (truth, said)), colour in zip(
            points.items(), COLOURS * len(points), strict=False
        ):
            axes.scatter(truth, said, s=14, alpha=0.6, color=colour, label=name, linewidths=0)
        axes.set(xlabel=f"true {what}", ylabel=f"predicted {what}", aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)

    return drawing((4.8, 4.6), draw)


def write_survival(path: Path, said: Said) -> None:
    """Draw one bag's survival curve.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    times, survival = ([point[i] for point in said.curve] for i in range(2))
    curve = Survived(f"{said.group} risk", times, survival, said.steps)
    picture = survival_chart([curve], said.unit, NOTICE)
    write_bytes(path, picture.encode(), lambda _: None, "--out")
