"""What is in a data set's folder in, a row an image out: tables, folders, file names, arrays."""

from __future__ import annotations

import csv
import logging
import os
import re
import shutil
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.errors import DataError, ResourceError
from pathcli.registry import did_you_mean
from pathcli.store.files import disk_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pathcli.data.classes import Arrays, ClassSet, FileNames, Table

log = logging.getLogger("pathcli")

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
ALL = "all"
_SPELT = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
_SPLITS = {"train", "val", "test"}
_ROWS = 256


@dataclass(frozen=True)
class Row:
    """What a table or layout says of one image; `fault` is why it cannot be used."""

    name: str
    path: Path
    label: str
    group: str = ""
    split: str = ""
    fault: str = ""


def spelt(split: str) -> str:
    """Return the name of a split as pathcli spells it: train, val, test, or in lower case."""
    folded = split.strip().casefold()
    return _SPELT.get(folded, folded)


# --- tables ------------------------------------------------------------------------------


def own_table(path: Path, folder: Path) -> list[Row]:
    """Return the rows of a labels.csv; paths start from the folder of images or the table's."""
    found = []
    for cells in _cells(path, ("image", "label")):
        at = folder / cells["image"]
        if not at.is_file() and (path.parent / cells["image"]).is_file():
            at = path.parent / cells["image"]
        label, group, split = cells["label"], cells.get("group", ""), cells.get("split", "")
        found.append(Row(cells["image"], at, label, group, spelt(split)))
    return found


def table_rows(layout: Table, folder: Path, classes: ClassSet) -> Iterator[Row]:
    """Yield a row an image of the set's own tables, as far as they are there."""
    labels = (layout.label,) if layout.label else classes.keys
    wanted = (layout.image, *labels, *filter(None, [layout.split]))
    for split, file in layout.files.items():
        if (path := _below(folder, file)) is None:
            continue
        find = _finder(path.parents[len(Path(file).parts) - 1], layout.images)
        for cells in _cells(path, wanted):
            name = cells[layout.image.casefold()]
            at = find(name)
            said = [cells[label.casefold()] for label in labels]
            ones = [label for label, cell in zip(labels, said, strict=True) if cell == "1"]
            fault = "" if layout.label or len(ones) == 1 else "not exactly one label"
            yield Row(
                name,
                at or folder / name,
                said[0] if layout.label else "".join(ones[:1]),
                _first_group(layout.group, at.stem if at else ""),
                spelt(split or cells.get(layout.split.casefold(), "")),
                fault,
            )


def _first_group(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.IGNORECASE) if pattern else None
    return match[1] if match else ""


def _below(folder: Path, name: str) -> Path | None:
    """Return a file of the set: below the folder, or below the one folder it was unpacked to."""
    if (folder / name).is_file():
        return folder / name
    found = sorted(folder.glob(f"*/{name}"))
    return found[0] if len(found) == 1 else None


def _finder(folder: Path, images: str) -> Callable[[str], Path | None]:
    """Return a function that finds an image by what a table calls it.

    Tables write paths from folders that users do not keep, leave suffixes out, and have blanks
    where the file has hyphens.
    """
    by_stem: defaultdict[str, list[Path]] = defaultdict(list)
    root = folder / images if (folder / images).is_dir() else folder

    def folded(name: str) -> str:
        path = Path(name)
        stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
        return re.sub(r"[\s-]+", "-", stem.casefold())

    def find(name: str) -> Path | None:
        parts = Path(name.replace("\\", "/")).parts
        for start in range(len(parts)):
            if (at := root.joinpath(*parts[start:])).is_file():
                return at
        if not by_stem:
            for path in images_in(root):
                by_stem[folded(path.name)].append(path)
        alike = by_stem[folded(name)]
        return alike[0] if len(alike) == 1 else None

    return find


