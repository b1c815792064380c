"""A tiled TIFF pyramid in, pixels out: its file tiles are decoded here, each of them once.

OpenSlide spends three quarters of its time on compositing. Where a region needs none, the
file tiles that cover it are decoded straight into arrays, by the same libjpeg-turbo, so that
the pixels are OpenSlide's. All else, and every doubt, is left to the slide below.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import finalize

import cv2
import numpy as np

from pathcli.errors import DataError
from pathcli.slides.tile_cache import TileCache
from pathcli.types import Slide

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pathcli.types import ByteArray

    # the bytes of a file tile and its number into an array [h, w, 3]; the shape it had
    Decode = Callable[[bytes, int, ByteArray], tuple[int, ...]]

CACHE_BYTES = 64 * 2**20  # a row of 256 px file tiles, 87,000 px wide
_NAMES = {1: "raw", 5: "LZW", 7: "JPEG", 8: "deflate", 32946: "deflate"} | dict.fromkeys(
    (33003, 33005, 34712), "JPEG 2000"
)
_YCBCR_JPEG_2000 = 33003
_YCBCR = 6
# what the photometric tag says, told to the decoder: an Adobe marker, 0 for RGB, 1 for YCbCr
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4)
_START, _END = b"\xff\xd8", b"\xff\xd9"
_VENDORS = {"aperio", "generic-tiff", "hamamatsu", "philips", "tiff"}  # whose tiles do not overlap
_AGREED = 2  # largest difference between two decoders of one JPEG 2000 tile
_TRIED = 3  # file tiles compared before a level is trusted
_WHOLE_PIXEL = 1e-6

log = logging.getLogger("pathcli")


class _Pyramid(Slide):
    """A slide that knows the (width, height) of its levels."""

    dimensions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Level:
    """The file tiles of one level, row by row; a byte count of 0 is a tile never written."""

    size: tuple[int, int]  # (width, height) of the level
    tile: tuple[int, int]
    offsets: tuple[int, ...]
    counts: tuple[int, ...]
    decode: Decode
    name: str

    @property
    def across(self) -> int:
        return math.ceil(self.size[0] / self.tile[0])


class UnservedError(Exception):
    """This region, level or file is left to the slide below; the text says why."""


class DirectReader:
    """Pixels from the file's own tiles, everything else from the slide below."""

    def __init__(self, below: _Pyramid) -> None:
        """Stand over an open slide.

        Raises:
            UnservedError: its file is not tiled in a way that is understood here.
        """
        self.path, self.downsamples, self._below = below.path, below.downsamples, below
        self.info = replace(below.info, reader="direct")
        self.tiles = TileCache(CACHE_BYTES)
        self._levels: dict[int, _Level] = {}
        found = _tiled_images(below)
        self._file = os.open(self.path, os.O_RDONLY)
        self._release = finalize(self, os.close, self._file)  # also of a slide nobody closes
        for number, size in enumerate(below.dimensions):
            try:
                self._levels[number] = self._trusted(number, found.get(size))
            except UnservedError as error:
                if number == 0:
                    self._release()
                    raise
                log.debug("%s: level %d is not read directly: %s", self.path, number, error)
        level = self._levels[0]
        side = "x".join(map(str, dict.fromkeys(level.tile)))
        self.why = f"direct: {side} px {level.name} tiles"

    def _trusted(self, number: int, page: Any) -> _Level:  # noqa: ANN401 - tifffile is untyped
        """Return a level once one of its richest tiles looks as the slide below shows it."""
        if page is None:
            msg = "it has no tiled image of this size"
            raise UnservedError(msg)
        level = _level(page)
        self._levels[number] = level
        step = self.downsamples[number]
        for index in np.argsort(np.negative(level.counts), kind="stable")[:_TRIED].tolist():
            row, column = divmod(index, level.across)
            x, y = column * level.tile[0], row * level.tile[1]
            w, h = (min(t, s - a) for t, s, a in zip(level.tile, level.size, (x, y), strict=True))
            at = (round(x * step), round(y * step))
            try:
                seen = self._below.read(at, number, (w, h))
                mine = self._decoded(np.empty((*level.tile[::-1], 3), np.uint8), level, index)
            except (DataError, UnservedError):
                continue
            exact = max(abs(a - p * step) for a, p in zip(at, (x, y), strict=True)) < _WHOLE_PIXEL
            differ = cv2.absdiff(seen, mine[:h, :w])
            if (differ.max() if exact else differ.mean()) <= _AGREED:
                return level
            if exact:  # one tile is enough; elsewhere the slide below resamples
                break
        del self._levels[number]
        msg = f"its {level.name} tiles look different in {self._below.info.reader}"
        raise UnservedError(msg)

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> ByteArray:
        """Return uint8 RGB [h, w, 3]; see `Slide.read`.

        The slide below serves what begins inside a pixel of its level (OpenSlide resamples
        there), leaves the scan, or needs a tile that is missing or broken.
        """
        try:
            return self._assemble(xy, level, size)
        except UnservedError:
            return self._below.read(xy, level, size)

    def _assemble(self, xy: tuple[int, int], number: int, size: tuple[int, int]) -> ByteArray:
        level = self._levels.get(number)
        if level is None:
            raise UnservedError
        at = [v / self.downsamples[number] for v in xy]
        (x, y), (w, h), (tw, th) = (round(v) for v in at), size, level.tile
        inside = x >= 0 and y >= 0 and x + w <= level.size[0] and y + h <= level.size[1]
        if not inside or max(abs(at[0] - x), abs(at[1] - y)) > _WHOLE_PIXEL:
            raise UnservedError
        out = np.empty((h, w, 3), np.uint8)
        if (w, h) == level.tile and not x % tw and not y % th:  # a file tile as it is
            index = y // th * level.across + x // tw
            if self.tiles.unshared((number, index), out.size):
                return self._decoded(out, level, index)
        across = list(_spans(x, w, tw))
        for row, top, above, rows in _spans(y, h, th):
            for column, left, before, width in across:
                index = row * level.across + column
                tile = self.tiles.borrow((number, index), (th, tw, 3), self._decoded, level, index)
                try:
                    part = _part(out, top, left, rows, width)
                    part[:] = _part(tile.pixels, above, before, rows, width)
                finally:
                    self.tiles.give_back((number, index), tile, 3 * rows * width)
        return out

    def _decoded(self, out: ByteArray, level: _Level, index: int) -> ByteArray:
        """Decode one file tile into `out` [h, w, 3] and return it."""
        count = level.counts[index]
        if not count:
            msg = "a missing tile"
            raise UnservedError(msg)
        try:
            data = os.pread(self._file, count, level.offsets[index])
            if len(data) == count and level.decode(data, index, out) == out.shape:
                return out
        except Exception as error:  # codecs raise what the bytes provoke
            raise UnservedError(str(error)) from error
        msg = "a tile that is cut off or of another size"
        raise UnservedError(msg)

    def close(self) -> None:
        """Release the file and the tiles."""
        self._release()
        self.tiles.clear()
        self._below.close()


