"""Many slides, one after another: one that fails does not stop the rest."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.cli import Told, explain, show
from pathcli.errors import BusyError, PathcliError
from pathcli.slides.readers import public_name
from pathcli.store.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pathcli.slides.discovery import Found
    from pathcli.types import Progress

log = logging.getLogger("pathcli")

PARTIAL = 3
FEW = 3  # slides up to which an equal warning is said of each by name


@dataclass
class Batch:
    """Results of the slides that went well, and (path, code, reason) of those that did not.

    `listed` is where the latter are kept, in the folder of pictures.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, int, str]] = field(default_factory=list)
    listed: str = "failures.csv"

    @property
    def exit_code(self) -> int:
        """0 when all went well, the reason's own code when all failed for it, else 3."""
        if not self.failures:
            return 0
        codes = {code for _, code, _ in self.failures}
        return codes.pop() if len(codes) == 1 and not self.results else PARTIAL


def run_batch(
    slides: list[Found],
    work: Callable[[Found, Progress], dict[str, Any]],
    out: Path | None,
    *,
    expect: Callable[[list[Found]], None] | None = None,
    listed: str = "failures.csv",
) -> Batch:
    """Do `work` for each slide, showing progress; write those that failed to `out`/`listed`.

    A slide that another process is at is waited for, when all others are done.

    Args:
        slides: what to do, in order; results come in this order.
        work: does one slide.
        out: the folder; None writes nothing.
        expect: is told which slides follow, and told again when their order changes.
        listed: name of the file of failures.
    """
    turns = Turns(enumerate(slides))
    results: dict[int, dict[str, Any]] = {}
    failures: dict[int, tuple[str, int, str]] = {}
    busy: set[int] = set()
    if expect:
        expect(slides)
    with show.progress(len(slides)) as start:
        while turn := turns.take():
            number, found = turn
            shown = public_name(found.path)
            # a slide that was busy has a bar, or a line, only when it is begun
            bar = cache(partial(start, number + 1, Path(shown).name))
            if number not in busy:
                bar()
            try:
                results[number] = work(found.checked(), lambda *at, bar=bar: bar()(*at))
            except BusyError as error:
                busy.add(number)
                turns.busy(turn, error)
                if expect:
                    expect([slide for _, slide in turns.free])
            except Exception as error:  # noqa: BLE001 - the batch goes on; the code is not 0
                failures[number] = (shown, *_reason(shown, error))
    batch = Batch(
        [results[i] for i in sorted(results)], [failures[i] for i in sorted(failures)], listed
    )
    if out is None:  # a dry run writes nothing
        return batch
    path = out / listed
    if batch.failures and len(slides) > 1:
        _write_failures(batch, path)
    elif path.is_file():  # of an earlier run: nothing failed in this one
        path.unlink()
    return batch


def _reason(shown: str, error: Exception) -> tuple[int, str]:
    """Return the exit code and the line of what went wrong with a slide."""
    if isinstance(error, PathcliError):
        return error.exit_code, str(error)
    if isinstance(error, MemoryError):
        return 5, f"{shown}: out of memory"
    log.debug("%s", shown, exc_info=error)
    return 1, f"{shown}: {explain(error)}"


def _write_failures(batch: Batch, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file)
            writer.writerow(["wsi", "exit_code", "reason"])
            writer.writerows(batch.failures)
    except OSError as error:
        show.warn(f"{path}: not written ({error.strerror})")


def finish(
    batch: Batch,
    rows: list[dict[str, Any]],
    *,
    as_json: bool,
    out: Path | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Print what was done and what failed, `more` in the JSON, and exit with the batch's code."""
    if as_json:
        failures = [{"path": p, "exit_code": c, "reason": r} for p, c, r in batch.failures]
        show.as_json({"slides": batch.results, "failures": failures, **(more or {})})
    else:
        show.table(rows)
    told = Counter(text for result in batch.results for text in result["warnings"])
    for text, count in told.items():
        if count > FEW:
            show.warn(f"{count} slides: {text}")
    for result in batch.results:
        for text in result["warnings"]:
            if told[text] <= FEW:
                show.warn(f"{result['path']}: {text}")
    for reason, count in Counter(reason for _, _, reason in batch.failures).items():
        show.error(f"{reason} ({count} slides)" if count > 1 else reason)
    if batch.failures and len(batch.failures) + len(batch.results) > 1:
        total = len(batch.failures) + len(batch.results)
        listed = out / batch.listed if out else None
        where = f": {listed}" if listed and listed.is_file() else ""
        show.say(f"{len(batch.failures)} of {total} slides failed{where}")
    if batch.exit_code:
        raise Told(batch.exit_code)
