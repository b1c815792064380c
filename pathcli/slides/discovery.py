"""Files, folders, globs and CSV lists in, the slides they mean out.

A DICOM series is one slide however many files it has, and an MRXS slide is its `.mrxs`
file, also when the folder beside it is what was given.
"""

from __future__ import annotations

import csv
import glob
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

from pathcli.errors import DataError
from pathcli.slides.dicom import series_uid
from pathcli.slides.readers import IMAGE_SUFFIXES
from pathcli.types import MPP_RANGE

SLIDE_SUFFIXES = {
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".zvi"),
    *(".dcm", ".btf", ".svslide", ".czi"),
}


_LARGE = 80_000_000  # pixels: what a plain image may have; see `pathcli.data.images`


def is_slide(path: Path | str) -> bool:
    """Return whether a file is a slide by its name, or a TIFF too large for a plain image."""
    suffix = Path(path).suffix.lower()
    if suffix not in {".tif", ".tiff"}:
        return suffix in SLIDE_SUFFIXES
    import tifffile  # noqa: PLC0415

    try:
        with tifffile.TiffFile(path) as file:
            page = file.pages.first
            return bool(page.imagewidth * page.imagelength > _LARGE)
    except (OSError, ValueError, IndexError):  # the reader of images says what is wrong with it
        return False


@dataclass(frozen=True)
class Found:
    """One slide to work on, with the resolution a CSV gave for it (um per pixel).

    An input without a slide has a `fault` instead: the rest of a batch goes on.
    """

    path: Path | str
    mpp: float | None = None
    fault: DataError | None = None

    def checked(self) -> Found:
        """Return itself if there is a slide to open.

        Raises:
            DataError: the input meant no slide.
        """
        if self.fault:
            raise self.fault
        return self


def discover(inputs: list[str]) -> list[Found]:
    """Return the slides that `inputs` mean, each once, in the order given.

    A path that does not exist is returned as it is: opening it says so. A folder or glob
    without slides, or a CSV that is no slide list, is returned with its fault.
    """
    found: dict[tuple[str, float | None], Found] = {}
    for text in inputs:
        try:
            slides = _expand(text)
        except DataError as error:
            slides = [Found(text, fault=error)]
        for slide in slides:
            found.setdefault((str(slide.path), slide.mpp), slide)
    return list(found.values())


def _expand(text: str) -> list[Found]:
    path = Path(text).expanduser()
    if not text:
        msg = "an empty argument names no slide"
        raise DataError(msg)
    if "://" in text:
        return [Found(text)]
    if path.is_dir():
        return [Found(p) for p in _folder(path)]
    if path.is_file():
        return _csv(path) if path.suffix.lower() == ".csv" else [Found(_whole(path))]
    if glob.has_magic(text):
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute too
        if not matches:
            msg = f"{text}: nothing matches"
            raise DataError(msg)
        return discover(matches)
    return [Found(path)]


def _whole(path: Path) -> Path:
    """Return the file that stands for the slide `path` belongs to."""
    if path.suffix.lower() != ".dcm":
        return path
    return _series([p for p in sorted(path.parent.iterdir()) if p.suffix.lower() == ".dcm"], path)


def _series(files: list[Path], path: Path) -> Path:
    uid = series_uid(path)
    return next((p for p in files if series_uid(p) == uid), path) if uid else path


def _folder(folder: Path) -> list[Path]:
    folder = folder if folder.name else folder.resolve()  # "." and ".." have no name
    mrxs = folder.with_suffix(".mrxs") if folder.name else folder
    if mrxs.is_file() and (folder / "Slidedat.ini").is_file():
        return [mrxs]
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    slides = [p for p in files if p.suffix.lower() in SLIDE_SUFFIXES and not _inside_mrxs(p)]
    slides = slides or [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES]
    seen: set[tuple[Path, str]] = set()
    whole = []
    for path in slides:
        uid = series_uid(path) if path.suffix.lower() == ".dcm" else None
        if uid is None or (path.parent, uid) not in seen:
            whole.append(path)
        if uid is not None:
            seen.add((path.parent, uid))
    if not whole:
        msg = f"{folder}: no slides in this folder ({len(files)} files)"
        raise DataError(msg)
    return whole


def _inside_mrxs(path: Path) -> bool:
    return path.parent.with_suffix(".mrxs").is_file()


def _csv(path: Path) -> list[Found]:
    """Read a list with the header `wsi[,mpp]`; paths are relative to the list."""
    try:
        lines = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: not a CSV file ({error})"
        raise DataError(msg) from error
    header = [name.strip() for name in lines[0]] if lines else []
    if "wsi" not in header or set(header) - {"wsi", "mpp"}:
        got = ",".join(header) or "nothing"
        msg = f"{path}: a slide list is a CSV with the header wsi or wsi,mpp, not {got}"
        raise DataError(msg)
    slides = []
    for number, cells in enumerate(lines[1:], start=2):
        row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
        if row.get("wsi"):
            mpp = _csv_mpp(path, number, row.get("mpp"))
            slides += _csv_row(path, row["wsi"], mpp)
    if not slides:
        msg = f"{path}: names no slide"
        raise DataError(msg)
    return slides


def _csv_mpp(path: Path, line: int, text: str | None) -> float | None:
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = math.nan
    if mpp is not None and not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        msg = (
            f"{path}, line {line}: mpp {text!r} is no number within "
            f"{MPP_RANGE[0]:g}-{MPP_RANGE[1]:g} um per pixel"
        )
        raise DataError(msg)
    return mpp


def _csv_row(path: Path, name: str, mpp: float | None) -> list[Found]:
    place = name if "://" in name else str(path.parent / Path(name).expanduser())
    try:
        return [replace(slide, mpp=mpp) for slide in _expand(place)]
    except DataError as error:
        return [Found(place, fault=error)]
