"""Label tables in, one row per slide out: CLAM's table, and STAMP's pair of tables.

A table is CSV, TSV or XLSX. CLAM has one, `case_id,slide_id,label`; STAMP has a clinical
table (`PATIENT` and columns of findings) and a slide table (`PATIENT,FILENAME`). Names of
columns are compared without case.
"""

from __future__ import annotations

import csv
import re
import zipfile
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.types import digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

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
        rows, warnings = _own_rows(table, target or "label")
    elif target is None:
        msg = f"{path}: a table of patients has many columns; name the one of the label (target)"
        raise UsageError(msg)
    else:
        rows, warnings = _joined_rows(table, read_sheet(slides), target)
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
        *counted("patients with slides of different labels", _mixed(rows)),
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


# --- files -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sheet:
    """Cells of a file as text: a header, and its lines with their numbers in the file."""

    path: Path
    header: tuple[str, ...]
    lines: tuple[tuple[int, tuple[str, ...]], ...]

    def find(self, names: Sequence[str]) -> int | None:
        """Return the column called by the first of `names` that is there, or None.

        Raises:
            DataError: two columns have this name.
        """
        folded = [head.casefold() for head in self.header]
        for name in (name.casefold() for name in names):
            if folded.count(name) > 1:
                msg = f"{self.path}: two columns are called {name!r}; rename one"
                raise DataError(msg)
            if name in folded:
                return folded.index(name)
        return None

    def column(self, names: Sequence[str]) -> int:
        """Return the column called by one of `names`.

        Raises:
            DataError: there is none, or two.
        """
        found = self.find(names)
        if found is None:
            known = did_you_mean(names[0], [head for head in self.header if head])
            msg = f"{self.path}: the header has no column {names[0]!r}; {known}"
            raise DataError(msg)
        return found

    def filled(self, names: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Yield line number and text of a column in which no cell may be empty.

        Raises:
            DataError: a cell is empty, or the column is missing.
        """
        column = self.column(names)
        for line, cells in self.lines:
            if not cells[column]:
                msg = f"{self.path}: line {line}: column {self.header[column]!r} is empty"
                raise DataError(msg)
            yield line, cells[column]

    def optional(self, names: Sequence[str]) -> list[str | None]:
        """Return the text of a column line by line, None where there is none."""
        column = self.find(names)
        return [(None if column is None else cells[column] or None) for _, cells in self.lines]


def read_sheet(path: Path | str, sheet: str | None = None) -> Sheet:
    """Return the cells of a CSV, TSV or XLSX file, without blank lines and outer blanks.

    Raises:
        DataError: no such file, not such a file, no header, or a line longer than the header.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"{path}: a folder, not a table" if path.is_dir() else f"{path}: no such file"
        raise DataError(msg)
    read = _excel if path.suffix.lower() in {".xlsx", ".xlsm"} else _delimited
    stripped = ((line, tuple(cell.strip() for cell in cells)) for line, cells in read(path, sheet))
    filled = [(line, cells) for line, cells in stripped if any(cells)]
    if len(filled) < 2:  # noqa: PLR2004 - the header, and a row
        msg = f"{path}: the table has no rows"
        raise DataError(msg)
    width = max(i for i, head in enumerate(filled[0][1], 1) if head)
    lines = []
    for line, cells in filled[1:]:
        if any(cells[width:]):
            msg = f"{path}: line {line} has {len(cells)} cells, the header {width}"
            raise DataError(msg)
        lines.append((line, (*cells[:width], *[""] * (width - len(cells)))))
    return Sheet(path, filled[0][1][:width], tuple(lines))


def _delimited(path: Path, sheet: str | None) -> Iterator[tuple[int, list[str]]]:
    if sheet is not None:
        msg = f"{path}: sheet {sheet!r} was asked for, but only XLSX files have sheets"
        raise UsageError(msg)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            delimiter = max(",;\t", key=header.count)  # a spreadsheet's language decides
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter)
            for cells in reader:
                yield reader.line_num, cells
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: not a CSV, TSV or XLSX table in UTF-8 ({error})"
        raise DataError(msg) from error


def _excel(path: Path, sheet: str | None) -> Iterator[tuple[int, list[str]]]:
    import openpyxl  # noqa: PLC0415 - most tables are text

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        msg = f"{path}: not an XLSX file ({error})"
        raise DataError(msg) from error
    try:
        if sheet is not None and sheet not in book.sheetnames:
            msg = f"{path}: no sheet is called {sheet!r}: {did_you_mean(sheet, book.sheetnames)}"
            raise DataError(msg)
        page = book[sheet or book.sheetnames[0]]
        for line, cells in enumerate(page.iter_rows(values_only=True), 1):
            yield line, [_cell_text(cell) for cell in cells]
    finally:
        book.close()


def _cell_text(cell: object) -> str:
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # a spreadsheet keeps 1 as 1.0
    return "" if cell is None else str(cell)


# --- rows --------------------------------------------------------------------------------


def _own_rows(table: Sheet, target: str) -> tuple[list[Row], tuple[str, ...]]:
    cases, labels = table.filled(CASE), table.filled((target,))
    columns = zip(cases, table.filled(SLIDE), labels, table.optional(SITE), strict=True)
    made = [
        (line, Row(case, slide_name(slide), label, site, split))
        for ((line, case), (_, slide), (_, label), site), split in zip(
            columns, _parts(table), strict=True
        )
    ]
    return _unique(table.path, made)


def _joined_rows(patients: Sheet, slides: Sheet, target: str) -> tuple[list[Row], tuple[str, ...]]:
    """Join STAMP's tables; patients without a finding are left out, as STAMP does."""
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


def _mixed(rows: Iterable[Row]) -> list[str]:
    """Return the patients whose slides differ in label."""
    labels: dict[str, set[str | None]] = {}
    for row in rows:
        labels.setdefault(row.case, set()).add(row.label)
    return sorted((case for case, found in labels.items() if len(found) > 1), key=natural)
