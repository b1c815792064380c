"""A tissue mask in, polygons out: GeoJSON that QuPath opens where the tissue is."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pathcli.store.files import write_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.slides.tissue import Tissue

_COLOUR = [0, 158, 115]


def polygons(tissue: Tissue) -> list[list[np.ndarray[Any, Any]]]:
    """Return one list of rings per island, outline first, holes after; float [k, 2] level-0 px.

    Rings lie within a quarter of a mask cell of the cells' edges.
    """
    doubled = tissue.mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    islands: dict[int, list[np.ndarray[Any, Any]]] = {}
    for i, contour in enumerate(contours):
        parent = int(tree[0][i][3])
        smooth = cv2.approxPolyDP(contour, 1.0, closed=True)[:, 0]
        if len(smooth) < 3:  # noqa: PLR2004 - a polygon has three corners
            continue
        ring = (smooth + 0.5) / 2 * np.array(tissue.scale)
        if parent < 0:
            islands.setdefault(i, []).insert(0, ring)
        elif parent in islands:
            islands[parent].append(ring)
    return list(islands.values())


def write_geojson(path: Path, tissue: Tissue, bounds: tuple[int, int, int, int]) -> None:
    """Write the tissue as annotations for QuPath, which counts pixels from the scan's bounds.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    shift = np.array(bounds[:2], float)
    features = []
    for number, rings in enumerate(polygons(tissue)):
        closed = [np.concatenate([r, r[:1]]) - shift for r in rings]
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [np.round(r, 1).tolist() for r in closed],
                },
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": "Tissue", "color": _COLOUR},
                    "tissue_id": number,
                },
            }
        )
    collection = {"type": "FeatureCollection", "features": features}
    write_bytes(path, json.dumps(collection).encode(), lambda _: None)
