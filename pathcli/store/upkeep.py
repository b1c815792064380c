"""What is wrong with a store, what mends it, and the removal of what nobody will finish or use.

Ages are by the clock of the store's place. Nothing is removed that pathcli did not write.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.errors import (
    BusyError,
    DataError,
    ForeignError,
    NewerError,
    PathcliError,
    ResourceError,
)
from pathcli.store.entries import key_of
from pathcli.store.int8 import INT8
from pathcli.store.lease import LAPSE_S, lapsed, lease, lease_name
from pathcli.store.place import LocalPlace
from pathcli.store.store import default_root
from pathcli.store.units import ENTRIES, TEMPORARY, Unit, holds_others, units

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pathcli.store.store import Store
    from pathcli.types import Key

log = logging.getLogger("pathcli")

FAULTY = ("broken", "mixed")
"""The states of what cannot be trusted."""


@dataclass(frozen=True)
class Finding:
    """What is said of one name of the store; `mend` is the command that mends it, if one does.

    ok; pending: a running or just killed command will finish it; stale: nobody will; broken: an
    entry that cannot be trusted; mixed: its rows are shaped unlike those beside it; torn: some
    of its lines are no answers; unreadable: the system does not let it be read; newer: of a
    later pathcli; foreign: not written by pathcli.
    """

    name: str
    state: str
    detail: str = ""
    mend: str = ""


def verify(store: Store) -> Iterator[Finding]:
    """Check everything below the store's root, every block of an entry against its checksum."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for unit in units(store):
        for found in _findings(store, unit):
            yield found
            if found.state == "ok" and unit.key and unit.key.encoder:
                with suppress(PathcliError, KeyError):  # gone meanwhile
                    folder = shapes.setdefault(unit.name.rpartition("/")[0], {})
                    folder[unit.name] = store.features.shape(unit.key)[0]
    for folder in shapes.values():
        yield from _mixed(store, folder)


def _findings(store: Store, unit: Unit) -> Iterator[Finding]:
    """Yield what is to be said of one unit; nothing of a lease that is no news."""
    if unit.key and unit.kind in ENTRIES:
        yield _entry(store, unit, unit.key)
    elif unit.kind in TEMPORARY:
        yield from _temporary(store, unit)
    elif unit.kind == "foreign":
        yield Finding(unit.name, "foreign", "not written by pathcli", _MEND["foreign"])
    elif unit.kind != "store":
        yield _text(store, unit)


_STATES: dict[type[Exception], str] = {
    NewerError: "newer",
    ForeignError: "foreign",
    ResourceError: "unreadable",
}
_MEND = {
    "newer": "pip install --upgrade pathcli",
    "foreign": "none: it is left alone; move it out of the store",
    "unreadable": "none: let it be read, or wait; then pathcli store verify",
}


def _entry(store: Store, unit: Unit, key: Key) -> Finding:
    entries = store.features if key.encoder else store.tiles
    try:
        said = entries.verify(key)
    except KeyError:
        return Finding(unit.name, "pending", "replaced while it was read")
    except PathcliError as error:
        state = _STATES.get(type(error), "broken")
        why = re.sub(r"; run: .*$", "", str(error).rpartition(f"{unit.name}: ")[2])
        return Finding(unit.name, state, why, _MEND.get(state) or _anew(store, key))
    if said == key:
        return Finding(unit.name, "ok")
    place = "/".join(filter(None, (said.encoder, said.tiles, said.stem)))
    return Finding(unit.name, "broken", f"says it is the entry of {place}", _anew(store, key))


def _anew(store: Store, key: Key) -> str:
    return f"{_prune(store)} && {_command(store, key)}"


def _at(store: Store) -> str:
    """Return the option that names a store, of one that is not the usual."""
    usual = str(Path(default_root()).expanduser()) == str(store.root)
    return "" if usual else f" --store {shlex.quote(str(store.root))}"


def _prune(store: Store) -> str:
    return f"pathcli store prune{_at(store)}"


def _command(store: Store, key: Key) -> str:
    """Return the command that makes an entry, of the slide where its card says it was."""
    slide = "SLIDE"
    with suppress(OSError, PathcliError, ValueError, KeyError, TypeError):
        card = json.loads(store.place.read(f"slides/{key.item}.json"))
        slide = shlex.quote(card["last_seen"])
    at = _at(store)
    if key.encoder is None:
        return f"pathcli tile {slide}{at}"
    encoder = key.encoder.removesuffix(INT8).rpartition("-")[0]
    return f"pathcli embed {slide} --encoder {encoder}{at}"


def _mixed(store: Store, folder: dict[str, tuple[int, ...]]) -> Iterator[Finding]:
    """Yield the entries of one encoder and tile specification whose rows are unlike the most."""
    counts = Counter(folder.values())
    usual, most = next(iter(counts.most_common(1)))
    for name, shape in folder.items():
        if shape != usual:
            encoder = name.split("/")[1]
            detail = f"rows of {shape} beside {most} entries of {usual}: of another encoder"
            mend = f"{_prune(store)} --encoder {encoder}, then embed again"
            yield Finding(name, "mixed", detail, mend)


