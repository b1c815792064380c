"""The data of kind `pairs`: images and captions from a table, shards or slides, split for training.

What it shares with the kind `instructions` is `SampleData`: reading, splitting and packing.

Nothing depends on the order of rows: pairs are sorted by a hash of name and caption. They are
kept packed, since a million and a half of Python objects would fill the memory of every worker.
"""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence  # noqa: TC003 - recipes read annotations
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pathcli.data.corpus import Corpus
from pathcli.data.formats import CAPTIONS, Format, Source, samples
from pathcli.data.images import image_name, read_image
from pathcli.data.packed import Packed, pack
from pathcli.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from pathcli.data.corpus import CorpusData
    from pathcli.types import ByteArray, Sample

    Hashes = NDArray[np.uint64]
    Indices = NDArray[np.int64]

_WARM_UP = 1000  # images before which a share of broken ones says little

log = logging.getLogger("pathcli")


class SampleData(ABC):
    """What kinds of data read from files share: a base; `noun` is what they call a sample."""

    noun = "sample"

    def __init__(self, *, val: float, min_words: int, max_broken: float, limit: int | None) -> None:
        """Keep the settings; see `PairData`.

        Raises:
            UsageError: a number out of its range.
        """
        wrong = [
            f"data.{name} is a share from 0 to below 1"
            for name, share in (("val", val), ("max_broken", max_broken))
            if not 0 <= share < 1
        ]
        if min_words < 0 or (limit is not None and limit < 1):
            wrong.append("data.min_words and data.limit are positive numbers")
        if wrong:
            raise UsageError("; ".join(wrong))
        self.val, self.min_words = val, min_words
        self.max_broken, self.limit = max_broken, limit

    @abstractmethod
    def read(self) -> Iterator[tuple[Source, Iterator[Sample]]]:
        """Yield each source and its samples."""

    def unfit(self, sample: Sample) -> str:
        """Return why a sample is left out, "" if it is not."""
        short = not sample.turns and len(sample.answer.split()) < self.min_words
        return f"fewer than {self.min_words} words" if short else ""

    def corpus(self) -> Corpus:
        """Return the samples, split; see `CorpusData.corpus`.

        Raises:
            DataError: a source is damaged or of no known layout, or no sample is left.
            ResourceError: a source, its slides, or a library that reads it is not there.
        """
        table, sources, roots = _Table(self.noun), list[Source](), list[Path]()
        for each, found in self.read():
            sources.append(each)
            roots += [each.root] if each.root not in roots else []
            for sample in found:
                if why := self.unfit(sample):
                    each.drop(why, sample.name)
                else:
                    table.add(sample, roots.index(each.root))
        source = sources[0]
        for other in sources[1:]:
            source.absorb(other)
        order = table.distinct()
        if len(order) < len(table):
            source.dropped[f"the same {self.noun} again"] += len(table) - len(order)
        if not len(order):
            raise _nothing(self.noun, source, sources)
        order = order[: self.limit]
        images, of = table.images(order)
        train, val, torn = split(table.groups[order], images, self.val, of)
        if torn:
            source.dropped["the image is in train under another group"] += torn
        packed = table.packed()
        return Corpus(
            packed.select(order[train]),
            packed.select(order[val]),
            hashlib.sha256(table.hashes[order].tobytes()).hexdigest()[:12],
            dict(source.dropped),
            (*source.warnings, *_dropped(source), *table.warnings(order, val, self.val)),
        )

    def pictures(self, pairs: Sequence[Sample]) -> Pictures:
        """Return what reads the images of `pairs`, with this data's `max_broken`."""
        return Pictures(pairs, self.max_broken)


