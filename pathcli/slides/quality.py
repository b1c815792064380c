"""Tiles in, quality flags out: blurred, under a pen, dark or folded, mostly white.

Pen, dark and white are read off the overview that the tissue was found in (4 to 16 um per
pixel); blur is read from pixels at about 1 um, from the coarsest level that has them. The
rules are version 1: another rule needs another name, since a `TileSpec` records names only.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pathcli.errors import DataError, UsageError
from pathcli.slides.masks import chroma_of
from pathcli.slides.overview import best_level
from pathcli.slides.pens import pen_mask, pens
from pathcli.slides.stains import extremes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from pathcli.slides.tissue import Tissue
    from pathcli.types import ByteArray, Slide, TileSpec

FLAGS = ("blur", "pen", "dark", "white")
PEN_SHARE = 0.1
"""Share of a tile under ink from which it is dropped."""
DARK_SHARE = 0.25
"""Share of a tile that is black or a fold."""
WHITE_SHARE = 0.9
"""Share of a tile as bright as glass; a tile of fat is not as empty."""
_WHITE = 220  # smallest channel, of 255
_BLACK = 50  # largest channel, of 255
_FOLD_VALUE, _FOLD_SATURATION = 0.6, 1.2  # times the slide's median: two layers of tissue
BLUR_UM = 1.0
BLUR_VARIANCE = 30.0
"""Variance of the Laplacian of grey (0-255) at 1 um per pixel, under which a tile is smooth.

