"""Tiles and features as HDF5: the layout on disk, written so that a kill loses one block.

`features`, `coords` and `status` are contiguous, so a bag is one read and a row one seek.
`features` is allocated before the encoder starts; rows are then written to their place in
the file, past HDF5, and `block_crc32` is both the journal of a running job and the check
of a finished one: a block counts when its checksum matches its bytes.

An encoder whose id ends in `-int8` has its features kept as int8, and beside them `scales`
float32 by which the last axis is multiplied; they are read as float16 like all others.
"""

from __future__ import annotations

import io
import os
import zlib
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from pathcli.errors import DataError, PathcliError
from pathcli.store.attributes import (
    block_faults,
    coords_attributes,
    damaged,
    entry_attributes,
    features_attributes,
    key_in,
    layout,
)
from pathcli.store.files import disk_errors, part_path, publish, require_space, write_bytes
from pathcli.store.hdf5_reading import (
    feature_shape,
    read_features,
    read_tile_part,
    read_tiles,
    reading,
)
from pathcli.store.int8 import as_int8
from pathcli.store.numbers import largest, missing
from pathcli.types import Features, TileStatus

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.store.place import LocalPlace
    from pathcli.types import Key, Tiles

BLOCK_ROWS = 128


def _write_tile_part(file: h5py.File, tiles: Tiles) -> None:
    file.attrs.update(entry_attributes(tiles))
    coords = file.create_dataset("coords", data=tiles.xy.astype(np.int32))
    coords.attrs.update(coords_attributes(tiles))
    coords.attrs["crc32"] = zlib.crc32(np.ascontiguousarray(tiles.xy, np.int32).tobytes())


def write_tiles(path: Path, tiles: Tiles) -> None:
    """Write a tiles entry whole or not at all."""
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        _write_tile_part(file, tiles)
        file.create_dataset("status", data=tiles.status.astype(np.uint8))
    write_bytes(path, memory.getvalue(), read_tiles)


def verify_features(path: Path) -> Key:
    """Check every block of a features entry against its checksum, in bounded memory.

    NaN is accepted exactly in the rows that `status` calls unreadable.

    Raises:
        DataError: a block is damaged or was never written; otherwise as `read_features`.
    """
    torn = nan = 0
    with reading(path) as file:
        tiles = read_tile_part(file, file["status"][:])
        blocks = _blocks(len(tiles))
        arrays = [file[name] for name in ("features", *({"scales"} & {*file}))]
        for crc, rows in zip(file["block_crc32"][:], blocks, strict=True):
            kept, status = [array[rows] for array in arrays], tiles.status[rows]
            whole = crc == _crc(*kept, status)
            torn += not whole
            nan += whole and not np.array_equal(missing(kept[-1]), status != TileStatus.OK)
        key = key_in(file.attrs)
    if torn or nan:
        raise damaged(path, block_faults(torn, nan, len(blocks)))
    return key


def _blocks(n: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_ROWS, n)) for i in range(0, n, BLOCK_ROWS)]


def _crc(*parts: Any) -> int:  # noqa: ANN401 - whole arrays, or bytes
    """Return the checksum of a block, never 0: that is what an unwritten block says."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc or 1


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: str) -> None:
    """Create a contiguous dataset whose bytes exist, unwritten, from the start."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    large = name in {"features", "scales"}
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER if large else h5py.h5d.FILL_TIME_ALLOC)
    kind = h5py.h5t.py_create(np.dtype(dtype), logical=True)
    h5py.h5d.create(file.id, name.encode(), kind, h5py.h5s.create_simple(shape), plist)


