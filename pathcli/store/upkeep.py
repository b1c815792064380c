"""What a store holds and what is wrong with it: findings out of files, and their removal."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pathcli.errors import (
    BusyError,
    DataError,
    ForeignError,
    NewerError,
    PathcliError,
    ResourceError,
)
from pathcli.store.files import part_path
from pathcli.store.hdf5 import read_tiles, verify_features
from pathcli.store.lease import LAPSE_S, lapsed, lease, lease_path
from pathcli.store.store import Store, key_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger("pathcli")


@dataclass(frozen=True)
class Finding:
    """One file of the store: `state` is ok, pending, stale, broken or foreign."""

    path: Path
    state: str
    detail: str = ""


def verify(store: Store) -> Iterator[Finding]:
    """Check every file below the store's root, every block against its checksum.

    pending: a temporary that a running or just killed command will finish; stale: one whose
    lease has lapsed; broken: an entry that cannot be trusted; unreadable: the system does not
    let it be read; newer: of a later pathcli; foreign: not written by pathcli.
    """
    for path in sorted(store.root.rglob("*")):
        if not path.is_dir() and path != store.root / "store.json":
            yield from _findings(store, path)


def _findings(store: Store, path: Path) -> Iterator[Finding]:
    """Yield what is to be said of one file; nothing of a lease that is no news."""
    depth = path.relative_to(store.root).parts
    ours = _DEPTH.get(depth[0]) == len(depth)
    if ours and path.suffix == ".part":
        yield _temporary(path)
    elif ours and path.suffix == ".lease":
        found = _temporary(path)  # beside a pending temporary a lease is no news
        if found.state == "stale" or not part_path(path.with_suffix("")).exists():
            yield found
    elif ours and path.suffix == _SUFFIX[depth[0]]:
        yield _entry(path, depth[0])
    else:
        yield Finding(path, "foreign", "not written by pathcli; left alone")


_DEPTH = {"slides": 2, "tiles": 3, "features": 4}
_SUFFIX = {"slides": ".json", "tiles": ".h5", "features": ".h5"}


def _entry(path: Path, kind: str) -> Finding:
    try:
        if kind == "slides":
            json.loads(path.read_text(encoding="utf-8"))
        elif key_of(path) is None:
            return Finding(path, "foreign", "not written by pathcli; left alone")
        else:
            found = read_tiles(path).key if kind == "tiles" else verify_features(path)
            if found != key_of(path):
                return Finding(path, "broken", f"is the entry of {found}; run: pathcli store prune")
    except FileNotFoundError:
        return Finding(path, "pending", "replaced while it was read")
    except OSError as error:
        return Finding(path, "unreadable", str(error))
    except (PathcliError, ValueError) as error:
        return Finding(path, _STATES.get(type(error), "broken"), str(error))
    return Finding(path, "ok")


_STATES: dict[type[Exception], str] = {
    NewerError: "newer",
    ForeignError: "foreign",
    ResourceError: "unreadable",
}


def _temporary(path: Path) -> Finding:
    entry = path.with_suffix("")
    holder = lease_path(entry)
    beats = [p.stat().st_mtime for p in (holder, path) if p.exists()]
    quiet_s = time.time() - max(beats, default=0.0)
    alive = holder.exists() and not lapsed(holder)
    if entry.exists() and not alive:
        detail = "left beside a finished entry; run: pathcli store prune"
        return Finding(path, "stale", detail)
    if alive or quiet_s <= LAPSE_S:
        detail = "being written, or just killed: the same command resumes it"
        return Finding(path, "pending", detail)
    detail = f"untouched for {quiet_s / 60:.0f} min: rerun its command, or pathcli store prune"
    return Finding(path, "stale", detail)


@dataclass(frozen=True)
class Removal:
    """One file that `prune` removes, and why."""

    path: Path
    why: str
    size: int


def prune(
    store: Store,
    *,
    encoder: str | None = None,
    older_than_days: float | None = None,
    dry_run: bool = False,
) -> list[Removal]:
    """Remove stale temporaries, lapsed leases and broken entries, and what the filters name.

    Args:
        store: where.
        encoder: also remove all features of this encoder id.
        older_than_days: also remove features older than this (with `encoder`: only both).
        dry_run: only say what would go.

    Raises:
        DataError: no entry has this encoder id.
    """
    gone = [
        Removal(f.path, f.state, f.path.stat().st_size)
        for f in verify(store)
        if f.state in {"stale", "broken"}
    ]
    known = {r.path for r in gone}
    if encoder and not (store.root / "features" / encoder).is_dir():
        ids = ", ".join(sorted({str(k.encoder) for k in store.features})) or "none"
        msg = f"no features of encoder {encoder!r} in {store.root}; there are: {ids}"
        raise DataError(msg)
    if encoder or older_than_days is not None:
        limit = time.time() - 86400 * (older_than_days or 0)
        for key in store.features:
            path = store.features.path(key)
            wanted = encoder in {None, key.encoder} and path.stat().st_mtime < limit
            if wanted and path not in known:
                gone.append(Removal(path, "by request", path.stat().st_size))
    return gone if dry_run else [removal for removal in gone if _remove(store, removal)]


def _remove(store: Store, removal: Removal) -> bool:
    """Remove one file, unless a writer has taken it up since it was looked at."""
    path = removal.path
    entry = path.with_suffix("") if path.suffix in {".part", ".lease"} else path
    try:
        with lease(entry):
            if removal.why == "broken" and [f.state for f in _findings(store, path)] != ["broken"]:
                return False  # written anew meanwhile
            path.unlink(missing_ok=True)
    except BusyError:
        log.info("kept %s: it is being written", path)
        return False
    log.info("removed %s (%s)", path, removal.why)
    return True
