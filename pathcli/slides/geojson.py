"""A tissue mask in, polygons out: GeoJSON that QuPath opens where the tissue is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from shapely import Polygon, affinity

from pathcli.store.files import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

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
    shift = np.array(bounds[:2], float)
    features = []
    for number, island in enumerate(polygons(tissue)):
        rings = [np.array(ring.coords) - shift for ring in (island.exterior, *island.interiors)]
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [np.round(ring, 1).tolist() for ring in rings],
                },
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": "Tissue", "color": _COLOUR},
                    "tissue_id": number,
                },
            }
        )
    collection = {"type": "FeatureCollection", "features": features}
    write_bytes(path, json.dumps(collection).encode(), lambda _: None, "--out")
