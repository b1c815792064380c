"""The store itself: a place whose mappings `tiles` and `features` every command shares."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import platformdirs

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.store.entries import FeatureEntries, TileEntries
from pathcli.store.hdf5 import Hdf5
from pathcli.store.place import PROBE, LocalPlace
from pathcli.store.remote import RemotePlace

if TYPE_CHECKING:
    from pathcli.store.entries import Backend
    from pathcli.store.place import Place
    from pathcli.types import SlideInfo

log = logging.getLogger("pathcli")

FORMAT = 1
MARKER = "store.json"
HDF5, ZARR = "hdf5", "zarr"


def default_root() -> str:
    """Return `$PATHCLI_STORE`, or a folder of the platform's user cache."""
    return os.environ.get("PATHCLI_STORE") or str(platformdirs.user_cache_path("pathcli") / "store")


class Store:
    """What was computed is kept: `store.tiles[key]`, `store.features[key]`.

    Every command shares it, so what one computed the next one finds. A folder holds entries as
    HDF5; an address (`s3://bucket/folder`) or a folder `*.zarr` as Zarr. `local` is a folder of
    this machine for what is neither tiles nor features: the store's own, or one in the cache.
    """

    def __init__(self, root: Path | str | None = None, *, create: bool = True) -> None:
        """Open the store at `root` (default: `$PATHCLI_STORE`, else the user's cache).

        Raises:
            UsageError: not an address of a store.
            DataError: the folder is not a store, or of a newer format.
            ResourceError: it cannot be created or read, or with `create` off is not there.
        """
        named = str(root or default_root())
        if re.match(r"\w{2,}:/(?!/)", named):
            msg = f"{named}: an address has two slashes (s3://BUCKET/FOLDER), and is text, no Path"
            raise UsageError(msg)
        self.place: Place
        self.root: Path | str
        if "://" in named:
            self.place = RemotePlace(named)
            self.root, self.local = self.place.root, _beside(self.place.root)
        else:
            self.root = self.local = Path(named).expanduser()
            self.place = LocalPlace(self.root)
        self.backend = backend_of(self.place, self._open(create=create))
        self.tiles = TileEntries(self.backend)
        self.features = FeatureEntries(self.backend)

    def _open(self, *, create: bool) -> str:
        """Return how the entries are kept: as the store says, or for a new one as its place."""
        kind = ZARR if "://" in str(self.root) or self.local.suffix == f".{ZARR}" else HDF5
        try:
            text = self.place.read(MARKER).decode()
        except FileNotFoundError:
            self._begin(kind, create=create)
            return kind
        except UnicodeDecodeError:
            text = ""
        try:
            found = int(json.loads(text)["format"])
            kind = str(json.loads(text).get("entries", kind))
        except (ValueError, KeyError, TypeError) as error:
            msg = (
                f'{self.root}/{MARKER}: damaged; if this is a pathcli store, write {{"format": 1}} '
                "into it"
            )
            raise DataError(msg) from error
        if found > FORMAT or kind not in {HDF5, ZARR}:
            msg = f"{self.root}: store format {found} of {kind}, this pathcli reads {FORMAT}; "
            raise DataError(msg + "update pathcli")
        if kind == HDF5 and "://" in str(self.root):
            msg = f"{self.root}: entries here are HDF5, which is read from a folder; copy it first"
            raise DataError(msg)
        return kind

    def _begin(self, kind: str, *, create: bool) -> None:
        """Make a store where there is none yet."""
        self._require_empty()
        if not create:
            msg = f"{self.root}: no store here; give another --store (pathcli embed makes one)"
            raise ResourceError(msg) from None
        self.place.write(MARKER, json.dumps({"format": FORMAT, "entries": kind}).encode() + b"\n")

    def _require_empty(self) -> None:
        """Refuse to make a store of what is something else."""
        if isinstance(self.place, LocalPlace) and self.place.folder.is_file():
            msg = f"{self.root}: a store is a folder, this is a file; give another --store"
            raise DataError(msg) from None
        there = self.place.names()
        known = all(name.startswith((MARKER, PROBE)) for name in there)
        if not known and not self.place.exists(MARKER):  # another process may have made it
            msg = f"{self.root}: not a store, and not empty; give a store or an empty folder"
            raise DataError(msg) from None

    def remember(self, info: SlideInfo, path: Path | str, mpp: float, source: str) -> None:
        """Keep a slide's card: geometry, the mpp used and its source, where it was last seen."""
        card = asdict(info) | {"mpp_used": mpp, "mpp_source": source, "last_seen": str(path)}
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        name = f"slides/{info.item}.json"
        data = text.encode("utf-8", errors="backslashreplace")
        try:
            if self.place.read(name) == data:
                return
            known = True
        except FileNotFoundError:
            known = False
        try:
            self.place.write(name, data)
        except ResourceError as error:
            if not known:
                raise
            log.debug("%s", error)  # a read-only store still serves

    def slides(self) -> dict[str, dict[str, Any]]:
        """Return the cards of all slides the store has seen, by item."""
        cards = {}
        for name in self.place.glob("slides/*.json"):
            try:
                cards[PurePosixPath(name).stem] = json.loads(self.place.read(name))
            except (OSError, ValueError, ResourceError):
                log.warning("%s/%s: cannot be read; run: pathcli store verify", self.root, name)
        return cards


def backend_of(place: Place, kind: str) -> Backend:
    """Return what keeps entries at a place, as HDF5 or as Zarr."""
    if kind == HDF5 and isinstance(place, LocalPlace):
        return Hdf5(place)
    from pathcli.store.zarr import Zarr  # noqa: PLC0415

    return Zarr(place)


def _beside(address: str) -> Path:
    """Return the folder of this machine that goes with a store elsewhere."""
    name = re.sub(r"[^\w.-]+", "_", address)
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    return platformdirs.user_cache_path("pathcli") / "remote" / f"{name[:60]}-{digest}"


def item_name(stem: str, fingerprint: str) -> str:
    """Return the item of a slide: its readable stem and 8 digits of its content.

    >>> item_name("case 7/β", "6335ea0e6cc5")
    'case_7_β-6335ea0e'
    """
    readable = re.sub(r"[^\w.+-]+", "_", stem).strip("._")[:60] or "slide"
    return f"{readable}-{fingerprint[:8]}"
