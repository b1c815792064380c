"""Tiles against lesions: which tiles are lesion, and what attention detects.

Lesions are polygons in level-0 px that do not overlap, as `read_lesions` and
`evaluation_lesions` return them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import shapely
from shapely import Polygon, STRtree

from pathcli.metrics.froc import Detections
from pathcli.mil.heatmap import readable

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from pathcli.metrics.classification import Floats
    from pathcli.types import Tiles

GROWN_UM = 75.0
ITC_UM = 200.0
_SAME = 1 - 1e-9  # areas that differ by less are equal


def lesion_share(tiles: Tiles, lesions: Sequence[Polygon]) -> NDArray[np.float64]:
    """Return the share of each tile's area that is lesion, float 0..1 [n]."""
    tile, _, area = _overlaps(tiles, lesions)
    return _share(tiles, tile, area)


def inside(tiles: Tiles, lesions: Sequence[Polygon], *, share: float = 0.5) -> NDArray[np.bool_]:
    """Return which tiles count as lesion, bool [n].

    A tile does if at least `share` of its area is lesion. A lesion that overlaps none of
    these tiles, being small, thin or cut by the grid, is represented by the tile that holds
    most of it (by all that hold equally much). So every lesion that meets a tile counts.
    """
    tile, lesion, area = _overlaps(tiles, lesions)
    found = _share(tiles, tile, area) >= share * _SAME
    most = np.zeros(len(lesions))
    np.maximum.at(most, lesion, area)
    missed = np.ones(len(lesions), bool)
    missed[lesion[found[tile]]] = False
    found[tile[missed[lesion] & (area >= most[lesion] * _SAME)]] = True
    return found


def _share(tiles: Tiles, tile: NDArray[np.int64], area: NDArray[np.float64]) -> NDArray[np.float64]:
    covered = np.bincount(tile, area, minlength=len(tiles))
    return np.asarray(np.minimum(covered / tiles.side0**2, 1.0))


def _overlaps(
    tiles: Tiles, lesions: Sequence[Polygon]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return all pairs that overlap: row of the tile, index of the lesion, common area (px)."""
    x, y = tiles.xy[:, 0], tiles.xy[:, 1]
    boxes = shapely.box(x, y, x + tiles.side0, y + tiles.side0)
    shapes = np.array(lesions, dtype=object)
    shapely.prepare(shapes)
    lesion, tile = STRtree(boxes).query(shapes, predicate="intersects")
    area = np.full(len(tile), tiles.side0**2)
    cut = ~shapely.covers(shapes[lesion], boxes[tile])  # the others are lesion throughout
    area[cut] = shapely.area(shapely.intersection(shapes[lesion[cut]], boxes[tile[cut]]))
    real = area > 0  # not mere contact
    return tile[real], lesion[real], area[real]


def evaluation_lesions(
    lesions: Sequence[Polygon], mpp: float
) -> tuple[list[Polygon], frozenset[int]]:
    """Return lesions as CAMELYON16 evaluates them, and the indices of those it ignores.

    Outlines grow by half of `GROWN_UM` on each side (75 um is the size of five tumour cells),
    what then touches is one lesion, and holes are filled. Isolated tumour cells are ignored:
    lesions of at most 200 um, so of less than 275 um when grown. As in the organisers' script
    (`Evaluation_FROC.py`, Ehteshami Bejnordi), the length is the major axis of the ellipse with
    the same second moments; theirs is measured in pixels of level 5, this one exactly.

    Args:
        lesions: polygons in level-0 px.
        mpp: um per level-0 pixel.
    """
    grown = shapely.unary_union([lesion.buffer(GROWN_UM / 2 / mpp) for lesion in lesions])
    whole = shapely.unary_union([Polygon(part.exterior) for part in shapely.get_parts(grown)])
    merged = sorted(shapely.get_parts(whole), key=lambda p: p.bounds[1::-1])
    most = (ITC_UM + GROWN_UM) / mpp
    return merged, frozenset(i for i, p in enumerate(merged) if _major_axis(p) < most)


def _major_axis(shape: Polygon) -> float:
    """Return the long axis of the ellipse with the second moments of `shape` (without holes)."""
    ring = np.array(shape.exterior.coords) - shape.centroid.coords[0]
    m = cv2.moments(ring[:, None].astype(np.float32))
    covariance = np.array([[m["mu20"], m["mu11"]], [m["mu11"], m["mu02"]]]) / m["m00"]
    return float(4 * np.sqrt(np.linalg.eigvalsh(covariance)[-1]))


def detections(
    tiles: Tiles,
    attention: Floats,
    lesions: Sequence[Polygon],
    ignored: Collection[int] = (),
    *,
    radius_um: float = 200.0,
) -> Detections:
    """Return attention's candidates for FROC and the lesion each one hits.

    Non-maximum suppression, as the challenge's entrants did: the tile of highest attention is
    a candidate and silences all tiles whose centres lie within `radius_um` of its own; then
    the highest of the rest, until none is left. A candidate is its tile's centre, and hits the
    lesion that contains it: the challenge scores points. Give `evaluation_lesions` for its
    rules, the polygons as drawn for stricter ones.

    FROC compares scores between slides, while attention sums to one on each: give a number
    that can be compared, such as attention times the slide's probability and its tile count.

    Args:
        tiles: the slide's tiles, with the status of the features.
        attention: float [k], one per readable tile.
        lesions: polygons, level-0 px.
        ignored: indices of lesions that count for nothing.
        radius_um: 200, the size under which lesions are isolated tumour cells.

    Raises:
        UsageError: there are not as many numbers as readable tiles.
        DataError: attention is nan or infinite, or there is no readable tile.
    """
    centres = readable(tiles, attention).xy + tiles.side0 / 2
    peaks = _peaks(centres, attention, radius_um / tiles.slide_mpp)
    hits = np.full(len(peaks), -1, np.int64)
    shapes: Any = np.array(lesions, dtype=object)
    lesion, peak = STRtree(shapely.points(centres[peaks])).query(shapes, predicate="intersects")
    hits[peak] = lesion
    scores = np.asarray(attention[peaks], np.float64)
    return Detections(scores, hits, len(lesions), frozenset(ignored))


def _peaks(centres: Floats, attention: Floats, radius: float) -> NDArray[np.int64]:
    """Return the rows that survive suppression within `radius` (inclusive), highest first."""
    points = shapely.points(centres)
    tree = STRtree(points)
    silent = np.zeros(len(points), bool)
    kept = []
    for row in np.argsort(-attention, kind="stable").tolist():
        if not silent[row]:
            kept.append(row)
            silent[tree.query(points[row], predicate="dwithin", distance=radius)] = True
    return np.array(kept, np.int64)
