"""One writer per entry: a lease file beside the entry, refreshed while its owner lives.

The file is created with `O_CREAT | O_EXCL`, says which process of which machine owns it, and
its modification time is the heartbeat. A lease has lapsed when its process is gone, or, for
a process that cannot be looked up from here, when its heartbeat stopped.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.errors import BusyError
from pathcli.store.files import disk_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEARTBEAT_S = 10.0
LAPSE_S = 60.0
BIRTH_S = 5.0  # a lease is written right after it is created; an empty one died in between


def lease_path(entry: Path) -> Path:
    """Return the path of the lease that guards `entry`."""
    return entry.with_name(entry.name + ".lease")


def _machine() -> str:
    """Name what process numbers belong to: host, boot and, in a container, its name space."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _me() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _alive(owner: dict[str, Any]) -> bool:
    """Tell whether the owning process runs; a number used again is another process."""
    if os.name != "posix":
        return True
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


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _clock(folder: Path) -> float:
    """Return the time as the folder's file system has it, which is what heartbeats show."""
    probe = folder / f"clock.{os.getpid()}-{threading.get_ident()}.part"
    try:
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return time.time()
    return now


def lapsed(path: Path) -> bool:
    """Tell whether the lease file at `path` has no living owner any more; no file, no lapse."""
    owner = _read(path)
    if owner.get("machine") == _machine() and isinstance(owner.get("pid"), int):
        return not _alive(owner)
    try:
        beat = path.stat().st_mtime
    except FileNotFoundError:
        return False
    return _clock(path.parent) - beat > (LAPSE_S if owner else BIRTH_S)


def _create(path: Path, text: str) -> None:
    """Create a file that must not exist yet, with its content."""
    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _clear(path: Path) -> None:
    """Remove a lapsed lease, one process at a time: nobody may remove its successor's."""
    turn = lease_path(path)
    try:
        _create(turn, "")
    except FileExistsError:
        with suppress(FileNotFoundError):
            if _clock(path.parent) - turn.stat().st_mtime > LAPSE_S:
                turn.unlink()
        time.sleep(BIRTH_S / 50)
        return
    try:
        if lapsed(path):
            path.unlink(missing_ok=True)
    finally:
        turn.unlink(missing_ok=True)


def _take(path: Path) -> dict[str, Any]:
    """Create the lease file, taking it over when its owner is gone; return what it says."""
    me = _me()
    deadline = time.monotonic() + 2 * BIRTH_S
    while True:
        try:
            _create(path, json.dumps(me))
        except FileExistsError:
            if lapsed(path):
                _clear(path)
            elif _read(path) or time.monotonic() > deadline:
                break
            else:
                time.sleep(BIRTH_S / 50)
        else:
            return me
    owner = _read(path)
    host = str(owner.get("machine", "another machine")).split(" ", maxsplit=1)[0]
    msg = (
        f"{path.name.removesuffix('.lease')}: being written by process {owner.get('pid')} on "
        f"{host}; run the same command again when it has finished"
    )
    raise BusyError(msg)


@contextmanager
def lease(entry: Path, option: str = "--store") -> Iterator[Callable[[], bool]]:
    """Hold the lease of `entry` for the length of the block; `option` says where it lies.

    Yields a function that tells whether it is still held: a process that was stopped for
    longer than the heartbeat allows must not publish what another has taken up.

    Raises:
        BusyError: a living process holds it.
        ResourceError: the disk is full, or the folder may not be written.
    """
    path = lease_path(entry)
    with disk_errors(path, option):
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = _take(path)
    done = threading.Event()

    def held() -> bool:
        return _read(path) == mine

    def beat() -> None:
        while not done.wait(HEARTBEAT_S):
            with suppress(OSError):
                if held():
                    os.utime(path)

    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        done.set()
        thread.join()
        if held():
            path.unlink(missing_ok=True)
