"""The data of kind `instructions`: questions, conversations and captions about images.

One source or several, of any layout in `pathcli.data.formats.TALKS`; a mixture such as
PA-LLaVA's second stage is a list of its tables:

    data:
      kind: instructions
      source: [pathvqa/qas/train_vqa.pkl, pmc-vqa/train.csv]
      images: [pathvqa/images, pmc-vqa/images]

The kind `texts` is the same without images.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence  # noqa: TC003 - recipes read annotations
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.data.formats import TALKS, Source, TalkFormat, samples
from pathcli.data.pairs import Pictures, SampleData
from pathcli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pathcli.types import ByteArray, Sample


class InstructionData(SampleData):
    """Where instructions come from: `data: {kind: instructions, source: ...}`."""

    noun = "instruction"

    def __init__(
        self,
        *,
        source: Path | list[Path],
        images: Path | list[Path] | None = None,
        format: TalkFormat = "auto",  # noqa: A002 - the recipe's word
        val: float = 0.01,
        min_words: int = 0,
        keep: Mapping[str, Sequence[str]] | None = None,
        max_broken: float = 0.01,
        limit: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Keep the settings; files are read by `corpus`.

        Args:
            source: a table, a pickle, a folder or tar shards, or a list of them; "*" stands for
                several files.
            images: the folder of images or slides, or a list, one for each source (default:
                beside each source). Names may lack the ending.
            format: the layout of all sources, or auto: each is recognised for itself.
            val: share of the instructions that is validated on; groups, and all questions of an
                image, stay whole.
            min_words: captions of fewer words are left out; answers to questions may be short.
            keep: columns and the values wanted of them, "*" for any that is not empty; every
                source needs the column.
            max_broken: share of images that may turn out broken, and of samples that cannot be
                told (chat.limit has no room for them, say); past it training stops.
            limit: use so many instructions only, the same ones each time.
            max_pixels: larger images are skipped where they are read (PA-LLaVA: 16777216).

        Raises:
            UsageError: a number out of its range, or not as many `images` as sources.
        """
        super().__init__(val=val, min_words=min_words, max_broken=max_broken, limit=limit)
        paths = _list(source)
        roots: list[Path | None] = [*_list(images)] or [None]
        if not paths or len(roots) not in {1, len(paths)}:
            msg = f"data.images: one folder, or one for each of {len(paths)} in data.source"
            raise UsageError(msg)
        if max_pixels is not None and max_pixels < 1:
            msg = f"data.max_pixels: a positive number, not {max_pixels}"
            raise UsageError(msg)
        self.sources = [*zip(paths, roots * (len(paths) // len(roots)), strict=True)]
        self.format, self.keep, self.max_pixels = format, dict(keep or {}), max_pixels

    def read(self) -> Iterator[tuple[Source, Iterator[Sample]]]:
        """See `SampleData.read`."""
        for given, images in self.sources:
            for path in _files(given):
                source = self.source(path, images)
                yield source, samples(source, self.format, TALKS)

    def source(self, path: Path, images: Path | None) -> Source:
        """Return how a file is read."""
        return Source(path, images, self.keep, bare=True)

    def pictures(self, pairs: Sequence[Sample]) -> AllPictures:
        """Return what reads the images of `pairs`, with this data's limits."""
        return AllPictures(pairs, self.max_broken, self.max_pixels)


class TextData(InstructionData):
    """Questions and conversations without images: `data: {kind: texts, source: ...}`.

    Of a table that names images, what is said alone is learnt.
    """

    noun = "text"

    def __init__(
        self,
        *,
        source: Path | list[Path],
        format: TalkFormat = "auto",  # noqa: A002 - the recipe's word
        val: float = 0.01,
        keep: Mapping[str, Sequence[str]] | None = None,
        max_broken: float = 0.01,
        limit: int | None = None,
    ) -> None:
        """Keep the settings; see `InstructionData`. `max_broken` is of what cannot be told.

        Raises:
            UsageError: a number out of its range.
        """
        given = {"format": format, "val": val, "keep": keep}
        super().__init__(source=source, max_broken=max_broken, limit=limit, **given)  # type: ignore[arg-type]  # of several types

    def source(self, path: Path, images: Path | None) -> Source:
        """See `InstructionData.source`."""
        return replace(super().source(path, images), words=True)


class AllPictures(Pictures):
    """Reads all images of a sample."""

    def __call__(self, sample: Sample) -> tuple[Sample, *tuple[ByteArray, ...]]:  # type: ignore[override]  # one or several
        """Return a sample and its images uint8 [h, w, 3]; see `Pictures`."""
        this, images = self.all(sample)
        return this, *images


def _list(given: Path | list[Path] | None) -> list[Path]:
    paths = given if isinstance(given, list) else [given] if given else []
    return [path.expanduser().absolute() for path in paths]


def _files(path: Path) -> list[Path]:
    """Return the files a path with "*" stands for; shards are listed by their own reader."""
    if path.exists() or not glob.has_magic(str(path)) or ".tar" in path.name:
        return [path]
    found = sorted(Path(name) for name in glob.glob(str(path)))  # noqa: PTH207 - absolute
    if not found:
        msg = f"{path}: no such file (in a recipe: data.source)"
        raise ResourceError(msg)
    return found
