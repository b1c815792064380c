"""Tiles and features as Zarr v3 at any place: a group for each entry, its `zarr.json` last.

An entry is finished when the group's `zarr.json` is there; what an interrupted run left is told
by the chunks that are there and match their checksum, so there is no journal beside.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.store.attributes import (
    block_faults,
    damaged,
    entry_attributes,
    key_in,
    later,
    require_format,
    tiles_of,
)
from pathcli.store.int8 import ScaledRows
from pathcli.store.numbers import missing
from pathcli.store.zarr_arrays import META, Array, Rows, entry_files
from pathcli.store.zarr_writer import ZarrWriter
from pathcli.types import Features, TileStatus

if TYPE_CHECKING:
    from pathcli.store.place import Place
    from pathcli.types import Key, Tiles


class Group:
    """A finished entry: its attributes, and its arrays by name."""

    def __init__(self, place: Place, name: str) -> None:
        """Read the metadata of the whole group, which is one file.

        Raises:
            FileNotFoundError: there is none.
            DataError: it is damaged, foreign or of a newer format.
        """
        self.place, self.name = place, name
        self.where = f"{place.root}/{name}"
        text = place.read(f"{name}/{META}")
        try:
            told = json.loads(text)
            self.attrs: dict[str, Any] = told["attributes"]
            require_format(self.attrs, self.where)
            arrays = told["consolidated_metadata"]["metadata"]
            self.arrays = {n: Array.told(f"{name}/{n}", meta) for n, meta in arrays.items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise damaged(self.where, f"{type(error).__name__}: {error}") from error

    def rows(self, name: str) -> Rows:
        """Return one array, to be read."""
        try:
            return Rows(self.place, self.arrays[name])
        except KeyError as error:
            raise damaged(self.where, error) from error

    def tiles(self) -> Tiles:
        """Return what the entry says of tiles."""
        try:
            return tiles_of(self.attrs, self.rows("coords")[:], self.rows("status")[:])
        except (KeyError, ValueError) as error:
            raise damaged(self.where, error) from error
        except TypeError as error:
            raise later(self.where, error) from error


class Zarr:
    """Entries that are Zarr groups of a place, `name` being the group's."""

    suffix, marker = "", f"/{META}"

    def __init__(self, place: Place) -> None:
        """Take the store's place."""
        self.place = place

    def read_tiles(self, name: str) -> Tiles:
        """Read a tiles entry; errors are those of `Backend`."""
        return Group(self.place, name).tiles()

    def write_tiles(self, name: str, tiles: Tiles) -> None:
        """Write a tiles entry whole or not at all."""
        self.place.remove(name + self.marker)
        files = entry_files(name, tiles, entry_attributes(tiles), {})
        status = Array(f"{name}/status", (len(tiles),), "|u1", max(len(tiles), 1))
        if len(tiles):
            files = {status.chunk(0): status.encode(tiles.status)} | files
        for file, data in files.items():
            self.place.write(file, data)

    def read_features(self, name: str, *, mapped: bool = False) -> Features:
        """Read a features entry; with `mapped`, `values` are read as they are used."""
        group = Group(self.place, name)
        tiles = group.tiles()
        values: Any = group.rows("features")
        if "scales" in group.arrays:
            values = ScaledRows(values, group.rows("scales"))  # type: ignore[arg-type]
        if not len(values) == len(tiles) == len(tiles.status):
            raise damaged(group.where, "unfinished blocks")
        key = key_in(group.attrs)
        return Features(key, values if mapped else values[:], tiles.xy, tiles.status)

    def feature_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """Return the shape of one row and how many rows are unreadable."""
        group = Group(self.place, name)
        bad = int((group.rows("status")[:] != TileStatus.OK).sum())
        return group.rows("features").shape[1:], bad

    def verify_features(self, name: str) -> Key:
        """Check every chunk, one at a time; NaN only and wherever `status` says unreadable.

        Raises:
            DataError: a chunk is damaged or missing; otherwise as reading it.
        """
        group = Group(self.place, name)
        tiles = group.tiles()
        kept = [group.rows(each) for each in ("features", *({"scales"} & {*group.arrays}))]
        if any(len(each) != len(tiles) for each in kept):
            raise damaged(group.where, "other rows than tiles")
        torn = nan = 0
        chunks = kept[0].array.chunks
        for rows in chunks:
            try:
                parts = [each[rows] for each in kept]
            except DataError:
                torn += 1
                continue
            nan += not np.array_equal(missing(parts[-1]), tiles.status[rows] != TileStatus.OK)
        if torn or nan:
            raise damaged(group.where, block_faults(torn, nan, len(chunks)))
        return key_in(group.attrs)

    def writer(
        self, name: str, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]
    ) -> ZarrWriter:
        """Open an entry to be filled."""
        return ZarrWriter(self.place, name, tiles, encoder, row_shape)

    def begun(self, name: str) -> bool:
        """Tell whether there is an unfinished entry."""
        begun = self.place.exists(f"{name}/features/{META}")
        return begun and not self.place.exists(name + self.marker)

    def size(self, name: str) -> int:
        """Return how many bytes a finished entry takes."""
        self.place.stat(name + self.marker)
        return sum(file.size for file in self.place.list(name))

    def remove(self, name: str) -> None:
        """Remove a finished entry: what makes it one first."""
        self.place.remove(name + self.marker)
        self.place.remove_all(name)
