"""One writer per entry: a lease file beside the entry, refreshed while its owner lives.

The file is created with `O_CREAT | O_EXCL`, holds host and process, and its modification
time is the heartbeat. A lease has lapsed when its process on this host is gone, or when
the heartbeat of another host stopped.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pathcli.types import BusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HEARTBEAT_S = 10.0
LAPSE_S = 60.0
BIRTH_S = 1.0  # a lease is written right after it is created; an empty one died in between


def lease_path(entry: Path) -> Path:
    """Return the path of the lease that guards `entry`."""
    return entry.with_name(entry.name + ".lease")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _started(pid: int) -> str:
    """Return when process `pid` began (Linux), so that a reused number is told apart."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:  # noqa: PTH123 - not a user path
            return stat.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def lapsed(path: Path) -> bool:
    """Tell whether the lease file at `path` has no living owner any more; no file, no lapse."""
    owner = _read(path)
    if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
        pid = owner["pid"]
        return not _alive(pid) or (owner.get("started") or _started(pid)) != _started(pid)
    try:
        quiet_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    return quiet_s > (LAPSE_S if owner else BIRTH_S)


def _clear(path: Path) -> None:
    """Remove a lapsed lease, one process at a time: nobody may remove its successor's."""
    turn = lease_path(path)
    try:
        os.close(os.open(turn, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        with suppress(FileNotFoundError):
            if time.time() - turn.stat().st_mtime > LAPSE_S:
                turn.unlink()
        time.sleep(BIRTH_S / 10)
        return
    try:
        if lapsed(path):
            path.unlink(missing_ok=True)
    finally:
        turn.unlink(missing_ok=True)


def _take(path: Path) -> dict[str, Any]:
    """Create the lease file, taking it over when its owner is gone; return what it says."""
    me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    deadline = time.monotonic() + 2 * BIRTH_S
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            if lapsed(path):
                _clear(path)
            elif _read(path) or time.monotonic() > deadline:
                break
            else:
                time.sleep(BIRTH_S / 10)
            continue
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(me, file)
        return me
    owner = _read(path)
    msg = (
        f"{path.name.removesuffix('.lease')}: being written by process {owner.get('pid')} on "
        f"{owner.get('host')}; run the same command again when it has finished"
    )
    raise BusyError(msg)


@contextmanager
def lease(entry: Path) -> Iterator[None]:
    """Hold the lease of `entry` for the length of the block.

    Raises:
        BusyError: a living process holds it.
    """
    path = lease_path(entry)
    mine = _take(path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            with suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)
