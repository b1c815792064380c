"""WebDataset's tar shards and folders of images with texts in, samples out.

A shard is indexed once: where each image begins and ends. Any image can then be read at any
time, so that shuffling and resuming are exact. The index is kept in memory alone.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pathcli.data.formats.source import ENDINGS, texts
from pathcli.data.formats.tables import CAPTION, GROUP, LABEL, pick
from pathcli.errors import DataError, ResourceError
from pathcli.types import Member

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pathcli.data.formats.source import Row, Source, Talk
    from pathcli.types import Sample

TEXTS = {".txt", ".caption"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_EXPORT = re.compile(r"(.+)_\d+_\d+$")


# --- tar shards --------------------------------------------------------------------------


def captions(row: Row) -> list[Talk]:
    """Return the captions of a record."""
    return [((), text) for text in texts(pick(row, CAPTION))]


def webdataset(
    source: Source, said: Callable[[Row], list[Talk]] = captions, why: str = "no caption"
) -> Iterator[Sample]:
    """Yield the samples of tar shards: members of one stem are an image and its text.

    The text is a `.txt` or `.caption`, or the caption in a `.json`, which may also give label
    and group. The stem ends at the last dot. `said` finds what is said in a record, and `why`
    tells that there is nothing.

    Raises:
        DataError: compressed, truncated, or no tar.
        ResourceError: no shard, or one of a range is missing.
    """
    for path in shard_list(source.path):
        yield from _samples(source, _index(path), said, why)


@dataclass
class _Found:
    """What was found of one stem."""

    image: str | Member | None = None
    text: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, suffix: str, ref: str | Member, read: Callable[[], bytes]) -> None:
        if suffix in ENDINGS:
            self.image = ref
        elif suffix in TEXTS:
            self.text = read().decode("utf-8-sig")
        elif suffix == ".json":
            facts = json.loads(read())
            self.facts = facts if isinstance(facts, dict) else {}


def _samples(
    source: Source,
    index: dict[str, _Found],
    said: Callable[[Row], list[Talk]] = captions,
    why: str = "no caption",
) -> Iterator[Sample]:
    for stem, found in index.items():
        talks = said(found.facts | ({"caption": found.text} if found.text else {}))
        if found.image is None and not found.text and not talks:
            continue  # neither image nor caption: some other file
        source.rows += 1
        if found.image is None:
            source.drop("a caption without an image", stem)
            continue
        exported = _EXPORT.match(PurePosixPath(stem).name)
        group = pick(found.facts, GROUP) or (exported and exported[1])
        label = pick(found.facts, LABEL)
        yield from source.talks(found.image, talks, why, label=label, group=group)


def _index(path: Path) -> dict[str, _Found]:
    index: dict[str, _Found] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # it would keep every header
                if not member.isreg() or member.issparse():
                    continue
                stem, suffix = os.path.splitext(member.name)  # noqa: PTH122 - a million times
                place = Member(str(path), member.offset_data, member.size, member.name)
                read = archive.extractfile(member).read  # type: ignore[union-attr]  # a file
                index.setdefault(stem, _Found()).add(suffix.lower(), place, read)
            _check_end(archive)
    except (tarfile.TarError, EOFError) as error:
        msg = f"{path}: truncated or no tar archive ({error})"
        raise DataError(msg) from error
    except ValueError as error:
        msg = f"{path}: {member.name if member else ''} is not text or JSON ({error})"
        raise DataError(msg) from error
    return index


def _check_end(archive: tarfile.TarFile) -> None:
    """Refuse an archive without its end mark, a block of zeros: tarfile takes any fault for it."""
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        msg = f"no end mark at byte {archive.offset}"
        raise tarfile.ReadError(msg)


def shard_list(path: Path) -> list[Path]:
    """Return the shards a file, a folder, a glob or a range `{000..012}` means, in order.

    Raises:
        DataError: a shard is compressed: it could not be read by position.
        ResourceError: there is none, or one of a range is missing.
    """
    if path.is_dir():
        ends = (".tar", *COMPRESSED)
        found = sorted(p for p in path.iterdir() if p.name.lower().endswith(ends))
    elif _BRACE.search(str(path)) and not path.exists():
        found = [Path(text) for text in _expand(str(path))]
    elif glob.has_magic(str(path)) and not path.exists():
        found = [Path(text) for text in sorted(glob.glob(str(path)))]  # noqa: PTH207 - absolute
    else:
        found = [path]
    missing = [p for p in found if not p.is_file()]
    if missing or not found:
        what = f"{missing[0]}: no such shard" if missing else f"{path}: no shard"
        msg = f"{what} ({len(missing)} of {len(found)} are missing)"
        raise ResourceError(msg)
    for shard in found:
        with shard.open("rb") as file:
            packed = file.read(6).startswith(_MAGIC)
        if packed or shard.name.lower().endswith(COMPRESSED):
            msg = f"{shard}: compressed, so images cannot be read by position; unpack it to a .tar"
            raise DataError(msg)
    return found


def _expand(text: str) -> list[str]:
    """Return the names a pattern with `{000..012}` or `{a,b}` stands for."""
    brace = _BRACE.search(text)
    if not brace:
        return [text]
    span = _RANGE.match(brace[1])
    if span:
        first, last, width = int(span[1]), int(span[2]), len(span[1])
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        parts = brace[1].split(",")
    head, tail = text[: brace.start()], text[brace.end() :]
    return [name for part in parts for name in _expand(head + part + tail)]


# --- folders -----------------------------------------------------------------------------


def folder(source: Source) -> Iterator[Sample]:
    """Yield the samples of a folder and those below it: images with a text of the same stem.

    PathGen's own export is one: `<wsi>_<x>_<y>.png` and `.txt`, whose group is the patient.

    Raises:
        ResourceError: no such folder.
    """
    root = source.path
    if not root.is_dir():
        msg = f"{root}: no such folder"
        raise ResourceError(msg)
    source.images = root
    for place, folders, names in os.walk(root):
        folders.sort()
        index: dict[str, _Found] = {}
        for path in map(Path(place).joinpath, sorted(names)):
            name = path.relative_to(root).as_posix()
            stem, suffix = name.removesuffix(path.suffix), path.suffix.lower()
            try:
                index.setdefault(stem, _Found()).add(suffix, name, path.read_bytes)
            except ValueError as error:
                msg = f"{path}: not text or JSON ({error})"
                raise DataError(msg) from error
        yield from _samples(source, index)
