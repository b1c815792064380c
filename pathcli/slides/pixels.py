"""A slide's tiles in, their pixels on disk out, as one of `Layout`'s kinds.

Each slide has one folder, filled under a hidden name and renamed once it is whole: the same
call then finds it done, and a call with other parameters is refused.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import socket
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pathcli import __version__
from pathcli.errors import BusyError, DataError
from pathcli.slides.readers import open_slide
from pathcli.slides.tiling import read_tile, refuse_if_bad
from pathcli.store.files import disk_errors, part_path
from pathcli.store.lease import lease
from pathcli.store.place import LocalPlace
from pathcli.types import TileStatus, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator

    from pathcli.slides.pixel_layouts import Layout, Row
    from pathcli.types import ByteArray, Progress, Slide, Tiles

FORMAT = 1
OPTION = "--pixels-out"
_AHEAD = 4  # tiles each thread may be ahead of the writer
_HERE = re.sub(r"\W+", "_", socket.gethostname())
_MANY = 100  # files up to which each is synced by itself; thousands would take minutes

log = logging.getLogger("pathcli")

T = TypeVar("T")


@dataclass(frozen=True)
class PixelRun:
    """What `save_pixels` did for one slide: `tiles` were saved, in `size` bytes below `path`.

    `unreadable` ones were left out (in Zarr: are black); `cached` says that all was there.
    """

    layout: Layout
    path: Path
    tiles: int
    unreadable: int
    size: int
    cached: bool
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """What the user should know."""
        if not self.unreadable:
            return []
        fate = "black" if self.layout.kind == "zarr" else "left out"
        n = self.tiles + self.unreadable
        return [f"{self.unreadable} of {n} tiles cannot be read and are {fate}"]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, for `--json`."""
        return {
            "kind": self.layout.kind,
            "codec": self.layout.codec,
            "path": str(self.path),
            "tiles": self.tiles,
            "unreadable": self.unreadable,
            "bytes": self.size,
            "cached": self.cached,
            "seconds": round(self.seconds, 3),
        }


def save_pixels(
    path: Path | str,
    tiles: Tiles,
    out: Path,
    layout: Layout,
    *,
    workers: int = 2,
    max_bad_tiles: float = 0.01,
    progress: Progress = silent,
) -> PixelRun:
    """Write the pixels of a slide's tiles below `out`, whole or not at all, or find them there.

    Args:
        path: the slide.
        tiles: which tiles, as `tile` returns them.
        out: a folder of folders, one per slide.
        layout: how pixels are kept.
        workers: threads that read and pack.
        max_bad_tiles: share of unreadable tiles above which the slide fails.
        progress: called with (tiles done, tiles in all).

    Raises:
        DataError: not a slide, too many tiles cannot be read, or other pixels are in the place.
        ResourceError: the disk is full, or another process is writing this slide.
    """
    start = time.perf_counter()
    place = layout.place(out, tiles.item)
    card = saved(place, tiles, layout)
    cached = card is not None
    if card is None:
        with lease(LocalPlace(place.parent, OPTION), place.name) as held:
            card = saved(place, tiles, layout)  # another process may have been faster
            if card is None:
                with disk_errors(place, OPTION), closing(open_slide(path)) as slide:
                    reading = _Reading(slide, tiles, layout, workers, max_bad_tiles, progress)
                    card = _publish(place, reading, held)
    bad = len(card["unreadable"])
    refuse_if_bad(str(path), bad, len(tiles), max_bad_tiles)
    return PixelRun(
        layout=layout,
        path=place,
        tiles=len(tiles) - bad,
        unreadable=bad,
        size=card["bytes"],
        cached=cached,
        seconds=time.perf_counter() - start,
    )


def saved(place: Path, tiles: Tiles, layout: Layout) -> dict[str, Any] | None:
    """Return what a finished folder says of these tiles; None when there is no folder.

    Raises:
        DataError: the folder holds other tiles, or none of ours.
    """
    if not place.exists():
        return None
    asked = _card(tiles, layout)
    try:
        card = layout.read_card(place)
        same = {name: card[name] for name in asked} == asked
    except (OSError, ValueError, KeyError, TypeError):
        msg = f"{place}: not written by --save-pixels {layout.kind}; give another {OPTION}"
        raise DataError(msg) from None
    if not same:
        msg = f"{place}: holds tiles of other parameters; give another {OPTION}, or remove it"
        raise DataError(msg)
    return card


