"""Columns of numbers in, a table of slides with their outcomes out: a value, or time and event.

Tables are those of `pathcli.mil.tables`. A row's label is its stratum (a quarter of the
values; event or censored): what splits keep in proportion, and nothing that is learnt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pathcli.errors import DataError
from pathcli.mil.sheets import Sheet, read_sheet
from pathcli.mil.tables import (
    MISSING,
    SLIDE,
    LabelTable,
    Row,
    counted,
    joined_rows,
    listed,
    mixed,
    natural,
    own_rows,
)
from pathcli.types import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


@dataclass(frozen=True)
class OutcomeTable(LabelTable):
    """The slides of a cohort with numbers: `targets` has a row's by its slide.

    `classes` are the strata, of which every part of a split needs those in `required`.
    """

    targets: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def needed(self) -> tuple[str, ...]:
        """The strata without which no part of a split can be used."""
        return self.required

    def lacking(self, label: str, part: str) -> str:
        """Return the clause that says what a part of a split lacks, and how much there is."""
        patients = len({row.case for row in self.rows if row.label == label})
        return (
            f"no patient of stratum {label!r} in {part}, there are {patients} in all: "
            "change data.val, data.test or data.folds"
        )

    def of(self, rows: Sequence[Row]) -> Floats:
        """Return the numbers of rows, float64 [n, m]."""
        return np.array([self.targets[row.slide] for row in rows], float)


class Columns(Protocol):
    """What of an outcome decides how its table is read.

    `columns` are their names and `checks` turn their texts into numbers (ValueError: why not).
    With `of_patients` a patient has one outcome and is one case.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        ...

    @property
    def checks(self) -> tuple[Callable[[str], float], ...]:
        """What reads each of them."""
        ...

    @property
    def of_patients(self) -> bool:
        """Tell whether patients have the outcome, and not slides."""
        ...

    def strata(self, targets: Floats) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
        """Return the stratum of each row [n, m], the strata's names, and those needed."""
        ...


def number(text: str) -> float:
    """Return the number a text writes; ValueError with the reason where it is none."""
    try:
        found = math.nan if "_" in text else float(text)
    except ValueError:
        found = None
    if not text or found is None:
        reason = "no number" if text else "empty"
        raise ValueError(reason)
    if not math.isfinite(found):
        reason = "no finite number"
        raise ValueError(reason)
    return found


def time(text: str) -> float:
    """Return a time of at least 0; ValueError with the reason where it is none."""
    found = number(text)
    if found < 0:
        reason = "a negative time"
        raise ValueError(reason)
    return found


def event(text: str) -> float:
    """Return 1 for an event, 0 for a censored patient; ValueError with the reason else."""
    try:
        found = number(text)
    except ValueError:
        if not text:
            raise
        found = math.nan
    if found not in {0, 1}:
        reason = "neither 1 (event) nor 0 (censored)"
        raise ValueError(reason)
    return found


def read_outcome(
    path: Path | str, outcome: Columns, *, slides: Path | str | None = None, bag: str = "patient"
) -> OutcomeTable:
    """Return the slides of a table with their outcomes.

    Args:
        path: a table of slides with `case_id` and `slide_id`, in which no cell may be missing;
            with `slides`, STAMP's clinical table, whose patients without an outcome are left
            out, and counted.
        outcome: which columns, and how they are read.
        slides: STAMP's slide table, with `PATIENT` and `FILENAME`.
        bag: slide or patient, what is one case.

    Raises:
        DataError: a column is missing; cells that are not what they should be, named by line;
            a patient of two outcomes; all outcomes equal, or no event at all.
    """
    sheet, name = read_sheet(path), "/".join(outcome.columns)
    joined = _joined(sheet, outcome, name, may_miss=slides is not None)
    if slides is None:
        rows, warnings = own_rows(joined, name)
    else:
        rows, warnings = joined_rows(joined, read_sheet(slides), name)
    if not rows:
        msg = f"{path}: no slide has {name}"
        raise DataError(msg)
    _refuse_torn(rows, name, str(path), bag, of_patients=outcome.of_patients)
    targets = {row.slide: tuple(float(x) for x in (row.label or "").split(";")) for row in rows}
    try:
        at, names, needed = outcome.strata(np.array([targets[row.slide] for row in rows]))
    except ValueError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from None
    ordered = sorted([r.slide, r.case, r.label or "", r.site or "", r.split or ""] for r in rows)
    return OutcomeTable(
        tuple(replace(row, label=names[i]) for row, i in zip(rows, at, strict=True)),
        names,
        str(path),
        digest({"columns": outcome.columns, "rows": ordered}),
        tuple(dict.fromkeys(warnings)),
        targets,
        needed,
    )


def has_columns(path: Path | str, outcome: Columns) -> bool:
    """Tell whether a table has an outcome's columns."""
    sheet = read_sheet(path)
    return all(sheet.find((column,)) is not None for column in outcome.columns)


def has_slides(path: Path | str) -> bool:
    """Tell whether a table names slides itself, and not only patients."""
    return read_sheet(path).find(SLIDE) is not None


def _joined(sheet: Sheet, outcome: Columns, name: str, *, may_miss: bool) -> Sheet:
    """Return the sheet with its first column of the outcome holding all numbers, or nothing.

    Raises:
        DataError: a cell is not what it should be; all such lines are counted.
    """
    places = [sheet.column((column,)) for column in outcome.columns]
    if len(set(places)) < len(places):
        msg = f"{sheet.path}: {name} are one column; name two"
        raise DataError(msg)
    faults: dict[tuple[str, str], list[str]] = {}
    lines = []
    for line, cells in sheet.lines:
        texts = [cells[place] for place in places]
        found: list[float] = []
        missing = may_miss and any(text.casefold() in MISSING for text in texts)
        for column, check, text in zip(outcome.columns, outcome.checks, texts, strict=True):
            if may_miss and text.casefold() in MISSING:
                continue
            try:
                found.append(check(text))
            except ValueError as error:
                where = f"line {line}" + f" ({text!r})" * bool(text)
                faults.setdefault((column, str(error)), []).append(where)
        known = "" if missing else ";".join(repr(x) for x in found)
        lines.append((line, (*cells[: places[0]], known, *cells[places[0] + 1 :])))
    if faults:
        told = [f"column {c!r}: {why} in {listed(where)}" for (c, why), where in faults.items()]
        msg = f"{sheet.path}: {'; '.join(told)}"
        raise DataError(msg)
    header = (*sheet.header[: places[0]], name, *sheet.header[places[0] + 1 :])
    return Sheet(sheet.path, header, tuple(lines))


def _refuse_torn(
    rows: Sequence[Row], name: str, source: str, bag: str, *, of_patients: bool
) -> None:
    """Refuse a patient of two outcomes, or of two cases, where a patient is one."""
    torn = mixed(rows)
    if torn and (of_patients or bag == "patient"):
        told = counted(f"patients whose slides differ in {name}", torn)[0]
        more = "a patient has one" if of_patients else "a patient has one, or data.bag=slide"
        msg = f"{source}: {told}; {more}"
        raise DataError(msg)
    cases = [row.case for row in rows]
    if of_patients and bag == "slide" and len(set(cases)) < len(cases):
        several = sorted({case for case in cases if cases.count(case) > 1}, key=natural)
        told = counted("patients have several slides", several)[0]
        msg = f"{source}: {told}; of {name} a patient is one case: set data.bag=patient"
        raise DataError(msg)
