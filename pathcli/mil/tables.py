"""Label tables in, one row per slide out: CLAM's table, and STAMP's pair of tables.

A table is CSV, TSV or XLSX. CLAM has one, `case_id,slide_id,label`; STAMP has a clinical
table (`PATIENT` and columns of findings) and a slide table (`PATIENT,FILENAME`). Names of
columns are compared without case.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from pathcli.errors import DataError, UsageError
from pathcli.mil.sheets import read_sheet
from pathcli.types import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pathcli.mil.sheets import Sheet

CASE = ("case_id", "patient")
SLIDE = ("slide_id", "slide", "filename")
SITE = ("site", "center", "centre")
SPLIT = ("split", "split_info")
_PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""How tables call the parts of a split, in any case."""
MISSING = {"", "na", "n/a", "nan", "null"}
"""What a clinical table writes, in any case, where the finding is not known."""

_SUFFIXES = re.compile(
    r"\.(svs|tiff?|ndpi|mrxs|scn|bif|vms|vmu|zvi|dcm|btf|svslide|czi|png|jpe?g|h5|pt|npy)$",
    re.IGNORECASE,
)
_SHOWN = 3
"""How many names a message lists before it counts the rest."""


@dataclass(frozen=True)
class Row:
    """One slide of a label table; `split` is train, val or test where the table says so."""

    case: str
    slide: str
    label: str | None
    site: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class LabelTable:
    """The slides of a cohort; a label's index in `classes` is its class index.

    `digest` names the rows in any order, with the classes; `source` is the file they are from.
    """

    rows: tuple[Row, ...]
    classes: tuple[str, ...]
    source: str
    digest: str
    warnings: tuple[str, ...] = ()

    @cached_property
    def by_slide(self) -> Mapping[str, Row]:
        """The rows by slide id."""
        return {row.slide: row for row in self.rows}

    @property
    def needed(self) -> tuple[str, ...]:
        """The classes without which no part of a split can be used: all of them."""
        return self.classes

    def lacking(self, label: str, part: str) -> str:
        """Return the clause that says what a part of a split lacks, and how much there is."""
        patients = len({row.case for row in self.rows if row.label == label})
        return (
            f"no slide of class {label!r} in {part}; it has {patients} patients in all: "
            "merge classes, or change val, test or folds"
        )

    def index(self, row: Row) -> int:
        """Return the class index of a row.

        Raises:
            DataError: the row has no label, or one that is no class of the table.
        """
        if row.label not in self.classes:
            msg = f"{self.source}: slide {row.slide} has label {row.label!r}; {self.classes} wanted"
            raise DataError(msg)
        return self.classes.index(row.label)


def read_labels(
    path: Path | str,
    *,
    slides: Path | str | None = None,
    target: str | None = None,
    classes: Mapping[str, str] | None = None,
    sheet: str | None = None,
) -> LabelTable:
    """Return the slides of a label table with their labels.

    Args:
        path: CSV, TSV or XLSX with `case_id`, `slide_id`, `label` and, if it has them, `site`
            (or `center`) and `split` (or `split_info`); with `slides`, STAMP's clinical table.
        slides: STAMP's slide table, with `PATIENT` and `FILENAME`.
        target: the column that holds the label (default: `label`).
        classes: a label as the file has it -> the name of its class; the order of the names
            is the order of the classes (default: the labels themselves in natural order).
        sheet: name of the XLSX sheet (default: the first).

    Raises:
        DataError: a column or cell is missing, a slide has two labels or patients, a label is
            not in `classes`, or only one class is there.
        UsageError: `slides` without `target`.
    """
    table = read_sheet(path, sheet)
    if slides is None:
        rows, warnings = own_rows(table, target or "label")
    elif target is None:
        msg = f"{path}: a table of patients has many columns; name the one of the label (target)"
        raise UsageError(msg)
    else:
        rows, warnings = joined_rows(table, read_sheet(slides), target)
    return label_table(rows, source=str(path), classes=classes, warnings=warnings)


def label_table(
    rows: Iterable[Row],
    *,
    source: str,
    classes: Mapping[str, str] | None = None,
    warnings: Iterable[str] = (),
) -> LabelTable:
    """Return the table of `rows`, whose labels are mapped to class names by `classes`.

    Raises:
        DataError: as `read_labels`.
    """
    rows = tuple(rows)
    found = sorted({row.label for row in rows if row.label is not None}, key=natural)
    mapping = {str(k): str(v) for k, v in (classes or {label: label for label in found}).items()}
    if unknown := [label for label in found if label not in mapping]:
        some = f"{listed(unknown)} in no class; map every label (known: {', '.join(mapping)})"
        msg = f"{source}: label {some}"
        raise DataError(msg)
    rows = tuple(replace(row, label=mapping[row.label] if row.label else None) for row in rows)
    names = tuple(dict.fromkeys(mapping.values()))
    counts = Counter(row.label for row in rows)
    seen = [name for name in names if counts[name]]
    if len(seen) < 2:  # noqa: PLR2004 - a choice is between two
        msg = f"{source}: {len(rows)} slides, all of class {listed(seen)}; two classes are needed"
        raise DataError(msg)
    notes = (
        *counted("classes without a slide", [name for name in names if name not in seen]),
        *counted("patients with slides of different labels", mixed(rows)),
        *counted("classes that differ in case only", _alike(names)),
    )
    ordered = sorted([r.slide, r.case, r.label or "", r.site or "", r.split or ""] for r in rows)
    key = digest({"classes": names, "rows": ordered})
    return LabelTable(rows, names, source, key, tuple(dict.fromkeys((*warnings, *notes))))


