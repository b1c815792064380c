"""An annotation file in, a region of interest out: only tiles mostly inside it are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.slides.annotations import NEGATIVE, polygons_of, read_drawn
from pathcli.slides.readers import public_name
from pathcli.types import digest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from shapely import Polygon

SUFFIXES = (".geojson", ".json", ".xml")
LEAST_INSIDE = 0.5
"""Share of a tile that must lie inside: a tile belongs to the side where most of it is."""

_SUBTRACTED = {NEGATIVE, "_2", "exclusion", "ignore*"}
_OUTSIDE = 0.01  # share of the region beyond the slide from which it is said


@dataclass(frozen=True)
class Roi:
    """Polygons in level-0 px, without overlaps; `digest` names their geometry in a TileSpec."""

    polygons: tuple[Polygon, ...]
    digest: str
    warnings: tuple[str, ...] = ()

    def fraction(self, xy: NDArray[Any], side0: float) -> NDArray[np.float64]:
        """Return the exact share [n] of tiles inside: corners `xy` [n, 2], side in level-0 px."""
        area = np.zeros(len(xy))
        whole = shapely.multipolygons(list(self.polygons))
        _, low, _, high = whole.bounds
        for x in np.unique(xy[:, 0]):  # a column first: polygons may have many corners
            column = whole.intersection(shapely.box(x, low, x + side0, high))
            if column.is_empty:
                continue
            rows = np.flatnonzero(xy[:, 0] == x)
            y = xy[rows, 1].astype(float)
            boxes = shapely.box(float(x), y, x + side0, y + side0)
            area[rows] = shapely.area(shapely.intersection(column, boxes))
        return np.asarray(np.clip(np.round(area / side0**2, 9), 0.0, 1.0))  # ties are ties


def read_roi(path: Path | str, bounds: tuple[int, int, int, int], size: tuple[int, int]) -> Roi:
    """Return the region an annotation file draws: QuPath's GeoJSON, ASAP's or Aperio's XML.

    All its areas count, whatever their class, but `_2`, `Exclusion`, `Ignore*` and Aperio's
    NegativeROA, which are subtracted; points, lines and detections do not.

    Args:
        path: the file.
        bounds: the scan's bounds (x, y, width, height), from whose corner QuPath counts.
        size: width and height of level 0; what is drawn beyond is cut off.

    Raises:
        ResourceError: there is no such file, or it may not be read.
        DataError: it is none of these formats, has no area, or none on this slide.
    """
    path = Path(path)
    drawn = [one for one in read_drawn(path, bounds) if one.rings]
    inside = shapely.unary_union([one.area for one in drawn if not one.classes & _SUBTRACTED])
    outside = shapely.unary_union([one.area for one in drawn if one.classes & _SUBTRACTED])
    region = inside.difference(outside)
    if region.area == 0:
        why = "what it encloses is excluded again" if inside.area else "no polygon in it"
        msg = f"{path}: {why}; draw the region of interest as an area and export it again"
        raise DataError(msg)
    width, height = size
    on_slide = polygons_of(region.intersection(shapely.box(0, 0, width, height)))
    lost = 1 - sum(part.area for part in on_slide) / region.area
    if not on_slide:
        x0, y0, x1, y1 = (round(v) for v in region.bounds)
        msg = (
            f"{path}: its polygons (x {x0} to {x1}, y {y0} to {y1}) lie outside the slide of "
            f"{width} x {height} px; is it of another slide, or not in level-0 pixels?"
        )
        raise DataError(msg)
    parts = tuple(sorted(on_slide, key=lambda part: part.bounds[1::-1]))
    said = f"{lost:.0%} of the region of interest lies outside the slide"
    return Roi(parts, digest(_canonical(parts)), (said,) if lost > _OUTSIDE else ())


def _canonical(parts: tuple[Polygon, ...]) -> list[Any]:
    """Return coordinates to 0.01 px, the same however the polygons were ordered or wound."""
    normal = shapely.normalize(shapely.multipolygons(list(parts)))
    return [
        [np.round(ring.coords, 2).tolist() for ring in (part.exterior, *part.interiors)]
        for part in normal.geoms
    ]


def check_rois(given: Path, slides: Iterable[Path | str]) -> None:
    """Refuse at once what no slide of several can be given: one file, or one file of a folder.

    Raises:
        UsageError: one file for several slides, or slides of one name and a folder.
        ResourceError: there is no such file or folder.
    """
    paths = [public_name(slide) for slide in slides]
    owners: dict[Path, str] = {}
    for path in paths:
        try:
            file = roi_file(given, path, len(paths))
        except DataError:  # that slide's own failure
            continue
        if owners.setdefault(file, path) != path:
            msg = (
                f"--roi {given}: {owners[file]} and {path} would both be given {file.name}; "
                "tile slides of one name apart, each with its own file"
            )
            raise UsageError(msg)


def roi_file(given: Path, slide: Path | str, slides: int = 1) -> Path:
    """Return the region's file of a slide: `given` itself, or the one of its stem in a folder.

    Raises:
        UsageError: one file for several `slides`.
        ResourceError: there is no such file or folder.
        DataError: the folder has no file for this slide, or several.
    """
    if not given.exists():
        msg = f"--roi {given}: no such file or folder"
        raise ResourceError(msg)
    if given.is_file():
        if slides > 1:
            msg = (
                f"--roi {given}: one file is one slide's, and there are {slides} slides; "
                "give a folder with a file per slide, named like it"
            )
            raise UsageError(msg)
        return given
    stem = Path(public_name(slide)).name
    stems = {stem, stem.partition(".ome.")[0], Path(stem).stem}
    found = [given / f"{s}{suffix}" for s in sorted(stems) for suffix in SUFFIXES]
    found = [file for file in found if file.is_file()]
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found)
    why = f"several regions of interest: {names}" if found else "no region of interest"
    msg = f"{public_name(slide)}: {why} in {given}; it needs one {Path(stem).stem}.geojson or .xml"
    raise DataError(msg)
