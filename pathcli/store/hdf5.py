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
import json
import math
import os
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import h5py
import numpy as np

from pathcli import __version__
from pathcli.errors import DataError, ForeignError, NewerError, PathcliError, ResourceError
from pathcli.store.files import disk_errors, part_path, publish, require_space, write_bytes
from pathcli.store.int8 import INT8, ScaledRows, as_int8
from pathcli.types import Features, Key, Tiles, TileSpec, TileStatus

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FORMAT = 1
BLOCK_ROWS = 128
CREATOR = f"pathcli {__version__}"


def _tile_attributes(tiles: Tiles) -> dict[str, Any]:
    """Return what a reader of TRIDENT or CLAM files looks for on `coords`."""
    return {
        "patch_size": tiles.spec.size_px,
        "patch_size_level0": round(tiles.side0),
        "level0_magnification": _magnification(tiles.slide_mpp),
        "target_magnification": _magnification(tiles.spec.mpp),
        "overlap": tiles.spec.size_px - tiles.spec.step_px,
        "name": tiles.item,
        "savetodir": "None",
        "level0_width": tiles.width,
        "level0_height": tiles.height,
    }


def _magnification(mpp: float) -> float:
    """Return the objective readers expect at a resolution: the nearest of ..., 10, 20, 40, ..."""
    return float(10 * 2 ** round(math.log2(1 / mpp)))


def _write_tile_part(file: h5py.File, tiles: Tiles) -> None:
    file.attrs.update(
        {
            "format": FORMAT,
            "creator": CREATOR,
            "item": tiles.item,
            "spec": json.dumps(tiles.spec.to_json(), sort_keys=True),
            "slide_mpp": tiles.slide_mpp,
            "width": tiles.width,
            "height": tiles.height,
            "tissue_share": tiles.tissue_share,
            "warnings": json.dumps(tiles.warnings),
        }
    )
    coords = file.create_dataset("coords", data=tiles.xy.astype(np.int32))
    coords.attrs.update(_tile_attributes(tiles))
    coords.attrs["crc32"] = zlib.crc32(np.ascontiguousarray(tiles.xy, np.int32).tobytes())


def _open(path: Path) -> h5py.File:
    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno is not None:  # the system refuses; the bytes may well be whole
            msg = f"{path}: cannot be read now ({os.strerror(error.errno)})"
            raise ResourceError(msg) from error
        raise _damaged(path, error) from error
    found = file.attrs.get("format")
    if found is None or found > FORMAT:
        file.close()
        if found is None:
            msg = f"{path}: not written by pathcli"
            raise ForeignError(msg)
        msg = f"{path}: store format {found}, this pathcli reads up to {FORMAT}; update pathcli"
        raise NewerError(msg)
    return file


def _damaged(path: Path | str, why: object) -> DataError:
    return DataError(f"{path}: damaged entry ({why}); run: pathcli store prune")


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    """Open an entry; what its content provokes becomes one clear line."""
    with _open(path) as file:
        try:
            yield file
        except (KeyError, OSError, ValueError) as error:
            if getattr(error, "errno", None) is not None:
                msg = f"{path}: cannot be read now ({error})"
                raise ResourceError(msg) from error
            raise _damaged(path, error) from error
        except TypeError as error:  # a specification with a field this version does not know
            msg = f"{path}: its specification is of a later pathcli ({error}); update pathcli"
            raise NewerError(msg) from error


def _read_tile_part(file: h5py.File, status: Any) -> Tiles:  # noqa: ANN401 - h5py is untyped
    attrs = file.attrs
    xy = file["coords"][:]
    if zlib.crc32(xy.tobytes()) != file["coords"].attrs["crc32"]:
        raise _damaged(file.filename, "coords do not match their checksum")
    return Tiles(
        item=str(attrs["item"]),
        xy=xy,
        status=status,
        spec=TileSpec.from_json(json.loads(attrs["spec"])),
        slide_mpp=float(attrs["slide_mpp"]),
        width=int(attrs["width"]),
        height=int(attrs["height"]),
        tissue_share=float(attrs["tissue_share"]),
        warnings=tuple(json.loads(attrs["warnings"])),
    )


def write_tiles(path: Path, tiles: Tiles) -> None:
    """Write a tiles entry whole or not at all."""
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        _write_tile_part(file, tiles)
        file.create_dataset("status", data=tiles.status.astype(np.uint8))
    write_bytes(path, memory.getvalue(), read_tiles)


def read_tiles(path: Path) -> Tiles:
    """Read a tiles entry.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged, foreign or of a newer format.
        ResourceError: the system does not let it be read.
    """
    with _reading(path) as file:
        return _read_tile_part(file, file["status"][:])


