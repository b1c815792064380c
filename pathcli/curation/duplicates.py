"""Images in, whether one like it was there before: byte for byte, or to the eye.

To the eye means the difference hash (N. Krawetz 2013, "Kind of Like That"): an image is shrunk
to a few greys, and each bit says whether a grey is brighter than its neighbour. One of 64 bits
compares along rows; a second, along columns, has to agree, for patches of tissue are alike.
"""

from __future__ import annotations

import itertools
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pathcli.errors import UsageError

if TYPE_CHECKING:
    from pathcli.types import ByteArray

DISTANCE = 4
"""Bits of 64 in which two hashes of one image may differ, along rows and along columns.

Of 517 lung patches 99.6 % are found again after JPEG at quality 60 and 160 px instead of 224;
no two of different origin differ in less than 18.
"""
FARTHEST = 15
"""Beyond it unrelated images begin to be alike."""
BITS = 64

_SIDE, _FLAT = 8, 2.0
_BAND = 16  # most bits of a band: 65,536 buckets


@dataclass(frozen=True)
class Looks:
    """An image's difference hashes, each 64 bits: along its rows, and along its columns."""

    rows: int
    columns: int


def looks(image: ByteArray) -> Looks | None:
    """Return the hashes of uint8 RGB [h, w, 3]; None for a flat image, whose bits are noise."""
    import cv2  # noqa: PLC0415 - only where there are images

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    sizes = ((_SIDE + 1, _SIDE), (_SIDE, _SIDE + 1))
    wide, tall = (cv2.resize(grey, s, interpolation=cv2.INTER_AREA).astype(int) for s in sizes)
    if wide.std() < _FLAT:
        return None
    return Looks(_number(np.diff(wide, axis=1) > 0), _number(np.diff(tall, axis=0) > 0))


def _number(bits: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes())


@dataclass
class Seen:
    """Images that were added, each by a number, and which of them another one is a copy of.

    Hashes that differ in at most `distance` bits agree in one of `distance + 1` bands, so only
    images with an equal band are compared (M. Norouzi et al. 2012, "Fast search in Hamming
    space with multi-index hashing"). An image costs 32 bytes and 4 for each band.
    """

    distance: int = DISTANCE
    _numbers: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    _digests: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    _rows: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    _columns: array[int] = field(default_factory=lambda: array("Q"), repr=False)
    _buckets: dict[tuple[int, int], array[int]] = field(default_factory=dict, repr=False)
    _flat: dict[int, int] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Cut 64 bits into bands.

        Raises:
            UsageError: a distance at which everything is alike, or a negative one.
        """
        if not 0 <= self.distance <= FARTHEST:
            msg = f"--distance is 0 to {FARTHEST} bits of {BITS}, not {self.distance}"
            raise UsageError(msg)
        count = max(self.distance + 1, BITS // _BAND)
        edges = [BITS * i // count for i in range(count + 1)]
        self._bands = [(low, (1 << (high - low)) - 1) for low, high in itertools.pairwise(edges)]

    def __len__(self) -> int:
        """Return how many images were added."""
        return len(self._numbers) + len(self._flat)

    def add(self, number: int, digest: str, seen: Looks | None) -> None:
        """Remember an image: its number, the hex digits of its bytes' digest, its looks."""
        short = _short(digest)
        if seen is None:
            self._flat.setdefault(short, number)
            return
        for key in self._keys(seen.rows):
            self._buckets.setdefault(key, array("I")).append(len(self._numbers))
        self._numbers.append(number)
        self._digests.append(short)
        self._rows.append(seen.rows)
        self._columns.append(seen.columns)

    def find(self, digest: str, seen: Looks | None) -> tuple[int, int] | None:
        """Return the number of the nearest image that is alike, and in how many bits it differs.

        Bits are the more of rows and columns; -1 for a copy byte for byte; None if there is none.
        """
        short = _short(digest)
        if seen is None:
            return (self._flat[short], -1) if short in self._flat else None
        places = self._places(seen.rows)
        if not len(places):
            return None
        if len(same := places[_view(self._digests)[places] == np.uint64(short)]):
            return self._numbers[int(same[0])], -1
        apart = np.maximum(
            _differ(_view(self._rows)[places], seen.rows),
            _differ(_view(self._columns)[places], seen.columns),
        )
        nearest = int(apart.argmin())
        if apart[nearest] > self.distance:
            return None
        return self._numbers[int(places[nearest])], int(apart[nearest])

    def _keys(self, bits: int) -> list[tuple[int, int]]:
        return [(low, bits >> low & mask) for low, mask in self._bands]

    def _places(self, bits: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        found = [self._buckets[key] for key in self._keys(bits) if key in self._buckets]
        parts = [np.frombuffer(each, np.uint32) for each in found]
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)


def _short(digest: str) -> int:
    return int(digest[:16], 16)


def _view(values: array[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.frombuffer(values, np.uint64)


def _differ(
    many: np.ndarray[tuple[int], np.dtype[np.uint64]], one: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return in how many bits each of uint64 [n] differs from one."""
    wide = np.bitwise_xor(many, np.uint64(one)).view(np.uint8).reshape(-1, 8)
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] = np.unpackbits(wide, axis=1).sum(1)
    return counts
