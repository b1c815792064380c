"""Pictures and masks in, smoothed chroma and tidy masks out, as quick as a large slide needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pathcli.slides.overview import spread
from pathcli.slides.stains import extremes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathcli.types import ByteArray

_STRIPE_PX = 1_000_000  # pixels of a picture smoothed at once: they stay in the processor's cache
_RAGGED = 0.03  # share of a mask's cells at an edge from which its cells are labelled


def odd(px: float) -> int:
    """Return the nearest odd kernel size, at least 1, at most what OpenCV's median takes."""
    return min(2 * int(px / 2) + 1, 255)


def chroma_of(rgb: NDArray[Any]) -> ByteArray:
    """Return the largest minus the smallest channel, uint8 [h, w]."""
    least, most = extremes(rgb)
    return most - least


def smooth_chroma(rgb: ByteArray, sigma: float) -> ByteArray:
    """Return the chroma of a picture after a Gaussian of `sigma` px, uint8 [h, w].

    It is computed in stripes, each with as many rows more as the Gaussian sees.
    """
    height, width = rgb.shape[:2]
    chroma = np.empty((height, width), np.uint8)
    more, rows = int(3 * sigma) + 2, max(1, _STRIPE_PX // width)

    def smooth(top: int) -> None:
        first, bottom = max(0, top - more), min(height, top + rows)
        part = cv2.GaussianBlur(rgb[first : bottom + more], (0, 0), sigma)
        chroma[top:bottom] = chroma_of(part[top - first : bottom - first])

    spread(smooth, range(0, height, rows))
    return chroma


def tidy(
    found: NDArray[Any], um_per_px: float, close_um: float, area_mm2: float, hole_mm2: float
) -> NDArray[np.bool_]:
    """Close gaps, drop small islands and fill small holes of a mask [h, w] of 0 and 1."""
    side = odd(close_um / um_per_px)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    closed = cv2.morphologyEx(found.view(np.uint8), cv2.MORPH_CLOSE, kernel)
    cell_mm2 = (um_per_px / 1000) ** 2
    least = min(area_mm2 / cell_mm2, found.size / 10)  # a patch is smaller than a slide's dust
    solid = without_small(np.asarray(closed, np.uint8), least)
    holes = without_small(solid ^ np.uint8(1), hole_mm2 / cell_mm2)
    return (holes ^ np.uint8(1)).view(bool)


def without_small(mask: ByteArray, least: float) -> ByteArray:
    """Return a mask of 0 and 1 without its islands (8-connected) of less than `least` cells."""
    edges = cv2.countNonZero(mask[:, 1:] ^ mask[:, :-1]) if mask.shape[1] > 1 else 0
    by = _by_label if edges > _RAGGED * mask.size else _by_outline
    return by(mask, least)


def _by_label(mask: ByteArray, least: float) -> ByteArray:
    """Look up every cell: for masks so ragged that outlines are slower."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = (stats[:, cv2.CC_STAT_AREA] >= least).astype(np.uint8)
    keep[0] = 0
    return np.asarray(keep[labels])


def _by_outline(mask: ByteArray, least: float) -> ByteArray:
    """Erase islands by their outlines, whose cells tell the area.

    An outline of n steps around an area A (through the centres of its cells) has A + n/2 + 1
    cells on and in it, and the outline of a hole A - n/2 + 1 cells inside (Pick 1899).
    """
    outlines, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    kept = mask.copy()
    if not len(outlines):
        return kept
    parent = tree[0][:, 3]
    steps = np.array([len(line) if len(line) > 1 else 0 for line in outlines])
    area = np.array([cv2.contourArea(line) for line in outlines])
    outer = parent < 0
    cells = np.where(outer, area + steps / 2 + 1, steps / 2 - 1 - area)
    island = np.where(outer, np.arange(len(steps)), parent)
    small = np.bincount(island, cells, minlength=len(steps)) < least
    gone = np.flatnonzero(small[island]).tolist()
    cv2.drawContours(kept, [outlines[i] for i in gone], -1, 0, cv2.FILLED)
    return kept
