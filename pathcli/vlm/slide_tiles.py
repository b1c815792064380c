"""Rankings of a slide's tiles in, the tiles to read out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pathcli.encoders.search import DUPLICATES, distinct
from pathcli.errors import UsageError
from pathcli.types import TileStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from pathcli.types import Tiles

    Floats = NDArray[np.floating[Any]]
    Rows = NDArray[np.intp]

CLUSTERED = 4096
"""Tiles, evenly spaced over the slide, among which kinds of tissue are sought."""

REACH = 8
"""How far down a ranking tiles unlike its best are sought, for each that is wanted."""

_BLOCK, _ROUNDS = 512, 10


class Attention(NamedTuple):
    """Where another model looked: its tiles, with the features' status, and float [readable]."""

    tiles: Tiles
    values: Floats


def choose(
    ranked: Mapping[str, Rows], read: Callable[[Rows], Floats], budget: int
) -> dict[int, str]:
    """Return which tiles to read, and why each, in the order of choice.

    An equal part of the budget goes to each ranking and one to the spread; what does not divide
    goes to the rankings, the first one first. From a ranking the best are taken, near-duplicates
    (`DUPLICATES`) of better ones after all others of the `REACH` times as many that are looked at.
    The spread clusters the slide's tiles (k-means, `CLUSTERED` of them at most, begun with
    tiles far from each other) and takes the tile nearest to each centre that is still free.

    Args:
        ranked: places 0..n-1, best first, by the reason for this order.
        read: gives the unit embeddings float32 [b, d] of places [b].
        budget: how many to choose; all where there are no more.
    """
    n = len(next(iter(ranked.values())))
    budget = min(budget, n)
    spread = budget // (len(ranked) + 1)
    taken: dict[int, str] = {}
    for left, (why, order) in zip(range(len(ranked), 0, -1), ranked.items(), strict=False):
        count = math.ceil((budget - spread - len(taken)) / left)
        free = order[~np.isin(order, list(taken))]
        best, _ = distinct(free[: REACH * count], read, count, DUPLICATES)
        alike = [at for at in free[: count + len(best)].tolist() if at not in best]
        taken |= dict.fromkeys([*best, *alike][:count], why)
    if not spread:
        return taken
    size = min(n, max(CLUSTERED, 2 * budget))
    pool = np.linspace(0, n - 1, size).round().astype(np.intp)
    rows = read(pool)
    closed = np.isin(pool, list(taken))
    centres = _centres(rows, spread)
    near = 2 * (centres @ rows.T) - np.einsum("ij,ij->i", rows, rows)
    for row in near:
        at = int(np.where(closed, -np.inf, row).argmax())
        closed[at] = True
        taken[int(pool[at])] = "spread"
    return taken


def _centres(rows: Floats, count: int) -> Floats:
    """Return the centres [count, d] of clusters, the same for the same rows.

    Lloyd's k-means from the row nearest to the mean and those farthest from all before; distances
    are products of matrices. A cluster left empty keeps its centre.
    """
    squares = np.einsum("ij,ij->i", rows, rows)

    def away(centre: Floats) -> Floats:
        found: Floats = squares - 2 * (rows @ centre) + centre @ centre
        return found

    starts = [int(away(rows.mean(0)).argmin())]
    least = away(rows[starts[0]])
    while len(starts) < count:
        starts.append(int(least.argmax()))
        least = np.minimum(least, away(rows[starts[-1]]))
    centres, labels = rows[starts], np.full(len(rows), -1)
    for _ in range(_ROUNDS):
        now = (2 * (rows @ centres.T) - (centres**2).sum(1)).argmax(1)
        if (now == labels).all():
            break
        labels = now
        members = (labels == np.arange(count)[:, None]).astype(rows.dtype)
        sizes = members.sum(1, keepdims=True)
        centres = np.where(sizes > 0, members @ rows / np.maximum(sizes, 1), centres)
    return centres


def nearest(attend: Attention, tiles: Tiles) -> Floats:
    """Return for each tile the attention [n] of the other model's tile nearest to its centre.

    Raises:
        UsageError: the tiles are another slide's, or attention does not fit them.
    """
    from scipy.spatial import KDTree  # noqa: PLC0415 - costs half a second

    readable = attend.tiles.status == TileStatus.OK
    if attend.tiles.item != tiles.item or len(attend.values) != readable.sum():
        msg = f"attention of {attend.tiles.item} does not fit the tiles of {tiles.item}"
        raise UsageError(msg)
    centres = attend.tiles.xy[readable] + attend.tiles.side0 / 2
    found: Floats = attend.values[KDTree(centres).query(tiles.xy + tiles.side0 / 2)[1]]
    return found


def cosines(values: NDArray[Any], rows: Rows, text: Floats) -> Floats:
    """Return the cosines float32 [k] of `rows`, ascending, of features [n, d] with a unit vector.

    A block at a time in one buffer, which stays in the processor's cache.
    """
    found = np.empty(len(rows), np.float32)
    buffer = np.empty((min(_BLOCK, len(rows)), values.shape[1]), np.float32)
    for start in range(0, len(rows), _BLOCK):
        some = rows[start : start + _BLOCK]
        first, end = int(some[0]), int(some[-1]) + 1
        block = buffer[: len(some)]
        block[:] = values[first:end] if end - first == len(some) else values[some]
        found[start : start + len(some)] = (block @ text) / _norms(block)
    return found


def units(values: NDArray[Any]) -> Floats:
    """Return float32 rows of length one; a row of zeros stays."""
    found = values.astype(np.float32)
    found /= _norms(found)[:, None]
    return found


def _norms(rows: Floats) -> Floats:
    found: Floats = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return np.maximum(found, np.finfo(np.float32).tiny, out=found)