class FeatureWriter:
    """Fill one features entry in place, from where the last run stopped.

    Rows must be written in order; `resumed` is how many are already safe, `resumed_bad` how
    many of those are unreadable. Leaving the block
    without an error publishes the entry; with an error the temporary stays to be resumed.
    """

    def __init__(self, path: Path, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]) -> None:
        """Open the temporary of `path`, or create it.

        Raises:
            ResourceError: the disk cannot hold the entry.
        """
        self.path, self.part = path, part_path(path)
        self.n, self.row_shape = len(tiles), row_shape
        self._tiles, self._encoder = tiles, encoder
        self._layout = layout(encoder, row_shape)
        self._row_bytes = {
            name: int(np.prod(shape)) * np.dtype(kind).itemsize
            for name, (shape, kind) in self._layout.items()
        }
        self._filled = self.resumed_bad = 0
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            done = self._resume()
            if done is None:
                self._create()
            self.resumed = done or 0

    def _create(self) -> None:
        self.part.unlink(missing_ok=True)
        require_space(self.path, (sum(self._row_bytes.values()) + 12) * self.n + 65536)
        with h5py.File(self.part, "w", locking=False) as file:
            _write_tile_part(file, self._tiles)
            file.attrs["encoder"] = self._encoder
            for name, (shape, kind) in self._layout.items():
                _allocate(file, name, (self.n, *shape), kind)
            _allocate(file, "block_crc32", (len(_blocks(self.n)),), "<u4")
            file["features"].attrs.update(features_attributes(self._tiles.item, self._encoder))
            self._locate(file)
        if hasattr(os, "posix_fallocate"):
            with self.part.open("r+b") as file_:
                os.posix_fallocate(file_.fileno(), 0, self.part.stat().st_size)

    def _locate(self, file: h5py.File) -> None:
        names = (*self._layout, "block_crc32")
        self._at = {name: file[name].id.get_offset() or 0 for name in names}

    def _resume(self) -> int | None:
        """Return how many leading rows an earlier run left whole, or None to start afresh."""
        try:
            with reading(self.part) as file:
                same = (
                    file.attrs["encoder"] == self._encoder
                    and file["features"].shape == (self.n, *self.row_shape)
                    and np.array_equal(file["coords"][:], self._tiles.xy)
                )
                if not same:
                    return None
                journal = file["block_crc32"][:]
                self._locate(file)
                good = 0
                for crc, rows in zip(journal, _blocks(self.n), strict=True):
                    if not crc or crc != _crc(*(file[name][rows] for name in self._layout)):
                        break
                    good = rows.stop
                self.resumed_bad = int((file["status"][:good] != TileStatus.OK).sum())
                return good
        except (PathcliError, KeyError, OSError, ValueError):
            return None

    def __enter__(self) -> Self:
        """Open the temporary for writing."""
        self._file = self.part.open("r+b")
        return self

    def begin(self, row: int) -> None:
        """Declare that writing starts at `row` (at most `resumed`, and not past the last)."""
        block = row // BLOCK_ROWS
        blank = bytes(4 * (len(_blocks(self.n)) - block))
        self._put("block_crc32", 4 * block, blank)
        self._filled = row
        self._file.seek(self._at["status"])
        self.resumed_bad = row - self._file.read(row).count(TileStatus.OK)

    def write(self, values: Any, status: Any) -> None:  # noqa: ANN401 - arrays
        """Append float16 rows [k, *row_shape] and their status uint8 [k].

        Raises:
            DataError: a value that float16 cannot hold.
            ResourceError: the disk is full.
        """
        if not np.isfinite(largest(values)[status == TileStatus.OK]).all():
            msg = f"{self.path.name}: the encoder gave values that are not finite in float16"
            raise DataError(msg)
        start, stop = self._filled, self._filled + len(values)
        kept = as_int8(values) if "scales" in self._layout else (values,)
        for name, part in zip(self._layout, (*kept, status), strict=True):
            data = np.ascontiguousarray(part, self._layout[name][1])
            self._put(name, start * self._row_bytes[name], data)
        self._filled = stop
        last = len(_blocks(self.n)) if stop == self.n else stop // BLOCK_ROWS
        for i in range(start // BLOCK_ROWS, last):
            self._put("block_crc32", 4 * i, self._block_crc(i).to_bytes(4, "little"))

    def _put(self, name: str, offset: int, data: Any) -> None:  # noqa: ANN401 - an array, or bytes
        with disk_errors(self.path):
            self._file.seek(self._at[name] + offset)
            self._file.write(data)
            self._file.flush()

    def _block_crc(self, block: int) -> int:
        start = block * BLOCK_ROWS
        count = min(BLOCK_ROWS, self.n - start)
        parts = []
        for name, size in self._row_bytes.items():
            self._file.seek(self._at[name] + start * size)
            parts.append(self._file.read(count * size))
        return _crc(*parts)

    def discard(self) -> None:
        """Throw the temporary away: the next run starts afresh."""
        self.part.unlink(missing_ok=True)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish the entry if nothing went wrong."""
        self._file.close()
        if kind is None:
            publish(self.part, self.path, verify_features)


class Hdf5:
    """Entries that are files of a folder, `name` being the file's."""

    suffix, marker = ".h5", ""

    def __init__(self, place: LocalPlace) -> None:
        """Take the store's folder."""
        self.place = place

    def read_tiles(self, name: str) -> Tiles:
        """Read a tiles entry, as `read_tiles` does."""
        return read_tiles(self.place.path(name))

    def write_tiles(self, name: str, tiles: Tiles) -> None:
        """Write a tiles entry whole or not at all."""
        write_tiles(self.place.path(name), tiles)

    def read_features(self, name: str, *, mapped: bool = False) -> Features:
        """Read a features entry, as `read_features` does."""
        return read_features(self.place.path(name), mapped=mapped)

    def feature_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """Return the shape of one row and how many rows are unreadable."""
        return feature_shape(self.place.path(name))

    def verify_features(self, name: str) -> Key:
        """Check every block, as `verify_features` does."""
        return verify_features(self.place.path(name))

    def writer(
        self, name: str, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]
    ) -> FeatureWriter:
        """Open an entry to be filled."""
        return FeatureWriter(self.place.path(name), tiles, encoder, row_shape)

    def begun(self, name: str) -> bool:
        """Tell whether there is an unfinished entry."""
        return part_path(self.place.path(name)).exists()

    def size(self, name: str) -> int:
        """Return how many bytes a finished entry takes."""
        return self.place.stat(name).size

    def remove(self, name: str) -> None:
        """Remove a finished entry."""
        self.place.remove(name)
