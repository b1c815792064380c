"""Tiles and an encoder in, features in the store out: readers, encoder and writer overlap.

Batches are cut by tile index, never by arrival, so the number of readers changes nothing
but the speed. At most a few batches of pixels are in memory, whatever the slide's size.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pathcli.device import pick_device
from pathcli.errors import BusyError, DataError, PathcliError, ResourceError
from pathcli.slides.readers import open_slide
from pathcli.slides.tiling import TileRun, read_tile, summary, tile_slide
from pathcli.store import Store
from pathcli.types import Encoder, Key, TileStatus, silent

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pathcli.store.hdf5 import FeatureWriter
    from pathcli.types import ByteArray, Progress, Slide, Tiles, TileSpec

log = logging.getLogger("pathcli")

Batch = tuple[int, "ByteArray", "ByteArray"]
"""First row, pixels uint8 [b, s, s, 3], status uint8 [b]."""


class Rows(Protocol):
    """What is embedded row by row: the tiles of a slide, or plain images.

    `name` stands in messages, `side` is the width of a row's pixels, and `max_bad` the share of
    unreadable rows above which all fail.
    """

    name: str
    side: int
    max_bad: float

    def read(self, row: int) -> ByteArray:
        """Return uint8 RGB [side, side, 3]; called from several threads at once.

        Raises:
            DataError: this row cannot be read.
        """
        ...

    def gone(self, row: int) -> bool:
        """Tell whether a row's file is no longer there, so that it is not called unreadable."""
        ...


class SlideRows:
    """The tiles of a slide."""

    def __init__(self, slide: Slide, tiles: Tiles, max_bad: float) -> None:
        """Keep what is read."""
        self.slide, self.tiles, self.max_bad = slide, tiles, max_bad
        self.name, self.side = str(slide.path), tiles.spec.size_px

    def read(self, row: int) -> ByteArray:
        """See `Rows.read`."""
        x, y = self.tiles.xy[row].tolist()
        return read_tile(self.slide, (x, y), self.tiles.spec, self.tiles.slide_mpp)

    def gone(self, row: int) -> bool:
        """See `Rows.gone`."""
        del row
        return isinstance(self.slide.path, Path) and not self.slide.path.exists()


@dataclass(frozen=True)
class EmbedRun:
    """What `embed` did for one slide.

    `encoded` tiles went through the encoder in this run, in `encode_seconds` once the weights
    were loaded; `unreadable` ones have no features.
    """

    tiling: TileRun
    key: Key
    tiles: int
    encoded: int
    unreadable: int
    row_shape: tuple[int, ...]
    seconds: float
    encode_seconds: float
    warnings: tuple[str, ...]


