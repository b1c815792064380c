"""Several devices in, one process for each: slides are dealt to whichever is free.

Leases of the store keep two writers apart, here as between any two commands.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any

from pathcli.device import pick_device
from pathcli.encoders.embedding import Embedder, EmbedRun
from pathcli.errors import ResourceError, UsageError
from pathcli.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from pathcli.encoders.embedding import Job
    from pathcli.types import Encoder, Progress

    Known = tuple[str, dict[str, Any]]

_here: list[Embedder] = []
"""The embedder of a process that was started below."""


def devices_of(text: str) -> list[str]:
    """Return the devices a list names: "cuda:0,cuda:1", or all GPUs there are by "cuda:all".

    Raises:
        UsageError: a GPU is named twice.
        ResourceError: there is no GPU.
    """
    if text != "cuda:all":
        names = [name.strip() for name in text.split(",")]
        if twice := [name for name in set(names) if name != "cpu" and names.count(name) > 1]:
            msg = f"--device names {twice[0]} twice; a process each would fight for its memory"
            raise UsageError(msg)
        return names
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        msg = "--device cuda:all: no GPU is here"
        raise ResourceError(msg)
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())]


class Fleet:
    """An `Embedder` on each of several devices; what was expected is worked on at once.

    Used as an `Embedder` is: `expect` the slides, then call for each. Whichever process is free
    takes the next two, one to encode and one to prepare meanwhile.
    """

    def __init__(
        self,
        encoder: Encoder,
        store: Store | None = None,
        *,
        devices: Sequence[str],
        **how: Any,  # noqa: ANN401 - what `Embedder` takes
    ) -> None:
        """Keep the settings: `how` are those of `Embedder`, workers those of each process.

        Raises:
            ResourceError: a device is not here.
        """
        self.encoder, self.store, self.devices, self._how = encoder, store or Store(), devices, how
        for device in devices:
            pick_device(device)
        self._waiting: deque[tuple[Known, Future[EmbedRun]]] = deque()
        self._begun: list[tuple[Known, Future[EmbedRun]]] = []
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def expect(self, jobs: Iterable[Job]) -> None:
        """Begin with these slides, in order, a process for each device; to be told once."""
        self._waiting.extend(((str(path), dict(how)), Future()) for path, how in jobs)
        self._begun.extend(self._waiting)
        for device in self.devices[: len(self._waiting)]:
            thread = threading.Thread(target=self._drive, args=(device,), name=f"drive {device}")
            self._threads.append(thread)
            thread.start()

    def __call__(
        self,
        path: Path | str,
        *,
        progress: Progress | None = None,
        **how: Any,  # noqa: ANN401 - what `Embedder` takes
    ) -> EmbedRun:
        """Wait for one of the slides that were expected; see `Embedder.__call__`.

        Raises:
            UsageError: this slide was not expected, or has been asked for before.
        """
        known = (str(path), how)
        place = next((i for i, (job, _) in enumerate(self._begun) if job == known), None)
        if place is None:
            msg = f"{path}: tell a fleet by `expect` what it will be asked for"
            raise UsageError(msg)
        run = self._begun.pop(place)[1].result()
        if progress:
            progress(run.tiles, run.tiles)
        return run

    def _drive(self, device: str) -> None:
        """Give the process of one device slide after slide, each with the one that follows.

        The last ones come alone: none is held back from a process that has nothing to do.
        """
        pool: ProcessPoolExecutor | None = None
        job = self._take()
        while job and not self._closed.is_set():
            after = self._take() if len(self._waiting) >= len(self.devices) else None
            (known, future) = job
            try:
                pool = pool or self._pool(device)
                future.set_result(pool.submit(_embed, known, after and after[0]).result())
            except BrokenProcessPool:
                msg = f"{known[0]}: the process on {device} died, for want of memory perhaps"
                future.set_exception(ResourceError(msg))
                pool = None  # and has cleared up after itself
            except BaseException as error:  # noqa: BLE001 - raised where the slide is asked for
                if not isinstance(error, Exception):  # Ctrl-C, told there before it is here
                    self._closed.set()
                future.set_exception(error)
            job = after or self._take()
        if pool:
            pool.shutdown()

    def _pool(self, device: str) -> ProcessPoolExecutor:
        level = logging.getLogger("pathcli").level
        share = len(self.devices) if set(self.devices) == {"cpu"} else 1
        how = self._how | {"device": device}
        return ProcessPoolExecutor(
            1,
            multiprocessing.get_context("spawn"),
            _begin,
            (self.encoder, self.store.root, how, share, level),
        )

    def _take(self) -> tuple[Known, Future[EmbedRun]] | None:
        try:
            return self._waiting.popleft()
        except IndexError:
            return None

    def close(self) -> None:
        """Begin with no further slide, and wait for those begun."""
        self._closed.set()
        for thread in self._threads:
            thread.join()


def _begin(encoder: Encoder, root: Path, how: dict[str, Any], share: int, level: int) -> None:
    """Make this process's embedder, on its part of the cores."""
    import torch  # noqa: PLC0415

    logging.getLogger("pathcli").setLevel(level)
    torch.set_num_threads(max(1, torch.get_num_threads() // share))
    _here[:] = [Embedder(encoder, Store(root), **how)]


def _embed(job: Known, after: Known | None) -> EmbedRun:
    """Embed one slide here while the one after it is prepared."""
    embedder = _here[0]
    embedder.expect([job, after] if after else [job])
    return embedder(job[0], **job[1])
