"""Several devices in, one process for each: slides are dealt to whichever is free.

Leases of the store keep two writers apart, here as between any two commands.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any, Protocol

from pathcli.device import pick_device
from pathcli.encoders.embedding import Embedder, EmbedRun
from pathcli.errors import BusyError, ResourceError, UsageError
from pathcli.slides.readers import public_name
from pathcli.store import Store
from pathcli.store.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from pathcli.encoders.embedding import Job
    from pathcli.types import Encoder, Progress

log = logging.getLogger("pathcli")

Known = tuple[str, dict[str, Any]]
"""A slide and the keyword arguments of its call."""

LOOK_S = 0.5
"""Seconds between two looks at how far a slide is."""


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


class LostError(ResourceError):
    """A process died with the slide it had."""


class Hand(Protocol):
    """A process that embeds, here or elsewhere."""

    def embed(self, job: Known, after: Known | None) -> EmbedRun:
        """Embed one slide while the one after it is prepared.

        Raises:
            LostError: the process died; there must be another.
        """

    def close(self) -> None:
        """End the process, at once if it is at work."""


class Crew(ABC):
    """Several processes that embed at once what was expected: see `Fleet` for one of them.

    Used as an `Embedder` is: `expect` the slides, then call for each. Whichever process is free
    takes the next two, one to encode and one to prepare meanwhile; what processes of other
    commands are busy with comes last.
    """

    def __init__(self, encoder: Encoder, store: Store | None = None) -> None:
        """Keep what all have in common.

        Raises:
            UsageError: a store that no other process can see.
        """
        self.encoder, self.store = encoder, store or Store()
        if str(self.store.root).startswith("memory:"):
            msg = f"{self.store.root}: several processes share no memory; give another --store"
            raise UsageError(msg)
        self._turns: Turns[tuple[Known, Future[EmbedRun]]] = Turns()
        self._begun: list[tuple[Known, Future[EmbedRun]]] = []
        self._hands: set[Hand] = set()
        self._threads: list[threading.Thread] = []
        self._fault: Exception | None = None  # of a process that could not be had
        self._closed, self._lock, self._working = threading.Event(), threading.Lock(), 0

    def expect(self, jobs: Iterable[Job]) -> None:
        """Begin with these slides, in order; to be told once."""
        self._begun = [((str(path), dict(how)), Future()) for path, how in jobs]
        self._turns = Turns(self._begun)
        places = self._places()[: len(self._begun)]
        self._working = len(places)
        for place in places:
            self._start(place)

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
            msg = f"{public_name(path)}: tell by `expect` what will be asked for"
            raise UsageError(msg)
        _, future = self._begun.pop(place)
        while not wait([future], LOOK_S).done:
            if progress and (at := self._look().get(known[0])):
                progress(*at)
        run = future.result()
        if progress:
            progress(run.tiles, run.tiles)
        return run

    def close(self) -> None:
        """Begin with no further slide; those begun are left, to be resumed another time."""
        self._closed.set()
        self._turns.stop()
        while any(thread.is_alive() for thread in self._threads):
            for hand in list(self._hands):
                hand.close()
            for thread in list(self._threads):
                thread.join(LOOK_S)

    @abstractmethod
    def _places(self) -> Sequence[str]:
        """Return where processes are to be."""

    @abstractmethod
    def _hire(self, place: str) -> Hand:
        """Return a process that can be asked to embed, when there is one."""

    def _look(self) -> Mapping[str, tuple[int, int]]:
        """Return how many tiles of slides are done, and of how many, as far as that is known."""
        return {}

    def _start(self, place: str) -> None:
        thread = threading.Thread(target=self._drive, args=(place,), name=f"drive {place}")
        self._threads.append(thread)
        thread.start()

    def _drive(self, place: str) -> None:
        """Give one process slides; the last to leave says what became of those nobody took."""
        try:
            self._deal(place)
        except Exception as error:  # noqa: BLE001 - raised where slides are asked for
            self._fault = error
        with self._lock:
            self._working -= 1
            others = self._working > 0
        while not others and self._fault and (job := self._turns.take()):
            job[1].set_exception(self._fault)

    def _deal(self, place: str) -> None:
        """Give one process slide after slide, each with the one that follows.

        The last ones come alone: none is held back from a process that has nothing to do.
        """
        hand, after = None, None
        while not self._closed.is_set():
            try:
                hand = hand or self._hire(place)
            except BaseException:
                if after:
                    self._turns.give_back(after)
                raise
            self._hands.add(hand)
            job = after or self._turns.take()
            if job is None:
                break
            after = self._turns.take_ahead(len(self._threads))
            if not self._give(hand, job, after and after[0]):
                hand.close()
                self._hands.discard(hand)
                hand = None
        if hand:
            hand.close()

    def _give(self, hand: Hand, job: tuple[Known, Future[EmbedRun]], after: Known | None) -> bool:
        """Have one slide embedded; tell whether the process still lives."""
        known, future = job
        try:
            future.set_result(hand.embed(known, after))
        except BusyError as error:
            self._turns.busy(job, error)
        except LostError as error:
            future.set_exception(error)
            return False
        except BaseException as error:  # noqa: BLE001 - raised where the slide is asked for
            if not isinstance(error, Exception):  # Ctrl-C, told there before it is here
                self._closed.set()
            future.set_exception(error)
        return True


class Fleet(Crew):
    """An `Embedder` on each of several devices of this machine."""

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
        super().__init__(encoder, store)
        self.devices, self._how = devices, how
        for device in devices:
            pick_device(device)

    def _places(self) -> Sequence[str]:
        resource_tracker.ensure_running()  # it lets signals through to the thread that starts it
        return self.devices

    def _hire(self, place: str) -> Hand:
        share = len(self.devices) if set(self.devices) == {"cpu"} else 1
        how = self._how | {"device": place}
        level = logging.getLogger("pathcli").level
        return Child(place, (self.encoder, self.store.root, how, share, level))


class Child:
    """A process of this machine that embeds on one device."""

    def __init__(self, device: str, how: tuple[Any, ...]) -> None:
        """Keep what `_begin` is told; the process starts with the first slide."""
        self.device = device
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _begin, how)

    def embed(self, job: Known, after: Known | None) -> EmbedRun:
        """See `Hand.embed`."""
        if hasattr(signal, "pthread_sigmask"):
            # inherited: Ctrl-C is for the process that a person talks to, which ends the others
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(_embed, job, after).result()
        except BrokenProcessPool as error:
            slide = public_name(job[0])
            msg = f"{slide}: the process on {self.device} died, for want of memory perhaps"
            raise LostError(msg) from error

    def close(self) -> None:
        """See `Hand.close`."""
        # from Python 3.14 on terminate_workers
        for process in list((self._pool._processes or {}).values()):  # noqa: SLF001
            process.terminate()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin(encoder: Encoder, root: Path | str, how: dict[str, Any], share: int, level: int) -> None:
    """Make this process's embedder, on its part of the cores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch  # noqa: PLC0415

    logging.getLogger("pathcli").setLevel(level)
    torch.set_num_threads(max(1, torch.get_num_threads() // share))
    _here[:] = [Embedder(encoder, Store(root), **how)]
    signal.signal(signal.SIGTERM, _leave)  # up to here there is no lease, and nothing to say


def _leave(*_: object) -> None:
    """End this process, its leases given back."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit()


def _embed(job: Known, after: Known | None) -> EmbedRun:
    """Embed one slide here while the one after it is prepared."""
    embedder = _here[0]
    embedder.expect([job, after] if after else [job])
    return embedder(job[0], **job[1])


_here: list[Embedder] = []
"""The embedder of a process that was started above."""
