"""Peers' HDF5 files: written whole or not at all, read with one clear line for what is wrong."""

from __future__ import annotations

import os
import shutil
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import h5py

from pathcli.errors import DataError, ResourceError
from pathcli.store.files import disk_errors, part_path, publish
from pathcli.store.peers.parcel import RECORD, plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

OPTION = "OUT"
ROWS = 512
"""Rows in a chunk. Peers write 1 or 32; theirs and all other readers take any."""


def temporary(path: Path) -> Path:
    """Return where a file, or folder, is written before it becomes `path`."""
    return part_path(path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}"))


@contextmanager
def writing(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file that appears at `path` when the block ends without an error.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    part = temporary(path)
    with disk_errors(path, OPTION):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with h5py.File(part, "w", locking=False) as file:
                yield file
            publish(part, path, _readable)
        finally:
            with suppress(OSError):
                part.unlink(missing_ok=True)


def _readable(path: Path) -> None:
    with h5py.File(path, "r", locking=False) as file:
        list(file)


@contextmanager
def writing_folder(path: Path) -> Iterator[Path]:
    """Give a folder that appears at `path` when the block ends without an error.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    part, old = temporary(path), temporary(path.with_name(path.name + ".old"))
    with disk_errors(path, OPTION):
        part.mkdir(parents=True)
        try:
            yield part
            if path.exists():
                path.replace(old)
            try:
                part.replace(path)
            except BaseException:
                with suppress(OSError):
                    old.replace(path)
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)


def dataset(
    file: h5py.Group,
    name: str,
    values: Any,  # noqa: ANN401 - an array
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Add a dataset that may be appended to, in chunks of `ROWS` rows, uncompressed."""
    chunk = (min(ROWS, max(1, len(values))), *values.shape[1:])
    made = file.create_dataset(name, data=values, chunks=chunk, maxshape=(None, *values.shape[1:]))
    for key, value in (attrs or {}).items():
        made.attrs[key] = "None" if value is None else value


@contextmanager
def reading(path: Path) -> Iterator[h5py.File]:
    """Open a peer's HDF5 file.

    Raises:
        DataError: it is locked, cut short, no HDF5 file, or what the block looks for is not there.
        ResourceError: the system does not let it be read.
    """
    if path.with_name(path.name + ".lock").exists():
        msg = (
            f"{path}: a .lock lies beside it: it is being written, or its writer died; when no "
            "run is at work, write it anew"
        )
        raise DataError(msg)
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError as error:
        msg = f"{path}: no such file"
        raise DataError(msg) from error
    except OSError as error:
        if error.errno is not None and not isinstance(error, BlockingIOError):
            msg = f"{path}: cannot be read ({os.strerror(error.errno)})"
            raise ResourceError(msg) from error
        why = str(error).rpartition("(")[2].rstrip(")")
        msg = f"{path}: cut short, or no HDF5 file ({why}); make it again"
        raise DataError(msg) from error
    except (KeyError, ValueError, TypeError, RuntimeError) as error:  # what bad bytes provoke
        msg = f"{path}: not as expected ({error})"
        raise DataError(msg) from error
    except DataError as error:
        if str(error).startswith(str(path)):
            raise
        msg = f"{path}: {error}"
        raise DataError(msg) from error


def content(file: h5py.Group, name: str) -> Any:  # noqa: ANN401 - an array
    """Return all of a dataset.

    Raises:
        DataError: there is none of this name.
    """
    if name not in file or not isinstance(file[name], h5py.Dataset):
        msg = f"no dataset {name!r}, only {', '.join(file) or 'nothing'}; was its writer stopped?"
        raise DataError(msg)
    return file[name][()]


def attributes(of: Any) -> dict[str, Any]:  # noqa: ANN401 - h5py is untyped
    """Return attributes as plain JSON values, without pathcli's own."""
    return {name: plain(value) for name, value in of.attrs.items() if name != RECORD}


def record_in(of: Any) -> str | None:  # noqa: ANN401
    """Return what pathcli left in a file or group."""
    found = of.attrs.get(RECORD)
    return None if found is None else str(plain(found))