def _spans(start: int, length: int, tile: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the tiles under a line: which, where in the line, where in the tile, how much."""
    for number in range(start // tile, -(-(start + length) // tile)):
        before = start - number * tile
        at, into = (-before, 0) if before < 0 else (0, before)
        yield number, at, into, min(tile - into, length - at)


def _part(pixels: ByteArray, top: int, left: int, rows: int, width: int) -> NDArray[np.void]:
    """Return a part of [h, w, 3] as `rows` of void, which numpy copies without a thread switch."""
    line = pixels.shape[1] * 3
    return np.ndarray((rows,), _void(3 * width), pixels, top * line + 3 * left, (line,))


@cache
def _void(size: int) -> np.dtype[np.void]:
    return np.dtype((np.void, size))


def _tiled_images(slide: _Pyramid) -> dict[tuple[int, int], Any]:
    """Return the first tiled image of each (width, height) in the file of a slide."""
    from tifffile import TiffFile  # noqa: PLC0415

    if slide.info.vendor not in _VENDORS:
        msg = f"{slide.info.vendor} is no plain pyramid of TIFF tiles"
        raise UnservedError(msg)
    if not isinstance(slide.path, Path):
        msg = "it is not on this machine"
        raise UnservedError(msg)
    if not hasattr(os, "pread"):
        msg = "this system cannot read a file from several threads at once"
        raise UnservedError(msg)
    found: dict[tuple[int, int], Any] = {}
    try:
        with TiffFile(slide.path) as file:
            for first in file.pages:
                for page in (first, *(first.pages or ())):
                    if page.is_tiled:
                        page.decode, page.jpegtables  # noqa: B018 - read while the file is open
                        found.setdefault((page.imagewidth, page.imagelength), page)
    except Exception as error:  # tifffile raises what the bytes provoke
        msg = f"its TIFF structure is damaged ({type(error).__name__})"
        raise UnservedError(msg) from error
    return found


def _level(page: Any) -> _Level:  # noqa: ANN401 - tifffile is untyped
    """Return the tiles of a TIFF image of 8-bit RGB."""
    name = _NAMES.get(int(page.compression))
    if name is None:
        msg = f"compression {page.compression} is not decoded here"
        raise UnservedError(msg)
    if (page.samplesperpixel, page.bitspersample, int(page.planarconfig)) != (3, 8, 1):
        msg = f"{page.samplesperpixel} x {page.bitspersample} bits are not 8-bit RGB"
        raise UnservedError(msg)
    level = _Level(
        size=(page.imagewidth, page.imagelength),
        tile=(page.tilewidth, page.tilelength),
        offsets=page.dataoffsets,
        counts=page.databytecounts,
        decode=_jpeg(page) if name == "JPEG" else _other(page),
        name=name,
    )
    listed = min(len(level.offsets), len(level.counts))
    if listed < level.across * math.ceil(level.size[1] / level.tile[1]):
        msg = "its list of tiles is cut short"
        raise UnservedError(msg)
    return level


def _jpeg(page: Any) -> Decode:  # noqa: ANN401 - tifffile is untyped
    """Return a decoder that refuses what libjpeg warns of, as OpenSlide does."""
    try:
        from simplejpeg import decode_jpeg  # noqa: PLC0415
    except ImportError as error:
        msg = "simplejpeg is not installed"
        raise UnservedError(msg) from error

    if page.jpegheader:  # NDPI: one JPEG, cut behind its restart markers
        head, skip, last = page.jpegheader, 0, _END
    else:
        marker = _ADOBE + bytes([int(page.photometric) == _YCBCR])
        head = _START + marker + (page.jpegtables or _START + _END)[2:-2]
        skip, last = len(_START), b""

    def decode(data: bytes, _: int, out: ByteArray) -> tuple[int, ...]:
        if not data.startswith(_START[:skip]):
            msg = "not a JPEG tile"
            raise UnservedError(msg)
        shape: tuple[int, ...] = decode_jpeg(head + data[skip:] + last, buffer=out).shape
        return shape

    return decode


def _other(page: Any) -> Decode:  # noqa: ANN401 - tifffile is untyped
    def decode(data: bytes, index: int, out: ByteArray) -> tuple[int, ...]:
        out[:] = page.decode(data, index)[0][0]
        if int(page.compression) == _YCBCR_JPEG_2000:
            out[:] = cv2.cvtColor(out[..., [0, 2, 1]], cv2.COLOR_YCrCb2RGB)
        return out.shape

    return decode
