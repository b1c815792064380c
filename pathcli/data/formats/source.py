"""Where samples come from, which files are there, and why rows were left out."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError
from pathcli.registry import did_you_mean
from pathcli.types import Member, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pathcli.types import ImageRef

Row = dict[str, Any]
"""One record, its keys in lower case; an image is a name, a list of names, or a `Member`."""

Talk = tuple[tuple[str, ...], str]
"""What is said in turns before an answer, and the answer; before a caption nothing is said."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
"""The files that are images."""

_TCGA = re.compile(r"TCGA-\w\w-\w{4}(?=-|$)")
_ANY = "*"


@dataclass
class Source:
    """What is read, what of it is wanted, and what became of the rows.

    `images` is the folder of images or slides (default: beside the table); `keep` maps columns
    to the values wanted, "*" for any that is not empty; `deep` looks for an image in all
    folders below `images` by its name alone; `bare` lets names lack the file's ending; `words`
    takes what is said alone, and leaves images that rows name where they are.
    """

    path: Path
    images: Path | None = None
    keep: Mapping[str, Sequence[str]] = field(default_factory=dict)
    deep: bool = False
    bare: bool = False
    words: bool = False
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        """Return the folder that names of images are relative to."""
        return self.images or (self.path if self.path.is_dir() else self.path.parent)

    def drop(self, why: str, name: str, count: int = 1) -> None:
        """Count a row that is left out, and remember the first of its kind."""
        self.dropped[why] += count
        self.examples.setdefault(why, name)

    def wanted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Yield the rows that `keep` lets pass; all are counted.

        Raises:
            DataError: a column of `keep` is not there.
        """
        keep = {column.casefold(): set(values) for column, values in self.keep.items()}
        for row in rows:
            if not self.rows:
                _check_columns(self.path, keep, row)
            self.rows += 1
            for column, values in keep.items():
                value = row.get(column)
                text = "" if value is None else str(value).strip()
                if not text or (text not in values and _ANY not in values):
                    why = f"{column} is {'not of data.keep' if text else 'empty'}"
                    self.drop(why, text or f"row {self.rows}")
                    break
            else:
                yield row

    def pairs(
        self, image: object, captions: object, label: object = None, group: object = None
    ) -> Iterator[Sample]:
        """Yield a sample for each caption of an image, or of several images shown together."""
        talks: list[Talk] = [((), text) for text in texts(captions)]
        yield from self.talks(image, talks, "no caption", label=label, group=group)

    def talks(
        self,
        image: object,
        talks: Sequence[Talk],
        why: str,
        *,
        label: object = None,
        group: object = None,
        name: str = "",
    ) -> Iterator[Sample]:
        """Yield a sample for each talk about one image or several; `why` says there is none.

        `name` stands for the image where its place does not name it.
        """
        given = [] if self.words else image if isinstance(image, list) else [image]
        names = [name for name in given if name]
        shown = str(getattr(names[0], "name", names[0])) if names else f"row {self.rows}"
        if not names and not self.words:
            self.drop("no image is named", shown)
            return
        if not talks:
            self.drop(why, shown)
            return
        refs = tuple(ref for name in names if (ref := self._ref(name)) is not None)
        if len(refs) < len(names):
            self.drop("no such image file", shown)
            return
        same = name or ", ".join(_name(ref, name) for ref, name in zip(refs, names, strict=True))
        same = same or shown
        for turns, answer in talks:
            yield Sample(same, refs, answer, turns, plain(label), patient(plain(group)))

    def _ref(self, name: object) -> ImageRef | None:
        if isinstance(name, Member):
            return name
        return self.files.find(str(name)) if isinstance(name, (str, int)) else None

    @cached_property
    def files(self) -> Files:
        """What is there below `root`."""
        return Files(self.root, deep=self.deep, bare=self.bare)

    def absorb(self, other: Source) -> None:
        """Count what became of another source's rows as well."""
        self.rows += other.rows
        self.dropped += other.dropped
        self.examples = other.examples | self.examples
        self.warnings += other.warnings


class Files:
    """Which files exist, known from one listing of each folder rather than a look at each file."""

    def __init__(self, root: Path, *, deep: bool = False, bare: bool = False) -> None:
        """List nothing yet; `deep` finds a file in any folder below `root`, `bare` any ending."""
        self.root, self._deep, self._bare = str(root), deep, bare
        self._listed: dict[str, frozenset[str]] = {}
        self._elsewhere: dict[str, str] = {}

    def find(self, name: str) -> str | None:
        """Return the path of an image: as named below the root, straight in it, or (deep) below.

        A file that is not where it is named stands for one name alone, the first; and of
        several files of one name in the folders below none is taken.
        """
        lacks = self._bare and not name.lower().endswith(ENDINGS)
        spelled = [name, *(name + ending for ending in ENDINGS)] if lacks else [name]
        return next((path for path in map(self._find, spelled) if path), None)

    def _find(self, name: str) -> str | None:
        folder, base = os.path.split(os.path.join(self.root, name))  # noqa: PTH118 - a million times
        if base not in self._names(folder):
            below = self._below.get(base) if self._deep else None
            place = self.root if base in self._names(self.root) else below
            if not place or self._elsewhere.setdefault(base, name) != name:
                return None
            folder = place
        return os.path.join(folder, base)  # noqa: PTH118 - a million times

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(os.listdir(folder))  # noqa: PTH208 - names alone
            except OSError:
                self._listed[folder] = frozenset()
        return self._listed[folder]

    @cached_property
    def _below(self) -> dict[str, str]:
        """Return the folder of each name, "" where several folders have it."""
        found: dict[str, str] = {}
        for folder, _, names in os.walk(self.root):
            for name in names:
                found[name] = "" if name in found else folder
        return found


def texts(value: object) -> list[str]:
    """Return the captions of a cell: one text or a list of them, without empty ones."""
    cells = value if isinstance(value, list) else [value]
    return [cell.strip() for cell in cells if isinstance(cell, str) and cell.strip()]


def plain(value: object) -> str:
    """Return a cell as text, "" for None."""
    return "" if value is None else str(value).strip()


def patient(group: str) -> str:
    """Return the patient of a TCGA barcode (its first three fields), else the group itself."""
    found = _TCGA.match(group)
    return found.group() if found else group


def _name(ref: ImageRef, name: object) -> str:
    if isinstance(ref, Member):
        return f"{Path(ref.archive).stem}/{ref.name}"
    return posixpath.normpath(str(name))


def _check_columns(path: Path, keep: Mapping[str, set[str]], row: Row) -> None:
    for column in keep:
        if column not in row:
            msg = f"{path}: data.keep: no column {column!r}: {did_you_mean(column, [*row])}"
            raise DataError(msg)
