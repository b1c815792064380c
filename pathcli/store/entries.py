"""Keys in, what was computed for them out: two mappings over whatever keeps the bytes."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from pathcli.errors import UsageError
from pathcli.store.lease import lease
from pathcli.store.place import LocalPlace
from pathcli.types import Features, Key, Tiles

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from pathcli.store.place import Place

V = TypeVar("V", Tiles, Features)


class Writer(Protocol):
    """Fills one features entry in order, from where the last run stopped.

    `resumed` rows are already safe, `resumed_bad` of them (from `begin` on: of those before its
    row) unreadable. Leaving the block without
    an error publishes the entry; with an error what was written stays to be resumed.
    """

    n: int
    row_shape: tuple[int, ...]
    resumed: int
    resumed_bad: int

    def begin(self, row: int) -> None:
        """Declare that writing starts at `row` (at most `resumed`, and not past the last)."""

    def write(self, values: Any, status: Any) -> None:  # noqa: ANN401 - arrays
        """Append float16 rows [k, *row_shape] and their status uint8 [k].

        Raises:
            DataError: a value that float16 cannot hold.
            ResourceError: no space, or the place is away.
        """

    def discard(self) -> None:
        """Throw away what was written: the next run starts afresh."""

    def __enter__(self) -> Self:
        """Begin to write."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Publish the entry if nothing went wrong."""


class Backend(Protocol):
    """How entries are kept at a place.

    A finished entry has the file `name + marker`. Readers raise FileNotFoundError when there is
    none, DataError when it is damaged, foreign or newer, ResourceError when the place refuses.
    """

    @property
    def place(self) -> Place:
        """Where."""

    @property
    def suffix(self) -> str:
        """How the name of an entry ends."""

    @property
    def marker(self) -> str:
        """What the file that makes an entry finished is called, after the entry's name."""

    def read_tiles(self, name: str) -> Tiles:
        """Read a tiles entry."""

    def write_tiles(self, name: str, tiles: Tiles) -> None:
        """Write a tiles entry whole or not at all."""

    def read_features(self, name: str, *, mapped: bool = False) -> Features:
        """Read a features entry; with `mapped`, `values` are read as they are used."""

    def feature_shape(self, name: str) -> tuple[tuple[int, ...], int]:
        """Return the shape of one row and how many rows are unreadable."""

    def verify_features(self, name: str) -> Key:
        """Check every block of a features entry; return the key it says."""

    def writer(self, name: str, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]) -> Writer:
        """Open an entry to be filled."""

    def begun(self, name: str) -> bool:
        """Tell whether there is an unfinished entry."""

    def size(self, name: str) -> int:
        """Return how many bytes a finished entry takes."""

    def remove(self, name: str) -> None:
        """Remove a finished entry."""


class Entries(Mapping[Key, V]):
    """The finished entries of one kind, by their keys."""

    kind: str
    _folders: int

    def __init__(self, backend: Backend) -> None:
        """Look up entries with `backend`."""
        self.backend = backend

    def name(self, key: Key) -> str:
        """Return the name that the entry of `key` has at the store's place."""
        folder = f"{self.kind}/{key.encoder}" if self.kind == "features" else self.kind
        return f"{folder}/{key.tiles}/{key.stem}{self.backend.suffix}"

    def path(self, key: Key) -> Path:
        """Return where the entry of `key` is, or would be, on this machine.

        Raises:
            UsageError: the store is elsewhere.
        """
        place = self.backend.place
        if not isinstance(place, LocalPlace):
            msg = f"{place.root}: its entries are no files of this machine"
            raise UsageError(msg)
        return place.path(self.name(key))

    def __getitem__(self, key: Key) -> V:
        """Read one entry; KeyError when there is none, DataError when it is damaged."""
        with _key_errors(key):
            return self._read(self.name(key))

    @abstractmethod
    def _read(self, name: str) -> V:
        """Read the entry of a name; FileNotFoundError when there is none."""

    def __contains__(self, key: object) -> bool:
        """Tell whether an entry was finished."""
        return isinstance(key, Key) and self.backend.place.exists(self._marker(key))

    def _marker(self, key: Key) -> str:
        return self.name(key) + self.backend.marker

    def __iter__(self) -> Iterator[Key]:
        """Yield the keys of all finished entries."""
        yield from self._keys("/".join([self.kind] + ["*"] * self._folders))

    def _keys(self, folder: str) -> Iterator[Key]:
        end = self.backend.suffix + self.backend.marker
        for found in self.backend.place.glob(f"{folder}/*{end}"):
            if key := key_of(found.removesuffix(self.backend.marker)):
                yield key

    def __len__(self) -> int:
        """Count the finished entries."""
        return sum(1 for _ in self)

    def size(self, key: Key) -> int:
        """Return how many bytes an entry takes; KeyError when there is none."""
        with _key_errors(key):
            return self.backend.size(self.name(key))

    def time(self, key: Key) -> float:
        """Return when an entry was finished, by the clock of its place; KeyError as `size`."""
        with _key_errors(key):
            return self.backend.place.stat(self._marker(key)).mtime

    def remove(self, key: Key) -> None:
        """Remove an entry; nothing happens when there is none."""
        self.backend.remove(self.name(key))


