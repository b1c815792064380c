"""Files of images and texts in, what is wrong with them out: a finding a row, and counts.

Looked for are rows that cannot be read (no such file, no answer, half a conversation), images
that are broken or of an absurd size, texts of blanks, rows that stand twice, answers that stand
in their question, and leaks: an image (the same pixels, or alike to the eye) or a group (patient,
slide, video) in more than one split. A split is the column `split` of a row, else its file.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
import unicodedata
from array import array
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pathcli.curation.duplicates import Looks, Seen, looks
from pathcli.data.formats import TALKS, Source, samples
from pathcli.data.formats.conversations import group_of
from pathcli.data.images import image_name, member_bytes, read_image
from pathcli.data.layouts import spelt
from pathcli.errors import DataError, ResourceError
from pathcli.store.files import write_bytes
from pathcli.types import Member, Region, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pathcli.data.formats.source import Row
    from pathcli.types import ImageRef, Progress, Sample

SMALLEST, LARGEST, LONGEST = 32, 80_000_000, 10
"""Pixels of a side, pixels of an image, and sides to each other, beyond which a size is absurd."""

ABSURD = "an image of absurd size"
NEAR = "an image like one in another split"
DAMAGED = "the file cannot be read on"
_BATCH = 128
_CHOICE = re.compile(r"\bor\b|\n\s*\(?[A-Ha-h][.:)]")
_WORD = re.compile(r"\w+")
_BARE = {"yes", "no", "none", "not"}


@dataclass(frozen=True)
class Finding:
    """One fault: `row` counts the samples or records of `file` from 1, 0 is the whole file."""

    file: str
    row: int
    name: str
    what: str
    detail: str = ""


@dataclass
class Checked:
    """What was checked, a dictionary a file, and what was found."""

    files: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)

    def counts(self) -> list[dict[str, Any]]:
        """Return how often each fault was found, with an example, the most frequent first."""
        first: dict[str, Finding] = {}
        for found in self.findings:
            first.setdefault(found.what, found)
        return [
            {"fault": what, "count": count, "e.g.": _told(first[what])}
            for what, count in Counter(f.what for f in self.findings).most_common()
        ]


def _told(found: Finding) -> str:
    where = f"row {found.row}, " if found.row else ""
    return f"{where}{found.name}" + (f": {found.detail}" if found.detail else "")


def check_files(
    paths: Sequence[Path],
    *,
    images: Path | None = None,
    layout: str = "auto",
    fast: bool = False,
    workers: int = 4,
    progress: Progress = silent,
) -> Checked:
    """Return what is wrong with files, read one after the other; see the module.

    `fast` reads the headers of images alone: pixels are neither decoded nor compared, and an
    image is in two splits only where both name the same file.

    Raises:
        ResourceError: a file is not there, or a library that reads it.
    """
    check = _Check(fast=fast)
    names = Counter(path.name for path in paths)
    with ThreadPoolExecutor(workers) as pool:
        for path in paths:
            at = path.expanduser().absolute()
            source = _Watched(at, images and images.expanduser().absolute(), bare=True)
            side = at.name if names[path.name] == 1 else str(path)
            check.file(source, side, layout, pool, progress)
    check.torn_groups()
    return check.done


def write_findings(findings: Iterable[Finding], path: Path) -> None:
    """Write findings as CSV: file, row, name, what, detail.

    Raises:
        ResourceError: the disk is full or closed.
    """
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["file", "row", "name", "what", "detail"])
    table.writerows((f.file, f.row, f.name, f.what, f.detail) for f in findings)
    data = text.getvalue().encode(errors="backslashreplace")
    write_bytes(path, data, lambda _: None, "--out")


# --- reading -----------------------------------------------------------------------------


@dataclass
class _Watched(Source):
    """A source that remembers each row it drops, and the row it is at."""

    drops: list[tuple[int, str, str]] = field(default_factory=list)
    row: Row = field(default_factory=dict)

    def wanted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """See `Source.wanted`."""
        for row in super().wanted(rows):
            self.row = row
            yield row

    def drop(self, why: str, name: str, count: int = 1) -> None:
        """See `Source.drop`."""
        super().drop(why, name, count)
        self.drops.append((self.rows, name, why if count == 1 else f"{why} ({count} rows)"))


@dataclass(frozen=True)
class _Look:
    """What was seen of an image: a digest in hex, its looks, and what is wrong with it."""

    digest: str
    looks: Looks | None = None
    fault: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _At:
    """A sample and where it stands; `number` counts the samples of all files."""

    sample: Sample
    number: int
    file: str
    row: int
    split: str


class _Check:
    """What is known of all files so far: a few numbers for each sample and image."""

    def __init__(self, *, fast: bool) -> None:
        self.done = Checked()
        self._fast = fast
        self._files: list[str] = []
        self._file, self._row = array("H"), array("L")  # of each sample
        self._digests: dict[int, str] = {}  # of each image, by its reference
        self._first: dict[str, tuple[int, str]] = {}  # of each digest: a sample and its split
        self._told: set[tuple[str, str]] = set()  # digest and split
        self._seen: defaultdict[str, Seen] = defaultdict(Seen)  # by split
        self._said: dict[int, int] = {}  # a hash of split, images and texts: a sample
        self._groups: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def file(
        self, source: _Watched, side: str, layout: str, pool: ThreadPoolExecutor, step: Progress
    ) -> None:
        """Check one file; `side` is the split of rows that name none."""
        self._files.append(str(source.path))
        begun, found = len(self._row), self._read(source, side, layout)
        while batch := list(islice(found, _BATCH)):
            refs = {_hash(image_name(ref)): ref for at in batch for ref in at.sample.images}
            new = [key for key in refs if key not in self._digests]
            looked = pool.map(self._look, [refs[key] for key in new])
            looks_of = dict(zip(new, looked, strict=True))
            for at in batch:
                self._sample(at, looks_of)
            step(source.rows, 0)
        path = str(source.path)
        self.done.findings += [Finding(path, row, name, why) for row, name, why in source.drops]
        counts = {"rows": source.rows, "samples": len(self._row) - begun}
        self.done.files.append({"file": path} | counts | {"warnings": source.warnings})

    def _read(self, source: _Watched, side: str, layout: str) -> Iterator[_At]:
        """Yield the samples of a file up to where it cannot be read on."""
        path = str(source.path)
        try:
            for sample in samples(source, layout, TALKS):
                told = source.row.get("split")
                split = spelt(told) if isinstance(told, str) and told.strip() else side
                if split not in self.done.splits:
                    self.done.splits.append(split)
                self._row.append(source.rows)
                self._file.append(len(self._files) - 1)
                yield _At(sample, len(self._row) - 1, path, source.rows, split)
        except DataError as error:
            self.done.findings.append(Finding(path, source.rows, "", DAMAGED, str(error)))
        except ResourceError:
            if not source.rows:
                raise  # otherwise none of its slides is there, which each row says

    def _sample(self, at: _At, looked: dict[int, _Look]) -> None:
        sample = at.sample
        if any(map(_blank, (*sample.turns, sample.answer))):
            self._find(at, "a text of blanks")
        elif sample.turns and gives_away(sample.turns[-1], sample.answer):
            self._find(at, "the answer stands in the question", sample.answer)
        digests = []
        for ref in sample.images:
            key = _hash(image_name(ref))
            if key not in self._digests:
                self._new(at, ref, look := looked[key])
                self._digests[key] = look.digest
            digests.append(self._digests[key])
            self._torn(at, digests[-1])
        text = "\0".join((at.split, *digests, "", *sample.turns, sample.answer))
        if (first := self._said.setdefault(_hash(text), at.number)) != at.number:
            self._find(at, "a row that stands twice", f"as {self._where(first)}")
        if group := sample.group or group_of({}, sample.name):
            self._groups[group][at.split] += 1

    def _find(self, at: _At, what: str, detail: str = "") -> None:
        self.done.findings.append(Finding(at.file, at.row, at.sample.name, what, detail))

    def _where(self, number: int) -> str:
        return f"row {self._row[number]} of {Path(self._files[self._file[number]]).name}"

    # --- images ---

    def _look(self, ref: ImageRef) -> _Look:
        name = hashlib.blake2b(image_name(ref).encode(errors="surrogatepass"), digest_size=16)
        try:
            if self._fast:
                width, height = _size(ref)
                if width * height > LARGEST:
                    return _Look(name.hexdigest(), None, ABSURD, f"{width} x {height} px")
                return _Look(name.hexdigest(), None, *_absurd(width, height))
            pixels = read_image(ref)
        except DataError as error:
            return _Look(name.hexdigest(), None, "a broken image", str(error))
        height, width = pixels.shape[:2]
        digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=b"%d" % width)
        return _Look(digest.hexdigest(), looks(pixels), *_absurd(width, height))

    def _new(self, at: _At, ref: ImageRef, look: _Look) -> None:
        """Judge an image that was not seen before, and compare it with those of other splits."""
        if look.fault:
            where = "" if image_name(ref) in look.detail else f"{image_name(ref)}: "
            self._find(at, look.fault, where + look.detail)
        if self._fast or (look.fault and look.fault != ABSURD):
            return
        for split, seen in self._seen.items():
            near = seen.find(look.digest, look.looks) if split != at.split else None
            if near and near[1] >= 0:
                self._find(at, NEAR, f"{at.split}; {split}: {self._where(near[0])}")
        self._seen[at.split].add(at.number, look.digest, look.looks)

    def _torn(self, at: _At, digest: str) -> None:
        """Tell of an image in this split if it is in another, once a split."""
        first, split = self._first.setdefault(digest, (at.number, at.split))
        if split != at.split and (digest, at.split) not in self._told:
            self._told.add((digest, at.split))
            self._find(
                at, "an image in several splits", f"{at.split}; {split}: {self._where(first)}"
            )

    def torn_groups(self) -> None:
        """Tell of the groups that are in several splits."""
        for group, counts in self._groups.items():
            if len(counts) > 1:
                detail = ", ".join(f"{split} {count}" for split, count in counts.items())
                self.done.findings.append(
                    Finding("", 0, group, "a group in several splits", detail)
                )


def _hash(text: str) -> int:
    data = text.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _size(ref: ImageRef) -> tuple[int, int]:
    """Return width and height as an image's header has them.

    Raises:
        DataError: not there, or not an image.
    """
    if isinstance(ref, Region):
        return ref.side0, ref.side0
    try:
        with Image.open(io.BytesIO(member_bytes(ref)) if isinstance(ref, Member) else ref) as image:
            return image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return LARGEST, LARGEST
    except (OSError, ValueError, SyntaxError) as error:
        msg = f"{image_name(ref)}: not an image ({type(error).__name__})"
        raise DataError(msg) from error


def _absurd(width: int, height: int) -> tuple[str, str]:
    """Return a fault and its detail, both empty if a size can be."""
    small, large = sorted((width, height))
    wrong = small < SMALLEST or large > LONGEST * small
    return (ABSURD, f"{width} x {height} px") if wrong else ("", "")


# --- texts -------------------------------------------------------------------------------


def _blank(text: str) -> bool:
    """Return whether a text has nothing to be seen: blanks and control characters alone."""
    return all(unicodedata.category(sign)[0] in "ZC" for sign in text)


def gives_away(question: str, answer: str) -> bool:
    """Return whether an answer stands in its question, word for word.

    Not where the question offers choices ("or", lines of A: B:), nor for yes and no.
    """
    asked, told = ([*_WORD.findall(text.casefold())] for text in (question, answer))
    if not told or (len(told) == 1 and told[0] in _BARE) or _CHOICE.search(question):
        return False
    return f" {' '.join(told)} " in f" {' '.join(asked)} "
