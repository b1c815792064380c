"""Tiles, masks, cluster labels and values in, pictures out: overviews fit for a paper."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pathcli.slides.geojson import polygons
from pathcli.slides.overview import overview
from pathcli.store.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from shapely import Polygon

    from pathcli.slides.tissue import Tissue
    from pathcli.types import ByteArray, Slide, Tiles

LONG_SIDE = 1600
CONTOUR = (0, 158, 115)
GRID = (40, 40, 40)
REGION = (0, 114, 178)
OUTLINE = (0, 0, 0)
COLOURS = "viridis"  # matplotlib's; its middle and top are no colours of haematoxylin and eosin
PALETTE = (
    *((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167)),
    *((86, 180, 233), (213, 94, 0), (240, 228, 66), (120, 94, 240)),
)
"""Colours that people with any colour vision tell apart (Okabe and Ito 2008, and one more)."""


class Canvas:
    """The scanned part of a slide as a picture, with level-0 coordinates to draw in."""

    def __init__(self, slide: Slide, mpp: float, long_side: int = LONG_SIDE) -> None:
        """Read the picture, `long_side` px long; `mpp` is um per level-0 px."""
        x, y, w, h = slide.info.bounds
        down = max(1.0, max(w, h) / long_side)
        whole, _ = overview(slide, down)
        sx, sy = whole.shape[1] / slide.info.width, whole.shape[0] / slide.info.height
        part = whole[round(y * sy) : round((y + h) * sy), round(x * sx) : round((x + w) * sx)]
        grow = long_side / max(part.shape[:2])
        self.pixels: ByteArray = part
        if grow > 1:
            size = (round(part.shape[1] * grow), round(part.shape[0] * grow))
            self.pixels = cv2.resize(part, size, interpolation=cv2.INTER_CUBIC).astype(np.uint8)
        self.origin = np.array([x, y], float)
        self.per_px = w / self.pixels.shape[1]
        self.um_per_px = self.per_px * mpp

    def place(self, points: NDArray[Any]) -> NDArray[np.int32]:
        """Return picture pixels [k, 2] of level-0 points [k, 2]."""
        return np.asarray(np.rint((points - self.origin) / self.per_px), np.int32)

    def boxes(self, tiles: Tiles, side_px: float | None = None) -> list[tuple[int, int, int, int]]:
        """Return picture rectangles (x0, y0, x1, y1) of tiles, or of `side_px` level-0 px."""
        side = tiles.side0 if side_px is None else side_px
        low, high = self.place(tiles.xy), self.place(tiles.xy + side)
        return [(int(a), int(b), int(c), int(d)) for (a, b), (c, d) in zip(low, high, strict=True)]

    def outline(
        self, shapes: Iterable[Polygon], colour: tuple[int, int, int], thickness: int
    ) -> None:
        """Draw the outlines of polygons (level-0 px) and of their holes."""
        for shape in shapes:
            rings = [self.place(np.array(r.coords)) for r in (shape.exterior, *shape.interiors)]
            cv2.polylines(self.pixels, rings, True, colour, thickness, cv2.LINE_AA)  # noqa: FBT003

    def tint(self, tiles: Tiles, shares: NDArray[np.floating[Any]], strength: float = 0.5) -> None:
        """Mix the colours of `shares` 0..1 [k] into the tiles [k]; overlapping ones are averaged.

        `strength` is the share of the colour in the mixture, 0..1.
        """
        total = np.zeros(self.pixels.shape[:2])
        count = np.zeros(self.pixels.shape[:2])
        # corners are whole pixels: only a whole side leaves no gap to the next tile
        boxes = self.boxes(tiles, math.ceil(round(tiles.side0, 6)))
        for (x0, y0, x1, y1), share in zip(boxes, shares, strict=True):
            cell = slice(max(0, y0), max(y1, y0 + 1)), slice(max(0, x0), max(x1, x0 + 1))
            total[cell] += share
            count[cell] += 1
        covered = count > 0
        colour = _colours(total[covered] / count[covered])
        self.pixels[covered] = np.rint(
            self.pixels[covered] * (1 - strength) + colour * strength
        ).astype(np.uint8)

    def scale_bar(self) -> None:
        """Draw a bar of a round length at the lower left."""
        height, width = self.pixels.shape[:2]
        length_um = _round_length(self.um_per_px * width / 5)
        bar = round(length_um / self.um_per_px)
        text = f"{length_um / 1000:g} mm"
        image = Image.fromarray(self.pixels)
        draw = ImageDraw.Draw(image)
        font = ImageFont.load_default(size=max(14, height // 50))
        left, base, thick = width // 40, height - height // 40, max(4, height // 250)
        box = draw.textbbox((0, 0), text, font=font)
        text_h = box[3] - box[1]
        plate = (left - 10, base - thick - text_h - 22, left + max(bar, box[2]) + 10, base + 10)
        draw.rectangle(plate, fill=(255, 255, 255))
        draw.rectangle((left, base - thick, left + bar, base), fill=(0, 0, 0))
        draw.text((left, base - thick - text_h - 14), text, fill=(0, 0, 0), font=font)
        self.pixels = np.array(image)


def _round_length(um: float) -> float:
    """Return the largest of 1, 2, 5 times a power of ten that is at most `um`."""
    power = 10 ** math.floor(math.log10(um))
    return float(max(m * power for m in (1, 2, 5) if m * power <= um))


def draw_tiles(
    slide: Slide, tiles: Tiles, tissue: Tissue, roi: Iterable[Polygon] = ()
) -> ByteArray:
    """Return an overview: the scan, what is left out paled, tissue outline, tiles, scale bar.

    The polygons of `roi` (level-0 px) are outlined in another colour than the tissue.
    """
    canvas = Canvas(slide, tiles.slide_mpp)
    kept = np.zeros(canvas.pixels.shape[:2], bool)
    boxes = canvas.boxes(tiles)
    for x0, y0, x1, y1 in boxes:
        kept[y0:y1, x0:x1] = True
    if not boxes:  # nothing was left out in favour of anything
        kept[:] = True
    pale = (canvas.pixels.astype(np.uint16) + 2 * 255) // 3
    canvas.pixels = np.where(kept[..., None], canvas.pixels, pale.astype(np.uint8))
    canvas.pixels = np.ascontiguousarray(canvas.pixels)
    for x0, y0, x1, y1 in boxes:
        cv2.rectangle(canvas.pixels, (x0, y0), (x1, y1), GRID, 1)
    if tiles.spec.tissue != "none":
        canvas.outline(polygons(tissue), CONTOUR, 3)
    canvas.outline(roi, REGION, 4)
    canvas.scale_bar()
    return canvas.pixels


def draw_labels(
    slide: Slide, tiles: Tiles, labels: Sequence[int], tissue: Tissue, strength: float = 0.55
) -> ByteArray:
    """Return the scan with each tile's middle cell tinted by its label (`PALETTE`)."""
    canvas = Canvas(slide, tiles.slide_mpp)
    step = tiles.side0 * tiles.spec.step_px / tiles.spec.size_px
    inset = (tiles.side0 - step) / 2
    tint = canvas.pixels.astype(np.float32)
    low, high = canvas.place(tiles.xy + inset), canvas.place(tiles.xy + inset + step)
    for (x0, y0), (x1, y1), label in zip(low, high, labels, strict=True):
        colour = np.array(PALETTE[label % len(PALETTE)], np.float32)
        cell = tint[y0:y1, x0:x1]
        cell[:] = cell * (1 - strength) + colour * strength
    canvas.pixels = np.rint(tint).astype(np.uint8)
    canvas.outline(polygons(tissue), GRID, 2)  # no colour of a label
    canvas.scale_bar()
    return canvas.pixels


