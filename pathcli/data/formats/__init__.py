"""A file, folder or glob of images and captions in, samples out: every layout we read, by name."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from pathcli.data.formats.published import pathgen, pathgen_init, pmc_oa, pubmedvision, quilt
from pathcli.data.formats.shards import COMPRESSED, folder, shard_list, webdataset
from pathcli.data.formats.source import Source
from pathcli.data.formats.tables import CAPTION, IMAGE, TABLES, manifest, read_rows
from pathcli.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pathcli.types import Sample

__all__ = ["FORMATS", "Format", "Source", "recognise", "samples"]

Format = Literal[
    "auto",
    "manifest",
    "webdataset",
    "folder",
    "pathgen",
    "pathgen-init",
    "quilt-1m",
    "pmc-oa",
    "pubmedvision",
]

FORMATS: dict[str, Callable[[Source], Iterator[Sample]]] = {
    "manifest": manifest,
    "webdataset": webdataset,
    "folder": folder,
    "pathgen": pathgen,
    "pathgen-init": pathgen_init,
    "quilt-1m": quilt,
    "pmc-oa": pmc_oa,
    "pubmedvision": pubmedvision,
}

_MARKS = {
    "pathgen": {"wsi_id", "position", "caption"},
    "pubmedvision": {"image", "conversations", "modality"},
    "pmc-oa": {"image", "caption", "pmcid"},
    "quilt-1m": {"image_path", "caption", "pathology"},
}
"""The columns by which a table's layout is known."""

log = logging.getLogger("pathcli")


def samples(source: Source, name: Format = "auto") -> Iterator[Sample]:
    """Return the samples of a source in the order of its rows; `source.dropped` counts the rest.

    Raises:
        DataError: it is of no known layout, or not of the one named.
        ResourceError: it is not there, or a library that reads it is not.
        UsageError: `keep` is given for what has no columns.
    """
    if name == "auto":
        name = recognise(source.path)
        log.info("%s: read as %s", source.path, name)
    if source.keep and name in {"webdataset", "folder"}:
        msg = f"{source.path}: data.keep chooses rows of a table, this is a {name}"
        raise UsageError(msg)
    return FORMATS[name](source)


def recognise(path: Path) -> Format:
    """Return the layout of a file, folder or pattern, by its endings and its first row.

    Raises:
        DataError: it is none we know.
        ResourceError: it is not there.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.name.lower().endswith((".tar", *COMPRESSED)):
        shard_list(path)
        return "webdataset"
    if not path.exists():
        msg = f"{path}: no such file or folder; give data.source"
        raise ResourceError(msg)
    if path.name.endswith("_imgs.json"):
        return "pathgen-init"
    row = next(iter(read_rows(path)), {})
    for name, marks in _MARKS.items():
        if marks <= row.keys():
            return name  # type: ignore[return-value]  # the table's names are of the Literal
    if {*row} & {*IMAGE} and {*row} & {*CAPTION}:
        return "manifest"
    msg = (
        f"{path}: no known layout, the first row has {', '.join(row) or 'nothing'}; a table needs "
        f"an image ({', '.join(IMAGE)}) and a caption ({', '.join(CAPTION)}), or give data.format"
    )
    raise DataError(msg)


def _of_folder(path: Path) -> Format:
    names = [entry.name.lower() for entry in path.iterdir()]
    if any(name.endswith("_imgs.json") for name in names):
        return "pathgen-init"
    if any(name.endswith((".tar", *COMPRESSED)) for name in names):
        return "webdataset"
    if any(name.endswith(".parquet") for name in names):
        return "manifest"
    tables = [name for name in names if name.endswith(TABLES)]
    if tables and not any(name.endswith(".txt") for name in names):
        msg = f"{path}: a folder; name the table in it as data.source, e.g. {path / tables[0]}"
        raise DataError(msg)
    return "folder"