class Embedder:
    """An encoder on a device, ready for one slide after another; loads when first needed."""

    def __init__(
        self,
        encoder: Encoder,
        store: Store | None = None,
        *,
        device: str = "auto",
        batch: int = 32,
        workers: int = 2,
        max_bad_tiles: float = 0.01,
    ) -> None:
        """Keep the settings.

        Args:
            encoder: what embeds.
            store: where features are kept (default: the user's store).
            device: auto, cpu, cuda, cuda:1 or mps.
            batch: tiles per forward pass.
            workers: threads that read tiles.
            max_bad_tiles: share of unreadable tiles above which a slide fails.
        """
        self.encoder, self.store = encoder, store or Store()
        self.device, self.batch, self.workers = device, batch, max(1, workers)
        self.max_bad_tiles = max_bad_tiles
        self._loaded, self._encode_seconds = False, 0.0
        self._fault: PathcliError | None = None

    def __call__(
        self,
        path: Path | str,
        *,
        spec: TileSpec | None = None,
        progress: Progress | None = None,
        **tiling: Any,  # noqa: ANN401 - what `tile` takes
    ) -> EmbedRun:
        """Embed one slide, or find its features in the store.

        Args:
            path: the slide.
            spec: how it is cut (default: the encoder's native tiles).
            progress: called with (tiles done, tiles in all).
            tiling: `mpp`, `mpp_source`, `out`, `overview`, `geojson` as `tile` takes them.

        Raises:
            DataError: not a slide, no usable resolution, or too many unreadable tiles.
            ResourceError: no weights, no space, or another process is embedding it.
        """
        start = time.perf_counter()
        with closing(open_slide(path)) as slide:
            run = tile_slide(slide, spec or self.encoder.native, self.store, **tiling)
            key = replace(run.tiles.key, encoder=self.encoder.id)
            encoded = 0
            rows = SlideRows(slide, run.tiles, self.max_bad_tiles)
            if len(run.tiles) and key not in self.store.features:
                encoded = self.fill(rows, run.tiles, key, progress or silent)
            shape, bad = self.store.features.shape(key) if len(run.tiles) else ((), 0)
            _refuse_if_bad(rows, bad, len(run.tiles))
        return EmbedRun(
            tiling=run,
            key=key,
            tiles=len(run.tiles),
            encoded=encoded,
            unreadable=bad,
            row_shape=shape,
            seconds=time.perf_counter() - start,
            encode_seconds=self._encode_seconds if encoded else 0.0,
            warnings=(*run.warnings, *self._warnings(run.tiles, bad)),
        )

    def _warnings(self, tiles: Tiles, bad: int) -> Iterator[str]:
        if tiles.spec.size_px < self.encoder.input_px:
            yield (
                f"tiles of {tiles.spec.size_px} px are enlarged to the encoder's "
                f"{self.encoder.input_px} px"
            )
        if bad:
            yield f"{bad} of {len(tiles)} tiles cannot be read and have no features"

    def load(self) -> None:
        """Read the weights onto the device, once; what failed once fails again at once."""
        if self._fault:
            raise self._fault
        if not self._loaded:
            try:
                self.device = pick_device(self.device)
                self.encoder.load(self.device)
            except PathcliError as error:
                self._fault = error
                raise
            self._loaded = True

    def fill(self, rows: Rows, tiles: Tiles, key: Key, progress: Progress) -> int:
        """Fill and publish the entry of `key` as its one writer; return how many were encoded.

        Args:
            rows: what is read, a row for each of `tiles`.
            tiles: what the entry says of its rows; at least one.
            key: where it is kept; its encoder is this one.
            progress: called with (rows done, rows in all).

        Raises:
            DataError: too many rows are unreadable.
            ResourceError: no weights, no space, or another process is embedding it.
        """
        with self.store.features.lock(key) as held:
            if key in self.store.features:  # another process was faster
                return 0
            self.load()
            writer = self.store.features.writer(tiles, self.encoder.id, self.encoder.row_shape)
            with writer:
                encoded = self._fill(rows, len(tiles), writer, progress)
                if not held():
                    msg = f"{rows.name}: another process has taken this over meanwhile"
                    raise BusyError(msg)
        return encoded

    def _fill(self, rows: Rows, n: int, writer: FeatureWriter, progress: Progress) -> int:
        """Encode what an earlier run did not; return how many rows."""
        start_s = time.perf_counter()
        bad = writer.resumed_bad
        first = n if writer.resumed == n else writer.resumed // self.batch * self.batch
        progress(first, n)
        if first < n:
            writer.begin(first)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="reader") as pool:
            for start, pixels, status in self._read(pool, rows, n, first):
                try:
                    writer.write(self._encode(pixels, status), status)
                    bad += int((status != TileStatus.OK).sum())
                    _refuse_if_bad(rows, bad, n)
                except DataError:  # rows of a bad file, or of bad weights, are not to be resumed
                    writer.discard()
                    raise
                progress(start + len(status), n)
        self._encode_seconds = time.perf_counter() - start_s
        return n - first

    def _read(self, pool: ThreadPoolExecutor, rows: Rows, n: int, first: int) -> Iterator[Batch]:
        """Yield batches in order while the next ones are being read."""
        starts = iter(range(first, n, self.batch))
        queue: deque[Future[Batch]] = deque()
        try:
            for start in starts:
                stop = min(start + self.batch, n)
                queue.append(pool.submit(_read_batch, rows, start, stop))
                if len(queue) > self.workers + 1:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            for future in queue:
                future.cancel()

    def _encode(self, pixels: ByteArray, status: ByteArray) -> NDArray[np.float16]:
        """Return float16 [b, *row_shape]; rows that could not be read are NaN."""
        import torch  # noqa: PLC0415

        images = torch.from_numpy(pixels).to(self.device)
        try:
            features = self.encoder.encode(images).cpu().numpy()
        except torch.OutOfMemoryError as error:
            msg = f"{self.device} is out of memory at --batch {self.batch}; give a smaller one"
            raise ResourceError(msg) from error
        with np.errstate(over="ignore"):
            half: NDArray[np.float16] = features.astype(np.float16)
        half[status != TileStatus.OK] = np.nan
        return half


def _read_batch(rows: Rows, start: int, stop: int) -> Batch:
    pixels = np.zeros((stop - start, rows.side, rows.side, 3), np.uint8)
    status = np.zeros(stop - start, np.uint8)
    for i in range(stop - start):
        try:
            pixels[i] = rows.read(start + i)
        except DataError as error:
            if rows.gone(start + i):
                raise
            log.debug("unreadable: %s", error)
            status[i] = TileStatus.UNREADABLE
    return start, pixels, status


def _refuse_if_bad(rows: Rows, bad: int, n: int) -> None:
    if bad > rows.max_bad * n:
        msg = (
            f"{rows.name}: {bad} of {n} tiles cannot be read, more than "
            f"{rows.max_bad:.1%}; is the file whole? (--max-bad-tiles sets the limit)"
        )
        raise DataError(msg)


def embed(
    path: Path | str,
    encoder: Encoder,
    *,
    store: Store | None = None,
    spec: TileSpec | None = None,
    device: str = "auto",
    batch: int = 32,
    workers: int = 2,
    progress: Progress | None = None,
) -> EmbedRun:
    """Embed one slide into the store; for several slides keep one `Embedder`.

    Raises:
        DataError: not a slide, no usable resolution, or too many unreadable tiles.
        ResourceError: no weights, no space, or another process is embedding it.
    """
    embedder = Embedder(encoder, store, device=device, batch=batch, workers=workers)
    return embedder(path, spec=spec, progress=progress)


def embed_summary(run: EmbedRun) -> dict[str, Any]:
    """Return one run as plain JSON values, for `--json` and reports."""
    return summary(run.tiling) | {
        "encoder": run.key.encoder,
        "encoded": run.encoded,
        "unreadable": run.unreadable,
        "row_shape": list(run.row_shape),
        "seconds": round(run.seconds, 3),
        "tiles_per_second": round(run.encoded / run.encode_seconds, 1) if run.encoded else None,
        "warnings": list(run.warnings),
    }
