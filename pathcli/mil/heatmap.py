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
from PIL import Image, ImageDraw, ImageFont

from pathcli.slides.geojson import feature, save_features
from pathcli.slides.overlay import Canvas
from pathcli.slides.tiling import read_tile
from pathcli.types import DataError, TileStatus, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from shapely import Polygon

    from pathcli.metrics.classification import Floats
    from pathcli.types import ByteArray, Slide, Tiles

COLOURS = "viridis"  # matplotlib's; its middle and top are no colours of haematoxylin and eosin
OUTLINE = (0, 0, 0)
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


def percentile(attention: Floats) -> NDArray[np.float64]:
    """Return the percentile rank, 0..100 [k]: tiles with less attention, and half the equal."""
    ordered = np.sort(attention)
    below, to = (np.searchsorted(ordered, attention, side) for side in ("left", "right"))
    return np.asarray(50 * (below + to) / len(attention))


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
    total = np.zeros(canvas.pixels.shape[:2])
    count = np.zeros(canvas.pixels.shape[:2])
    # corners are whole pixels: only a whole side leaves no gap to the next tile
    boxes = canvas.boxes(kept, math.ceil(round(tiles.side0, 6)))
    for (x0, y0, x1, y1), rank in zip(boxes, percentile(attention), strict=True):
        cell = slice(max(0, y0), max(y1, y0 + 1)), slice(max(0, x0), max(x1, x0 + 1))
        total[cell] += rank / 100
        count[cell] += 1
    covered = count > 0
    colour = _colours(total[covered] / count[covered])
    canvas.pixels[covered] = np.rint(
        canvas.pixels[covered] * (1 - strength) + colour * strength
    ).astype(np.uint8)
    shapes = list(lesions)
    canvas.outline(shapes, OUTLINE, 3)
    canvas.scale_bar()
    return np.vstack([canvas.pixels, _legend(canvas.pixels.shape[1], attention, bool(shapes))])


def _colours(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return RGB 0..255 [k, 3] of shares 0..1 [k], perceptually uniform."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    return np.asarray(mpl.colormaps[COLOURS](share)[..., :3] * 255)


def _legend(width: int, attention: Floats, lesions: bool) -> ByteArray:
    """Return a white strip [h, width, 3]: what the colours mean, and the raw range."""
    size = min(26, max(9, width // 45))
    font = ImageFont.load_default(size=size)
    pad, bar_w = size, width // 4
    image = Image.new("RGB", (width, 4 * size), "white")
    draw = ImageDraw.Draw(image)
    low = f"low attention ({attention.min():.2g})"
    high = f"high ({attention.max():.2g})"
    left = pad + math.ceil(draw.textlength(low, font=font)) + pad
    bar = np.broadcast_to(_colours(np.linspace(0, 1, bar_w)), (size, bar_w, 3))
    image.paste(Image.fromarray(np.rint(bar).astype(np.uint8)), (left, size // 2))
    draw.text((pad, size // 4), low, "black", font)
    draw.text((left + bar_w + pad, size // 4), high, "black", font)
    words = "colour: percentile rank of attention among the slide's tiles"
    draw.text((pad, 9 * size // 4), words, "black", font)
    if lesions:
        at = 2 * pad + math.ceil(draw.textlength(words, font=font))
        draw.line((at, 3 * size, at + 2 * pad, 3 * size), OUTLINE, 3)
        draw.text((at + 5 * pad // 2, 9 * size // 4), "lesion", "black", font)
    return np.array(image)


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
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * tiles.side0
    features = []
    for row in np.sort(_by_attention(attention)[:most]).tolist():
        named = {
            "attention": float(attention[row]),
            "attention_percentile": round(float(ranks[row]), 4),
        }
        square = kept.xy[row] + corners
        features.append(feature([square], bounds, "detection", {"measurements": named}))
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
