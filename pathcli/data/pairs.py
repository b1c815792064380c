"""The data of kind `pairs`: images and captions from a table, shards or slides, split for training.

Nothing depends on the order of rows: pairs are sorted by a hash of name and caption. They are
kept packed, since a million and a half of Python objects would fill the memory of every worker.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from array import array
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path  # noqa: TC003 - likewise
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from pathcli.data.corpus import Corpus
from pathcli.data.formats import Format, Source, samples
from pathcli.data.images import image_name, read_image
from pathcli.errors import DataError, UsageError
from pathcli.types import Member, Region, Sample

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from pathcli.types import ByteArray, ImageRef

    Hashes = NDArray[np.uint64]
    Indices = NDArray[np.int64]

_WARM_UP = 1000  # images before which a share of broken ones says little

log = logging.getLogger("pathcli")


class PairData:
    """Where the image-text pairs of a recipe come from: `data: {kind: pairs, source: ...}`."""

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
        wrong = [
            f"data.{name} is a share from 0 to below 1"
            for name, share in (("val", val), ("max_broken", max_broken))
            if not 0 <= share < 1
        ]
        if min_words < 0 or (limit is not None and limit < 1):
            wrong.append("data.min_words and data.limit are positive numbers")
        if wrong:
            raise UsageError("; ".join(wrong))
        self.source, self.format, self.images = source, format, images
        self.val, self.min_words, self.keep = val, min_words, dict(keep or {})
        self.max_broken, self.limit = max_broken, limit

    def corpus(self) -> Corpus:
        """Return the pairs, split; see `CorpusData.corpus`.

        Raises:
            DataError: the source is damaged or of no known layout, or no pair is left.
            ResourceError: the source, its slides, or a library that reads it is not there.
        """
        source = Source(self.source, self.images, self.keep)
        table = _Table()
        for sample in samples(source, self.format):
            if len(sample.images) > 1:
                source.drop("several images", sample.name)
            elif len(sample.answer.split()) < self.min_words:
                source.drop(f"fewer than {self.min_words} words", sample.name)
            else:
                table.add(sample)
        order = table.distinct()
        if len(order) < len(table):
            source.dropped["the same pair again"] += len(table) - len(order)
        if not len(order):
            raise _nothing(source)
        order = order[: self.limit]
        train, val, torn = split(table.groups[order], table.images[order], self.val)
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


def _dropped(source: Source) -> list[str]:
    if not source.dropped:
        return []
    reasons = (
        f"{why} {count}" + (f" (e.g. {source.examples[why]})" if why in source.examples else "")
        for why, count in source.dropped.most_common()
    )
    return [f"{source.dropped.total()} of {source.rows} rows left out: {', '.join(reasons)}"]


def _nothing(source: Source) -> DataError:
    why = "; ".join(_dropped(source)) or "it has no rows"
    return DataError(
        f"{source.path}: no pair of image and caption is left: {why}; images were looked for "
        f"below {source.root}: give data.images if they lie elsewhere"
    )


# --- the split ---------------------------------------------------------------------------


def split(groups: Hashes, images: Hashes, val: float) -> tuple[Indices, Indices, int]:
    """Return rows to train on, rows to validate on, and how many are on neither side.

    `groups` and `images` are hashes, uint64 [n]. Groups go to validation in the order of their
    hashes as long as they fit into its share, at least one (the smallest) and never all. A
    validation row whose image is in train too, under another group, is on neither side.
    """
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
    torn = held & np.isin(images, images[~held])
    return np.flatnonzero(~held), np.flatnonzero(held & ~torn), int(torn.sum())


class _Table:
    """Samples as they are read: packed, with hashes of pair, image and group."""

    def __init__(self) -> None:
        self._blob, self._ends = bytearray(), array("q")
        self._places: dict[str, int] = {}
        self._pairs, self._images, self._groups = array("Q"), array("Q"), array("Q")
        self._grouped = bytearray()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, sample: Sample) -> None:
        self._blob += _pack(sample, self._places)
        self._ends.append(len(self._blob))
        image = _hash(sample.name)
        self._pairs.append(_hash(sample.name, sample.answer))
        self._images.append(image)
        self._groups.append(_hash("group", sample.group) if sample.group else image)
        self._grouped.append(bool(sample.group))

    @property
    def hashes(self) -> Hashes:
        return np.array(self._pairs, np.uint64)

    @property
    def images(self) -> Hashes:
        return np.array(self._images, np.uint64)

    @property
    def groups(self) -> Hashes:
        return np.array(self._groups, np.uint64)

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
            which = "no pair has a group" if bare == len(order) else f"{bare} pairs have no group"
            found.append(
                f"{which} (patient, slide): images are split one by one, so near-duplicates of "
                "what is trained on may be validated on"
            )
        if share and not len(val):
            found.append("nothing is validated on: all pairs are of one group")
        elif len(val) > 2 * max(1, share * len(order)):
            found.append(
                f"{len(val)} of {len(order)} pairs are validated on: no group is smaller "
                f"(asked for {share:.1%})"
            )
        return found


def _hash(*parts: str) -> int:
    text = "\0".join(parts).encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


# --- packed samples ----------------------------------------------------------------------


class Packed(Sequence[Sample]):
    """Samples as one block of bytes; a sample is made when it is asked for."""

    def __init__(
        self, blob: bytearray, ends: Indices, places: tuple[str, ...], rows: Indices
    ) -> None:
        """Take samples packed one after the other; `rows` says which are meant, in order."""
        self._blob, self._ends, self._places, self._rows = blob, ends, places, rows

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Packed: ...

    def __getitem__(self, index: int | slice) -> Sample | Packed:
        """Return one sample, or a part of them."""
        if isinstance(index, slice):
            return self.select(self._rows[index])
        row = int(self._rows[index])
        start = int(self._ends[row - 1]) if row else 0
        return _unpack(self._blob[start : int(self._ends[row])], self._places)

    def select(self, rows: Indices) -> Packed:
        """Return other rows of the same block."""
        return Packed(self._blob, self._ends, self._places, rows)


def _pack(sample: Sample, places: dict[str, int]) -> bytes:
    """Return a sample as JSON; the folders, slides and archives of its images go to `places`."""

    def packed(ref: ImageRef) -> list[Any]:
        if isinstance(ref, Region):
            return [places.setdefault(ref.slide, len(places)), *ref.xy, ref.side0]
        if isinstance(ref, Member):
            place = places.setdefault(ref.archive, len(places))
            return [place, ref.offset, ref.size, ref.name]
        folder, name = os.path.split(ref)
        return [places.setdefault(folder, len(places)), name]

    refs = [packed(ref) for ref in sample.images]
    row = [sample.name, refs, sample.answer, sample.turns, sample.label, sample.group]
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _unpack(data: bytearray, places: Sequence[str]) -> Sample:
    name, refs, answer, turns, label, group = json.loads(data.decode(errors="surrogatepass"))

    def unpacked(place: int, first: Any, *rest: Any) -> ImageRef:  # noqa: ANN401 - JSON
        if not rest:
            return os.path.join(places[place], first)  # noqa: PTH118 - once for each image
        second, third = rest
        if isinstance(third, str):
            return Member(places[place], first, second, third)
        return Region(places[place], (first, second), third)

    images = tuple(unpacked(*ref) for ref in refs)
    return Sample(name, images, answer, tuple(turns), label, group)


# --- pixels ------------------------------------------------------------------------------


class Pictures:
    """Reads the images of samples; in place of a broken one it takes another sample.

    Which one is a function of the broken sample alone, so that a resumed run sees the same.
    """

    def __init__(self, pairs: Sequence[Sample], max_broken: float = 0.01) -> None:
        """Draw substitutes from `pairs`, and bear a share of `max_broken` images read."""
        self.pairs, self.max_broken = pairs, max_broken
        self.read, self.broken = 0, 0
        self._told: set[str] = set()

    def __call__(self, sample: Sample) -> tuple[Sample, ByteArray]:
        """Return a sample and its first image uint8 [h, w, 3]: the one given, or a substitute.

        Raises:
            DataError: more than `max_broken` of the images are broken.
            ResourceError: a file is there but may not be read.
        """
        start = _hash(sample.name, sample.answer)
        for this in chain([sample], self._others(start)):
            self.read += 1
            try:
                return this, read_image(this.images[0])
            except DataError as error:
                self._count(this, error)
        msg = f"{image_name(sample.images[0])}: broken, and so is every other image"
        raise DataError(msg)

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
