"""A place that fsspec opens: object stores, and memory for tests."""

from __future__ import annotations

import os
import re
import time
import uuid
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pathcli.errors import PathcliError, ResourceError, UsageError
from pathcli.store.place import PROBE, Stat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_S3 = {"connect_timeout": 10, "read_timeout": 30, "retries": {"max_attempts": 3}}
_AT_ONCE = 16  # files asked for at the same time
_TIMES = ("LastModified", "mtime", "modified", "updated", "last_modified", "created")


class RemotePlace:
    """Whatever fsspec opens: `s3://bucket/folder`, `gs://bucket/folder`, `memory://name`.

    An address holds no secrets: those are in the environment, as s3fs and gcsfs read them.
    """

    def __init__(self, url: str) -> None:
        """Take an address; nothing is asked of it yet.

        Raises:
            UsageError: no address of a store, or one with a password or a pattern in it.
            ResourceError: its package is not installed.
        """
        self.root = url.rstrip("/")
        scheme, _, rest = self.root.partition("://")
        if not rest or "@" in rest.partition("/")[0] or set(rest) & set("?*["):  # fsspec's own
            msg = (
                f"{scheme}://...: a store's address is as s3://bucket/folder, without * ? [, and "
                "who may use it stands in the environment; give another --store"
            )
            raise UsageError(msg)
        self.scheme = scheme
        self._opened: dict[int, tuple[Any, str]] = {}

    @property
    def options(self) -> dict[str, Any]:
        """What fsspec is told beside the address: never to remember what a folder held."""
        told: dict[str, Any] = {"use_listings_cache": False}
        if self.scheme in {"s3", "s3a"}:  # files are small: none is worth asking for its size first
            told |= {"config_kwargs": _S3, "max_concurrency": 1}
        return told

    @property
    def _files(self) -> tuple[Any, str]:
        """What fsspec opened, in this process: a connection does not survive a fork."""
        if os.getpid() not in self._opened:
            self._opened = {os.getpid(): self._open()}
        return self._opened[os.getpid()]

    def _open(self) -> tuple[Any, str]:
        from fsspec.core import url_to_fs  # noqa: PLC0415

        try:
            files, path = url_to_fs(self.root, **self.options)
        except ImportError as error:
            msg = f"{self.root}: needs a package ({error}); run: pip install 'pathcli[remote]'"
            raise ResourceError(msg) from error
        except ValueError as error:
            msg = f"{self.root}: not an address that can be opened ({error})"
            raise UsageError(msg) from error
        return files, str(path).rstrip("/")

    @property
    def _path(self) -> str:
        return self._files[1]

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to open the same place."""
        return {"root": self.root, "scheme": self.scheme, "_opened": {}}

    def _do(self, what: Callable[[Any, str], Any], name: str) -> Any:  # noqa: ANN401 - fsspec's
        with remote_errors(self.root):
            files, path = self._files
            return what(files, f"{path}/{name}" if name else path)

    def exists(self, name: str) -> bool:
        """Tell whether there is such a file."""
        try:
            return bool(self._do(lambda files, at: files.info(at)["type"] == "file", name))
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        """Return what a file holds; FileNotFoundError when there is none."""
        return bytes(self._do(lambda files, at: files.cat_file(at), name))

    def views(self, names: Sequence[str], *, mapped: bool = False) -> Iterator[Any]:  # noqa: ARG002 - nothing can be mapped
        """Yield what each file holds, several asked for at once."""
        for start in range(0, len(names), _AT_ONCE):
            some = names[start : start + _AT_ONCE]
            found = self._do(lambda files, at: files.cat([f"{at}/{n}" for n in some]), "")  # noqa: B023 - used at once
            by_name = {path.removeprefix(self._path).lstrip("/"): found[path] for path in found}
            yield from (by_name[name] for name in some)

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole or not at all; of two writers the last one stays."""
        with self._writing():
            self._do(lambda files, at: files.pipe_file(at, data), name)

    def create(self, name: str, data: bytes) -> None:
        """Write a file that must not exist yet; FileExistsError when it does.

        Raises:
            ResourceError: the place knows no exclusive creation.
        """
        with self._writing():
            if not self._exclusive:
                msg = (
                    f"{self.root}: several writers cannot be told apart there (no conditional "
                    "writes); give another --store"
                )
                raise ResourceError(msg)
            self._do(lambda files, at: _create(files, at, data), name)

    @cached_property
    def _exclusive(self) -> bool:
        """Whether of two who create one name the second is refused, as it should be."""
        probe = PROBE + uuid.uuid4().hex
        try:
            for _ in range(2):
                self._do(lambda files, at: _create(files, at, b""), probe)
        except FileExistsError:
            return True
        finally:
            self.remove(probe)
        return False

    def touch(self, name: str) -> None:
        """Make the file's time the present; FileNotFoundError when there is none.

        It is copied onto itself there, so that it is never made anew by somebody late.
        """
        how = {"MetadataDirective": "REPLACE"} if self.scheme in {"s3", "s3a"} else {}
        self._do(lambda files, at: files.cp_file(at, at, **how), name)

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens when there is none."""
        with suppress(FileNotFoundError):
            self._do(lambda files, at: files.rm_file(at), name)

    def remove_all(self, prefix: str) -> None:
        """Remove a folder and all that is in it."""
        with suppress(FileNotFoundError):
            self._do(lambda files, at: files.rm(at, recursive=True), prefix)

    def stat(self, name: str) -> Stat:
        """Return size and time of a file; FileNotFoundError when there is none."""
        return _stat(name, self._do(lambda files, at: files.info(at), name))

    def names(self) -> list[str]:
        """Return what the root itself holds, files and folders."""
        try:
            found = self._do(lambda files, at: files.ls(at, detail=False), "")
        except FileNotFoundError:
            return []
        return [str(path).rstrip("/").rpartition("/")[2] for path in found]

    def list(self, prefix: str = "") -> Iterator[Stat]:
        """Yield all files in and below the folder `prefix`, sorted by name."""
        try:
            found = self._do(lambda files, at: files.find(at, detail=True), prefix.rstrip("/"))
        except FileNotFoundError:
            return
        start = len(self._path) + 1
        for path in sorted(found):
            yield _stat(path[start:], found[path])

    def glob(self, pattern: str) -> Iterator[str]:
        """Yield the names of files that match, sorted; `*` stands for one part of a name."""
        fixed = pattern.partition("*")[0].rpartition("/")[0]
        wanted = re.compile("[^/]*".join(map(re.escape, pattern.split("*"))))
        for found in self.list(fixed):
            if wanted.fullmatch(found.name):
                yield found.name

    def now(self) -> float:
        """Return the time as the place has it; asked once, then counted on."""
        return time.monotonic() + self._ahead

    @cached_property
    def _ahead(self) -> float:
        probe = PROBE + uuid.uuid4().hex
        self.write(probe, b"")
        try:
            return self.stat(probe).mtime - time.monotonic()
        finally:
            self.remove(probe)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say of a bucket that is not there so; a file that is written cannot be missing."""
        try:
            yield
        except FileNotFoundError as error:
            msg = f"{self.root}: cannot be written ({error}); give another --store"
            raise ResourceError(msg) from error


