"""Batches of pixels in, features out in their order, in passes that the memory has room for.

On a CPU two batches go through the encoder at once, each on half of the cores: a single one
leaves cores idle wherever they wait for each other, and wherever a reader has taken one.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from pathcli.encoders.reading import out_of_memory
from pathcli.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    import torch

    from pathcli.encoders.reading import Batch
    from pathcli.types import Encoder

log = logging.getLogger("pathcli")

LANES = 2
"""Batches that a CPU encodes at once."""


class Passes:
    """A loaded encoder on its device."""

    def __init__(self, encoder: Encoder, device: str, batch: int, compiled: bool) -> None:
        """Keep the settings; see `Embedder`."""
        import torch  # noqa: PLC0415

        self.encoder, self.device, self.batch, self.compiled = encoder, device, batch, compiled
        self._fits, self._told = batch, False  # tiles per pass that the device has memory for
        self._lock = threading.Lock()
        if compiled:
            self._translated = torch.compile(encoder.encode, dynamic=False)
        alone = compiled or device != "cpu" or not getattr(encoder, "reentrant", False)
        self.lanes = 1 if alone else min(LANES, torch.get_num_threads())

    def over(self, batches: Iterable[Batch]) -> Generator[tuple[Batch, torch.Tensor]]:
        """Yield every batch, in order, with its features float32 [b, *row_shape].

        Raises:
            ResourceError: not even one tile fits.
        """
        if self.lanes == 1:
            for batch in batches:
                yield batch, self(batch.pixels)
            return
        begun: deque[tuple[Batch, Future[torch.Tensor]]] = deque()
        try:
            for batch in batches:
                begun.append((batch, self._pool.submit(self, batch.pixels)))
                if len(begun) > self.lanes:
                    features = begun[0][1].result()
                    yield begun.popleft()[0], features
            while begun:
                features = begun[0][1].result()
                yield begun.popleft()[0], features
        finally:
            left = [future for _, future in begun]
            for future in left:
                future.cancel()
            wait(left)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return _threads(self.lanes)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return features of uint8 [b, s, s, 3], in as many passes as the memory asks for.

        Raises:
            ResourceError: not even one tile fits.
        """
        import torch  # noqa: PLC0415

        while True:
            fits = self._fits
            try:
                parts = [self._pass(part, fits) for part in torch.split(pixels, fits)]
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                tried = fits if self.compiled else min(fits, len(pixels))
                if tried == 1:  # a compiled pass always had them all
                    msg = f"{self.device} is out of memory with a single tile; use another --device"
                    raise ResourceError(msg) from error
            self._shrink(tried // 2)  # here the failed pass is gone with its error
        self._tell()
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _shrink(self, fits: int) -> None:
        """Make all passes from now on that small."""
        import torch  # noqa: PLC0415

        with self._lock:
            self._fits = min(self._fits, fits)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def _tell(self) -> None:
        """Say, once, that passes are smaller than they were to be."""
        with self._lock:
            new = self._fits < self.batch and not self._told
            self._told |= new
        if new:
            log.warning(
                "%s is out of memory at --batch %d: going on with %d",
                *(self.device, self.batch, self._fits),
            )

    def _pass(self, pixels: torch.Tensor, fits: int) -> torch.Tensor:
        """Return the encoder's features of a part of a batch; the device may still be at work."""
        images = pixels.to(self.device, non_blocking=pixels.is_pinned())
        if not self.compiled:
            return self.encoder.encode(images)
        import torch  # noqa: PLC0415
        from torch._dynamo.exc import TorchDynamoException  # noqa: PLC0415

        # always of one size: each other one would be compiled anew
        images = torch.nn.functional.pad(images, (0, 0) * 3 + (0, fits - len(images)))
        try:
            return self._translated(images)[: len(pixels)]
        except TorchDynamoException as error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
            msg = f"{self.encoder.name} cannot be compiled here ({line}); leave --compile out"
            raise ResourceError(msg) from error


def _threads(lanes: int) -> ThreadPoolExecutor:
    """Return threads with their share of the cores each; the caller's own number stays.

    They end with the pool: nothing that they run keeps it.
    """
    import torch  # noqa: PLC0415

    cores, ready = torch.get_num_threads(), threading.Barrier(lanes + 1)

    def begin() -> None:
        torch.set_num_threads(max(1, cores // lanes))
        torch.get_num_threads()  # from here on it is this thread's own number
        with suppress(threading.BrokenBarrierError):
            ready.wait()

    pool = ThreadPoolExecutor(lanes, thread_name_prefix="encoder", initializer=begin)
    try:
        for _ in range(lanes):
            pool.submit(int)
        ready.wait()
    finally:
        ready.abort()  # nobody waits for one that was interrupted
        torch.set_num_threads(cores)  # what any thread begins with that comes later
    return pool
