"""Decoded file tiles in, the same tiles out to all who look at them, within a limit of memory."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from pathcli.types import ByteArray

    Make = Callable[..., object]


class _Tile:
    """Room for a tile, `made` once it is decoded.

    `users` are the readers that look at it now; `left` is how much of it nobody has taken yet.
    """

    def __init__(self, pixels: ByteArray) -> None:
        self.pixels, self.users, self.left = pixels, 0, pixels.size
        self.made, self.making = False, threading.Lock()


class TileCache:
    """Decoded tiles up to a number of bytes, the least used go first; each is made by one thread.

    Others that ask for a tile being made wait for it. The memory of a tile that goes serves
    the one that comes: fresh pages cost a third of a tile's decoding, and threads queue for them.
    A tile of which everything has been taken goes first, while its memory is still in the
    processor's cache, until one is asked for again after that: then regions overlap.
    """

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` bytes, or what is in use if that is more."""
        self.limit, self.held = limit, 0
        self._tiles: OrderedDict[Hashable, _Tile] = OrderedDict()
        self._taken: list[Hashable] = []  # tiles that have been given out whole
        self._early: dict[Hashable, None] = {}  # those that went for it, the last ones
        self._overlap = False
        self._lock = threading.Lock()

    def borrow(self, key: Hashable, shape: tuple[int, int, int], make: Make, *how: object) -> _Tile:
        """Return the tile of `key`, which stays until it is given back.

        If it is not held, `make(pixels, *how)` writes its pixels of `shape`.
        """
        with self._lock:
            tile = self._tiles.get(key)
            if (tile and tile.left <= 0) or key in self._early:
                self._overlap = True
                self._taken.clear()
                self._early.clear()
            if tile is None:
                tile = self._tiles[key] = _Tile(self._memory(shape))
            else:
                self._tiles.move_to_end(key)
            tile.users += 1
        if not tile.made:
            try:
                self._make(key, tile, make, how)
            except BaseException:
                self.give_back(key, tile, 0)
                raise
        return tile

    def give_back(self, key: Hashable, tile: _Tile, taken: int) -> None:
        """Say that a borrowed tile is not looked at any more, and that `taken` bytes were."""
        with self._lock:
            tile.users -= 1
            tile.left -= taken
            if tile.left <= 0 and not self._overlap:
                self._taken.append(key)

    def unshared(self, key: Hashable, size: int) -> bool:
        """Tell that a tile of `size` bytes, wanted whole, is likely to be wanted by no other."""
        with self._lock:
            if self._overlap or key in self._tiles or key in self._early:
                return False
            self._went(key, size)
        return True

    def _went(self, key: Hashable, size: int) -> None:
        """Remember a tile that is not kept because it was given out whole."""
        self._early[key] = None
        if len(self._early) * size > self.limit:  # it would be gone anyhow
            del self._early[next(iter(self._early))]

    def _memory(self, shape: tuple[int, int, int]) -> ByteArray:
        """Return room for a tile, that of one that is not needed or there is no more for."""
        size, room = math.prod(shape), None
        for key in self._unneeded(size):
            gone = self._tiles.pop(key).pixels
            self.held -= gone.size
            room = gone if gone.size == size else None
        self.held += size
        return np.empty(shape, np.uint8) if room is None else room.reshape(shape)

    def _unneeded(self, size: int) -> Iterator[Hashable]:
        """Yield the tiles that go before one of `size` bytes comes."""
        while self._taken:
            key = self._taken.pop()
            tile = self._tiles.get(key)
            if tile and tile.left <= 0 and not tile.users:
                self._went(key, size)
                yield key
                break
        while self.held + size > self.limit:
            oldest = next((key for key, tile in self._tiles.items() if not tile.users), None)
            if oldest is None:
                return
            yield oldest

    def _make(self, key: Hashable, tile: _Tile, make: Make, how: tuple[object, ...]) -> None:
        """Let one thread make a tile; where it fails, each that waited tries and fails."""
        try:
            with tile.making:
                if not tile.made:
                    make(tile.pixels, *how)
                    tile.made = True
        except BaseException:
            with self._lock:
                if self._tiles.get(key) is tile:
                    del self._tiles[key]
                    self.held -= tile.pixels.size
            raise

    def clear(self) -> None:
        """Forget all tiles."""
        with self._lock:
            self._tiles.clear()
            self._taken.clear()
            self.held = 0
