"""Many slides, one after another: one that fails does not stop the rest."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.cli import Told, explain, show
from pathcli.errors import PathcliError
from pathcli.slides.readers import public_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pathcli.slides.discovery import Found
    from pathcli.types import Progress

log = logging.getLogger("pathcli")

PARTIAL = 3
FEW = 3  # slides up to which an equal warning is said of each by name


@dataclass
class Batch:
    """Results of the slides that went well, and (path, code, reason) of those that did not."""

    results: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 when all went well, the reason's own code when all failed for it, else 3."""
        if not self.failures:
            return 0
        codes = {code for _, code, _ in self.failures}
        return codes.pop() if len(codes) == 1 and not self.results else PARTIAL


def run_batch(
    slides: list[Found], work: Callable[[Found, Progress], dict[str, Any]], out: Path | None
) -> Batch:
    """Do `work` for each slide, showing progress; write failures.csv to `out` if any failed."""
    batch = Batch()
    with show.progress(len(slides)) as start:
        for number, found in enumerate(slides, start=1):
            shown = public_name(found.path)
            step = start(number, Path(shown).name)
            try:
                batch.results.append(work(found.checked(), step))
            except PathcliError as error:
                batch.failures.append((shown, error.exit_code, str(error)))
            except MemoryError:
                batch.failures.append((shown, 5, f"{shown}: out of memory"))
            except Exception as error:  # the batch goes on; the code is not 0
                log.debug("%s", shown, exc_info=error)
                batch.failures.append((shown, 1, f"{shown}: {explain(error)}"))
    if out is None:  # a dry run writes nothing
        return batch
    path = out / "failures.csv"
    if batch.failures and len(slides) > 1:
        _write_failures(batch, path)
    elif path.is_file():  # of an earlier run: nothing failed in this one
        path.unlink()
    return batch


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
        listed = out / "failures.csv" if out else None
        where = f": {listed}" if listed and listed.is_file() else ""
        show.say(f"{len(batch.failures)} of {total} slides failed{where}")
    if batch.exit_code:
        raise Told(batch.exit_code)
