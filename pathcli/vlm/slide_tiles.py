"""Rankings of a slide's tiles in, the tiles to read out."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pathcli.encoders.search import DUPLICATES, distinct, unit
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

_ROWS = 65_536


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
    for centre in _centres(rows, spread):
        away = np.where(closed, np.inf, ((rows - centre) ** 2).sum(1))
        at = int(away.argmin())
        closed[at] = True
        taken[int(pool[at])] = "spread"
    return taken


def _centres(rows: Floats, count: int) -> Floats:
    """Return the centres [count, d] of clusters, the same for the same rows."""
    from scipy.cluster.vq import kmeans2  # noqa: PLC0415 - costs half a second

    starts = [int(((rows - rows.mean(0)) ** 2).sum(1).argmin())]
    away = np.full(len(rows), np.inf)
    while len(starts) < count:
        away = np.minimum(away, ((rows - rows[starts[-1]]) ** 2).sum(1))
        starts.append(int(away.argmax()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters left empty, as equal tiles leave them
        found: Floats = kmeans2(rows, rows[starts], minit="matrix")[0]
    return found


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
    """Return the cosines [k] of `rows` of features [n, d], a part at a time, with a unit vector."""
    parts = np.array_split(rows, max(1, len(rows) // _ROWS))
    found: Floats = np.concatenate([unit(values[part]) @ text for part in parts])
    return found
