"""A text and slides in, the tiles nearest to the text out, near-duplicates passed over.

The features of one slide at a time are in memory; of the others only two numbers a tile are
kept. Which embeddings are compared for duplicates is read again from the store.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.encoders.build import text_encoder
from pathcli.encoders.embedding import Embedder, EmbedRun
from pathcli.encoders.zeroshot import class_weights, too_long, unfamiliar
from pathcli.errors import DataError, UsageError
from pathcli.types import TileStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.store import Store
    from pathcli.types import Encoder, Features, Progress, Tiles, TileSpec

    Floats = NDArray[np.float32]
    Rows = NDArray[np.intp]

TOP = 20
DUPLICATES = 0.88
"""Cosine from which two tiles count as near-duplicates (PathGen, arXiv:2407.00203)."""

_ROWS = 65_536
_FIRST = 256  # tiles looked at together at first; twice as many each time after


@dataclass(frozen=True)
class Compared:
    """The tiles of one slide against the text, arrays [n] in the order of the slide's tiles.

    `cosine` float32 is that with the text, `score` what tiles are ranked by: the cosine, less
    that with the negative texts where there are any. Both are NaN for unreadable tiles.
    `strange` bool marks what the encoder says it does not know; None if it cannot say.
    """

    run: EmbedRun
    cosine: Floats
    score: Floats
    strange: NDArray[np.bool_] | None

    @property
    def readable(self) -> NDArray[np.bool_]:
        """Tell which tiles have features, bool [n]; at least one has."""
        return np.isfinite(self.score)

    @property
    def tiles(self) -> Tiles:
        """Return the readable tiles, all of status OK."""
        tiles, kept = self.run.tiling.tiles, self.readable
        return replace(tiles, xy=tiles.xy[kept], status=tiles.status[kept])


@dataclass(frozen=True)
class Hit:
    """A tile found: `rank` from 1, `slide` and `row` where it is, `xy` its level-0 corner.

    `higher_than` is the share of its slide's readable tiles that score lower; `strange` as in
    `Compared`.
    """

    rank: int
    slide: int
    row: int
    xy: tuple[int, int]
    score: float
    cosine: float
    higher_than: float
    strange: bool | None


@dataclass(frozen=True)
class Found:
    """What a search found: `hits` best first, over all `slides`.

    `passed_over` tiles ranked before the last hit but were near-duplicates of better ones,
    of a cosine of at least `duplicates`.
    """

    text: str
    negatives: tuple[str, ...]
    encoder: str
    slides: tuple[Compared, ...]
    hits: tuple[Hit, ...]
    passed_over: int
    duplicates: float
    warnings: tuple[str, ...]


class Searcher:
    """A text on its way through slides, one after another; `rank` ends the search."""

    def __init__(
        self,
        text: str,
        embedder: Embedder,
        *,
        negatives: Sequence[str] = (),
        top: int = TOP,
        duplicates: float = DUPLICATES,
    ) -> None:
        """Load the encoder and embed the texts.

        Args:
            text: what is looked for.
            embedder: with an encoder that reads texts too.
            negatives: texts that must not fit: the cosine with their mean is taken off.
            top: how many tiles to find.
            duplicates: cosine from which a tile is passed over for a better one like it; 1
                passes over none.

        Raises:
            UsageError: an empty text, an encoder that reads none, or an impossible number.
            DataError: a text's embedding has no direction.
            ResourceError: the weights are not here.
        """
        if not all(one.strip() for one in (text, *negatives)):
            msg = "the text to search for is empty; say in words what the tiles should show"
            raise UsageError(msg)
        if top < 1 or not 0 <= duplicates <= 1:
            msg = f"--top is at least 1 and --duplicates 0 to 1, not {top} and {duplicates:g}"
            raise UsageError(msg)
        self.text, self.negatives = text, tuple(negatives)
        self.embedder, self.top, self.duplicates = embedder, top, duplicates
        encoder = text_encoder(embedder.encoder)
        embedder.load()
        texts = [[text], list(negatives)] if negatives else [[text]]
        self._weights: Floats = np.asarray(class_weights(encoder, texts))
        cut = too_long(encoder, [text, *negatives])
        self._warnings = [
            f"{encoder.name} reads {encoder.text_limit} tokens of the {n} of "
            f"{shorten(one, 60, placeholder='...')!r}; the rest is not looked for"
            for one, n in zip(cut, encoder.count_tokens(cut) if cut else [], strict=True)
        ]

    def __call__(
        self,
        path: Path | str,
        *,
        spec: TileSpec | None = None,
        progress: Progress | None = None,
        **tiling: Any,  # noqa: ANN401 - what `Embedder` takes
    ) -> Compared:
        """Compare the tiles of one slide with the text; what the store has is not embedded.

        Raises:
            DataError: not a slide, no usable resolution, or no tile on it.
            ResourceError: no space, or another process is embedding it.
        """
        run = self.embedder(path, spec=spec, progress=progress, **tiling)
        if run.tiles == run.unreadable:
            msg = f"{path}: no tile to compare; pathcli tile {path} shows why"
            raise DataError(msg)
        features = self.embedder.store.features.mapped(run.key)
        found = cosines(features, self._weights)
        good = features.status == TileStatus.OK
        strange = unfamiliar(self.embedder.encoder, features.values[good])
        if strange is not None:
            every = np.zeros(len(good), bool)
            every[good] = strange
            strange = every
        less = found[:, 1] if self.negatives else np.float32(0)
        return Compared(run, found[:, 0], found[:, 0] - less, strange)

    def rank(self, slides: Sequence[Compared]) -> Found:
        """Rank the tiles of all slides together; equal ones by slide and place.

        Raises:
            UsageError: there is no slide.
        """
        if not slides:
            msg = "no slide to search; name slides, a folder, a glob or a CSV"
            raise UsageError(msg)
        kept = tuple({slide.run.key: slide for slide in reversed(slides)}.values())[::-1]
        scores = np.concatenate([slide.score for slide in kept])
        starts = np.cumsum([0, *(len(slide.score) for slide in kept)])
        order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]

        def read(places: Rows) -> Floats:
            of = np.searchsorted(starts, places, "right") - 1
            parts = np.zeros((len(places), self._weights.shape[1]), np.float32)
            for i in np.unique(of).tolist():
                features = self.embedder.store.features.mapped(kept[i].run.key)
                parts[of == i] = unit(features.values[places[of == i] - starts[i]])
            return parts

        places, passed_over = distinct(order, read, self.top, self.duplicates)
        hits = []
        for rank, place in enumerate(places, start=1):
            i = int(np.searchsorted(starts, place, "right")) - 1
            hits.append(_hit(rank, i, kept[i], place - int(starts[i])))
        return Found(
            text=self.text,
            negatives=self.negatives,
            encoder=self.embedder.encoder.id,
            slides=kept,
            hits=tuple(hits),
            passed_over=passed_over,
            duplicates=self.duplicates,
            warnings=tuple(self._told(kept, len(slides), len(hits), passed_over)),
        )

    def _told(
        self, kept: Sequence[Compared], given: int, hits: int, passed_over: int
    ) -> Iterator[str]:
        """Yield what the user should know before believing the ranks."""
        yield from self._warnings
        if given > len(kept):
            yield f"{given - len(kept)} of {given} slides are copies of others and searched once"
        strange = sum(int(s.strange.sum()) for s in kept if s.strange is not None)
        if strange:
            total = sum(int(s.readable.sum()) for s in kept)
            yield (
                f"{strange:,} of {total:,} tiles ({strange / total:.0%}) are unlike what "
                f"{self.embedder.encoder.name} was trained on: their cosines mean little (marked)"
            )
        if hits < self.top and passed_over:
            yield (
                f"{hits} tiles instead of {self.top}: the other {passed_over:,} have a cosine of "
                f"{self.duplicates:g} or more with one of these (--duplicates sets the limit)"
            )


def distinct(
    order: Rows, read: Callable[[Rows], Floats], top: int, duplicates: float
) -> tuple[list[int], int]:
    """Take the first `top` of `order` that are not near-duplicates of one taken before.

    Args:
        order: places, best first.
        read: gives the unit embeddings float32 [b, d] of places [b].
        top: how many to take.
        duplicates: cosine from which two are near-duplicates; from 1 on none are.

    Returns:
        The places taken, in order, and how many before the last of them were passed over (of
        all, if there were not `top` to take).
    """
    limit = duplicates if duplicates < 1 else np.inf
    taken: list[int] = []
    rows: list[Floats] = []
    start, size, last = 0, _FIRST, len(order)
    while start < len(order) and len(taken) < top:
        block = order[start : start + size]
        units = read(block)
        free = (units @ np.array(rows).T < limit).all(1) if rows else np.ones(len(block), bool)
        while len(taken) < top and free.any():
            first = int(free.argmax())
            taken.append(int(block[first]))
            rows.append(units[first])
            last = start + first + 1
            free &= units @ units[first] < limit
            free[first] = False
        start, size = start + size, min(2 * size, _ROWS)
    last = last if len(taken) == top else len(order)
    return taken, last - len(taken)


def _hit(rank: int, slide: int, of: Compared, row: int) -> Hit:
    x, y = of.run.tiling.tiles.xy[row].tolist()
    lower = (of.score < of.score[row]).sum() / of.readable.sum()
    strange = None if of.strange is None else bool(of.strange[row])
    score, cosine = float(of.score[row]), float(of.cosine[row])
    return Hit(rank, slide, row, (x, y), score, cosine, float(lower), strange)


def unit(values: NDArray[Any]) -> Floats:
    """Return float32 rows of length one; a row of zeros stays."""
    rows = values.astype(np.float32)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    found: Floats = rows / np.maximum(norms, np.finfo(np.float32).tiny)
    return found


def cosines(features: Features, weights: Floats) -> Floats:
    """Return float32 [n, c] with unit `weights` [c, d]; NaN for unreadable tiles."""
    n = len(features.values)
    found = np.full((n, len(weights)), np.nan, np.float32)
    for start in range(0, n, _ROWS):
        good = start + np.flatnonzero(features.status[start : start + _ROWS] == TileStatus.OK)
        found[good] = unit(features.values[good]) @ weights.T
    return found


def search(
    slides: Sequence[Path | str],
    text: str,
    encoder: Encoder,
    *,
    store: Store | None = None,
    negatives: Sequence[str] = (),
    top: int = TOP,
    duplicates: float = DUPLICATES,
    spec: TileSpec | None = None,
    mpp: float | None = None,
    device: str = "auto",
    batch: int = 32,
    workers: int = 2,
    progress: Progress | None = None,
) -> Found:
    """Find the tiles of `slides` nearest to `text`; features the store has are not made again.

    Args:
        slides: paths or addresses.
        text: what is looked for.
        encoder: reads images and texts.
        store: where tiles and features are kept (default: the user's store).
        negatives: as `Searcher` takes them.
        top: how many tiles to find.
        duplicates: as `Searcher` takes it.
        spec: how slides are cut (default: the encoder's native tiles).
        mpp: um per level-0 pixel, over what headers say.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: tiles per forward pass.
        workers: threads that read tiles.
        progress: called with (tiles done, tiles in all) of each slide.

    Raises:
        UsageError: no slide, an empty text, or an encoder that reads none.
        DataError: not a slide, no usable resolution, or no tile on it.
        ResourceError: no weights, no space, or another process is embedding a slide.
    """
    embedder = Embedder(encoder, store, device=device, batch=batch, workers=workers)
    ready = Searcher(text, embedder, negatives=negatives, top=top, duplicates=duplicates)
    return ready.rank([ready(path, spec=spec, mpp=mpp, progress=progress) for path in slides])
