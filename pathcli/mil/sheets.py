"""A CSV, TSV or XLSX file in; its header and its cells, as text with line numbers, out."""

from __future__ import annotations

import csv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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
