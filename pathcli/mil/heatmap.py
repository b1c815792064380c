"""Attention in, pictures out: heatmaps, objects for QuPath, the most and least attended tiles.

Attention is float [k], one number for each tile whose status is OK, in the tiles' order. The
status is that of the features, where tiles that could not be read are marked: give
`replace(tiles, status=features.status)`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pathcli.errors import DataError, UsageError
from pathcli.slides.geojson import feature, save_features, square
from pathcli.slides.overlay import COLOURS as COLOURS  # noqa: PLC0414 - part of what a heatmap is
from pathcli.slides.overlay import OUTLINE, Canvas, percentile, value_legend
from pathcli.slides.tiling import read_tile
from pathcli.types import TileStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from shapely import Polygon

    from pathcli.metrics.classification import Floats
    from pathcli.types import ByteArray, Slide, Tiles

_GAP = 4  # px between the tiles of a strip


class Extreme(NamedTuple):
    """A tile: `rank` by attention, 1 the highest; `row` in the tiles; pixels uint8 [s, s, 3]."""

    rank: int
    row: int
    xy: tuple[int, int]
    attention: float
    pixels: ByteArray


def readable(tiles: Tiles, attention: Floats) -> Tiles:
    """Return the tiles that attention [k] belongs to, those with status OK.

    Raises:
        UsageError: there are not as many numbers as readable tiles.
        DataError: attention is nan or infinite, or there is no readable tile.
    """
    ok = tiles.status == TileStatus.OK
    if attention.shape != (ok.sum(),):
        msg = (
            f"{tiles.item}: attention {attention.shape} does not fit {ok.sum()} readable tiles; "
            "give the tiles the status of the features"
        )
        raise UsageError(msg)
    if not ok.any():
        msg = f"{tiles.item}: no readable tile, so no attention; look at the slide's overview"
        raise DataError(msg)
    if not np.isfinite(attention).all():
        msg = f"{tiles.item}: attention is nan or infinite; look at the model's run"
        raise DataError(msg)
    return replace(tiles, xy=tiles.xy[ok], status=tiles.status[ok])


def draw_heatmap(
    slide: Slide,
    tiles: Tiles,
    attention: Floats,
    *,
    lesions: Iterable[Polygon] = (),
    strength: float = 0.5,
) -> ByteArray:
    """Return the scan tinted by attention, uint8 RGB [h, w, 3], a legend below.

    The colour is the percentile rank among the slide's tiles: raw attention is often so skewed
    that only one tile would show. Where tiles overlap, ranks are averaged; where there is no
    readable tile, the scan shows as it is.

    Args:
        slide: the open slide.
        tiles: its tiles, with the status of the features.
        attention: float [k], one per readable tile.
        lesions: polygons to outline, level-0 px.
        strength: share of the colour in the mixture, 0..1.

    Raises:
        UsageError: there are not as many numbers as readable tiles.
        DataError: attention is nan or infinite, or there is no readable tile.
    """
    kept = readable(tiles, attention)
    canvas = Canvas(slide, tiles.slide_mpp)
    canvas.tint(kept, percentile(attention) / 100, strength)
    shapes = list(lesions)
    canvas.outline(shapes, OUTLINE, 3)
    canvas.scale_bar()
    outlined = "lesion" if shapes else ""
    legend = value_legend(canvas.pixels.shape[1], attention, "attention", outlined)
    return np.vstack([canvas.pixels, legend])


def write_attention_geojson(
    path: Path,
    tiles: Tiles,
    attention: Floats,
    bounds: tuple[int, int, int, int],
    *,
    most: int | None = None,
) -> None:
    """Write readable tiles as QuPath detections that measure attention, raw and percentile.

    Squares are counted from the corner of the scan's `bounds`, as QuPath does. With `most`,
    only that many tiles of the highest attention are written.

    Raises:
        UsageError: there are not as many numbers as readable tiles.
        DataError: attention is nan or infinite, or there is no readable tile.
        ResourceError: the disk is full, or the folder may not be written.
    """
    kept, ranks = readable(tiles, attention), percentile(attention)
    features = []
    for row in np.sort(_by_attention(attention)[:most]).tolist():
        named = {
            "attention": float(attention[row]),
            "attention_percentile": round(float(ranks[row]), 4),
        }
        ring = square(kept.xy[row], tiles.side0)
        features.append(feature([ring], bounds, "detection", {"measurements": named}))
    save_features(path, features)


def _by_attention(attention: Floats) -> NDArray[np.intp]:
    """Return rows by attention, highest first; equal ones keep their order."""
    return np.argsort(-attention, kind="stable")


def extreme_tiles(
    slide: Slide, tiles: Tiles, attention: Floats, k: int = 10
) -> tuple[list[Extreme], list[Extreme]]:
    """Return the `k` most attended tiles, highest first, and the `k` least, lowest first.

    A slide of fewer than 2k tiles has fewer least attended ones: no tile is in both lists.

    Raises:
        UsageError: there are not as many numbers as readable tiles.
        DataError: attention is nan or infinite, no tile is readable, or one has become so.
    """
    kept = readable(tiles, attention)
    rows = np.flatnonzero(tiles.status == TileStatus.OK)
    order = _by_attention(attention)

    def extreme(rank: int) -> Extreme:
        at = order[rank]
        xy = (int(kept.xy[at, 0]), int(kept.xy[at, 1]))
        pixels = read_tile(slide, xy, tiles.spec, tiles.slide_mpp)
        return Extreme(rank + 1, int(rows[at]), xy, float(attention[at]), pixels)

    n = len(order)
    most, least = range(min(k, n)), range(n - 1, max(k, n - k) - 1, -1)
    return [extreme(rank) for rank in most], [extreme(rank) for rank in least]


def strip(pixels: Sequence[ByteArray], columns: int = 10) -> ByteArray:
    """Return tiles of one size side by side, uint8 RGB, in rows of `columns`, white between.

    Raises:
        UsageError: there is no tile.
    """
    if not pixels:
        msg = "no tile to put in a strip; leave the picture out"
        raise UsageError(msg)
    height, width = pixels[0].shape[:2]
    columns = min(columns, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    down, right = height + _GAP, width + _GAP
    sheet = np.full((rows * down - _GAP, columns * right - _GAP, 3), 255, np.uint8)
    for i, tile in enumerate(pixels):
        y, x = i // columns * down, i % columns * right
        sheet[y : y + height, x : x + width] = tile
    return sheet