def percentile(values: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Return the percentile rank, 0..100 [k]: those with a lower value, and half the equal."""
    ordered = np.sort(values)
    below, to = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return np.asarray(50 * (below + to) / len(values))


def _colours(share: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return RGB 0..255 [k, 3] of shares 0..1 [k], perceptually uniform."""
    import matplotlib as mpl  # noqa: PLC0415 - slow to import

    return np.asarray(mpl.colormaps[COLOURS](share)[..., :3] * 255)


def value_legend(
    width: int, values: NDArray[np.floating[Any]], name: str, outlined: str = "", digits: int = 2
) -> ByteArray:
    """Return a white strip [h, width, 3]: what the colours mean, and the range of `values`.

    `name` says what the values are, `outlined` what is outlined in black, where anything is;
    the range is written with `digits` significant digits.
    """
    size = min(26, max(9, width // 45))
    font = ImageFont.load_default(size=size)
    pad, bar_w = size, width // 4
    image = Image.new("RGB", (width, 4 * size), "white")
    draw = ImageDraw.Draw(image)
    least, most = (f"{end:.{digits}g}" for end in (values.min(), values.max()))
    low, high = f"low {name} ({least})", f"high ({most})"
    left = pad + math.ceil(draw.textlength(low, font=font)) + pad
    bar = np.broadcast_to(_colours(np.linspace(0, 1, bar_w)), (size, bar_w, 3))
    image.paste(Image.fromarray(np.rint(bar).astype(np.uint8)), (left, size // 2))
    draw.text((pad, size // 4), low, "black", font)
    draw.text((left + bar_w + pad, size // 4), high, "black", font)
    words = f"colour: percentile rank of {name} among the slide's tiles"
    draw.text((pad, 9 * size // 4), words, "black", font)
    if outlined:
        at = 2 * pad + math.ceil(draw.textlength(words, font=font))
        draw.line((at, 3 * size, at + 2 * pad, 3 * size), OUTLINE, 3)
        draw.text((at + 5 * pad // 2, 9 * size // 4), outlined, "black", font)
    return np.array(image)


def save_png(path: Path, pixels: ByteArray) -> None:
    """Write uint8 RGB [h, w, 3] as PNG, making the folder.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    memory = io.BytesIO()
    Image.fromarray(pixels).save(memory, "PNG", compress_level=4)
    write_bytes(path, memory.getvalue(), lambda _: None, "--out")
