"""What a bundle says of itself: `manifest.json`, its models and the files of each."""

from __future__ import annotations

import json
import tarfile
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError, NewerError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = 1
MANIFEST = "manifest.json"
MOVABLE = {"weights": "XDG_CACHE_HOME", "hub": "HF_HUB_CACHE"}
"""Parts of a bundle, and the variables that say where they belong."""


@dataclass(frozen=True)
class File:
    """One file of a bundle: its place below the folder, its length and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Bundled:
    """One model of a bundle; without files it ships with pathcli.

    `state` is what was done with it: bundled, shipped, unpacked, or here (it was already).
    """

    name: str
    licence: str
    what: str
    source: Mapping[str, Any]
    files: tuple[File, ...]
    state: str = "bundled"

    @property
    def size(self) -> int:
        """Return the length of its files in bytes."""
        return sum(file.bytes for file in self.files)


def read_manifest(path: Path) -> list[Bundled]:
    """Return what the manifest of a bundle says; it names no place outside the caches.

    Raises:
        ResourceError: there is no such folder, or the manifest cannot be read.
        DataError: there is no manifest, or it is damaged, of a newer pathcli, or names others.
    """
    try:
        if not path.parent.is_dir():
            raise _no_folder(path.parent)
        manifest = json.loads(path.read_bytes())
        if manifest["format"] > FORMAT:
            msg = f"{path}: bundle format {manifest['format']}, this pathcli reads {FORMAT}; "
            raise NewerError(msg + "update pathcli")
        models = []
        for model in manifest["models"]:
            told = [File(str(f["path"]), int(f["bytes"]), str(f["sha256"])) for f in model["files"]]
            more = {"name": str(model["name"]), "files": tuple(told)}
            models.append(Bundled(**(model | more)))
    except FileNotFoundError:
        msg = f"{path.parent}: no bundle (it has no {MANIFEST}), or not copied whole"
        raise DataError(msg) from None
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror})"
        raise ResourceError(msg) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path}: damaged; copy the bundle again"
        raise DataError(msg) from error
    for file in chain.from_iterable(model.files for model in models):
        parts = file.path.split("/")
        if parts[0] not in MOVABLE or {"", ".", ".."} & set(parts) or {"\\", ":"} & set(file.path):
            msg = f"{path}: names a place outside the caches ({file.path}); nothing was unpacked"
            raise DataError(msg)
    return models


def _no_folder(path: Path) -> ResourceError:
    """Return the error of what is no folder: it says what is there, and what a bundle is."""
    wanted = f"a bundle is the folder, with {MANIFEST}, that pathcli models bundle wrote"
    if not path.exists():
        return ResourceError(f"{path}: no such folder; {wanted}")
    archive = False
    with suppress(OSError):  # what cannot be read is a file all the same
        archive = path.is_file() and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))
    then = "; extract it, then unpack that folder" if archive else ""
    return ResourceError(f"{path}: {'an archive' if archive else 'a file'}; {wanted}{then}")
