"""The store itself: a folder whose mappings `tiles` and `features` every command shares."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import platformdirs

from pathcli.errors import DataError, ResourceError
from pathcli.store.files import disk_errors, part_path, write_bytes
from pathcli.store.hdf5 import FeatureWriter, feature_shape, read_features, read_tiles, write_tiles
from pathcli.store.lease import lease
from pathcli.types import Features, Key, SlideInfo, Tiles

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

log = logging.getLogger("pathcli")

FORMAT = 1


def default_root() -> Path:
    """Return `$PATHCLI_STORE`, or the platform's user cache."""
    return Path(
        os.environ.get("PATHCLI_STORE") or platformdirs.user_cache_path("pathcli") / "store"
    )


V = TypeVar("V", Tiles, Features)


@dataclass(frozen=True)
class Entries(Mapping[Key, V]):
    """The finished entries of one kind: a mapping from keys to what the files below `root` hold."""

    root: Path
    read: Callable[[Path], V]

    def path(self, key: Key) -> Path:
        """Return where the entry of `key` is, or would be."""
        folder = self.root / str(key.encoder) if self.root.name == "features" else self.root
        return folder / key.tiles / f"{key.stem}.h5"

    def __getitem__(self, key: Key) -> V:
        """Read one entry; KeyError when there is none, DataError when it is damaged."""
        try:
            return self.read(self.path(key))
        except FileNotFoundError:
            raise KeyError(key) from None

    def __contains__(self, key: object) -> bool:
        """Tell whether an entry was finished."""
        return isinstance(key, Key) and self.path(key).is_file()

    def __iter__(self) -> Iterator[Key]:
        """Yield the keys of all finished entries."""
        yield from filter(None, map(key_of, sorted(self.root.rglob("*.h5"))))

    def __len__(self) -> int:
        """Count the finished entries."""
        return sum(1 for _ in self)


class TileEntries(Entries[Tiles]):
    """`tiles/<tiles-digest>/<item>@<mpp>.h5`."""

    def __setitem__(self, key: Key, tiles: Tiles) -> None:
        """Write one entry whole or not at all."""
        write_tiles(self.path(key), tiles)


class FeatureEntries(Entries[Features]):
    """`features/<encoder-id>/<tiles-digest>/<item>@<mpp>.h5`."""

    def shape(self, key: Key) -> tuple[tuple[int, ...], int]:
        """Return the shape of a row and the number of unreadable rows, reading no feature.

        Raises:
            KeyError: there is no such entry.
            DataError: it is damaged.
        """
        try:
            return feature_shape(self.path(key))
        except FileNotFoundError:
            raise KeyError(key) from None

    def mapped(self, key: Key) -> Features:
        """Return an entry whose values are mapped, not read: a bag costs no memory of its own.

        Raises:
            KeyError: there is no such entry.
            DataError: it is damaged.
        """
        try:
            return read_features(self.path(key), mapped=True)
        except FileNotFoundError:
            raise KeyError(key) from None

    def begun(self, key: Key) -> bool:
        """Tell whether a run that was stopped left an entry to be resumed."""
        return part_path(self.path(key)).exists()

    def having(self, encoder: str, tiles: str) -> list[Key]:
        """Return the keys of all entries of one encoder and one tile specification."""
        folder = self.root / encoder / tiles
        return list(filter(None, map(key_of, sorted(folder.glob("*.h5")))))

    def writer(self, tiles: Tiles, encoder: str, row_shape: tuple[int, ...]) -> FeatureWriter:
        """Open an entry to be filled row by row; the caller holds `lock` meanwhile."""
        key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, encoder)
        return FeatureWriter(self.path(key), tiles, encoder, row_shape)

    def lock(self, key: Key) -> AbstractContextManager[Callable[[], bool]]:
        """Be the one writer of `key` for the length of a block, as `lease` has it."""
        return lease(self.path(key))