def _create(files: Any, path: str, data: bytes) -> None:  # noqa: ANN401 - fsspec's
    """Write a file that must not exist; S3 has a word of its own for two who do at once."""
    try:
        files.pipe_file(path, data, mode="create")
    except OSError as error:
        if "ConditionalRequestConflict" in f"{error} {error.__cause__}":
            raise FileExistsError(path) from error
        raise


def _stat(name: str, info: dict[str, Any]) -> Stat:
    when = next((info[key] for key in _TIMES if info.get(key)), 0)
    mtime = when.timestamp() if hasattr(when, "timestamp") else float(when)
    return Stat(name, int(info.get("size") or 0), mtime)


@contextmanager
def remote_errors(root: str) -> Iterator[None]:
    """Turn what a place on the network refuses with into one clear line.

    Raises:
        ResourceError: it is away, or refuses.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, PathcliError):
        raise
    except PermissionError as error:
        msg = f"{root}: no permission ({_line(error)}); give other credentials in the environment"
        raise ResourceError(msg) from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _NET:
            raise
        if "redential" in type(error).__name__:
            msg = f"{root}: no credentials; put them into the environment or ~/.aws"
            raise ResourceError(msg) from error
        msg = f"{root}: cannot be reached or refuses ({_line(error)})"
        raise ResourceError(msg) from error


_NET = {"botocore", "aiobotocore", "aiohttp", "fsspec", "s3fs", "gcsfs", "google", "requests"}


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
