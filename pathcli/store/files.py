"""Bytes to disk so that a finished file is whole: temporary, fsync, verify, replace."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from pathcli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


def part_path(entry: Path) -> Path:
    """Return the temporary that becomes `entry`; named after it so that it can be resumed."""
    return entry.with_name(entry.name + ".part")


@contextmanager
def disk_errors(path: Path, option: str = "--store") -> Iterator[None]:
    """Turn the system's refusals to write `path` into one clear line.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
        UsageError: a file is where a folder is needed.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL or "No space left" in str(error):
            free = shutil.disk_usage(_existing(path)).free / 1e6
            msg = (
                f"{path}: disk full ({free:.1f} MB free); free some space, or give another "
                f"folder with {option}"
            )
            raise ResourceError(msg) from error
        if error.errno in _CLOSED or "Permission denied" in str(error):
            msg = f"{path}: no permission to write; give another folder with {option}"
            raise ResourceError(msg) from error
        if isinstance(error, FileNotFoundError):  # a file system that makes no folders, as /proc
            msg = f"{path}: cannot be made there; give another folder with {option}"
            raise ResourceError(msg) from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            msg = f"{path}: a file is where a folder is needed; give another folder"
            raise UsageError(msg) from error
        raise


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def require_space(path: Path, size: int) -> None:
    """Refuse to begin a file of `size` bytes at `path` that the disk cannot hold.

    Raises:
        ResourceError: there is less free space than that.
    """
    free = shutil.disk_usage(_existing(path)).free
    if free < size:
        msg = (
            f"{path}: disk full: {size / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free; free "
            "some space, or give another folder with --store"
        )
        raise ResourceError(msg)


def publish(part: Path, entry: Path, verify: Callable[[Path], object]) -> None:
    """Make a finished temporary the entry: fsync, verify, replace, fsync the folder."""
    with disk_errors(entry):
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        verify(part)
        part.replace(entry)
        _sync_folder(entry.parent)


def _sync_folder(folder: Path) -> None:
    with suppress(PermissionError):  # Windows cannot open a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(
    entry: Path, data: bytes, verify: Callable[[Path], object], option: str = "--store"
) -> None:
    """Write a small file whole or not at all; of two writers at once the last one stays.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    part = part_path(entry.with_name(f"{entry.name}.{os.getpid()}-{threading.get_ident()}"))
    with disk_errors(entry, option):
        entry.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_bytes(data)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise
    publish(part, entry, verify)