class PairData(SampleData):
    """Where the image-text pairs of a recipe come from: `data: {kind: pairs, source: ...}`."""

    noun = "pair"

    def __init__(
        self,
        *,
        source: Path,
        format: Format = "auto",  # noqa: A002 - the recipe's word
        images: Path | None = None,
        val: float = 0.01,
        min_words: int = 0,
        keep: Mapping[str, Sequence[str]] | None = None,
        max_broken: float = 0.01,
        limit: int | None = None,
    ) -> None:
        """Keep the settings; files are read by `corpus`.

        Args:
            source: a table (CSV, TSV, JSON, JSONL, Parquet), a folder, or tar shards
                (`train-{000..012}.tar`, a glob, a folder).
            format: its layout (see `pathcli.data.formats`), or auto.
            images: the folder of images, or of slides (default: beside the table).
            val: share of the pairs that is validated on; groups stay whole.
            min_words: captions of fewer words are left out.
            keep: columns and the values wanted of them, "*" for any that is not empty.
            max_broken: share of images that may turn out broken; past it training stops.
            limit: use so many pairs only, the same ones each time.

        Raises:
            UsageError: a number out of its range.
        """
        super().__init__(val=val, min_words=min_words, max_broken=max_broken, limit=limit)
        self.source, self.format, self.images = source, format, images
        self.keep = dict(keep or {})

    def read(self) -> Iterator[tuple[Source, Iterator[Sample]]]:
        """See `SampleData.read`."""
        source = Source(self.source, self.images, self.keep)
        yield source, samples(source, self.format, CAPTIONS)

    def unfit(self, sample: Sample) -> str:
        """See `SampleData.unfit`."""
        return "several images" if len(sample.images) > 1 else super().unfit(sample)


def _dropped(source: Source) -> list[str]:
    if not source.dropped:
        return []
    reasons = (
        f"{why} {count}" + (f" (e.g. {source.examples[why]})" if why in source.examples else "")
        for why, count in source.dropped.most_common()
    )
    return [f"{source.dropped.total()} of {source.rows} rows left out: {', '.join(reasons)}"]


def _nothing(noun: str, source: Source, sources: Sequence[Source]) -> DataError:
    paths, roots = (
        ", ".join(dict.fromkeys(map(str, places)))
        for places in ([s.path for s in sources], [s.root for s in sources])
    )
    why = "; ".join(_dropped(source)) or "it has no rows"
    return DataError(
        f"{paths}: no {noun} is left: {why}; images were looked for below {roots}: "
        "give data.images if they lie elsewhere"
    )


# --- the split ---------------------------------------------------------------------------


def split(
    groups: Hashes, images: Hashes, val: float, of: Indices | None = None
) -> tuple[Indices, Indices, int]:
    """Return rows to train on, rows to validate on, and how many are on neither side.

    `groups` are hashes, uint64 [n]; `images` those of all images, uint64 [m], and `of` int64
    [m] the rows they are of (default: an image each). Groups go to validation in the order of their
    hashes as long as they fit into its share, at least one (the smallest) and never all. A
    validation row whose image is in train too, under another group, is on neither side.
    """
    of = np.arange(len(groups)) if of is None else of
    names, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(names), bool)
    if val and len(names) > 1:
        room = max(1, round(val * len(groups)))
        for group, size in enumerate(sizes.tolist()):
            if size <= room:
                chosen[group] = True
                room -= size
            if not room:
                break
        if not chosen.any():
            chosen[sizes.argmin()] = True
        chosen[-1] &= not chosen.all()
    held = chosen[group_of]
    seen = np.isin(images, images[~held[of]])
    torn = held & (np.bincount(of[seen], minlength=len(groups)) > 0)
    return np.flatnonzero(~held), np.flatnonzero(held & ~torn), int(torn.sum())


