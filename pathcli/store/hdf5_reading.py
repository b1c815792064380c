"""Reading tiles and features from HDF5: the library tells where arrays lie, once for a file."""

from __future__ import annotations

import os
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO

import h5py
import numpy as np

from pathcli.errors import ResourceError
from pathcli.store.attributes import damaged, key_in, later, require_format, tiles_of
from pathcli.store.int8 import ScaledRows
from pathcli.types import Features, TileStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from pathcli.types import Key, Tiles

_OTHER_COORDS = "coords do not match their checksum"


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Turn what an entry's content provokes, or the system, into one clear line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (KeyError, OSError, RuntimeError, ValueError) as error:  # h5py raises them all
        if number := getattr(error, "errno", None):  # the system refuses; the bytes may be whole
            msg = f"{path}: cannot be read now ({os.strerror(number)})"
            raise ResourceError(msg) from error
        raise damaged(path, error) from error
    except TypeError as error:  # a specification with a field this version does not know
        raise later(path, error) from error


@contextmanager
def reading(path: Path, opened: BinaryIO | None = None) -> Iterator[h5py.File]:
    """Open an entry; what is wrong with it becomes one clear line, also within the block.

    With `opened` it is that file which is read, whatever lies at `path` by now.
    """
    with _faults(path), h5py.File(opened or path, "r", locking=False) as file:
        require_format(file.attrs, path)
        yield file


def read_tile_part(file: h5py.File, status: Any) -> Tiles:  # noqa: ANN401 - h5py is untyped
    """Return the tiles that an open entry tells, `status` uint8 [n] being read already."""
    coords = file["coords"]
    xy = coords[:]
    if zlib.crc32(xy) != coords.attrs["crc32"]:
        raise damaged(file.filename, _OTHER_COORDS)
    return tiles_of(file.attrs, xy, status)


def read_tiles(path: Path) -> Tiles:
    """Read a tiles entry.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged, foreign or of a newer format.
        ResourceError: the system does not let it be read.
    """
    with reading(path) as file:
        return read_tile_part(file, file["status"][:])


@dataclass(frozen=True)
class _Layout:
    """The key of a features entry, and of each array its type, shape and place in the file."""

    key: Key
    coords_crc32: int
    arrays: Mapping[str, tuple[Any, tuple[int, ...], int | None]]

    def read(self, file: BinaryIO, name: str, *, mapped: bool = False) -> Any:  # noqa: ANN401 - an array
        """Return an array, past HDF5; or mapped copy-on-write: the file stays as it is."""
        dtype, shape, offset = self.arrays[name]
        if not offset:  # it is empty, or another program has cut it into chunks
            with h5py.File(file, "r") as opened:
                return opened[name][:]
        if mapped:
            return np.memmap(file, dtype, "c", offset, shape)
        values = np.empty(shape, dtype)
        file.seek(offset)
        if file.readinto(values) != values.nbytes:  # type: ignore[attr-defined]
            msg = f"{name} is cut off"
            raise ValueError(msg)
        return values


@dataclass(frozen=True)
class _Opened:
    """A file, equal to any in the same state: that changes when it does, or another comes."""

    path: Path
    state: tuple[int, ...]
    file: BinaryIO = field(compare=False)

    @classmethod
    def of(cls, path: Path, file: BinaryIO) -> _Opened:
        found = os.fstat(file.fileno())
        which = found.st_dev, found.st_ino, found.st_size
        return cls(path, (*which, found.st_mtime_ns, found.st_ctime_ns), file)


@lru_cache(maxsize=4096)
def _layout(opened: _Opened) -> _Layout:
    """Return the layout of a file; it takes HDF5 as long as reading 10 MB."""
    with reading(opened.path, opened.file) as file:
        names = {*file} & {"features", "scales", "coords", "status", "block_crc32"}
        each = {name: file[name] for name in names}
        arrays = {
            name: (data.dtype, data.shape, data.id.get_offset()) for name, data in each.items()
        }
        return _Layout(key_in(file.attrs), int(each["coords"].attrs["crc32"]), arrays)


def read_features(path: Path, *, mapped: bool = False) -> Features:
    """Read a features entry; with `mapped`, `values` are read from disk as they are used.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged, unfinished, foreign or of a newer format.
        ResourceError: the system does not let it be read.
    """
    with _faults(path), path.open("rb") as file:
        layout = _layout(_Opened.of(path, file))
        xy, status = layout.read(file, "coords"), layout.read(file, "status")
        done = bool(np.all(layout.read(file, "block_crc32")))
        values = layout.read(file, "features", mapped=mapped)
        if "scales" in layout.arrays:
            rows = ScaledRows(values, layout.read(file, "scales", mapped=mapped))
            values = rows if mapped else rows[:]
    if zlib.crc32(xy) != layout.coords_crc32:
        raise damaged(path, _OTHER_COORDS)
    if not (done and len(values) == len(xy) == len(status)):
        raise damaged(path, "unfinished blocks")
    return Features(layout.key, values, xy, status)


def feature_shape(path: Path) -> tuple[tuple[int, ...], int]:
    """Return the shape of one row and how many rows are unreadable; raises as `read_features`."""
    with reading(path) as file:
        bad = int((file["status"][:] != TileStatus.OK).sum())
        return tuple(file["features"].shape[1:]), bad
