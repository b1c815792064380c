"""Lines, or a function that draws, in; one SVG picture out (nothing global is touched)."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from matplotlib.axes import Axes

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#785ef0", "#1c2024")
"""Okabe and Ito's colours, told apart with any colour vision."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: its name, points, and the band around it where there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None


def chart(
    lines: Sequence[Line],
    *,
    x: str,
    y: str,
    title: str = "",
    unit: bool = False,
    diagonal: bool = False,
    ticks: Mapping[float, str] | None = None,
) -> str:
    """Return an SVG of `lines`.

    `unit` sets both axes to 0..1, `diagonal` draws y = x, `ticks` says what is written where
    below the x axis.
    """

    def draw(axes: Axes) -> None:
        if diagonal:
            axes.plot([0, 1], [0, 1], color="#b0b4ba", linewidth=1, linestyle="--")
        for line, colour in zip(lines, COLOURS * len(lines), strict=False):
            marker = "o" if len(line.x) < 3 else None  # noqa: PLR2004 - a point is no line
            axes.plot(line.x, line.y, color=colour, label=line.name, marker=marker)
            if line.low is not None and line.high is not None:
                axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, lw=0)
        axes.set(xlabel=x, ylabel=y, title=title)
        if unit:
            axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
        if ticks:
            axes.set_xticks(list(ticks), list(ticks.values()))
        axes.spines[["top", "right"]].set_visible(False)
        if any(line.name for line in lines):
            axes.legend(frameon=False)

    return drawing((4.6, 4.2) if unit else (5.6, 3.6), draw)


def drawing(size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """Return what `draw` puts on the axes of a figure of `size` inches, as SVG text."""
    import matplotlib as mpl  # noqa: PLC0415 - costs a second
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    svg = {"svg.hashsalt": "pathcli", "svg.fonttype": "none"}
    look: Any = svg | {"font.size": 10, "text.parse_math": False}  # names are no formulas
    with mpl.rc_context(look), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the browser has the glyphs
        figure = Figure(figsize=size, layout="constrained", dpi=200)
        draw(figure.add_subplot())
        canvas: Any = FigureCanvasSVG(figure)  # matplotlib does not type it; savefig draws twice
        text = io.StringIO()
        canvas.print_svg(text, metadata={"Date": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :]
