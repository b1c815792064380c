"""The published sets in, samples out: PathGen, PathGen_init, Quilt-1M, PMC-OA, PubMedVision."""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pathcli.data.formats.source import patient, plain, texts
from pathcli.data.formats.tables import CAPTION, IMAGE, TABLES, pick, read_rows
from pathcli.errors import DataError, ResourceError
from pathcli.slides.discovery import SLIDE_SUFFIXES
from pathcli.types import Region, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pathcli.data.formats.source import Row, Source, Talk

PATHGEN_PX = 672
"""Side of a PathGen region in level-0 pixels (README of the data set)."""

_SHOWN = 3
_VIDEO = re.compile(r"(.+?)_image_")
_FIGURE = re.compile(r"(.+)_\d+$")
_ARTICLE = re.compile(r"PMC\d+")


# --- PathGen -----------------------------------------------------------------------------


def _caption(row: Row) -> list[Talk]:
    return [((), text) for text in texts(row.get("caption"))[:1]]


def pathgen(
    source: Source, said: Callable[[Row], list[Talk]] = _caption, what: str = "caption"
) -> Iterator[Sample]:
    """Yield PathGen's records {wsi_id, position, caption, file_id?, side?} as regions of slides.

    `said` finds what is said in a record, by default its caption, and `what` calls it.

    Slides lie anywhere below `images`. A slide is known by its id as the stem or the beginning
    of the file's name; of several, the one in GDC's folder <file_id> is meant.

    Raises:
        ResourceError: none of the slides is there.
        DataError: the records are of another form.
    """
    slides, missing, there = Slides(source.root), set[str](), set[str]()
    for row in source.wanted(read_rows(source.path)):
        wsi, talks = plain(row.get("wsi_id")), said(row)
        xy = _position(row.get("position"))
        if not wsi or xy is None:
            if source.rows == 1:
                msg = f"{source.path}: records need wsi_id, position and {what}, not {[*row]}"
                raise DataError(msg)
            source.drop("no slide or position", wsi or f"row {source.rows}")
            continue
        name = f"{wsi}_{xy[0]}_{xy[1]}"
        path = slides.find(wsi, plain(row.get("file_id")))
        (missing if path is None else there).add(wsi)
        if path is None:
            source.drop("no slide of this id, or several", wsi)
        elif not talks:
            source.drop(f"no {what}", name)
        else:
            region = Region(path, xy, _side(row.get("side")))
            for turns, answer in talks:
                yield Sample(name, (region,), answer, turns, group=patient(wsi))
    if missing:
        first = ", ".join(sorted(missing)[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
        known = len(missing | there)
        what = f"{len(missing)} of {known} slides are not to be found below {source.root} ({first})"
        if not there:
            msg = f"{what}; give their folder as --images (in a recipe: data.images)"
            raise ResourceError(msg)
        source.warnings.append(what)


def _position(value: Any) -> tuple[int, int] | None:  # noqa: ANN401 - any JSON
    try:
        x, y = (int(part) for part in value)
    except (TypeError, ValueError):
        return None
    return (x, y) if x >= 0 and y >= 0 else None


def _side(value: Any) -> int:  # noqa: ANN401 - any JSON
    """Return a region's side in level-0 px where our own records say one, else PathGen's."""
    return value if isinstance(value, int) and value > 0 else PATHGEN_PX


class Slides:
    """The slides below a folder, by the beginning of their names."""

    def __init__(self, root: Path) -> None:
        """List `root` and all folders below it."""
        found = (
            (name, place)
            for place, _, names in os.walk(root)
            for name in names
            if Path(name).suffix.lower() in SLIDE_SUFFIXES
        )
        self._slides = sorted(found)
        self._known: dict[tuple[str, str], str | None] = {}

    def find(self, wsi: str, file_id: str = "") -> str | None:
        """Return the path of a slide; None if there is none, or nothing tells which of several."""
        key = (wsi, file_id)
        if key not in self._known:
            self._known[key] = self._find(wsi, file_id)
        return self._known[key]

    def _find(self, wsi: str, file_id: str) -> str | None:
        matches = []
        for name, place in self._slides[bisect_left(self._slides, (wsi, "")) :]:
            if not name.startswith(wsi):
                break
            if not name[len(wsi) :][:1].isalnum():  # DX1 is not the beginning of DX10
                matches.append((name, place))
        of_id = [m for m in matches if Path(m[1]).name == file_id]
        whole = [m for m in matches if Path(m[0]).stem == wsi]
        for some in (of_id, whole, matches):
            if len(some) == 1:
                return str(Path(some[0][1], some[0][0]))
        return None


# --- lists of names ----------------------------------------------------------------------


def pathgen_init(source: Source) -> Iterator[Sample]:
    """Yield the pairs of PathGen_init: its index files name images, tables beside give captions.

    `path` is `quilt_1m_imgs.json`, `pathcap_imgs.json` or the folder of both. Put Quilt-1M's
    CSV and PathCap's captions beside them; images lie anywhere below `images`. An index that
    has captions of its own needs no table.

    Raises:
        DataError: no index, or names without captions and no table beside.
    """
    folder = source.path if source.path.is_dir() else source.path.parent
    source.deep = True
    tables = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in TABLES]
    indices = [p for p in tables if p.name.endswith("_imgs.json")]
    if source.path.is_file():
        indices, tables = [source.path], [p for p in tables if p != source.path]
    names: set[str] = set()
    for index in indices:
        for row in read_rows(index):
            if texts(pick(row, CAPTION)):
                yield from _listed(source, row)
            else:
                names.add(_base(row))
    tables = [p for p in tables if p not in indices and not p.name.endswith("_imgs.json")]
    if not indices or (names and not tables):
        what = "no captions: put Quilt-1M's CSV or PathCap's captions" if indices else "no index"
        msg = f"{source.path}: {what} beside the index files (*_imgs.json)"
        raise DataError(msg)
    found: set[str] = set()
    for table in tables if names else ():
        for row in read_rows(table):
            if (name := _base(row)) in names:
                found.add(name)
                yield from _listed(source, row)
    if names - found:
        source.rows += len(names - found)
        source.drop("no caption", min(names - found), len(names - found))


def _listed(source: Source, row: Row) -> Iterator[Sample]:
    for kept in source.wanted([row]):
        video = _VIDEO.match(_base(kept))
        yield from source.pairs(pick(kept, IMAGE), pick(kept, CAPTION), group=video and video[1])


def _base(row: Row) -> str:
    return PurePosixPath(plain(pick(row, IMAGE))).name


def quilt(source: Source) -> Iterator[Sample]:
    """Yield the rows of Quilt-1M's CSV (caption, image_path, pathology, subset, split, ...).

    A missing caption is counted, never made up. The group is the video an image is from. Rows
    without `pathology` are left out by `keep: {pathology: ["*"]}`, as CLOVER does.
    """
    for row in source.wanted(read_rows(source.path)):
        video = _VIDEO.match(_base(row))
        yield from source.pairs(row.get("image_path"), row.get("caption"), group=video and video[1])


def pmc_oa(source: Source) -> Iterator[Sample]:
    """Yield the rows of PMC-OA (image, caption, pmcid, url_name); the group is the article.

    Where no column names the article, the image does: PMC212319_Fig3_4.jpg.
    """
    for row in source.wanted(read_rows(source.path)):
        named = _ARTICLE.match(_base(row))
        article = row.get("pmcid") or (named and named[0])
        yield from source.pairs(row.get("image"), row.get("caption"), group=article)


def pubmedvision(source: Source) -> Iterator[Sample]:
    """Yield PubMedVision's microscopy: caption is the first answer of a record's conversation.

    A record has `image` (a list), `conversations`, `modality` and `body_part`; of the two files
    the Alignment one describes images. The group is the figure an image is a part of.
    """
    for row in source.wanted(read_rows(source.path)):
        images, modality = row.get("image"), plain(row.get("modality"))
        if not modality.casefold().startswith("microscop"):
            source.drop("not microscopy", modality or "no modality")
            continue
        first = images[0] if isinstance(images, list) and images else images
        figure = _FIGURE.match(PurePosixPath(plain(first)).stem)
        yield from source.pairs(images, _answer(row), group=figure and figure[1])


def _answer(row: Row) -> str:
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("from") in {"gpt", "assistant"}:
            return plain(turn.get("value"))
    return ""
