"""A source's rows on their way through cleaning: read, judged, and written again."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pathcli.curation.duplicates import Looks, looks
from pathcli.data.formats import Source, samples
from pathcli.data.formats.tables import CAPTION, IMAGE
from pathcli.data.images import image_name, member_bytes, read_image
from pathcli.encoders.imageset import image_digest
from pathcli.types import Member, Region

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pathcli.data.formats.source import Row
    from pathcli.types import ByteArray, ImageRef, Sample

SHOWN_PX = 512
"""Short side to which larger images are shrunk once they are read."""


@dataclass(frozen=True)
class Picture:
    """An image that was read: uint8 RGB [h, w, 3], the digest of its bytes, and its looks."""

    ref: ImageRef
    pixels: ByteArray
    digest: str
    looks: Looks | None


@dataclass
class Pair:
    """A row on its way; `reason` is why it is dropped, "" as long as nothing speaks against it.

    `count` is how many rows it stands for: several where a source drops them together.
    """

    number: int
    id: str
    sample: Sample | None = None
    row: Row = field(default_factory=dict)
    reason: str = ""
    detail: str = ""
    count: int = 1
    pictures: list[Picture] = field(default_factory=list)

    def drop(self, reason: str, detail: str = "") -> None:
        """Say what speaks against it."""
        self.reason, self.detail = reason, detail

    @property
    def caption(self) -> str:
        """The text, "" for a row that has none."""
        return self.sample.answer if self.sample else ""

    @property
    def refs(self) -> tuple[ImageRef, ...]:
        """Where its images are."""
        return self.sample.images if self.sample else ()


class Rows(Source):
    """A source that remembers the row a sample is from, and what it dropped itself."""

    def __init__(self, source: Source) -> None:
        """Read what `source` reads."""
        super().__init__(source.path, source.images, source.keep)
        self.row: Row = {}
        self.lost: list[Pair] = []

    def wanted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """See `Source.wanted`."""
        for row in super().wanted(rows):
            self.row = row
            yield row

    def drop(self, why: str, name: str, count: int = 1) -> None:
        """See `Source.drop`."""
        super().drop(why, name, count)
        self.lost.append(Pair(self.rows, name, reason=why, count=count))

    def pairs_of(self, layout: str) -> Iterator[Pair]:
        """Yield what is to be judged and what was dropped already, in the order of the rows."""
        for sample in samples(self, layout):
            yield from self.taken()
            yield Pair(self.rows, str(self.row.get("id") or sample.name), sample, self.row)
        yield from self.taken()

    def taken(self) -> list[Pair]:
        """Return what was dropped since this was last called."""
        taken, self.lost = self.lost, []
        return taken


def read_picture(ref: ImageRef, looked: bool) -> Picture:
    """Return an image, and where copies are `looked` for its digest and its looks.

    Raises:
        DataError: it cannot be read.
    """
    import cv2  # noqa: PLC0415 - only where there are images

    pixels = read_image(ref)
    seen = looks(pixels) if looked else None
    if (short := min(pixels.shape[:2])) > SHOWN_PX:
        scale = SHOWN_PX / short
        pixels = np.asarray(
            cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8
        )
    return Picture(ref, pixels, (image_digest(ref) or "") if looked else "", seen)


def written(pair: Pair, out: Path, layout: str) -> Row:
    """Return a kept row: its own columns, its image named from `out` on.

    A square of a slide stays as it was named; an image inside an archive is written below `out`.
    """
    told = pair.row or _facts(pair)
    row: Row = {k: v for k, v in told.items() if not isinstance(v, Member)}
    row |= {_column(pair.row, CAPTION, "caption"): pair.caption}
    if all(isinstance(ref, Region) for ref in pair.refs):
        return row
    wanted = "image_path" if layout == "quilt-1m" else _column(pair.row, IMAGE, "image")
    names = [_placed(ref, out) for ref in pair.refs]
    return row | {wanted: names if isinstance(pair.row.get(wanted), list) else names[0]}


def _placed(ref: ImageRef, out: Path) -> str:
    """Return what an image is called in `out`; one of an archive is written there."""
    path = Path(image_name(ref))
    if isinstance(ref, Member):
        inside = Path(ref.name.replace("[", "-").replace("]", "")).parts
        parts = [part for part in inside if part not in {"..", "/"}]
        path = out / "images" / Path(ref.archive).stem / Path(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(member_bytes(ref))
    return Path(os.path.relpath(path, out)).as_posix()


def _facts(pair: Pair) -> Row:
    """Return what is known of a pair that is of no table."""
    known = {"label": pair.sample.label, "group": pair.sample.group} if pair.sample else {}
    return {name: value for name, value in known.items() if value}


def _column(row: Row, names: Sequence[str], otherwise: str) -> str:
    return next((name for name in names if name in row), otherwise)