Chosen with `BLUR_RATIO` on 552 sharp H&E tiles of lung and colon: none is called blurred, 98 %
are once blurred with a Gaussian of 2 um (standard deviation), all with one of 3 um, and 1 %
with one of 1 um."""
BLUR_RATIO = 0.06
"""The same over the variance of grey: a tile without contrast is smooth, but not blurred."""
_MANY = 0.5  # share of dropped tiles from which the user is told
_BLOCK_PX = 2048  # side of what is read at once, in pixels of about 1 um


def flags(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of flags, each once, in order.

    Raises:
        UsageError: no flag is called so.
    """
    asked = tuple(sorted(set(names)))
    for name in asked:
        if name not in FLAGS:
            near = difflib.get_close_matches(name, FLAGS, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            msg = f"--drop knows no {name!r}; {hint}(known: {', '.join(FLAGS)})"
            raise UsageError(msg)
    return asked


def flag_tiles(
    slide: Slide, spec: TileSpec, mpp: float, tissue: Tissue, xy: NDArray[np.int32]
) -> dict[str, NDArray[np.bool_]]:
    """Return bool [n] for each flag that `spec.drop` names: which tiles at `xy` [n, 2] have it.

    A tile that cannot be read is not called blurred.
    """
    found = {}
    for name in spec.drop:
        if name == "blur":
            found[name] = _blurred(slide, spec, mpp, xy)
        else:
            cells, least = _cells(name, tissue, mpp)
            side0 = spec.size_um / mpp
            share = replace(tissue, mask=cells).fraction(xy, (side0, side0))
            found[name] = share >= least
    return found


def drop_flagged(
    slide: Slide, spec: TileSpec, mpp: float, tissue: Tissue, xy: NDArray[np.int32]
) -> tuple[NDArray[np.int32], dict[str, int], tuple[str, ...]]:
    """Leave out tiles with a flag of `spec.drop`: what stays, counts per flag, a warning."""
    flagged = flag_tiles(slide, spec, mpp, tissue, xy)
    dropped = {name: int(rows.sum()) for name, rows in flagged.items()}
    bad = np.logical_or.reduce([np.zeros(len(xy), bool), *flagged.values()])
    said: tuple[str, ...] = ()
    if bad.sum() > _MANY * len(xy):
        counts = ", ".join(f"{name} {n}" for name, n in dropped.items())
        said = (
            f"--drop leaves out {bad.sum()} of {len(xy)} tiles ({counts}): look at the overview",
        )
    return xy[~bad], dropped, said


def _cells(name: str, tissue: Tissue, mpp: float) -> tuple[NDArray[np.bool_], float]:
    """Return the overview's cells that count for a flag, and the share of a tile they need."""
    picture = tissue.thumbnail
    if name == "pen":
        return pen_mask(pens(picture, mpp * tissue.scale[0]), picture.shape), PEN_SHARE
    if name == "dark":
        return _dark(picture, tissue.mask), DARK_SHARE
    return np.asarray(extremes(picture)[0] > _WHITE), WHITE_SHARE


def _dark(picture: ByteArray, tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return what is black, and what is much darker and more saturated than the slide's tissue.

    The second is how a fold looks: two layers stain twice (Bautista and Yagi 2009).
    """
    value = extremes(picture)[1]
    dark = value < _BLACK
    if tissue.any():
        saturation = chroma_of(picture) / np.maximum(value, 1)
        fold = value < _FOLD_VALUE * np.median(value[tissue])
        fold &= saturation > _FOLD_SATURATION * np.median(saturation[tissue])
        dark |= fold & tissue
    return np.asarray(dark)


def _blurred(slide: Slide, spec: TileSpec, mpp: float, xy: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return bool [n]: tiles whose Laplacian varies little, absolutely and for their contrast."""
    blurred = np.zeros(len(xy), bool)
    for rows in _blocks(xy, _BLOCK_PX * BLUR_UM / mpp):
        try:
            blurred[rows] = _sharpness(slide, spec, mpp, xy[rows])
        except DataError:
            for row in rows:
                try:
                    blurred[row] = _sharpness(slide, spec, mpp, xy[row : row + 1])[0]
                except DataError:
                    continue
    return blurred


def _blocks(xy: NDArray[np.int32], side0: float) -> Iterator[NDArray[np.int64]]:
    """Yield the indices of tiles whose corners share a square of `side0` level-0 px."""
    cell = np.floor(xy / side0).astype(np.int64)
    _, block = np.unique(cell[:, ::-1], axis=0, return_inverse=True)
    order = np.argsort(block, kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(block[order])) + 1) if len(xy) else ()


def _sharpness(
    slide: Slide, spec: TileSpec, mpp: float, xy: NDArray[np.int32]
) -> NDArray[np.bool_]:
    """Read the rectangle around some tiles and tell which are blurred."""
    level = best_level(slide, BLUR_UM / mpp)
    step = slide.downsamples[level]
    side0 = spec.size_um / mpp
    low, high = xy.min(axis=0), xy.max(axis=0) + side0
    size = [max(1, math.ceil(d / step)) for d in high - low]
    pixels = slide.read((int(low[0]), int(low[1])), level, (size[0], size[1]))
    grey: NDArray[Any] = cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)
    per_px = max(1.0, BLUR_UM / mpp / step)  # never enlarged: a coarse scan is read as it is
    shape = (max(1, round(grey.shape[1] / per_px)), max(1, round(grey.shape[0] / per_px)))
    grey = cv2.resize(grey.astype(np.float32), shape, interpolation=cv2.INTER_AREA)
    corner = (xy - low) / step / per_px + 1  # the outermost pixels see the neighbours
    side = side0 / step / per_px - 2
    edge = cv2.Laplacian(grey, cv2.CV_32F)
    varied, contrast = _variance(edge, corner, side), _variance(grey, corner, side)
    return np.asarray((varied < BLUR_VARIANCE) & (varied < BLUR_RATIO * contrast))


def _variance(picture: NDArray[Any], corner: NDArray[Any], side: float) -> NDArray[np.float64]:
    """Return the variance [n] of float [h, w] in squares of `side` px at `corner` [n, 2]."""
    sums, squares = cv2.integral2(picture.astype(np.float64))
    height, width = picture.shape
    x0, y0 = np.clip(np.rint(corner.T).astype(int), 0, [[width - 1], [height - 1]])
    x1 = np.clip(x0 + round(side), x0 + 1, width)
    y1 = np.clip(y0 + round(side), y0 + 1, height)
    area = (x1 - x0) * (y1 - y0)

    def mean(table: NDArray[Any]) -> NDArray[Any]:
        total = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
        return np.asarray(total / area)

    return np.asarray(np.maximum(mean(squares) - mean(sums) ** 2, 0))
