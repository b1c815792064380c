"""Tiles and an encoder in, features in the store out: readers, encoder and writer overlap.

While one slide is encoded the next one is opened, cut into tiles and begun to be read.
Batches are cut by tile index, never by arrival, and at most a few are in memory.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.device import pick_device
from pathcli.encoders.passes import Passes
from pathcli.encoders.reading import Prepared, Reader, SlideRows, drop
from pathcli.encoders.writing import Writing
from pathcli.errors import BusyError, DataError, PathcliError
from pathcli.slides.readers import open_slide, slide_mpp
from pathcli.slides.roi import Roi, read_roi
from pathcli.slides.tiling import TileRun, refuse_if_bad, summary, tile_slide
from pathcli.store import Store
from pathcli.store.lease import HEARTBEAT_S
from pathcli.types import Encoder, Key, silent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pathcli.encoders.reading import Rows
    from pathcli.store.entries import Writer
    from pathcli.types import Progress, Tiles, TileSpec

    Job = tuple[Path | str, Mapping[str, Any]]
    """A slide and the keyword arguments its call will have, `progress` left out."""

log = logging.getLogger("pathcli")


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
        compiled: bool = False,
    ) -> None:
        """Keep the settings.

        Args:
            encoder: what embeds.
            store: where features are kept (default: the user's store).
            device: auto, cpu, cuda, cuda:1 or mps.
            batch: tiles per forward pass.
            workers: threads that read tiles.
            max_bad_tiles: share of unreadable tiles above which a slide fails.
            compiled: let `torch.compile` translate the encoder first.
        """
        self.encoder, self.store = encoder, store or Store()
        self.device, self.batch, self.workers = device, batch, max(1, workers)
        self.max_bad_tiles, self.compiled = max_bad_tiles, compiled
        self._loaded, self._encode_seconds = False, 0.0
        self._fault: PathcliError | None = None
        self._expected: deque[Job] = deque()
        self._next: tuple[Job, Future[Prepared]] | None = None
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="next slide")

    def expect(self, jobs: Iterable[Job]) -> None:
        """Tell which slides will be asked for, in order: each is prepared during the one before.

        Nothing but time depends on it; it may be told again. What is wrong with a slide is raised
        by its own call.
        """
        self._expected = deque((str(path), dict(how)) for path, how in jobs)

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
            tiling: `mpp`, `mpp_source`, `roi`, `out`, `overview`, `geojson` as `tile` takes them.

        Raises:
            DataError: not a slide, no usable resolution, or too many unreadable tiles.
            ResourceError: no weights, no space, or another process is embedding it.
        """
        start = time.perf_counter()
        with closing(self._claim(path, {"spec": spec, **tiling})) as ready:
            run, rows, key, encoded = ready.run, ready.rows, ready.key, 0
            if len(run.tiles) and key not in self.store.features:
                encoded = self.fill(rows, run.tiles, key, progress or silent, ready.reader)
            shape, bad = self.store.features.shape(key) if len(run.tiles) else ((), 0)
            refuse_if_bad(rows.name, bad, len(run.tiles), rows.max_bad)
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

    # --- opening, and the next slide ---------------------------------------------------------

    def _claim(self, path: Path | str, how: dict[str, Any]) -> Prepared:
        """Return a slide, prepared before if it was expected, and begin with the one after it.

        Raises:
            BusyError: another process is at it; the order of the others may change then, so
                none of them is begun.
        """
        job = (str(path), how)
        if job in self._expected:
            while self._expected.popleft() != job:
                pass
        early = self._next[1] if self._next and self._next[0] == job else None
        if early:
            self._next = None
        try:
            ready = self._result(early) or self._prepare(path, **how)
        except BusyError:
            raise
        except BaseException:
            self._look_ahead()
            raise
        self._look_ahead()
        return ready

    @staticmethod
    def _result(early: Future[Prepared] | None) -> Prepared | None:
        """Return what was prepared; None if another process was at it then."""
        try:
            return early.result() if early else None
        except BusyError:
            return None

    def _look_ahead(self) -> None:
        job = self._expected[0] if self._expected else None
        if self._next and self._next[0] != job:
            drop(self._next[1])
            self._next = None
        if job and not self._next:
            self._next = (job, self._beside.submit(self._prepare, job[0], **job[1]))

    def _prepare(self, path: Path | str, spec: TileSpec | None = None, **tiling: Any) -> Prepared:  # noqa: ANN401
        """Open a slide, cut it and, if it has not been begun yet, read its first batches.

        Nothing is done for a slide that another process is at, nor by two of them at once.
        """
        slide, spec = open_slide(path), spec or self.encoder.native
        try:
            if isinstance(roi := tiling.get("roi"), str | Path):
                roi = read_roi(Path(roi), slide.info.bounds, (slide.info.width, slide.info.height))
                tiling["roi"] = roi
            whole = replace(spec, roi=roi.digest) if isinstance(roi, Roi) else spec
            used = slide_mpp(slide, tiling.get("mpp"))
            key = Key(slide.info.item, used, whole.digest, self.encoder.id)
            done = key in self.store.features
            with nullcontext() if done else self.store.features.lock(key):
                run = tile_slide(slide, spec, self.store, **tiling)
            rows, n = SlideRows(slide, run.tiles, self.max_bad_tiles), len(run.tiles)
            begun = done or self.store.features.begun(key)
            reader = None if begun or self._fault or not n else self._reader(rows, n)
        except BaseException:
            slide.close()
            raise
        return Prepared(slide, run, rows, key, reader)

    def _reader(self, rows: Rows, n: int, first: int = 0) -> Reader:
        pinned = pick_device(self.device).startswith("cuda")
        return Reader(rows, n, first=first, batch=self.batch, workers=self.workers, pinned=pinned)

    def close(self) -> None:
        """Forget what was expected, and release what was prepared for it."""
        self._expected.clear()
        self._look_ahead()

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
                self._passes = Passes(self.encoder, self.device, self.batch, self.compiled)
            except PathcliError as error:
                self._fault = error
                raise
            self._loaded = True

    # --- filling an entry --------------------------------------------------------------------

    def fill(
        self,
        rows: Rows,
        tiles: Tiles,
        key: Key,
        progress: Progress,
        reader: Reader | None = None,
    ) -> int:
        """Fill and publish the entry of `key` as its one writer; return how many were encoded.

        Args:
            rows: what is read, a row for each of `tiles`.
            tiles: what the entry says of its rows; at least one.
            key: where it is kept; its encoder is this one.
            progress: called with (rows done, rows in all).
            reader: has begun to read them; used if it began where the entry is to go on.

        Raises:
            DataError: too many rows are unreadable.
            ResourceError: no weights, no space, or another process is embedding it.
        """
        with self.store.features.lock(key) as held:
            if key in self.store.features:  # another process was faster
                return 0
            self.load()
            writer = self.store.features.writer(tiles, self.encoder.id, self.encoder.row_shape)
            n = len(tiles)
            first = n if writer.resumed == n else writer.resumed // self.batch * self.batch
            if reader is None or reader.first != first:
                reader = self._reader(rows, n, first)
            with writer, closing(reader):
                self._fill(reader, writer, progress, held)
                _require(held, rows)
        return n - first

    def _fill(
        self, reader: Reader, writer: Writer, progress: Progress, held: Callable[[], bool]
    ) -> None:
        """Encode what the reader gives; stop where the lease is found to be another's."""
        start, rows, n = time.perf_counter(), reader.rows, reader.n
        progress(reader.first, n)
        if reader.first < n:
            writer.begin(reader.first)
        bad, asked = writer.resumed_bad, time.time()
        with Writing(writer) as writing, closing(self._passes.over(reader)) as encoded:
            for batch, features in encoded:
                if abs(time.time() - asked) >= HEARTBEAT_S:  # this machine may have slept
                    _require(held, rows)
                    asked = time.time()
                bad += batch.bad
                try:
                    refuse_if_bad(rows.name, bad, n, rows.max_bad)
                except DataError:  # rows of a bad file are not to be resumed
                    writer.discard()
                    raise
                writing.put(features, batch)
                progress(batch.start + len(batch.status), n)
        self._encode_seconds = time.perf_counter() - start


def _require(held: Callable[[], bool], rows: Rows) -> None:
    if not held():
        msg = f"{rows.name}: another process has taken this over meanwhile"
        raise BusyError(msg)


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