def _card(tiles: Tiles, layout: Layout) -> dict[str, Any]:
    """Return what must be equal for saved pixels to be the same."""
    return {
        "format": FORMAT,
        "kind": layout.kind,
        "codec": layout.codec,
        "item": tiles.item,
        "slide_mpp": tiles.slide_mpp,
        "spec": tiles.spec.to_json(),
        "spec_digest": tiles.spec.digest,
        "tiles": len(tiles),
    }


def _publish(place: Path, reading: _Reading, held: Callable[[], bool]) -> dict[str, Any]:
    """Fill the hidden folder and rename it; return what it says of itself."""
    part = part_path(place.with_name(f".{place.name}@{_HERE}-{os.getpid()}"))
    for left in place.parent.glob(f".{glob.escape(place.name)}@*.part"):
        shutil.rmtree(left, ignore_errors=True)  # of a run that was killed
    part.mkdir()
    try:
        card = reading.write(part)
        if held():
            part.rename(place)
            return card
    finally:
        shutil.rmtree(part, ignore_errors=True)
    msg = f"{place}: another process has taken this over meanwhile"
    raise BusyError(msg)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _sync(folder: Path) -> None:
    """Make the files of a folder survive a power cut."""
    files = _files(folder)
    if len(files) > _MANY and hasattr(os, "sync"):
        os.sync()
        return
    for file in files:
        handle = os.open(file, os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# --- reading -----------------------------------------------------------------------------


def in_order(work: Callable[[int], T], rows: Iterable[int], workers: int) -> Iterator[T]:
    """Yield `work(row)` in the order of `rows`, done by `workers` threads a few rows ahead."""
    queue: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="reader") as pool:
        try:
            for row in rows:
                queue.append(pool.submit(work, row))
                if len(queue) > _AHEAD * workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()


def read_or_none(slide: Slide, tiles: Tiles, row: int) -> ByteArray | None:
    """Return a tile's pixels uint8 RGB [size_px, size_px, 3], None if they cannot be decoded.

    Raises:
        DataError: the slide's file is gone.
    """
    x, y = tiles.xy[row].tolist()
    try:
        return read_tile(slide, (x, y), tiles.spec, tiles.slide_mpp)
    except DataError as error:
        if isinstance(slide.path, Path) and not slide.path.exists():
            raise
        log.debug("unreadable: %s", error)
        return None


@dataclass(frozen=True)
class _Reading:
    """One slide's tiles on their way to disk."""

    slide: Slide
    tiles: Tiles
    layout: Layout
    workers: int
    max_bad: float
    progress: Progress

    def write(self, part: Path) -> dict[str, Any]:
        """Write everything into the folder `part`; return what it says of itself."""
        status = np.zeros(len(self.tiles), np.uint8)
        with closing(self._rows(status)) as rows:  # on an error too no thread reads any more
            self.layout.write(part, self.tiles, rows, status)
        card = _card(self.tiles, self.layout) | {
            "bytes": sum(file.stat().st_size for file in _files(part)),
            "unreadable": self.tiles.xy[status != TileStatus.OK].tolist(),
            "creator": f"pathcli {__version__}",
        }
        self.layout.write_card(part, card)
        _sync(part)
        return card

    def _rows(self, status: ByteArray) -> Generator[Row]:
        """Yield every row, packed by the threads that read it; (y, x) is the file's order."""

        def work(row: int) -> Row:
            pixels = read_or_none(self.slide, self.tiles, row)
            return row, None if pixels is None else self.layout.pack(pixels)

        n, bad = len(self.tiles), 0
        for row, data in in_order(work, range(n), self.workers):
            if data is None:
                status[row] = TileStatus.UNREADABLE
                bad += 1
                refuse_if_bad(str(self.slide.path), bad, n, self.max_bad)
            yield row, data
            self.progress(row + 1, n)