class _Table:
    """Samples as they are read: packed, with hashes of pair, image and group."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._blob, self._ends = bytearray(), array("q")
        self._places: dict[str, int] = {}
        self._pairs, self._images, self._groups = array("Q"), array("Q"), array("Q")
        self._of = array("q")
        self._grouped = bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, sample: Sample, root: int) -> None:
        """Take a sample; names below another root (the number of a folder) are of other images."""
        where = (f"root {root}",) if root else ()
        names = sample.name.split(", ")
        names = names if len(names) == len(sample.images) else [sample.name]
        images = [_hash(*where, name) for name in names]
        self._of.extend([len(self)] * len(images))
        self._images.extend(images)
        self._blob += pack(sample, self._places)
        self._ends.append(len(self._blob))
        self._pairs.append(_hash(*where, sample.name, *sample.turns, sample.answer))
        self._groups.append(_hash("group", sample.group) if sample.group else images[0])
        self._grouped.append(bool(sample.group))

    @property
    def hashes(self) -> Hashes:
        return np.array(self._pairs, np.uint64)

    @property
    def groups(self) -> Hashes:
        return np.array(self._groups, np.uint64)

    def images(self, order: Indices) -> tuple[Hashes, Indices]:
        """Return the images of the rows in `order`, and where in it their rows are."""
        rank = np.full(len(self), -1)
        rank[order] = np.arange(len(order))
        of = rank[np.array(self._of, np.int64)]
        return np.array(self._images, np.uint64)[of >= 0], of[of >= 0]

    def distinct(self) -> Indices:
        """Return the rows without repetitions, in the order of their hashes."""
        return np.unique(self.hashes, return_index=True)[1]

    def packed(self) -> Packed:
        ends = np.array(self._ends, np.int64)
        return Packed(self._blob, ends, tuple(self._places), np.arange(len(ends)))

    def warnings(self, order: Indices, val: Indices, share: float) -> list[str]:
        """Return what the split should be known for."""
        bare = len(order) - int(np.frombuffer(self._grouped, np.uint8)[order].sum())
        found = []
        if bare:
            none, some = f"no {self._noun} has a group", f"{bare} {self._noun}s have no group"
            which = none if bare == len(order) else some
            found.append(
                f"{which} (patient, slide): images are split one by one, so near-duplicates of "
                "what is trained on may be validated on"
            )
        if share and not len(val):
            found.append(f"nothing is validated on: all {self._noun}s are of one group")
        elif len(val) > 2 * max(1, share * len(order)):
            found.append(
                f"{len(val)} of {len(order)} {self._noun}s are validated on: no group is smaller "
                f"(asked for {share:.1%})"
            )
        return found


def _hash(*parts: str) -> int:
    text = "\0".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# --- pixels ------------------------------------------------------------------------------


class Pictures:
    """Reads the images of samples; in place of a broken one it takes another sample.

    Which one is a function of the broken sample alone, so that a resumed run sees the same.
    """

    def __init__(
        self,
        pairs: Sequence[Sample],
        max_broken: float = 0.01,
        max_pixels: int | None = None,
    ) -> None:
        """Draw substitutes from `pairs`, and bear a share of `max_broken` images read.

        Images of more than `max_pixels` are left aside as well: `skipped` counts them.
        """
        self.pairs, self.max_broken, self.max_pixels = pairs, max_broken, max_pixels
        self.read, self.broken, self.skipped = 0, 0, 0
        self._told: set[str] = set()

    def __call__(self, sample: Sample) -> tuple[Sample, ByteArray]:
        """Return a sample and its first image uint8 [h, w, 3]: the one given, or a substitute.

        Raises:
            DataError: more than `max_broken` of the images are broken.
            ResourceError: a file is there but may not be read.
        """
        this, images = self.all(sample)
        return this, images[0]

    def all(self, sample: Sample) -> tuple[Sample, list[ByteArray]]:
        """Return a sample and all its images; see `__call__`."""
        start = _hash(sample.name, *sample.turns, sample.answer)
        for this in chain([sample], self._others(start)):
            self.read += len(this.images)
            try:
                images = [read_image(ref) for ref in this.images]
            except DataError as error:
                self._count(this, error)
                continue
            if not any(self._too_large(image) for image in images):
                return this, images
            self._skip(this)
        fault = "too large" if self.skipped else "broken"
        msg = f"{image_name(sample.images[0])}: {fault}, and no other image can be used"
        raise DataError(msg)

    def _too_large(self, image: ByteArray) -> bool:
        return self.max_pixels is not None and image.shape[0] * image.shape[1] > self.max_pixels

    def _skip(self, sample: Sample) -> None:
        self.skipped += 1
        if sample.name not in self._told:
            self._told.add(sample.name)
            log.info("%s: more than %s px, another is used", sample.name, self.max_pixels)

    def _others(self, start: int) -> Iterable[Sample]:
        count = len(self.pairs)
        return (self.pairs[(start + step) % count] for step in range(count))

    def _count(self, sample: Sample, error: DataError) -> None:
        self.broken += 1
        if sample.name not in self._told:
            self._told.add(sample.name)
            log.warning("broken image, another is used instead: %s", error)
        few = min(_WARM_UP, len(self.pairs))
        if self.broken > self.max_broken * max(self.read, few):
            msg = (
                f"{error}; {self.broken} of {self.read} images read are broken, more than "
                f"data.max_broken={self.max_broken:g}; mend the data or raise it"
            )
            raise DataError(msg) from error


def pictures_of(data: CorpusData, samples: Sequence[Sample]) -> Pictures:
    """Return what reads the images of `samples`, as tolerant of broken ones as the data say."""
    return data.pictures(samples) if isinstance(data, SampleData) else Pictures(samples)