@contextmanager
def _key_errors(key: Key) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise KeyError(key) from None


class TileEntries(Entries[Tiles]):
    """`tiles/<tiles-digest>/<item>@<mpp>`."""

    kind, _folders = "tiles", 1

    def _read(self, name: str) -> Tiles:
        return self.backend.read_tiles(name)

    def __setitem__(self, key: Key, tiles: Tiles) -> None:
        """Write one entry whole or not at all."""
        self.backend.write_tiles(self.name(key), tiles)

    def verify(self, key: Key) -> Key:
        """Check an entry; return the key it says. Raises as reading it does."""
        return self[key].key


class FeatureEntries(Entries[Features]):
    """`features/<encoder-id>/<tiles-digest>/<item>@<mpp>`."""

    kind, _folders = "features", 2

    def _read(self, name: str) -> Features:
        return self.backend.read_features(name)

    def verify(self, key: Key) -> Key:
        """Check every block of an entry; return the key it says.

        Raises:
            KeyError: there is no such entry.
            DataError: a block is damaged or missing, or values are no numbers where they should.
        """
        with _key_errors(key):
            return self.backend.verify_features(self.name(key))

    def shape(self, key: Key) -> tuple[tuple[int, ...], int]:
        """Return the shape of a row and the number of unreadable rows, reading no feature.

        Raises:
            KeyError: there is no such entry.
            DataError: it is damaged.
        """
        with _key_errors(key):
            return self.backend.feature_shape(self.name(key))

    def mapped(self, key: Key) -> Features:
        """Return an entry whose values are mapped, not read: a bag costs no memory of its own.

        Raises:
            KeyError: there is no such entry.
            DataError: it is damaged.
        """
        with _key_errors(key):
            return self.backend.read_features(self.name(key), mapped=True)

    def begun(self, key: Key) -> bool:
        """Tell whether a run that was stopped left an entry to be resumed."""
        return self.backend.begun(self.name(key))

    def having(self, encoder: str, tiles: str) -> list[Key]:
        """Return the keys of all entries of one encoder and one tile specification."""
        return list(self._keys(f"{self.kind}/{encoder}/{tiles}"))

    def writer(self, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]) -> Writer:
        """Open an entry to be filled row by row; the caller holds `lock` meanwhile."""
        key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, encoder)
        return self.backend.writer(self.name(key), tiles, encoder, row_shape)

    def lock(self, key: Key) -> AbstractContextManager[Callable[[], bool]]:
        """Be the one writer of `key` for the length of a block, as `lease` has it."""
        return lease(self.backend.place, self.name(key))


def key_of(name: Path | str) -> Key | None:
    """Return the key that the name of an entry says, the inverse of `Entries.name`.

    None for a file that pathcli would not name so.
    """
    parts = ("", *PurePosixPath(name).parts)[-4:]
    item, _, mpp = parts[-1].removesuffix(".h5").rpartition("@")
    if not re.fullmatch(r"[^.].*-[0-9a-f]{8}", item) or not re.fullmatch(r"[0-9.e+-]+", mpp):
        return None
    encoder = parts[-3] if parts[0] == "features" else None
    try:
        return Key(item, float(mpp), parts[-2], encoder)
    except (ValueError, IndexError):
        return None
