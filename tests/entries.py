"""Entries of the store made without a slide or an encoder."""

import numpy as np

from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.types import Key, Tiles

D = 5


def make_tiles(n: int, item: str = "a-00000000", mpp: float = 0.25) -> Tiles:
    xy = np.stack([np.arange(n) * 7, np.arange(n) * 3], 1).astype(np.int32)
    blank = np.zeros(n, np.uint8)
    return Tiles(item, xy, blank, tile_spec(), mpp, 10_000, 9_000, 0.5, ("careful",))


def rows(start: int, stop: int) -> np.ndarray:
    return (np.arange(start, stop)[:, None] * np.ones(D) % 97).astype(np.float16)


def fill(store: Store, tiles: Tiles, batch: int = 50, stop: int | None = None) -> Key:
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, "enc-1")
    writer = store.features.writer(tiles, "enc-1", (D,))
    first = writer.resumed // batch * batch
    with store.features.lock(key), writer:
        writer.begin(first)
        for at in range(first, len(tiles), batch):
            if stop is not None and at >= stop:
                raise KeyboardInterrupt
            end = min(at + batch, len(tiles))
            writer.write(rows(at, end), np.zeros(end - at, np.uint8))
    return key
