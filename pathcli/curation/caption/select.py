"""A slide's features and texts in, the patches worth describing out.

Three routes propose patches, as in PathGen (arXiv:2407.00203): those nearest to any attribute of
a cancer, those nearest to all findings of a report together, and some of every cluster. Of
near-duplicates among them the first stays.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence  # noqa: TC003 - of a dataclass
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pathcli.encoders.search import DUPLICATES, cosines, distinct, unit
from pathcli.errors import UsageError
from pathcli.slides.tiling import tile_spec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathcli.types import Features, TileSpec

    Floats = NDArray[np.float32]
    Rows = NDArray[np.intp]

PATCH_UM = 168.0
"""Side of a patch: 672 px at level 0 of a slide of 0.25 um per pixel (README of PathGen-1.6M)."""
ROUTES = ("attributes", "report", "diversity")

_FITTED, _PASSES = 16_384, 20  # rows that clusters are found on, and the most passes over them
_ROWS = 65_536


def patch_spec(tissue: str = "otsu", min_tissue: float = 0.5) -> TileSpec:
    """Return the grid of patches: `PATCH_UM` a side, edge to edge, read at 336 px.

    PathGen reads 672 px at level 0 and shows its encoder half of that; the same square of tissue
    is meant here whatever a slide's resolution.

    Raises:
        UsageError: there is no such tissue method.
    """
    return tile_spec(336, PATCH_UM / 336, tissue=tissue, min_tissue=min_tissue)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How patches are chosen on each slide.

    `top` are taken by attributes and as many by the report, `diverse` from clusters (64 and 256
    in PathGen's code); `duplicates` is the cosine from which two are near-duplicates, 1 for never.
    """

    top: int = 64
    diverse: int = 256
    duplicates: float = DUPLICATES
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that choose nothing.

        Raises:
            UsageError: a number out of its range.
        """
        if self.top < 0 or self.diverse < 0 or not 0 <= self.duplicates <= 1 or self.seed < 0:
            msg = "--top, --diverse and --seed are at least 0, and --duplicates is 0 to 1"
            raise UsageError(msg)
        if self.top + self.diverse == 0:
            msg = "--top 0 and --diverse 0 choose no patch"
            raise UsageError(msg)


@dataclass(frozen=True)
class Chosen:
    """A patch: its row among the slide's tiles, what proposed it, and the text it is nearest to.

    `cosine` is that with the text; both are empty where there are no texts.
    """

    row: int
    routes: tuple[str, ...]
    text: str = ""
    cosine: float | None = None


@dataclass(frozen=True)
class Selection:
    """The patches chosen, best first by route, and the rows that were near-duplicates of them."""

    chosen: tuple[Chosen, ...]
    duplicates: tuple[int, ...]


def select(
    features: Features,
    attributes: Mapping[str, Floats],
    findings: Mapping[str, Floats],
    choice: Choice,
) -> Selection:
    """Choose patches of one slide.

    Args:
        features: of its tiles, from the store.
        attributes: unit vector float32 [d] of each attribute: a tile counts by its nearest one.
        findings: of each finding of the report: a tile counts by the sum of its cosines.
        choice: how many, and which are too alike.
    """
    texts = [*attributes, *findings]
    near = (
        cosines(features, np.stack([*attributes.values(), *findings.values()])) if texts else None
    )
    proposed = dict(_proposed(features, near, len(attributes), choice))
    order = np.array(
        list(dict.fromkeys(row for rows in proposed.values() for row in rows)), np.intp
    )

    def read(rows: Rows) -> Floats:
        return unit(features.values[rows])

    kept, _ = distinct(order, read, len(order), choice.duplicates)
    chosen = tuple(
        Chosen(
            row,
            tuple(r for r, rows in proposed.items() if row in rows),
            *_nearest(near, texts, row),
        )
        for row in kept
    )
    return Selection(chosen, tuple(row for row in order.tolist() if row not in set(kept)))


def _proposed(
    features: Features, near: Floats | None, attributes: int, choice: Choice
) -> Iterator[tuple[str, list[int]]]:
    """Yield each route and the rows it proposes, best first."""
    if near is not None and attributes:
        yield ROUTES[0], best(near[:, :attributes].max(1), choice.top)
    if near is not None and near.shape[1] > attributes:
        yield ROUTES[1], best(near[:, attributes:].sum(1), choice.top)
    good = np.flatnonzero(features.status == 0)
    if choice.diverse and len(good):
        yield ROUTES[2], good[spread(features.values[good], choice.diverse, choice.seed)].tolist()


def best(scores: Floats, top: int) -> list[int]:
    """Return the rows of the `top` highest scores, equal ones by row; NaN is never among them."""
    order = np.argsort(-scores, kind="stable")[: np.isfinite(scores).sum()]
    return [int(row) for row in order[:top]]


def _nearest(near: Floats | None, texts: Sequence[str], row: int) -> tuple[str, float | None]:
    if near is None:
        return "", None
    at = int(near[row].argmax())
    return texts[at], round(float(near[row, at]), 4)


def spread(values: NDArray[np.float16], count: int, seed: int) -> Rows:
    """Return at most `count` rows, as many of each k-means cluster as can be.

    Clusters are those of the L2-normalised features [n, d], k = ceil(sqrt(n)). One row of each
    is taken, then a second of each, and so on, in an order that `seed` draws.
    """
    from sklearn.cluster import MiniBatchKMeans  # noqa: PLC0415
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    n, rng = len(values), np.random.default_rng(seed)
    fitted = rng.permutation(n)[:_FITTED]
    means = MiniBatchKMeans(
        math.ceil(math.sqrt(n)),
        random_state=seed,
        n_init=1,
        batch_size=4096,
        max_iter=_PASSES,
        compute_labels=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different tiles than clusters
        means.fit(unit(values[np.sort(fitted)]))
    parts = [means.predict(unit(values[i : i + _ROWS])) for i in range(0, n, _ROWS)]
    drawn = rng.permutation(n)
    labels = np.concatenate(parts)[drawn]
    by_cluster = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    turn = np.empty(n, np.intp)  # how many of its cluster were drawn before a row
    turn[by_cluster] = np.arange(n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    order: Rows = drawn[np.argsort(turn, kind="stable")][:count]
    return order
