"""Features in, a Zarr group at a place out: chunk by chunk, resumed after the last whole one."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from pathcli.errors import DataError
from pathcli.store.attributes import entry_attributes, layout
from pathcli.store.files import require_space
from pathcli.store.int8 import as_int8
from pathcli.store.numbers import largest, missing
from pathcli.store.place import LocalPlace
from pathcli.store.zarr_arrays import Array, Rows, entry_files
from pathcli.types import TileStatus

if TYPE_CHECKING:
    from pathcli.store.place import Place
    from pathcli.types import Tiles

CHUNK_ROWS = 1024
CHUNK_BYTES = 4 << 20


class ZarrWriter:
    """Fill one features entry chunk by chunk, as `Writer` has it."""

    def __init__(
        self, place: Place, name: str, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]
    ) -> None:
        """Find what an earlier run left, or begin anew.

        Raises:
            ResourceError: the place cannot hold the entry, refuses or is away.
        """
        self.place, self.name, self.n, self.row_shape = place, name, len(tiles), row_shape
        kept = layout(encoder, row_shape)
        del kept["status"]
        row_bytes = int(np.prod(row_shape)) * np.dtype(kept["features"][1]).itemsize
        self._rows = rows = max(1, min(CHUNK_ROWS, CHUNK_BYTES // max(row_bytes, 1), self.n))
        self._arrays = {
            each: Array(f"{name}/{each}", (self.n, *shape), kind, rows)
            for each, (shape, kind) in kept.items()
        }
        self._files = entry_files(name, tiles, entry_attributes(tiles, encoder), self._arrays)
        self._last = self._files.popitem()
        self._ends = Array(f"{name}/status", (self.n,), "|u1", self.n)
        self._status = np.zeros(self.n, np.uint8)
        self._blocks = [np.empty((rows, *a.shape[1:]), a.dtype) for a in self._arrays.values()]
        there = {file.name for file in place.list(name)}
        done = self._resume(there)
        if done is None:
            if isinstance(place, LocalPlace):
                require_space(place.path(name), (row_bytes + 12) * self.n + 65536)
            if there:
                place.remove_all(name)
            for file, data in self._files.items():
                place.write(file, data)
        self.resumed = self._filled = done or 0
        self.resumed_bad = int((self._status != TileStatus.OK).sum())

    def _resume(self, there: set[str]) -> int | None:
        """Return how many leading rows an earlier run left whole, or None to start afresh."""
        if self._last[0] in there or not there.issuperset(self._files):
            return None
        try:
            if any(self.place.read(file) != data for file, data in self._files.items()):
                return None
        except FileNotFoundError:
            return None
        arrays, good = list(self._arrays.values()), 0
        chunks = enumerate(arrays[0].chunks)
        left = list(takewhile(lambda c: all(a.chunk(c[0]) in there for a in arrays), chunks))
        views = self.place.views([a.chunk(i) for i, _ in left for a in arrays])
        for i, rows in left:
            try:
                parts = [array.decode(next(views), i) for array in arrays]
            except (ValueError, FileNotFoundError):
                break
            self._status[rows] = np.where(missing(parts[-1]), TileStatus.UNREADABLE, TileStatus.OK)
            good = rows.stop
        return good

    def __enter__(self) -> Self:
        """Begin to write."""
        return self

    def begin(self, row: int) -> None:
        """Declare that writing starts at `row` (at most `resumed`, and not past the last)."""
        self._filled = row
        self.resumed_bad = int((self._status[:row] != TileStatus.OK).sum())
        start = row // self._rows * self._rows
        for array, block in zip(self._arrays.values(), self._blocks, strict=True):
            block[: row - start] = Rows(self.place, array)[start:row]

    def write(self, values: Any, status: Any) -> None:  # noqa: ANN401 - arrays
        """Append float16 rows [k, *row_shape] and their status uint8 [k].

        Raises:
            DataError: a value that float16 cannot hold.
            ResourceError: the place is full, refuses or is away.
        """
        if not np.isfinite(largest(values)[status == TileStatus.OK]).all():
            name = self.name.rpartition("/")[2]
            msg = f"{name}: the encoder gave values that are not finite in float16"
            raise DataError(msg)
        if not np.array_equal(missing(values), status != TileStatus.OK):
            msg = f"{self.name}: rows of unreadable tiles must be NaN"
            raise DataError(msg)
        self._status[self._filled : self._filled + len(values)] = status
        parts: tuple[Any, ...] = as_int8(values) if "scales" in self._arrays else (values,)
        while len(parts[0]):
            start = self._filled % self._rows
            count = min(self._rows - start, len(parts[0]))
            for block, part in zip(self._blocks, parts, strict=True):
                block[start : start + count] = part[:count]
            parts = tuple(part[count:] for part in parts)
            self._filled += count
            if start + count == self._rows or self._filled == self.n:
                for array, block in zip(self._arrays.values(), self._blocks, strict=True):
                    data = array.encode(block[: start + count])
                    self.place.write(array.chunk((self._filled - 1) // self._rows), data)

    def discard(self) -> None:
        """Throw away what was written: the next run starts afresh."""
        self.place.remove_all(self.name)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish the entry if nothing went wrong."""
        if kind is not None:
            return
        if self._filled != self.n:
            msg = (
                f"{self.place.root}/{self.name}: only {self._filled} of {self.n} rows were written"
            )
            raise DataError(msg)
        self.place.write(self._ends.chunk(0), self._ends.encode(self._status))
        self.place.write(*self._last)
