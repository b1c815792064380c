"""What a store consists of, told from the names of its files: the same for HDF5 and for Zarr."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pathcli.store.entries import key_of
from pathcli.store.place import PROBE, LocalPlace

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pathcli.store.place import Stat
    from pathcli.store.store import Store
    from pathcli.types import Key

ENTRIES = {"tiles": 3, "features": 4}
"""The kinds of entries, and how many parts their names have."""
TEXTS = {"slides": ".json", "responses": ".jsonl"}
TEMPORARY = ("part", "unfinished", "lease", "probe")


@dataclass(frozen=True)
class Unit:
    """What counts as one in a store: a file, or the group of files that is one Zarr entry.

    `kind` is one of ENTRIES, TEXTS or TEMPORARY, or evaluations, store or foreign. `size` is in
    bytes, `time` by the clock of the store's place.
    """

    name: str
    kind: str
    size: int
    time: float
    key: Key | None = None


def units(store: Store) -> Iterator[Unit]:
    """Yield all that is below the root of a store, by name."""
    groups: dict[str, list[Stat]] = {}
    for file in store.place.list():
        groups.setdefault(_unit_name(store, file.name), []).append(file)
    for name in sorted(groups):
        yield _unit(store, name, groups[name])


_IN_A_GROUP = re.compile(r"(\w+/)?(zarr\.json|c(\.\d+)+)(\.[\d-]+\.part)?")


def _unit_name(store: Store, file: str) -> str:
    """Return what a file belongs to: itself, but in Zarr the entry whose group it is in."""
    parts = file.split("/")
    depth = ENTRIES.get(parts[0], len(parts))
    inside = store.backend.marker and _IN_A_GROUP.fullmatch("/".join(parts[depth:]))
    return "/".join(parts[:depth]) if inside else file


def holds_others(store: Store, entry: str) -> bool:
    """Tell whether below an entry's group are files that pathcli did not write."""
    return any(_unit_name(store, file.name) != entry for file in store.place.list(entry))


def _unit(store: Store, name: str, files: list[Stat]) -> Unit:
    size, time = sum(file.size for file in files), max(file.mtime for file in files)
    kind = _kind(store, name, grouped=files[0].name != name)
    key = key_of(name) if kind in ENTRIES else None
    if kind in ENTRIES and key is None:
        kind = "foreign"
    elif kind in ENTRIES and all(file.name != name + store.backend.marker for file in files):
        kind = "unfinished"
    return Unit(name, kind, size, time, key)


def _kind(store: Store, name: str, *, grouped: bool) -> str:
    """Return what a name says it is; `grouped` if it is that of a folder."""
    top, *below = name.split("/")
    if not below:
        return _top(name)
    if len(below) + 1 != ENTRIES.get(top, 2 if top in TEXTS else 0):
        return "foreign"
    if not grouped and (end := re.search(r"\.(part|lease)$", name)):
        return end[1]
    group = top in ENTRIES and bool(store.backend.marker)
    suffix = TEXTS.get(top, store.backend.suffix)
    return top if grouped == group and name.endswith(suffix) else "foreign"


def _top(name: str) -> str:
    """Return what a file beside the folders is."""
    if name.startswith(PROBE):
        return "probe"
    if re.fullmatch(r"store\.json\.[\d-]+\.part", name):
        return "part"
    return {"store.json": "store", "evaluations.jsonl": "evaluations"}.get(name, "foreign")


@dataclass(frozen=True)
class Usage:
    """How much a store has of one kind, encoder and tile specification; `size` in bytes."""

    kind: str
    encoder: str | None
    tiles: str | None
    count: int
    size: int


def usage(store: Store) -> list[Usage]:
    """Return what takes the space of a store, the largest first.

    Of a store at an address also what goes with it on this machine: responses, evaluations.
    """
    counts: Counter[tuple[str, str | None, str | None]] = Counter()
    sizes: Counter[tuple[str, str | None, str | None]] = Counter()
    for unit in [*units(store), *_on_this_machine(store)]:
        kind = "temporary" if unit.kind in TEMPORARY else unit.kind
        key = (kind, unit.key.encoder, unit.key.tiles) if unit.key else (kind, None, None)
        counts[key] += 1
        sizes[key] += unit.size
    return sorted((Usage(*k, counts[k], sizes[k]) for k in counts), key=lambda u: -u.size)


def _on_this_machine(store: Store) -> Iterator[Unit]:
    if not isinstance(store.place, LocalPlace):
        for file in LocalPlace(store.local).list():
            kind = re.split(r"[/.]", file.name)[0]
            yield Unit(file.name, f"{kind}, on this machine", file.size, file.mtime)
