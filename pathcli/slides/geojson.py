"""A tissue mask in, polygons out: GeoJSON that QuPath opens where the tissue is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from shapely import Polygon, affinity

from pathcli.store.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.slides.tissue import Tissue

_COLOUR = [0, 158, 115]


def polygons(tissue: Tissue) -> list[Polygon]:
    """Return one valid polygon per island, with its holes, in level-0 px.

    Outlines run along the edges of the mask's cells, smoothed by at most half a cell.
    """
    doubled = tissue.mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    islands: dict[int, list[np.ndarray[Any, Any]]] = {}
    for i, contour in enumerate(contours):
        parent = int(tree[0][i][3])
        ring = contour[:, 0].astype(float) + 0.5  # centres of half cells
        if parent < 0:
            islands.setdefault(i, []).insert(0, ring)
        elif parent in islands and len(ring) > 2:  # noqa: PLR2004 - a polygon has three corners
            islands[parent].append(ring)
    found: list[Polygon] = []
    scale = (tissue.scale[0] / 2, tissue.scale[1] / 2)
    for outline, *holes in islands.values():
        # from the centres of the outermost half cells to their edges
        shape = Polygon(outline, holes).buffer(0.5, join_style="mitre").simplify(1.0).buffer(0)
        placed = affinity.scale(shape, *scale, origin=(0, 0))
        found += [part for part in getattr(placed, "geoms", [placed]) if not part.is_empty]
    return found


def write_geojson(path: Path, tissue: Tissue, bounds: tuple[int, int, int, int]) -> None:
    """Write the tissue as annotations for QuPath, which counts pixels from the scan's bounds.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    looks = {"name": "Tissue", "color": _COLOUR}
    features = []
    for number, island in enumerate(polygons(tissue)):
        rings = [np.array(ring.coords) for ring in (island.exterior, *island.interiors)]
        more = {"classification": looks, "tissue_id": number}
        features.append(feature(rings, bounds, "annotation", more))
    save_features(path, features)


def feature(
    rings: Sequence[NDArray[Any]],
    bounds: tuple[int, int, int, int],
    kind: str,
    properties: Mapping[str, Any],
) -> dict[str, Any]:
    """Return one polygon as a QuPath object of a `kind` ("annotation", "detection").

    `rings` are closed, level-0 px [k, 2], the outer one first; written to 0.1 px, counted
    from the corner of the scan's `bounds`.
    """
    coordinates = [np.round(ring - np.array(bounds[:2], float), 1).tolist() for ring in rings]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": {"objectType": kind, **properties},
    }


def square(xy: NDArray[Any], side0: float) -> NDArray[np.float64]:
    """Return the closed ring [5, 2] of a tile: its corner and side in level-0 px."""
    return xy + side0 * np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]], float)


def save_features(path: Path, features: Sequence[Mapping[str, Any]]) -> None:
    """Write features as one GeoJSON collection, whole or not at all.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    collection = {"type": "FeatureCollection", "features": features}
    write_bytes(path, json.dumps(collection).encode(), lambda _: None, "--out")
