"""Images and captions in; the pairs worth keeping, and every other one with its reason, out.

As PA-LLaVA cleaned its data (Dai et al. 2024, arXiv:2408.09530): no captions that are too short,
none about what is not human, no images that are no pathology; and no image twice. What is
cheap to tell is asked first. The first reason found counts.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pathcli.curation.agreement import Agreement, Drawn, agreement
from pathcli.curation.clean_rows import Pair, Rows, read_picture, written
from pathcli.curation.duplicates import DISTANCE, Seen
from pathcli.data.formats import CAPTIONS, recognise
from pathcli.data.outputs import whole
from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.store.files import disk_errors
from pathcli.types import digest, silent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pathcli.curation.judges import ImageJudge, TextJudge, Verdict
    from pathcli.data.formats import Source
    from pathcli.types import ByteArray, ImageRef, Progress

Copies = Literal["image", "pair", "none"]
COPIES: dict[str, str] = {
    "image": "an image is kept once, whatever its captions; those of one row stay together",
    "pair": "an image may come again with another caption",
    "none": "nothing is looked for",
}
WORDS = 20
"""PA-LLaVA dropped captions of fewer words."""
BATCH = 64
SHORT, ANIMAL, UNREAD = "short caption", "not human", "image cannot be read"
IMAGE_OUT, COPY, ALIKE = "not pathology", "copy", "near copy"
EXAMPLES = 12  # of each reason, for the report


@dataclass(frozen=True)
class Judges:
    """Who judges; None judges nothing. The dear ones are asked about a sample of `agree` each."""

    texts: TextJudge | None = None
    images: ImageJudge | None = None
    dear_texts: TextJudge | None = None
    dear_images: ImageJudge | None = None
    agree: int = 0


@dataclass(frozen=True)
class Example:
    """A dropped row: its name, what was said of it, its caption, and its image, if it was read."""

    name: str
    detail: str
    caption: str
    pixels: ByteArray | None = None


@dataclass
class Cleaned:
    """What became of the rows: how many pairs were kept, and how many were dropped by reason.

    `undecided` counts by judge what a dear judge had no verdict on; such rows stay in. `spent`
    is what models took, where somebody counts it.
    """

    path: Path
    layout: str = ""
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    undecided: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Example]] = field(default_factory=dict)
    agreements: dict[str, Agreement] = field(default_factory=dict)
    spent: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def clean(
    source: Source,
    out: Path,
    judges: Judges,
    *,
    layout: str = "auto",
    min_words: int = WORDS,
    copies: Copies = "image",
    distance: int = DISTANCE,
    workers: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> Cleaned:
    """Write OUT/kept.jsonl and OUT/dropped.csv (row, id, reason, detail) of a source of captions.

    A kept row has all its columns, its image named from OUT on; an image inside an archive is
    written below OUT/images. Memory holds a batch of images, and about 120 bytes for each kept.

    Args:
        source: images and captions, in any layout of captions.
        out: the folder to write to.
        judges: who decides about texts and images.
        layout: the layout's name, or auto.
        min_words: the least number of words of a caption.
        copies: see `COPIES`.
        distance: bits of 64 in which near copies may differ.
        workers: threads that read images.
        seed: of the sample that dear judges see.
        progress: told how many rows were read; how many there are nobody knows.

    Raises:
        UsageError: no such rule of copies.
        DataError: not a table we read.
        ResourceError: a file may not be read or written.
    """
    rows, layout = Rows(source), _layout(source, layout)
    work = _Work(out, judges, _copies(copies, distance), min_words, seed, layout)
    with disk_errors(out, "--out"):
        out.mkdir(parents=True, exist_ok=True)
        with (
            whole(out / "kept.jsonl", "--out") as kept,
            whole(out / "dropped.csv", "--out") as dropped,
        ):
            _write(work, _judged(work, rows, workers, progress), kept, dropped)
    work.done.rows, work.done.warnings = rows.rows, rows.warnings
    work.compare()
    return work.done


def rehearse(
    source: Source,
    judges: Judges,
    *,
    layout: str = "auto",
    min_words: int = WORDS,
    copies: Copies = "image",
    distance: int = DISTANCE,
    workers: int = 2,
    seed: int = 0,
    progress: Progress = silent,
) -> int:
    """Judge as `clean` does, write nothing, and return the number of rows.

    With judges whose models are `Unasked` it tells what they would be asked at most: what they
    would drop is still there when the next is asked.

    Raises:
        PathcliError: see `clean`.
    """
    rows, layout = Rows(source), _layout(source, layout)
    work = _Work(Path(), judges, _copies(copies, distance), min_words, seed, layout)
    for _ in _judged(work, rows, workers, progress):
        pass
    work.compare()
    return rows.rows


def _copies(rule: Copies, distance: int) -> _Copies:
    if rule not in COPIES:
        msg = f"--copies: {did_you_mean(rule, [*COPIES])}"
        raise UsageError(msg)
    return _Copies(rule, Seen(distance))


def _layout(source: Source, layout: str) -> str:
    layout = recognise(source.path) if layout == "auto" else layout
    if layout not in CAPTIONS:
        msg = f"--format: {did_you_mean(layout, [*CAPTIONS])}"
        raise UsageError(msg)
    return layout


def _judged(work: _Work, rows: Rows, workers: int, progress: Progress) -> Iterator[list[Pair]]:
    """Yield every row, judged, in parts."""
    with ThreadPoolExecutor(workers, thread_name_prefix="clean") as pool:
        for batch in _batches(rows.pairs_of(work.layout)):
            work.judge(batch, pool)
            yield batch
            progress(rows.rows, rows.rows)


def _write(work: _Work, judged: Iterable[list[Pair]], kept: Path, dropped: Path) -> None:
    """Write every row where it belongs."""
    how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace"}  # half characters
    with kept.open("w", **how) as lines, dropped.open("w", newline="", **how) as rest:
        table = csv.writer(rest, lineterminator="\n")
        table.writerow(["row", "id", "reason", "detail"])
        for pair in chain.from_iterable(judged):
            if pair.reason:
                table.writerow([pair.number, pair.id, pair.reason, pair.detail])
            else:
                line = written(pair, work.out, work.layout)
                lines.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    every = iter(pairs)
    while batch := list(islice(every, BATCH)):
        yield batch


@dataclass
class _Copies:
    """Which pairs are there already, by the rule asked for."""

    rule: str
    seen: Seen
    pairs: set[int] = field(default_factory=set)

    def of(self, pair: Pair) -> tuple[int, int] | None:
        """Return the row that a pair copies, and in how many bits it differs, -1 for none."""
        found = [self.seen.find(image.digest, image.looks) for image in pair.pictures]
        apart = -1
        origins = []
        for each in found:
            if each is None:
                return None
            origins.append(each[0])
            apart = max(apart, each[1])
        if not origins or (self.rule == "image" and set(origins) == {pair.number}):
            return None
        if self.rule == "pair" and self._key(pair, origins) not in self.pairs:
            return None
        return origins[0], apart

    def add(self, pair: Pair) -> None:
        """Remember a pair that is kept."""
        origins = []
        for image in pair.pictures:
            known = self.seen.find(image.digest, image.looks)
            if known is None:
                self.seen.add(pair.number, image.digest, image.looks)
            origins.append(known[0] if known else pair.number)
        if self.rule == "pair":
            self.pairs.add(self._key(pair, origins))

    def _key(self, pair: Pair, origins: Sequence[int]) -> int:
        said = "".join(c for c in pair.caption.casefold() if c.isalnum())
        return int(digest([sorted(set(origins)), said]), 16)


@dataclass
class _Work:
    """One run: rows are judged a batch at a time, what is cheap first."""

    out: Path
    judges: Judges
    copies: _Copies
    min_words: int
    seed: int
    layout: str

    def __post_init__(self) -> None:
        self.done = Cleaned(self.out / "kept.jsonl", self.layout)
        size = self.judges.agree
        self.texts: Drawn[tuple[str, bool]] = Drawn(size, self.seed)
        self.images: Drawn[tuple[ImageRef, bool]] = Drawn(size, self.seed)

    def judge(self, batch: list[Pair], pool: ThreadPoolExecutor) -> None:
        """Find the reasons against the pairs of a batch, and count."""
        open_pairs = [pair for pair in batch if not pair.reason]
        for pair in open_pairs:
            if (count := len(pair.caption.split())) < self.min_words:
                pair.drop(SHORT, f"{count} words")
        self._judge_texts([pair for pair in open_pairs if not pair.reason])
        left = [pair for pair in open_pairs if not pair.reason]
        if self.judges.images or self.copies.rule != "none":
            self._read(left, pool)
            left = [pair for pair in left if not pair.reason]
            self._drop_copies(left)  # what is there already need not be judged
            self._judge_images([pair for pair in left if not pair.reason])
            self._drop_copies([pair for pair in left if not pair.reason], add=True)
        for pair in batch:
            self._count(pair)

    def _judge_texts(self, pairs: list[Pair]) -> None:
        if not self.judges.texts or not pairs:
            return
        found = self.judges.texts([pair.caption for pair in pairs])
        for pair, verdict in zip(pairs, found, strict=True):
            self._settle(pair, verdict, ANIMAL, self.judges.texts.name)
            self.texts.offer((pair.caption, bool(verdict.out)))

    def _judge_images(self, pairs: list[Pair]) -> None:
        if not self.judges.images or not pairs:
            return
        every = [(pair, image) for pair in pairs for image in pair.pictures]
        found = self.judges.images([i.ref for _, i in every], [i.pixels for _, i in every])
        for (pair, image), verdict in zip(every, found, strict=True):
            if not pair.reason:
                self._settle(pair, verdict, IMAGE_OUT, self.judges.images.name)
            self.images.offer((image.ref, bool(verdict.out)))

    def _settle(self, pair: Pair, verdict: Verdict, reason: str, judge: str) -> None:
        if verdict.out:
            pair.drop(reason, f"{judge}: {verdict.why}")
        self.done.undecided[judge] += verdict.out is None

    def _read(self, pairs: list[Pair], pool: ThreadPoolExecutor) -> None:
        looked = self.copies.rule != "none"
        jobs = [[pool.submit(read_picture, ref, looked) for ref in pair.refs] for pair in pairs]
        for pair, images in zip(pairs, jobs, strict=True):
            try:
                pair.pictures = [image.result() for image in images]
            except DataError as error:
                pair.drop(UNREAD, str(error))

    def _drop_copies(self, pairs: list[Pair], *, add: bool = False) -> None:
        if self.copies.rule == "none":
            return
        for pair in pairs:
            if found := self.copies.of(pair):
                what = f"{found[1]} of 64 bits differ from row {found[0]}"
                near = found[1] >= 0
                pair.drop(ALIKE if near else COPY, what if near else f"of row {found[0]}")
            elif add:
                self.copies.add(pair)

    def _count(self, pair: Pair) -> None:
        if not pair.reason:
            self.done.kept += 1
            return
        self.done.dropped[pair.reason] += pair.count
        shown = self.done.examples.setdefault(pair.reason, [])
        if len(shown) < EXAMPLES:
            pixels = pair.pictures[0].pixels if pair.pictures else None
            shown.append(Example(pair.id, pair.detail, pair.caption, pixels))

    def compare(self) -> None:
        """Ask the dear judges about the samples drawn."""
        if self.texts.found and self.judges.dear_texts:
            dear = self.judges.dear_texts([text for text, _ in self.texts.found])
            self._agreed("texts", [out for _, out in self.texts.found], dear)
        if self.images.found and self.judges.dear_images:
            refs = [ref for ref, _ in self.images.found]
            dear = self.judges.dear_images(refs, [])
            self._agreed("images", [out for _, out in self.images.found], dear)

    def _agreed(self, what: str, cheap: Sequence[bool], dear: Sequence[Verdict]) -> None:
        self.done.agreements[what] = agreement(cheap, [verdict.out for verdict in dear])
