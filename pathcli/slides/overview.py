"""A slide in, a small picture of the whole of it out."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING, TypeVar

import cv2
import numpy as np

from pathcli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pathcli.types import ByteArray, Slide

    Box = tuple[int, int, int, int]  # left, top, right and bottom, in pixels of the picture

_SMALLEST = 128  # pixels of a level: a smaller part that cannot be read is given up
_READ_PX = 16_000_000  # pixels of a level read at once; larger levels are read in stripes
_BLOCK_PX = 1024  # side of what a thread reads of a stripe: it stays in the processor's cache
_THREADS = 8
_STRIPES = 2  # whole stripes in memory at once
_WHOLE = 1e-6
_WHITE = 255

T = TypeVar("T")
R = TypeVar("R")


def spread(work: Callable[[T], R], items: Sequence[T], most: int = _THREADS) -> list[R]:
    """Return `work` of every item, done in as many threads as OpenCV may use, `most` at most."""
    threads = min(most, cv2.getNumThreads(), len(items))
    if threads < 2:  # noqa: PLR2004 - no thread but this one
        return [work(item) for item in items]
    with ThreadPoolExecutor(threads, thread_name_prefix="overview") as pool:
        return list(pool.map(work, items))


def best_level(slide: Slide, downsample: float) -> int:
    """Return the coarsest level that is at least as fine as `downsample` (1 % tolerance)."""
    fine = [i for i, d in enumerate(slide.downsamples) if d <= downsample * 1.01]
    return max(fine, key=lambda i: slide.downsamples[i]) if fine else 0


def overview(slide: Slide, downsample: float) -> tuple[ByteArray, float]:
    """Return the whole of level 0, reduced by about `downsample`, uint8 RGB [h, w, 3].

    Uses the coarsest level that is fine enough, averages areas, and reads large levels in
    stripes, so that memory stays bounded for a slide without a pyramid. A part that cannot
    be decoded is white; the second value is the share of the area so lost.
    """
    info = slide.info
    width = max(1, round(info.width / downsample))
    height = max(1, round(info.height / downsample))
    level = best_level(slide, downsample)
    step = slide.downsamples[level]
    size = (round(info.width / step), round(info.height / step))
    canvas = _Canvas(slide, level, size, np.empty((height, width, 3), np.uint8))
    count = max(1, math.ceil(size[0] * size[1] / _READ_PX))
    edges = np.linspace(0, height, min(count, height) + 1).round().astype(int)
    stripes: list[Box] = [(0, top, width, bottom) for top, bottom in pairwise(edges.tolist())]
    parts = [(stripe, part) for stripe in stripes for part in canvas.parts(stripe)]
    most = _THREADS if canvas.divisible else _STRIPES
    done = spread(lambda part: canvas.painted(part[1]), parts, most)
    failed = {stripe: None for (stripe, _), good in zip(parts, done, strict=True) if not good}
    lost = sum(map(canvas.save, failed))
    return canvas.picture, lost / (width * height)


@dataclass(frozen=True)
class _Canvas:
    """The picture uint8 RGB [h, w, 3], and the level it is made of, `size` (w, h) px large."""

    slide: Slide
    level: int
    size: tuple[int, int]
    picture: ByteArray

    @property
    def divisible(self) -> bool:
        """Whether parts give the pixels of the whole: each averages whole pixels of its own."""
        step = self.slide.downsamples[self.level]
        height, width = self.picture.shape[:2]
        whole = abs(step - round(step)) < _WHOLE
        return whole and not self.size[0] % width and not self.size[1] % height

    def parts(self, stripe: Box) -> list[Box]:
        """Cut a stripe into what a thread paints at once."""
        if not self.divisible:
            return [stripe]
        height, width = self.picture.shape[:2]
        across = max(1, _BLOCK_PX * width // self.size[0])
        down = max(1, _BLOCK_PX * height // self.size[1])
        left, top, right, bottom = stripe
        return [
            (x, y, min(x + across, right), min(y + down, bottom))
            for y, x in product(range(top, bottom, down), range(left, right, across))
        ]

    def _source(self, box: Box) -> Box:
        """Return a box of the picture in pixels of the level."""
        height, width = self.picture.shape[:2]
        (x0, x1), (y0, y1) = (
            [round(v * of / to) for v in axis]
            for axis, of, to in ((box[::2], self.size[0], width), (box[1::2], self.size[1], height))
        )
        return x0, y0, x1, y1

    def painted(self, box: Box) -> bool:
        """Paint a box; False where it cannot be decoded."""
        left, top, right, bottom = self._source(box)
        step = self.slide.downsamples[self.level]
        at = (round(left * step), round(top * step))
        try:
            region = self.slide.read(at, self.level, (right - left, bottom - top))
        except DataError:
            return False
        x0, y0, x1, y1 = box
        size = (x1 - x0, y1 - y0)
        self.picture[y0:y1, x0:x1] = cv2.resize(region, size, interpolation=cv2.INTER_AREA)
        return True

    def save(self, box: Box) -> int:
        """Paint what can be decoded of a box, by quarters; return how many pixels are lost."""
        if self.painted(box):
            return 0
        x0, y0, x1, y1 = box
        left, top, right, bottom = self._source(box)
        if max(right - left, bottom - top) <= _SMALLEST or min(x1 - x0, y1 - y0) <= 1:
            self.picture[y0:y1, x0:x1] = _WHITE
            return (x1 - x0) * (y1 - y0)
        x, y = (x0 + x1) // 2, (y0 + y1) // 2
        quarters = ((x0, y0, x, y), (x, y0, x1, y), (x0, y, x, y1), (x, y, x1, y1))
        return sum(map(self.save, quarters))