def slide_name(text: str) -> str:
    """Return the slide's id: a file name without folder and without a slide's suffix."""
    return _SUFFIXES.sub("", re.split(r"[/\\]", text.strip())[-1])


def counted(what: str, names: Iterable[str]) -> tuple[str, ...]:
    """Return one warning that counts `names` and lists the first few, or none if there are none."""
    every = list(names)
    return (f"{what}: {len(every)} ({listed(every)})",) * bool(every)


def listed(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def natural(text: str) -> tuple[list[tuple[int, int, str]], str]:
    """Return a sort key in which runs of digits are numbers."""
    parts = [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]
    return parts, text


# --- rows --------------------------------------------------------------------------------


def own_rows(table: Sheet, target: str) -> tuple[list[Row], tuple[str, ...]]:
    """Return the rows of a table that has patients, slides and labels in one, with warnings.

    Raises:
        DataError: a column or cell is missing, or a slide is there twice, and differently.
    """
    if table.find(SLIDE) is None and table.find(CASE) is not None:
        known = ", ".join(head for head in table.header if head and head != target)
        label = "" if table.find((target,)) is not None else " and data.target=COLUMN, its label's"
        msg = (
            f"{table.path}: the header has no column {SLIDE[0]!r} (but {known}); a table of "
            f"patients needs data.slide_table=FILE, too, with columns PATIENT,FILENAME{label}"
        )
        raise DataError(msg)
    cases, labels = table.filled(CASE), table.filled((target,))
    columns = zip(cases, table.filled(SLIDE), labels, table.optional(SITE), strict=True)
    made = [
        (line, Row(case, slide_name(slide), label, site, split))
        for ((line, case), (_, slide), (_, label), site), split in zip(
            columns, _parts(table), strict=True
        )
    ]
    return _unique(table.path, made)


def joined_rows(patients: Sheet, slides: Sheet, target: str) -> tuple[list[Row], tuple[str, ...]]:
    """Join STAMP's tables; patients without a finding are left out, as STAMP does.

    Raises:
        DataError: a column or cell is missing, or a patient is there twice, and differently.
    """
    patients.column((target,))
    findings = patients.optional((target,))
    known: dict[str, Row] = {}
    columns = zip(
        patients.filled(CASE), findings, patients.optional(SITE), _parts(patients), strict=True
    )
    for (line, case), found, site, split in columns:
        label = None if (found or "").casefold() in MISSING else found
        row = Row(case, "", label, site, split)
        if known.setdefault(case, row) != row:
            msg = f"{patients.path}: line {line}: patient {case} is there twice, and differently"
            raise DataError(msg)
    made, orphans = [], []
    for (line, case), (_, slide) in zip(slides.filled(CASE), slides.filled(SLIDE), strict=True):
        if case in known:
            made.append((line, replace(known[case], slide=slide_name(slide))))
        else:
            orphans.append(slide)
    rows, warnings = _unique(slides.path, made)
    bare = known.keys() - {row.case for row in rows}
    blank = [case for case, row in known.items() if row.label is None]
    notes = (
        *warnings,
        *counted(f"slides left out, no such patient in {patients.path}", orphans),
        *counted(f"patients without a slide in {slides.path}", sorted(bare, key=natural)),
        *counted(f"patients left out, column {target!r} is empty", blank),
    )
    return [row for row in rows if row.label is not None], notes


def _parts(table: Sheet) -> Iterator[str | None]:
    for (line, _), text in zip(table.lines, table.optional(SPLIT), strict=True):
        if text is not None and text.casefold() not in _PART_NAMES:
            msg = f"{table.path}: line {line}: split {text!r} is none of train, val, test"
            raise DataError(msg)
        yield None if text is None else _PART_NAMES[text.casefold()]


def _unique(path: Path, rows: Iterable[tuple[int, Row]]) -> tuple[list[Row], tuple[str, ...]]:
    first: dict[str, tuple[int, Row]] = {}
    again = []
    for line, row in rows:
        before, kept = first.setdefault(row.slide, (line, row))
        if before == line:
            continue
        if kept != row:
            names = {"case": "patients", "label": "labels", "site": "sites", "split": "splits"}
            what = next(names[k] for k in names if getattr(kept, k) != getattr(row, k))
            msg = f"{path}: line {line}: slide {row.slide} has two {what} (see line {before})"
            raise DataError(msg)
        again.append(row.slide)
    return [row for _, row in first.values()], counted("repeated rows dropped", again)


def _alike(names: Sequence[str]) -> list[str]:
    """Return names that are equal but for upper and lower case."""
    counts = Counter(name.casefold() for name in names)
    return [name for name in names if counts[name.casefold()] > 1]


def mixed(rows: Iterable[Row]) -> list[str]:
    """Return the patients whose slides differ in label."""
    labels: dict[str, set[str | None]] = {}
    for row in rows:
        labels.setdefault(row.case, set()).add(row.label)
    return sorted((case for case, found in labels.items() if len(found) > 1), key=natural)
