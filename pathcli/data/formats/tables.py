"""CSV, TSV, JSON, JSONL and Parquet in, rows out; and the plain table of images and captions."""

from __future__ import annotations

import csv
import json
import re
from typing import TYPE_CHECKING, Any

from pathcli.data.images import cell, open_parquet
from pathcli.errors import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pathcli.data.formats.source import Row, Source
    from pathcli.types import Sample

IMAGE = (
    *("image", "image_path", "path", "filepath", "file_name", "filename", "jpg"),
    *("image_name", "img_name", "img"),
)
CAPTION = ("caption", "text", "title", "txt", "captions")
LABEL = ("label", "class")
GROUP = ("group", "patient", "wsi_id")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")

_CHUNK, _RECORD = 1 << 20, 1 << 24  # characters read at a time, and the most of one record
_CELL = 1 << 24
_GAP = re.compile(r"[\s,]*")


def manifest(source: Source) -> Iterator[Sample]:
    """Yield the samples of a table: image and caption, maybe label and group, by usual names.

    Raises:
        DataError: no image or no caption column.
    """
    for row in source.wanted(read_rows(source.path)):
        if source.rows == 1:
            _check_header(source.path, row)
        image, caption = pick(row, IMAGE), pick(row, CAPTION)
        yield from source.pairs(image, caption, pick(row, LABEL), pick(row, GROUP))


def pick(row: Row, names: tuple[str, ...]) -> Any:  # noqa: ANN401 - any cell
    """Return the cell of the first of `names` that the row has, None if it has none."""
    return next((row[name] for name in names if name in row), None)


def _check_header(path: Path, row: Row) -> None:
    for what, names in (("image", IMAGE), ("caption", CAPTION)):
        if not {*names} & {*row}:
            got, known = ", ".join(row), ", ".join(names)
            msg = f"{path}: no {what} column: it has {got}; call it one of {known}"
            raise DataError(msg)


# --- rows --------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the records of a table one by one, keys in lower case; a folder means its Parquet.

    A JSON object maps images to captions or records; a JSON list may hold names alone.

    Raises:
        DataError: damaged, or no table we read.
        ResourceError: it is not there, or pyarrow is not.
    """
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        for file in sorted(path.glob("*.parquet")):
            yield from _parquet(file)
        return
    if not path.is_file():
        msg = f"{path}: no such file"
        raise ResourceError(msg)
    if reader is None:
        msg = f"{path}: not a table we read ({', '.join(TABLES)})"
        raise DataError(msg)
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        msg = f"{path}: not text in UTF-8 ({error.reason}); save it as UTF-8"
        raise DataError(msg) from error


def _delimited(path: Path) -> Iterator[Row]:
    csv.field_size_limit(_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        lines = csv.reader(file, delimiter=delimiter)
        try:
            header = [name.strip().casefold() for name in next(lines, [])]
            for cells in lines:
                if len(cells) > len(header):
                    msg = (
                        f"{path}: line {lines.line_num} has {len(cells)} cells, the header "
                        f"{len(header)}; quote captions that hold a {delimiter!r}"
                    )
                    raise DataError(msg)
                if cells:
                    yield dict(zip(header, cells, strict=False))
        except csv.Error as error:
            msg = f"{path}: line {lines.line_num}: not a table ({error})"
            raise DataError(msg) from error


def _lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                msg = f"{path}: line {number} is not JSON ({error})"
                raise DataError(msg) from error
            yield _row(value)


def _json(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        start = file.read(_CHUNK).lstrip()[:1]
        file.seek(0)
        if start == "[":
            yield from map(_row, _json_list(path))
            return
        try:
            value = json.load(file)
        except ValueError as error:
            msg = f"{path}: not JSON ({error}); one record a line is called .jsonl"
            raise DataError(msg) from error
    if not isinstance(value, dict):
        msg = f"{path}: a table in JSON is a list of records, or maps images to captions"
        raise DataError(msg)
    for name, said in value.items():
        yield {"image": name} | (_row(said) if isinstance(said, dict) else {"caption": said})


def _json_list(path: Path) -> Iterator[Any]:
    """Yield the values of a JSON list without holding the list."""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig") as file:
        text, at, count = file.read(_CHUNK).lstrip()[1:], 0, 0
        while True:
            at = _GAP.match(text, at).end()  # type: ignore[union-attr]  # matches nothing, too
            try:
                if text[at] == "]":
                    return
                value, at = decode(text, at)
            except (IndexError, ValueError) as error:
                more = file.read(_CHUNK) if len(text) - at < _RECORD else ""
                if not more:
                    msg = f"{path}: truncated or no JSON, after {count} records ({error})"
                    raise DataError(msg) from error
                text, at = text[at:] + more, 0
                continue
            count += 1
            yield value


def _row(value: object) -> Row:
    if isinstance(value, dict):
        return {str(key).casefold(): cell for key, cell in value.items()}
    return {"image": value}


def _parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; embedded images {bytes, path} are told by their place."""
    file = open_parquet(str(path))
    embedded = [
        field.name
        for field in file.schema_arrow
        if hasattr(field.type, "get_field_index") and field.type.get_field_index("bytes") >= 0
    ]
    names = [field.name for field in file.schema_arrow if field.name not in embedded]
    number = 0
    for batch in file.iter_batches(columns=names):
        for value in batch.to_pylist():
            images = {column: cell(str(path), column, number) for column in embedded}
            yield _row(value | images)
            number += 1


_READERS = {
    ".csv": _delimited,
    ".tsv": _delimited,
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".parquet": _parquet,
}