def _text(store: Store, unit: Unit) -> Finding:
    """Return what is to be said of a slide's card or of lines of JSON."""
    try:
        data = store.place.read(unit.name)
        if unit.kind == "slides":
            json.loads(data)
            return Finding(unit.name, "ok")
        torn = sum(map(_is_torn, data.splitlines()))
    except FileNotFoundError:
        return Finding(unit.name, "pending", "replaced while it was read")
    except ResourceError as error:
        return Finding(unit.name, "unreadable", str(error), _MEND["unreadable"])
    except ValueError as error:
        mend = f"{_prune(store)} && pathcli tile SLIDE{_at(store)}"
        return Finding(unit.name, "broken", f"not a slide's card ({error})", mend)
    if not torn:
        return Finding(unit.name, "ok")
    detail = f"lines cut off by a kill or a full disk: {torn}; readers pass over them"
    return Finding(unit.name, "torn", detail, "none needed")


def _is_torn(line: bytes) -> bool:
    try:
        return bool(line.strip()) and not isinstance(json.loads(line), dict)
    except ValueError:
        return True


# --- what is not finished ----------------------------------------------------------------

_OF_ONE_PROCESS = re.compile(r"\.\d+-\d+\.part$")  # small files; no lease guards them


def _entry_name(unit: Unit) -> str:
    """Return the name of the entry that a temporary or a lease is of."""
    return re.sub(r"(\.part|(\.lease)+)$", "", _OF_ONE_PROCESS.sub("", unit.name))


def _temporary(store: Store, unit: Unit) -> Iterator[Finding]:
    """Yield what is to be said of what is not finished; ages are by the place's clock."""
    place, entry = store.place, _entry_name(unit)
    holder = lease_name(entry)
    guarded = unit.kind != "probe" and not _OF_ONE_PROCESS.search(unit.name)
    times = []
    for name in {unit.name, holder}:
        with suppress(FileNotFoundError):  # gone meanwhile
            times += [place.stat(name).mtime] if place.exists(name) else []
    times += [unit.time] if unit.kind == "unfinished" else []
    finished = place.exists(entry + store.backend.marker)
    if not times or (finished and unit.kind == "unfinished"):
        return  # gone, or finished, meanwhile
    quiet_s = place.now() - max(times)
    ahead = f"its time is {_span(-quiet_s)} ahead of the store's clock"
    key = key_of(entry) if entry.partition("/")[0] in ENTRIES else None
    again = _command(store, key) if key else ""
    if guarded and place.exists(holder) and not lapsed(place, holder):
        if unit.kind == "lease" and store.backend.begun(entry):
            return  # it is told with what is being written
        detail, mend = "being written", ""
        if quiet_s < -LAPSE_S:
            detail, mend = (
                f"held by another host; {ahead}",
                f"if nobody runs it: {_rm(store, holder)}",
            )
        yield Finding(unit.name, "pending", detail, mend)
    elif guarded and finished:
        yield Finding(unit.name, "stale", "left beside a finished entry", _prune(store))
    elif guarded and quiet_s < -LAPSE_S:
        yield Finding(unit.name, "stale", ahead, _prune(store))
    elif quiet_s <= LAPSE_S:
        yield Finding(unit.name, "pending", "just killed; the command goes on with it", again)
    else:
        mend = f"{again}, or {_prune(store)}" if again and unit.kind != "lease" else _prune(store)
        yield Finding(unit.name, "stale", f"untouched for {_span(quiet_s)}", mend)


def _rm(store: Store, name: str) -> str:
    tool = "rm" if isinstance(store.place, LocalPlace) else "aws s3 rm"
    return f"{tool} {shlex.quote(f'{store.root}/{name}')}"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"  # noqa: PLR2004 - two hours


# --- removing ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """One entry or file that `prune` removes, and why; `size` in bytes."""

    unit: Unit
    why: str

    @property
    def name(self) -> str:
        """Return its name."""
        return self.unit.name

    @property
    def size(self) -> int:
        """Return how many bytes it takes."""
        return self.unit.size


BY_REQUEST = "by request"


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
        ResourceError: the store may not be written.
    """
    found, oldest = list(units(store)), store.place.now() - 86400 * (older_than_days or 0)
    features = [unit for unit in found if unit.key and unit.key.encoder]
    ids = {str(unit.key.encoder) for unit in features if unit.key}
    if encoder and encoder not in ids:
        there = ", ".join(sorted(ids)) or "none"
        msg = f"no features of encoder {encoder!r} in {store.root}; there are: {there}"
        raise DataError(msg)
    wanted = set()
    if encoder or older_than_days is not None:
        chosen = [u for u in features if u.key and encoder in {None, u.key.encoder}]
        wanted = {u.name for u in chosen if u.kind == "features" and u.time < oldest}
    gone = []
    for unit in found:
        states = {f.state for f in _findings(store, unit)} if unit.name not in wanted else set()
        why = BY_REQUEST if unit.name in wanted else next(iter(states & {"stale", "broken"}), "")
        if why:
            gone.append(Removal(unit, why))
    return gone if dry_run else [removal for removal in gone if _remove(store, removal)]


def _remove(store: Store, removal: Removal) -> bool:
    """Remove one of what was found, unless a writer has taken it up since."""
    unit, place = removal.unit, store.place
    entry = _entry_name(unit)
    try:
        with lease(place, entry):
            if removal.why == "broken" and all(f.state != "broken" for f in _findings(store, unit)):
                return False  # written anew meanwhile
            if unit.kind == "unfinished" and place.exists(entry + store.backend.marker):
                return False
            if unit.kind in {*ENTRIES, "unfinished"}:
                if holds_others(store, entry):
                    log.warning("kept %s: it holds a file not written by pathcli", entry)
                    return False
                store.backend.remove(entry)
            else:
                place.remove(unit.name)
    except BusyError:
        log.info("kept %s: it is being written", unit.name)
        return False
    log.info("removed %s (%s)", unit.name, removal.why)
    return True
