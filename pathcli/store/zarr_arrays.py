"""Arrays of a Zarr v3 group: cut into chunks with a checksum each, read by rows.

The metadata is written by zarr itself. Chunks are plain little-endian bytes and four of
checksum (codec crc32c), which are encoded and decoded here: so a bag is read several times
faster than chunk by chunk through zarr, and picked rows of a local store from mapped files.
"""

from __future__ import annotations

import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from pathcli.store.attributes import coords_attributes, damaged, features_attributes
from pathcli.store.place import LocalPlace

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.store.place import Place
    from pathcli.types import Tiles

META = "zarr.json"
_CRC = 4  # bytes of checksum at a chunk's end


@dataclass(frozen=True)
class Array:
    """One array of an entry, cut into chunks of `rows` along its first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: int

    @classmethod
    def told(cls, name: str, meta: Mapping[str, Any]) -> Array:
        """Return the array that its metadata tells.

        Raises:
            KeyError, ValueError, TypeError: it is not laid out as this module does.
        """
        shape = tuple(map(index, meta["shape"]))
        grid = tuple(map(index, meta["chunk_grid"]["configuration"]["chunk_shape"]))
        codecs, kind = [codec["name"] for codec in meta["codecs"]], str(meta["data_type"])
        whole = len(shape) == len(grid) > 0 and grid[1:] == shape[1:]
        if codecs != ["bytes", "crc32c"] or not whole or min(*shape, grid[0] - 1) < 0:
            msg = f"{name}: codecs {codecs}, {shape} in chunks of {grid}"
            raise ValueError(msg)
        return cls(name, shape, str(np.dtype(kind).newbyteorder("<")), grid[0])

    @cached_property
    def size(self) -> int:
        """How many bytes the file of a chunk has."""
        return self.rows * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize + _CRC

    @property
    def chunks(self) -> list[slice]:
        """The rows of each chunk."""
        n = self.shape[0]
        return [slice(i, min(i + self.rows, n)) for i in range(0, n, self.rows)]

    def chunk(self, i: int) -> str:
        """Return the name of chunk `i`."""
        return f"{self.name}/c.{i}" + ".0" * (len(self.shape) - 1)

    def encode(self, values: Any) -> bytes:  # noqa: ANN401 - an array
        """Return the file of a chunk of at most `rows` rows; those that are missing are 0."""
        told = np.zeros(self.size, np.uint8)
        self._rows_in(told)[: len(values)] = values
        told[-_CRC:].view("<u4")[0] = google_crc32c.value(told[:-_CRC])
        return told.tobytes()

    def decode(self, data: Any, i: int, *, check: bool = True) -> Any:  # noqa: ANN401 - an array
        """Return the rows of chunk `i` from its file, without copying them.

        Raises:
            ValueError: they do not match their checksum, or are too few.
        """
        told = np.frombuffer(data, np.uint8)
        if len(told) != self.size:
            msg = f"{self.chunk(i)} has {len(told)} bytes"
            raise ValueError(msg)
        if check and google_crc32c.value(told[:-_CRC]) != int(told[-_CRC:].view("<u4")[0]):
            msg = f"{self.chunk(i)} does not match its checksum"
            raise ValueError(msg)
        return self._rows_in(told)[: self.shape[0] - i * self.rows]

    def _rows_in(self, told: NDArray[np.uint8]) -> Any:  # noqa: ANN401 - an array
        """Return the rows that the bytes of chunks hold, those of a checksum being the last."""
        return told[:-_CRC].view(self.dtype).reshape(-1, *self.shape[1:])


class Rows:
    """Rows of an array that are read when they are asked for, with an index as of numpy."""

    def __init__(self, place: Place, array: Array) -> None:
        """Take the array; nothing is read yet."""
        self.place, self.array, self.shape = place, array, array.shape

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - an index as of numpy, of rows alone
        """Return rows as an array of their own.

        Chunks are checked, but where a few rows are picked from mapped files.

        Raises:
            DataError: a chunk is missing or damaged.
            ResourceError: the place refuses or is away.
        """
        if isinstance(index, slice) and index.step in {None, 1}:
            start, stop, _ = index.indices(len(self))
            return self._span(start, max(start, stop))
        wanted = np.arange(len(self))[index]
        return self._picked(wanted.ravel()).reshape((*wanted.shape, *self.shape[1:]))

    def _span(self, start: int, stop: int) -> Any:  # noqa: ANN401 - an array
        out, each = self._empty(stop - start), self.array.rows
        numbers = range(start // each, -(-stop // each) if stop > start else 0)
        for i, known in self._chunks(numbers):
            first, last = max(start - i * each, 0), min(stop - i * each, each)
            out[i * each + first - start : i * each + last - start] = known[first:last]
        return out

    def _picked(self, wanted: NDArray[np.int64]) -> Any:  # noqa: ANN401 - an array
        out, chunk_of = self._empty(len(wanted)), wanted // self.array.rows
        numbers = np.flatnonzero(np.bincount(chunk_of)).tolist()
        few = len(wanted) < len(numbers) * self.array.rows // 4
        for i, known in self._chunks(numbers, mapped=few and isinstance(self.place, LocalPlace)):
            here = np.flatnonzero(chunk_of == i)
            out[here] = known[wanted[here] - i * self.array.rows]
        return out

    def _empty(self, n: int) -> Any:  # noqa: ANN401 - an array
        return np.empty((n, *self.shape[1:]), self.array.dtype)

    def _chunks(self, numbers: Sequence[int], *, mapped: bool = False) -> Iterator[tuple[int, Any]]:
        array = self.array
        with damage(self.place, array.name):
            views = self.place.views([array.chunk(i) for i in numbers], mapped=mapped)
            for i, data in zip(numbers, views, strict=True):
                yield i, array.decode(data, i, check=not mapped)


@contextmanager
def damage(place: Place, name: str) -> Iterator[None]:
    """Turn a missing or damaged chunk of a finished entry into one line."""
    where = f"{place.root}/{name}"
    try:
        yield
    except FileNotFoundError as error:
        raise damaged(where, "a chunk is missing") from error
    except ValueError as error:
        raise damaged(where, error) from error


def entry_files(
    name: str, tiles: Tiles, attrs: Mapping[str, Any], arrays: Mapping[str, Array]
) -> dict[str, bytes]:
    """Return the files of an entry but for the chunks of its rows, the one that ends it last."""
    n = len(tiles)
    coords = Array(f"{name}/coords", (n, 2), "<i4", max(n, 1))
    status = Array(f"{name}/status", (n,), "|u1", max(n, 1))
    told = {"coords": coords_attributes(tiles)}
    if "features" in arrays:
        told["features"] = features_attributes(tiles.item, attrs["encoder"])
    meta = _metadata(attrs, {"coords": coords, "status": status, **arrays}, told)
    last = meta.pop(META)
    files = {coords.chunk(0): coords.encode(tiles.xy)} if n else {}
    return (
        files | {f"{name}/{file}": data for file, data in meta.items()} | {f"{name}/{META}": last}
    )


def _metadata(
    attrs: Mapping[str, Any], arrays: Mapping[str, Array], told: Mapping[str, dict[str, Any]]
) -> dict[str, bytes]:
    """Return the metadata files of a group and its arrays, as zarr writes them."""
    import zarr  # noqa: PLC0415
    from zarr.codecs import Crc32cCodec  # noqa: PLC0415
    from zarr.storage import MemoryStore  # noqa: PLC0415

    memory: dict[str, Any] = {}
    store = MemoryStore(memory)
    group = zarr.create_group(store, attributes=dict(attrs), zarr_format=3)
    for name, array in arrays.items():
        group.create_array(
            name,
            shape=array.shape,
            chunks=(array.rows, *array.shape[1:]),
            dtype=array.dtype,
            filters=None,
            compressors=[Crc32cCodec()],
            chunk_key_encoding={"name": "default", "separator": "."},
            fill_value=0,
            attributes=told.get(name),
        )
    with warnings.catch_warnings(action="ignore"):  # that v3 has not adopted it yet
        zarr.consolidate_metadata(store)
    return {name: buffer.to_bytes() for name, buffer in memory.items()}
