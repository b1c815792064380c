"""Many commands at one list: each goes on with what is free, and comes back to what is not."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pathcli.errors import BusyError

log = logging.getLogger("pathcli")

POLL_S = 3.0
"""Seconds between two looks at what another process is busy with."""

T = TypeVar("T")


class Turns(Generic[T]):
    """Jobs in the order in which they are to be done; several threads may take them.

    They are taken in the order given until one turns out to be another process's. Then others
    are at the same list, and the rest follows at random, so that no two go through it in step.
    What was busy is tried again at the end, until it is not.
    """

    def __init__(self, jobs: Iterable[T] = ()) -> None:
        """Keep the jobs."""
        self._free = deque(jobs)
        self._busy: list[T] = []
        self._alone, self._next_look = True, 0.0
        self._why = self._said = ""
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def __len__(self) -> int:
        """Count the jobs that nobody was found to be busy with."""
        return len(self._free)

    @property
    def free(self) -> list[T]:
        """Return the jobs that nobody was found to be busy with, in the order of their turns."""
        return list(self._free)

    def take(self) -> T | None:
        """Return the next job, waiting while others are busy with all of them; None at the end."""
        while not self._stopped.is_set():
            with self._lock:
                wait = self._next_look - time.monotonic()
                if not self._free and wait <= 0:
                    self._free.extend(self._busy)
                    self._busy.clear()
                if self._free:
                    return self._free.popleft()
                if not self._busy:
                    break
                self._tell()
            self._stopped.wait(wait)
        return None

    def take_ahead(self, keep: int) -> T | None:
        """Return the next job if at least `keep` are free, so that others still find one."""
        with self._lock:
            return self._free.popleft() if len(self._free) >= max(1, keep) else None

    def give_back(self, job: T) -> None:
        """Let another have a job that was taken."""
        with self._lock:
            self._free.appendleft(job)

    def busy(self, job: T, why: BusyError) -> None:
        """Put off a job that another process was found to be busy with."""
        with self._lock:
            self._busy.append(job)
            self._why, self._next_look = str(why).partition(";")[0], time.monotonic() + POLL_S
            if self._alone:
                random.SystemRandom().shuffle(self._free)
                self._alone = False

    def stop(self) -> None:
        """Have nothing more to take, and wake those who wait."""
        self._stopped.set()

    def _tell(self) -> None:
        """Say what is waited for, where that was not said last."""
        more = len(self._busy) - 1
        text = f"waiting for {self._why}" + (f", and for {more} more" if more else "")
        if text != self._said:
            log.info("%s", text)
            self._said = text
