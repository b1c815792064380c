"""A small file system under names, of which a store needs no more.

Names are relative, with `/` between their parts. A file is there whole or not at all, and of
several who create one name at once exactly one succeeds: that is all a lease needs, and no
file locking is among it. Those that are not folders of this machine are in `remote`.
"""

from __future__ import annotations

import fnmatch
import mmap
import os
import shutil
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pathcli.errors import PathcliError, ResourceError
from pathcli.store.files import disk_errors, write_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PROBE = ".probe."
"""How the names of files begin that are written at a root to learn something, and removed."""


@dataclass(frozen=True)
class Stat:
    """One file: its name, its size in bytes, and when it was written as the place's clock has it.

    The time is in seconds since 1970.
    """

    name: str
    size: int
    mtime: float


class Place(Protocol):
    """Files under names; every method raises ResourceError when the place refuses or is away."""

    @property
    def root(self) -> str:
        """Where that is, to be shown."""

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""

    def read(self, name: str) -> bytes:
        """Return what a file holds; FileNotFoundError when there is none."""

    def views(self, names: Sequence[str], *, mapped: bool = False) -> Iterator[Any]:
        """Yield what each file holds, `mapped` where that is possible, several at a time.

        FileNotFoundError when one is missing.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; of two writers the last one stays."""

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet; FileExistsError when it does."""

    def touch(self, name: str) -> None:
        """Make the file's time the present; FileNotFoundError when there is none."""

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when there is none."""

    def remove_all(self, prefix: str) -> None:
        """Remove a folder and all that is in it."""

    def stat(self, name: str) -> Stat:
        """Return size and time of a file; FileNotFoundError when there is none."""

    def names(self) -> list[str]:
        """Return what the root itself holds, files and folders."""

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Yield all files in and below the folder `prefix`, sorted by name."""

    def glob(self, pattern: str) -> Iterator[str]:
        """Yield the names of files that match, sorted; `*` stands for one part of a name."""

    def now(self) -> float:
        """Return the time as the place's own clock has it, which is what `Stat.mtime` shows."""


@dataclass(frozen=True)
class LocalPlace:
    """A folder; `option` of the command line is what names it."""

    folder: Path
    option: str = "--store"

    @property
    def root(self) -> str:
        """The folder."""
        return str(self.folder)

    def path(self, name: str) -> Path:
        """Return where a name is in the file system."""
        return self.folder / name

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        with self._reading(name):
            return self.path(name).is_file()

    def read(self, name: str) -> bytes:
        """Return what a file holds; FileNotFoundError when there is none."""
        with self._reading(name):
            return self.path(name).read_bytes()

    def views(self, names: Sequence[str], *, mapped: bool = False) -> Iterator[Any]:
        """Yield what each file holds, or the mapped file."""
        for name in names:
            if not mapped:
                yield self.read(name)
                continue
            with self._reading(name), self.path(name).open("rb") as file:
                empty = not os.fstat(file.fileno()).st_size
                view = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            yield view

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; of two writers the last one stays."""
        write_bytes(self.path(name), data, lambda _: None, self.option)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet; FileExistsError when it does."""
        path = self.path(name)
        with disk_errors(path, self.option):
            path.parent.mkdir(parents=True, exist_ok=True)
            there = _create(path, data)
        if there:
            raise FileExistsError(name)

    def touch(self, name: str) -> None:
        """Make the file's time the present; FileNotFoundError when there is none."""
        with self._reading(name):
            os.utime(self.path(name))

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when there is none."""
        with disk_errors(self.path(name), self.option):
            self.path(name).unlink(missing_ok=True)

    def remove_all(self, prefix: str) -> None:
        """Remove a folder and all that is in it."""
        with disk_errors(self.path(prefix), self.option), suppress(FileNotFoundError):
            shutil.rmtree(self.path(prefix))

    def stat(self, name: str) -> Stat:
        """Return size and time of a file; FileNotFoundError when there is none."""
        with self._reading(name):
            found = self.path(name).stat()
            return Stat(name, found.st_size, found.st_mtime)

    def names(self) -> list[str]:
        """Return what the root itself holds, files and folders."""
        try:
            with self._reading(""):
                return os.listdir(self.folder)  # noqa: PTH208 - names
        except FileNotFoundError:
            return []

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Yield all files in and below the folder `prefix`, sorted by name."""
        walk = os.walk(self.path(prefix), onerror=self._refused)
        for path in sorted(Path(folder, file) for folder, _, files in walk for file in files):
            with suppress(FileNotFoundError):  # removed meanwhile
                yield self.stat(path.relative_to(self.folder).as_posix())

    def _refused(self, error: OSError) -> None:
        """Say of a folder that may not be read so: what is in it is not just missing."""
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            msg = f"{error.filename}: cannot be read now ({error.strerror})"
            raise ResourceError(msg) from error

    def glob(self, pattern: str) -> Iterator[str]:
        """Yield the names of files that match, sorted; `*` stands for one part of a name."""
        yield from self._matching("", pattern.split("/"))

    def _matching(self, folder: str, parts: Sequence[str]) -> Iterator[str]:
        """Yield the names in a folder; unlike `Path.glob`, one that may not be read is an error."""
        try:
            with self._reading(folder):
                names = sorted(fnmatch.filter(os.listdir(self.path(folder)), parts[0]))  # noqa: PTH208
        except FileNotFoundError:
            return
        for name in names:
            if len(parts) > 1:
                yield from self._matching(f"{folder}{name}/", parts[1:])
            else:
                yield folder + name

    def now(self) -> float:
        """Return the time as the folder's file system has it, which may be another machine's."""
        probe = f"{PROBE}{os.getpid()}-{threading.get_ident()}"
        try:
            self.create(probe, b"")
            return self.stat(probe).mtime
        except (OSError, PathcliError):
            return time.time()
        finally:
            with suppress(OSError, PathcliError):
                self.remove(probe)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(name) from error
        except OSError as error:
            msg = f"{self.path(name)}: cannot be read now ({error.strerror or error})"
            raise ResourceError(msg) from error


def _create(path: Path, data: bytes) -> bool:
    """Create a file with its content; return whether one was there already."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return True
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return False
