"""What a person sees: tables, progress and failures (the one file that draws with rich)."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

err = Console(stderr=True, highlight=False, soft_wrap=True)


class Speed(ProgressColumn):
    """Tiles, or other units, per second, as measured lately."""

    def __init__(self, unit: str) -> None:
        """Know what is counted."""
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        """Return the speed of one bar."""
        return Text(f"{task.speed:.1f} {self.unit}/s" if task.speed else "", style="cyan")


@contextmanager
def progress(
    total: int, unit: str = "tiles"
) -> Iterator[Callable[[int, str], Callable[[int, int], None]]]:
    """Show one bar on a terminal's stderr; yields a function (number, name) -> callback.

    A `total` of 0 means that nobody knows how many bars will follow each other.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars = Progress(*columns, Speed(unit), TimeRemainingColumn(), console=err, transient=True)
    bars.disable = not err.is_terminal
    root = logging.getLogger()
    plain = root.handlers
    if err.is_terminal:  # messages go above the bar
        root.handlers = [
            RichHandler(console=err, show_time=False, show_path=False, show_level=False)
        ]

    def start(number: int, name: str) -> Callable[[int, int], None]:
        if bars.disable and total != 1:  # a log file wants a line a slide, not a bar
            say(f"{number}/{total} {name}" if total else name)
        for known in bars.task_ids:
            bars.remove_task(known)
        bar = bars.add_task(f"{number}/{total} {name[-40:]}" if total else name[-60:], total=None)

        def step(done: int, of: int) -> None:
            bars.update(bar, completed=done, total=of)

        return step

    try:
        with bars:
            yield start
    finally:
        root.handlers = plain


def table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Print flat rows as a table on stdout; numbers to the right."""
    if not rows:
        return
    drawn = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name, value in rows[0].items():
        right = isinstance(value, int | float) and not isinstance(value, bool)
        drawn.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(_cell(value)) for value in row.values()))
    wide = None if sys.stdout.isatty() else 200
    Console(highlight=False, markup=False, width=wide).print(drawn)


def _cell(value: Any) -> str:  # noqa: ANN401 - any JSON value
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 100 else f"{value:.0f}"  # noqa: PLR2004
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def sample(pieces: Sequence[tuple[str, str]]) -> None:
    """Print (role, text) pieces on stdout: what is learnt stands out, by [[ ]] without colours."""
    out = Console(highlight=False, markup=False, soft_wrap=True)
    styles = {"read": "dim", "learnt": "bold green", "image": "cyan", "counts": ""}
    drawn = Text()
    for role, text in pieces:
        marked = role == "learnt" and (not out.is_terminal or out.no_color)
        drawn.append("\n\n" if role == "counts" else "")
        drawn.append(f"[[{text}]]" if marked else text, style=styles[role])
    if pieces:
        out.print(drawn)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    err.print(f"[yellow]warning:[/] {_plain(text)}")


def error(text: str) -> None:
    """Print an error on stderr."""
    err.print(f"[red]error:[/] {_plain(text)}")


def say(text: str) -> None:
    """Print a line about what is being done, on stderr."""
    err.print(_plain(text))


def answer(text: str) -> None:
    """Print what was asked for on stdout, as it is; at once, into a pipe too."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def prompt(text: str) -> None:
    """Print that a line is waited for, where a person can type one."""
    if sys.stdin.isatty():
        sys.stderr.write(text)
        sys.stderr.flush()


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def as_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print the one JSON value of `--json`: an object, or the list of `recipes list`."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