def _cells(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the lines of a CSV, TSV or XLSX file, by column name in lower case.

    Raises:
        DataError: not a table, or a column is missing.
        ResourceError: it cannot be read.
    """
    try:
        lines = list(_excel(path) if path.suffix.lower() == ".xlsx" else _delimited(path))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror or error}); a table of labels is needed"
        raise ResourceError(msg) from error
    except (UnicodeDecodeError, csv.Error, zipfile.BadZipFile, KeyError, ValueError) as error:
        msg = f"{path}: not a CSV, TSV or XLSX table ({error})"
        raise DataError(msg) from error
    header = [head.casefold() for head in lines[0]] if lines else []
    for column in columns:
        if header.count(column.casefold()) != 1:
            what = did_you_mean(column.casefold(), header)
            msg = f"{path}: the header has no column {column!r}, or two; {what}"
            raise DataError(msg)
    if long := next((line for line in lines[1:] if any(line[len(header) :])), None):
        msg = f"{path}: a line has more cells than the header ({long[0]}, ...); quote commas"
        raise DataError(msg)
    return [dict(zip(header, line + [""] * len(header), strict=False)) for line in lines[1:]]


def _delimited(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        head = file.readline()
        file.seek(0)
        for line in csv.reader(file, delimiter=max(",;\t", key=head.count)):
            if any(line):
                yield [cell.strip() for cell in line]


def _excel(path: Path) -> Iterator[list[str]]:
    import openpyxl  # noqa: PLC0415 - most tables are text

    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    try:
        for line in book.worksheets[0].iter_rows(values_only=True):
            if any(cell is not None for cell in line):
                yield [
                    ""
                    if cell is None
                    else f"{cell:g}"
                    if isinstance(cell, float)
                    else str(cell).strip()
                    for cell in line
                ]
    finally:
        book.close()


# --- files -------------------------------------------------------------------------------


def images_in(folder: Path) -> Iterator[Path]:
    """Yield the images in and below a folder, by path; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            yield path


def class_folders(folder: Path, splits: Mapping[str, str]) -> list[Row]:
    """Return a row an image in a folder below `folder`; that folder's name is the label.

    A split is one of `splits`, or a first folder called train, val or test.
    """
    above = folder.resolve().parts
    found = []
    for path in images_in(folder):
        parts = path.relative_to(folder).parts
        split = next((s for s, name in splits.items() if name in (*above, *parts)), "")
        if not splits and len(parts) > 2 and spelt(parts[0]) in _SPLITS:  # noqa: PLR2004
            split = spelt(parts[0])
        label, fault = (parts[-2], "") if len(parts) > 1 else ("", "in no class folder")
        found.append(Row("/".join(parts), path, label, split=split, fault=fault))
    return found


def file_names(layout: FileNames, folder: Path) -> Iterator[Row]:
    """Yield a row an image whose name has the form; others are of other parts of the set."""
    for path in images_in(folder):
        if match := re.search(layout.pattern, path.name, re.IGNORECASE):
            known = match.groupdict()
            name = path.relative_to(folder).as_posix()
            yield Row(name, path, known["label"], known.get("group") or "")


# --- arrays ------------------------------------------------------------------------------


def array_rows(layout: Arrays, folder: Path, wanted: str) -> Iterator[Row]:
    """Yield a row an image of the arrays, which are unpacked once, as PNG, into the cache."""
    import h5py  # noqa: PLC0415 - one set has it

    for split in layout.splits:
        x, y, table = (
            _below(folder, name.format(split=split)) for name in (layout.x, layout.y, layout.table)
        )
        if x is None or y is None or wanted not in {"", ALL, spelt(split)}:
            continue
        try:
            with h5py.File(y, "r") as file:
                labels = [str(int(value)) for value in file["y"][:].reshape(-1)]
            images = _unpacked(x, len(labels))
        except (OSError, KeyError) as error:
            msg = f"{x.parent}: {x.name} and {y.name} are not whole ({error}); fetch them again"
            raise DataError(msg) from error
        groups = [c[layout.group] for c in _cells(table, (layout.group,))] if table else []
        if table and len(groups) != len(labels):
            msg = f"{table}: {len(groups)} lines for {len(labels)} images"
            raise DataError(msg)
        for i, label in enumerate(labels):
            path = images / f"{i:06d}.png"
            yield Row(f"{split}/{i:06d}", path, label, groups[i] if groups else "", spelt(split))


def _unpacked(x: Path, n: int) -> Path:
    """Return the folder of the images of an array, unpacked by this or an earlier run."""
    import h5py  # noqa: PLC0415
    import platformdirs  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    from pathcli.slides.readers import sampled_fingerprint  # noqa: PLC0415

    root = platformdirs.user_cache_path("pathcli") / "images"
    target = root / f"{x.stem}-{sampled_fingerprint(x)[:12]}"
    if target.is_dir():
        return target
    part = root / f"{target.name}.{os.getpid()}.part"
    with h5py.File(x, "r") as file, disk_errors(target):
        if len(file["x"]) != n:
            msg = f"{x}: {len(file['x'])} images for {n} labels"
            raise DataError(msg)
        log.info("unpacking %d images of %s to %s", n, x, target)
        part.mkdir(parents=True)
        try:
            for start in range(0, n, _ROWS):
                for i, pixels in enumerate(file["x"][start : start + _ROWS], start):
                    Image.fromarray(pixels).save(part / f"{i:06d}.png", compress_level=1)
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return target
