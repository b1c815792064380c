"""One writer per entry: a lease file beside the entry, refreshed while its owner lives.

The file is created exclusively, says which process of which machine owns it, and its time, by
the clock of the place it is in, is the heartbeat. A lease has lapsed when its process is gone,
or, for a process that cannot be looked up from here, when its heartbeat stopped.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.errors import BusyError, PathcliError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pathcli.store.place import Place

log = logging.getLogger("pathcli")

HEARTBEAT_S = 10.0
LAPSE_S = 60.0
BIRTH_S = 5.0  # a lease is written right after it is created; an empty one died in between


def lease_name(name: str) -> str:
    """Return the name of the lease that guards the entry `name`."""
    return f"{name}.lease"


def _machine() -> str:
    """Name what process numbers belong to: host, boot and, in a container, its name space."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _me() -> dict[str, Any]:
    return {
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "holding": uuid.uuid4().hex,
    }


def _alive(owner: dict[str, Any]) -> bool:
    """Tell whether the owning process runs; a number used again is another process."""
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _started(owner["pid"]) == owner.get("started")


def _started(pid: int) -> str:
    """Return when process `pid` began, "dead" for one killed but not yet reaped (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "dead" if fields[0] in {"Z", "X"} else fields[19]


_SOMEBODY = {"machine": "elsewhere", "pid": "?"}
"""The owner of a lease that cannot be read now: that is no sign of death."""
_holding: set[str] = set()
"""What this process holds; a lease of it that is not among them could not be given back."""


def _read(place: Place, name: str) -> dict[str, Any]:
    try:
        owner = json.loads(place.read(name))
    except (FileNotFoundError, ValueError):
        return {}
    except (OSError, PathcliError):
        return _SOMEBODY
    return owner if isinstance(owner, dict) else {}


_beats: dict[tuple[str, str], tuple[float, float]] = {}
"""Of each lease that was looked at: its time, and since when this process has seen it so."""


def lapsed(place: Place, name: str) -> bool:
    """Tell whether the lease file `name` has no living owner any more; no file, no lapse.

    A heartbeat is also over that was seen to stand still as long: where the clocks of hosts
    differ, its time alone may never be old.
    """
    owner = _read(place, name)
    here = os.name == "posix" and owner.get("machine") == _machine()
    if here and isinstance(owner.get("pid"), int):
        mine = owner["pid"] == os.getpid()
        return not _alive(owner) or (mine and owner.get("holding") not in _holding)
    try:
        beat = place.stat(name).mtime
    except FileNotFoundError:
        _beats.pop((place.root, name), None)
        return False
    known, since = _beats.get((place.root, name), (None, 0.0))
    if known != beat:
        since = time.monotonic()
        _beats[place.root, name] = beat, since
    quiet_s = max(place.now() - beat, time.monotonic() - since)
    return quiet_s > (LAPSE_S if owner else BIRTH_S)


def _clear(place: Place, name: str) -> None:
    """Remove a lapsed lease, one process at a time: nobody may remove its successor's."""
    turn = lease_name(name)
    try:
        place.create(turn, b"")
    except FileExistsError:
        with suppress(FileNotFoundError):
            if place.now() - place.stat(turn).mtime > LAPSE_S:
                place.remove(turn)
        time.sleep(BIRTH_S / 50)
        return
    try:
        if lapsed(place, name):
            place.remove(name)
    finally:
        place.remove(turn)


def _take(place: Place, name: str) -> dict[str, Any]:
    """Create the lease file, taking it over when its owner is gone; return what it says."""
    me = _me()
    _holding.add(me["holding"])
    deadline = time.monotonic() + 2 * BIRTH_S
    while True:
        try:
            place.create(name, json.dumps(me).encode())
        except FileExistsError:
            owner = _read(place, name)
            if owner == me:  # the answer was lost on the network and the question asked again
                return me
            if lapsed(place, name):
                _clear(place, name)
            elif owner or time.monotonic() > deadline:
                break
            else:
                time.sleep(BIRTH_S / 50)
        else:
            return me
    _holding.discard(me["holding"])
    host = str(owner.get("machine", "elsewhere")).split(" ", maxsplit=1)[0]
    msg = (
        f"{name.rpartition('/')[2].removesuffix('.lease')}: being written by process "
        f"{owner.get('pid')} on {host}; run the same command again when it has finished"
    )
    raise BusyError(msg)


@contextmanager
def lease(place: Place, name: str) -> Iterator[Callable[[], bool]]:
    """Hold the lease of the entry `name` of a place for the length of the block.

    Yields a function that tells whether it is still held: a process that was stopped for
    longer than the heartbeat allows must not publish what another has taken up.

    Raises:
        BusyError: a living process holds it.
        ResourceError: the place is full, away, or may not be written.
    """
    held_by = lease_name(name)
    mine = _take(place, held_by)
    done = threading.Event()

    def held() -> bool:
        return _read(place, held_by) == mine

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            with suppress(OSError, PathcliError):
                if held():
                    place.touch(held_by)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()
        try:
            if held():
                place.remove(held_by)
        except (OSError, PathcliError) as error:
            log.debug("%s: a lease that lapses by itself was left (%s)", held_by, error)
        finally:
            _holding.discard(mine["holding"])