def key_of(path: Path) -> Key | None:
    """Return the key that the place of an entry says, the inverse of the two `path` methods.

    None for a file that pathcli would not name so.
    """
    item, _, mpp = path.name.removesuffix(".h5").rpartition("@")
    if not re.fullmatch(r"[^.].*-[0-9a-f]{8}", item) or not re.fullmatch(r"[0-9.e+-]+", mpp):
        return None
    encoder = path.parent.parent.name if path.parents[2].name == "features" else None
    try:
        return Key(item, float(mpp), path.parent.name, encoder)
    except ValueError:
        return None


class Store:
    """A folder that keeps what was computed: `store.tiles[key]`, `store.features[key]`.

    Every command shares it, so what one computed the next one finds.
    """

    def __init__(self, root: Path | str | None = None, *, create: bool = True) -> None:
        """Open the store at `root` (default: `$PATHCLI_STORE`, else the user's cache).

        Raises:
            DataError: the folder is not a store, or of a newer format.
            ResourceError: it cannot be created or read, or with `create` off is not there.
        """
        self.root = Path(root).expanduser() if root else default_root()
        self.tiles = TileEntries(self.root / "tiles", read_tiles)
        self.features = FeatureEntries(self.root / "features", read_features)
        try:
            self._open(create=create)
        except OSError as error:
            msg = f"{self.root}: cannot be used ({error.strerror}); give another --store"
            raise ResourceError(msg) from error

    def _open(self, *, create: bool) -> None:
        marker = self.root / "store.json"
        if self.root.exists() and not self.root.is_dir():
            msg = f"{self.root}: a store is a folder, this is a file; give another --store"
            raise DataError(msg)
        try:
            text = marker.read_text(encoding="utf-8")
        except FileNotFoundError:
            others = self.root.iterdir() if self.root.is_dir() else []
            if any(not path.name.startswith("store.json") for path in others):
                msg = f"{self.root}: not a store, and not empty; give an empty folder as --store"
                raise DataError(msg) from None
            if not create and not self.root.is_dir():
                msg = f"{self.root}: no store here"
                raise ResourceError(msg) from None
            with disk_errors(marker):
                self.root.mkdir(parents=True, exist_ok=True)
            write_bytes(marker, json.dumps({"format": FORMAT}).encode() + b"\n", lambda _: None)
            return
        except UnicodeDecodeError:
            text = ""
        try:
            found = int(json.loads(text)["format"])
        except (ValueError, KeyError, TypeError) as error:
            msg = f'{marker}: damaged; if this is a pathcli store, write {{"format": 1}} into it'
            raise DataError(msg) from error
        if found > FORMAT:
            msg = f"{self.root}: store format {found}, this pathcli reads {FORMAT}; update pathcli"
            raise DataError(msg)

    def remember(self, info: SlideInfo, path: Path | str, mpp: float, source: str) -> None:
        """Keep a slide's card: geometry, the mpp used and its source, where it was last seen."""
        card = asdict(info) | {"mpp_used": mpp, "mpp_source": source, "last_seen": str(path)}
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        place = self.root / "slides" / f"{info.item}.json"
        data = text.encode("utf-8", errors="backslashreplace")
        if place.is_file() and place.read_bytes() == data:
            return
        try:
            write_bytes(place, data, lambda part: json.loads(part.read_bytes()))
        except ResourceError as error:
            if not place.is_file():
                raise
            log.debug("%s", error)  # a read-only store still serves

    def slides(self) -> dict[str, dict[str, Any]]:
        """Return the cards of all slides the store has seen, by item."""
        cards = {}
        for path in sorted((self.root / "slides").glob("*.json")):
            try:
                cards[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                log.warning("%s: cannot be read; run: pathcli store verify", path)
        return cards


def item_name(stem: str, fingerprint: str) -> str:
    """Return the item of a slide: its readable stem and 8 digits of its content.

    >>> item_name("case 7/β", "6335ea0e6cc5")
    'case_7_β-6335ea0e'
    """
    readable = re.sub(r"[^\w.+-]+", "_", stem).strip("._")[:60] or "slide"
    return f"{readable}-{fingerprint[:8]}"