def read_features(path: Path, *, mapped: bool = False) -> Features:
    """Read a features entry; with `mapped`, `values` are read from disk as they are used.

    Raises:
        FileNotFoundError: there is none.
        DataError: it is damaged, unfinished, foreign or of a newer format.
        ResourceError: the system does not let it be read.
    """
    with _reading(path) as file:
        tiles = _read_tile_part(file, file["status"][:])
        encoder, done = str(file.attrs["encoder"]), bool(np.all(file["block_crc32"][:]))
        values = _read_or_map(file, "features", mapped=mapped)
        if "scales" in file:
            rows = ScaledRows(values, _read_or_map(file, "scales", mapped=mapped))
            values = rows if mapped else rows[:]
    if not (done and len(values) == len(tiles.xy) == len(tiles.status)):
        raise _damaged(path, "unfinished blocks")
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, encoder)
    return Features(key, values, tiles.xy, tiles.status)


def _read_or_map(file: h5py.File, name: str, *, mapped: bool) -> Any:  # noqa: ANN401 - an array
    """Return a dataset as an array, or mapped copy-on-write: the file stays as it is."""
    data = file[name]
    if mapped and (offset := data.id.get_offset()):
        return np.memmap(file.filename, data.dtype, "c", offset, data.shape)
    return data[:]


def feature_shape(path: Path) -> tuple[tuple[int, ...], int]:
    """Return the shape of one row and how many rows are unreadable; raises as `read_features`."""
    with _reading(path) as file:
        bad = int((file["status"][:] != TileStatus.OK).sum())
        return tuple(file["features"].shape[1:]), bad


def verify_features(path: Path) -> Key:
    """Check every block of a features entry against its checksum, in bounded memory.

    NaN is accepted exactly in the rows that `status` calls unreadable.

    Raises:
        DataError: a block is damaged or was never written; otherwise as `read_features`.
    """
    bad = 0
    with _reading(path) as file:
        tiles = _read_tile_part(file, file["status"][:])
        blocks = _blocks(len(tiles))
        for crc, rows in zip(file["block_crc32"][:], blocks, strict=True):
            kept = [file[name][rows] for name in ("features", "scales") if name in file]
            status, values = tiles.status[rows], kept[-1]
            missing = np.isnan(values).any(axis=tuple(range(1, values.ndim)))
            same = np.array_equal(missing, status != TileStatus.OK)
            bad += not (crc == _crc(*kept, status) and same)
        key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, str(file.attrs["encoder"]))
    if bad:
        raise _damaged(path, f"{bad} of {len(blocks)} blocks")
    return key


def _blocks(n: int) -> list[slice]:
    return [slice(i, min(i + BLOCK_ROWS, n)) for i in range(0, n, BLOCK_ROWS)]


def _crc(*parts: Any) -> int:  # noqa: ANN401 - whole arrays, or bytes
    """Return the checksum of a block, never 0: that is what an unwritten block says."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return crc or 1


def _layout(encoder: str, row_shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the row shape and type of what is written row by row, in the checksum's order."""
    kept = {"features": (row_shape, "<f2")}
    if encoder.endswith(INT8):
        kept = {"features": (row_shape, "i1"), "scales": (row_shape[:-1], "<f4")}
    return {**kept, "status": ((), "u1")}


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
        self._layout = _layout(encoder, row_shape)
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
            file["features"].attrs.update(
                {"name": self._tiles.item, "savetodir": "None", "encoder": self._encoder}
            )
            self._locate(file)
        if hasattr(os, "posix_fallocate"):
            with self.part.open("r+b") as file_:
                os.posix_fallocate(file_.fileno(), 0, self.part.stat().st_size)

    def _locate(self, file: h5py.File) -> None:
        names = (*self._layout, "block_crc32")
        self._at = {name: int(file[name].id.get_offset()) for name in names}

    def _resume(self) -> int | None:
        """Return how many leading rows an earlier run left whole, or None to start afresh."""
        try:
            with _open(self.part) as file:
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

    def write(self, values: Any, status: Any) -> None:  # noqa: ANN401 - arrays
        """Append float16 rows [k, *row_shape] and their status uint8 [k].

        Raises:
            DataError: a value that float16 cannot hold.
            ResourceError: the disk is full.
        """
        if not np.isfinite(values[status == TileStatus.OK]).all():
            msg = f"{self.path.name}: the encoder gave values that are not finite in float16"
            raise DataError(msg)
        start, stop = self._filled, self._filled + len(values)
        kept = as_int8(values) if "scales" in self._layout else (values,)
        for name, part in zip(self._layout, (*kept, status), strict=True):
            data = np.ascontiguousarray(part, self._layout[name][1]).tobytes()
            self._put(name, start * self._row_bytes[name], data)
        self._filled = stop
        last = len(_blocks(self.n)) if stop == self.n else stop // BLOCK_ROWS
        for i in range(start // BLOCK_ROWS, last):
            self._put("block_crc32", 4 * i, self._block_crc(i).to_bytes(4, "little"))

    def _put(self, name: str, offset: int, data: bytes) -> None:
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
