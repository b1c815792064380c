"""What tiling, saving pixels or embedding would take, slide by slide; nothing is written.

Slides are opened and their tissue is found as for the real thing; the time a tile takes is
measured on a few of each slide's own tiles.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.slides.pixel_layouts import BLOCK_BYTES
from pathcli.slides.pixels import in_order, read_or_none, saved
from pathcli.slides.readers import open_slide, slide_mpp
from pathcli.slides.tiling import summary, tile_slide
from pathcli.store.entries import FeatureEntries, TileEntries
from pathcli.store.store import Store, default_root

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pathcli.slides.pixel_layouts import Layout
    from pathcli.slides.tiling import TileRun
    from pathcli.types import Key, Slide, SlideInfo, Tiles, TileSpec

RUNS, RUN_TILES = 4, 8  # of the tiles that are measured; neighbours share what is decoded
HOW = (
    "opening and tissue as just measured; reading and packing as measured on up to "
    f"{RUNS * RUN_TILES} tiles of each slide, {RUNS} runs of {RUN_TILES} neighbours, with as many "
    "workers; drawing pictures and waiting for the disk are not counted"
)
_ENTRY_BYTES, _TILE_BYTES = 7_000, 9  # of an entry of tiles: its frame; corner and status


class NoResolutionError(DataError):
    """A slide whose micrometres per pixel nobody gave, or whose header has no possible ones."""


@dataclass(frozen=True)
class Wanted:
    """What is to be done with the tiles, besides keeping in the store where they are.

    With a `layout`, pixels go below the folder `out`. With an `encoder` (its id), features of
    `row_bytes` a tile go to the store, after `forward_s` seconds a tile in the encoder.
    """

    layout: Layout | None = None
    out: Path | None = None
    encoder: str | None = None
    row_bytes: int = 0
    forward_s: float = 0.0
    workers: int = 2


@dataclass(frozen=True)
class SlidePlan:
    """What one slide would take.

    `run` is what `tile` would say; its `cached` and `there` ("pixels", "features") are what
    need not be done again. Seconds are for the whole slide: `tile_s` to open it and find its
    tissue, `read_s` to read and pack its tiles, `forward_s` in the encoder meanwhile. `disk`
    has the bytes that would be written, of tiles, pixels and features.
    """

    run: TileRun
    there: tuple[str, ...]
    tile_s: float
    read_s: float
    forward_s: float
    disk: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Seconds for the slide; readers and encoder work at the same time."""
        return self.tile_s + max(self.read_s, self.forward_s)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values: those of `tile --json`, and what it would take."""
        times = {"tile": self.tile_s, "read": self.read_s, "forward": self.forward_s}
        return summary(self.run) | {
            "there": [*(["tiles"] if self.run.cached else []), *self.there],
            "seconds": round(self.seconds, 3),
            "seconds_of": {name: round(value, 3) for name, value in times.items()},
            "bytes": sum(self.disk.values()),
            "bytes_of": self.disk,
            "warnings": list(self.warnings),
        }


def plan(
    path: Path | str,
    spec: TileSpec,
    store: Store,
    wanted: Wanted | None = None,
    *,
    mpp: float | None = None,
    **tiling: Any,  # noqa: ANN401 - what `tile_slide` takes
) -> SlidePlan:
    """Return what one slide would take; nothing is written.

    Args:
        path: the slide.
        spec: what would be cut.
        store: what is there already, as `unwritten_store` opens it.
        wanted: what else is to be done with the tiles (default: nothing).
        mpp: um per level-0 pixel, overriding the header.
        tiling: `mpp_source` and `roi`, as `tile` takes them.

    Raises:
        NoResolutionError: its resolution is not known, or none a scan can have.
        DataError: not a slide, or other pixels are where these would go.
    """
    wanted = wanted or Wanted()
    start = time.perf_counter()
    with closing(open_slide(path)) as slide:
        try:
            slide_mpp(slide, mpp)
        except DataError as error:
            raise NoResolutionError(*error.args) from None
        run = tile_slide(slide, spec, store, mpp=mpp, out=None, **tiling)
        tile_s = time.perf_counter() - start
        tiles = run.tiles
        there = tuple(_there(tiles, store, wanted))
        todo = {"pixels"} if wanted.layout else set()
        todo = (todo | ({"features"} if wanted.encoder else set())) - set(there)
        sample = _measure(slide, tiles, wanted) if todo and len(tiles) else _Sample()
    n = len(tiles)
    disk = {"tiles": 0 if run.cached else _ENTRY_BYTES + _TILE_BYTES * n}
    if wanted.layout:
        disk["pixels"] = round(sample.size * n) if "pixels" in todo else 0
    if wanted.encoder:
        disk["features"] = (wanted.row_bytes + _TILE_BYTES) * n if "features" in todo else 0
    return SlidePlan(
        run=run,
        there=there,
        tile_s=tile_s,
        read_s=sample.seconds * n,
        forward_s=wanted.forward_s * n if "features" in todo else 0.0,
        disk=disk,
        warnings=(*run.warnings, *sample.warnings),
    )


def _there(tiles: Tiles, store: Store, wanted: Wanted) -> list[str]:
    """Return which of pixels and features need not be made again."""
    found = []
    if wanted.layout and wanted.out:
        place = wanted.layout.place(wanted.out, tiles.item)
        found += ["pixels"] if saved(place, tiles, wanted.layout) else []
    if wanted.encoder and replace(tiles.key, encoder=wanted.encoder) in store.features:
        found += ["features"]
    return found


@dataclass(frozen=True)
class _Sample:
    """What a tile takes on average: seconds of all workers together, and bytes on disk."""

    seconds: float = 0.0
    size: float = 0.0
    warnings: tuple[str, ...] = ()


def _measure(slide: Slide, tiles: Tiles, wanted: Wanted) -> _Sample:
    """Read a few runs of neighbouring tiles with the workers that are wanted."""
    n, layout = len(tiles), wanted.layout
    starts = np.linspace(0, max(0, n - RUN_TILES), RUNS).astype(int)
    rows = sorted({row for start in starts for row in range(start, min(n, start + RUN_TILES))})

    def work(row: int) -> int | None:
        pixels = read_or_none(slide, tiles, row)
        return None if pixels is None else layout.size_of(pixels) if layout else 0

    start_s = time.perf_counter()
    sizes = list(in_order(work, rows, wanted.workers))
    seconds = (time.perf_counter() - start_s) / len(rows)
    good = [size for size in sizes if size is not None]
    bad = len(sizes) - len(good)
    told = (f"{bad} of the {len(sizes)} tiles measured cannot be read",) if bad else ()
    return _Sample(seconds, sum(good) / len(rows), told)


def totals(
    plans: Sequence[SlidePlan], store: Store, wanted: Wanted | None = None
) -> dict[str, Any]:
    """Return what all slides would take together, as plain JSON values.

    `memory_bytes` is the most this process has used so far, which opened, found and measured
    all that the real run would; None where the system does not say. `free_bytes` are those of
    the disks the store and the pixels would be on.
    """
    wanted = wanted or Wanted()
    disk: Counter[str] = Counter()
    for each in plans:
        disk.update(each.disk)
    places = {"store": store.local}
    if wanted.layout and wanted.out:
        places["pixels"] = wanted.out
    seconds = sum(each.seconds for each in plans)
    return {
        "slides": len(plans),
        "tiles": sum(len(each.run.tiles) for each in plans),
        "in_store": sum(each.run.cached for each in plans),
        "there": dict(Counter(name for each in plans for name in each.there)),
        "seconds": round(seconds, 3),
        "hours": round(seconds / 3600, 3),
        "workers": wanted.workers,
        "measured": HOW,
        "bytes": disk.total(),
        "bytes_of": dict(disk),
        "free_bytes": {name: _free(place) for name, place in places.items()},
        "memory_bytes": _memory(wanted),
    }


def _free(place: Path) -> int:
    place = place.expanduser().absolute()
    return shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free


def _memory(wanted: Wanted) -> int | None:
    """Return the most memory this process had so far, and what a file of Zarr needs on top."""
    try:
        import resource  # noqa: PLC0415
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    block = 2 * BLOCK_BYTES if wanted.layout and wanted.layout.kind == "zarr" else 0
    return peak * (1 if sys.platform == "darwin" else 1024) + block


# --- a store that is only read -----------------------------------------------------------


def unwritten_store(root: Path | str | None = None) -> Store:
    """Return a store that is read and never written; it need not be there.

    Args:
        root: its folder or address (default: the user's store).

    Raises:
        DataError: the folder is not a store, or of a newer format.
        ResourceError: it cannot be read.
    """
    return _Unwritten(root or default_root())


class _Unwritten(Store):
    def __init__(self, root: Path | str) -> None:
        super().__init__(root, create=False)
        self.tiles = _UnwrittenTiles(self.backend)
        self.features = _UnwrittenFeatures(self.backend)

    def _begin(self, _kind: str, *, create: bool) -> None:  # noqa: ARG002 - as the store's own
        """Write nothing, but refuse what is something else."""
        self._require_empty()

    def remember(self, info: SlideInfo, path: Path | str, mpp: float, source: str) -> None:
        """Write nothing."""


class _UnwrittenFeatures(FeatureEntries):
    def remove(self, key: Key) -> None:
        """Remove nothing."""


class _UnwrittenTiles(TileEntries):
    def __setitem__(self, key: Key, tiles: Tiles) -> None:
        """Write nothing."""
