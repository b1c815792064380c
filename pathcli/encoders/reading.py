"""Rows to embed in, batches of pixels out: threads read ahead of the encoder, within bounds.

Batches are cut by row, never by arrival, so the number of readers changes nothing but the
speed. At most a few batches of pixels are in memory, whatever there is to read.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pathcli.errors import DataError
from pathcli.slides.tiling import read_tile
from pathcli.types import TileStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from pathcli.slides.tiling import TileRun
    from pathcli.types import ByteArray, Key, Slide, Tiles

log = logging.getLogger("pathcli")

AHEAD = 1
"""Batches that wait, read, beside the one that each thread is reading."""

_NO_MEMORY = ("out of memory", "allocate memory", "not enough memory")


def out_of_memory(error: Exception) -> bool:
    """Tell by PyTorch's words, which is all there is on a CPU, whether memory was short."""
    return isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY)


class Rows(Protocol):
    """What is embedded row by row: the tiles of a slide, or plain images.

    `name` stands in messages, `side` is the width of a row's pixels, and `max_bad` the share of
    unreadable rows above which all fail.
    """

    name: str
    side: int
    max_bad: float

    def read(self, row: int) -> ByteArray:
        """Return uint8 RGB [side, side, 3]; called from several threads at once.

        Raises:
            DataError: this row cannot be read.
        """
        ...

    def gone(self, row: int) -> bool:
        """Tell whether a row's file is no longer there, so that it is not called unreadable."""
        ...


class SlideRows:
    """The tiles of a slide."""

    def __init__(self, slide: Slide, tiles: Tiles, max_bad: float) -> None:
        """Keep what is read."""
        self.slide, self.tiles, self.max_bad = slide, tiles, max_bad
        self.name, self.side = str(slide.path), tiles.spec.size_px

    def read(self, row: int) -> ByteArray:
        """See `Rows.read`."""
        x, y = self.tiles.xy[row].tolist()
        return read_tile(self.slide, (x, y), self.tiles.spec, self.tiles.slide_mpp)

    def gone(self, row: int) -> bool:
        """See `Rows.gone`."""
        del row
        return isinstance(self.slide.path, Path) and not self.slide.path.exists()


@dataclass(frozen=True)
class Batch:
    """Rows from `start` on: pixels uint8 [b, s, s, 3], and whether each is readable, uint8 [b]."""

    start: int
    pixels: torch.Tensor
    status: ByteArray

    @property
    def bad(self) -> int:
        """How many rows cannot be read; their pixels are black."""
        return int((self.status != TileStatus.OK).sum())


class Reader:
    """Reads rows `first` to `n` in batches, and ahead: the first ones as soon as it is made."""

    def __init__(
        self,
        rows: Rows,
        n: int,
        *,
        first: int = 0,
        batch: int = 32,
        workers: int = 2,
        pinned: bool = False,
    ) -> None:
        """Begin to read.

        Args:
            rows: what is read.
            n: how many rows there are.
            first: the row to begin with.
            batch: rows a batch.
            workers: threads that read, a batch each.
            pinned: read into memory that a GPU can copy from on its own.
        """
        self.rows, self.n, self.first, self.batch = rows, n, first, batch
        self._pinned, self._stopped = pinned, threading.Event()
        self._starts = iter(range(first, n, batch))
        self._begun: deque[Future[Batch]] = deque()
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
        for _ in range(workers + AHEAD):
            self._begin_one()

    def _begin_one(self) -> None:
        for start in self._starts:
            self._begun.append(self._pool.submit(self._read, start))
            return

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches in order.

        Raises:
            DataError: a file is gone.
        """
        while self._begun:
            batch = self._begun.popleft().result()
            self._begin_one()
            yield batch

    def _buffer(self, b: int) -> torch.Tensor:
        """Return uint8 [b, side, side, 3], in ordinary memory once there is no other.

        Raises:
            MemoryError: there is none at all.
        """
        import torch  # noqa: PLC0415

        shape = (b, self.rows.side, self.rows.side, 3)
        try:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if not self._pinned:
                raise MemoryError(str(error)) from error
        log.warning("too little memory that a GPU can copy from: its tiles take the slower way")
        self._pinned = False
        return self._buffer(b)

    def _read(self, start: int) -> Batch:
        b = min(self.batch, self.n - start)
        buffer = self._buffer(b)
        pixels, status = buffer.numpy(), np.zeros(b, np.uint8)
        for i in range(b):
            if self._stopped.is_set():
                break
            try:
                pixels[i] = self.rows.read(start + i)
            except DataError as error:
                if self.rows.gone(start + i):
                    raise
                log.debug("unreadable: %s", error)
                pixels[i], status[i] = 0, TileStatus.UNREADABLE
        return Batch(start, buffer, status)

    def close(self) -> None:
        """Stop reading; when this returns no thread does any more."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Prepared:
    """An open slide, its tiles and, unless its features are in the store, their first batches."""

    slide: Slide
    run: TileRun
    rows: SlideRows
    key: Key
    reader: Reader | None

    def close(self) -> None:
        """Release threads and file."""
        if self.reader:
            self.reader.close()
        self.slide.close()


def drop(future: Future[Prepared]) -> None:
    """Release what was prepared, or is being prepared, for nothing."""
    if not future.cancel():
        with suppress(Exception):  # nobody asked for that slide, so nobody is told
            future.result().close()
