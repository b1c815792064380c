"""Every batch of a run, made ready ahead of the loop: a place in the run in, its batch out.

What a batch holds, and the random numbers it is made with, follow from its place alone: a
resumed run, with however many workers, sees the batches it would have seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pathcli.errors import DataError, PathcliError, UsageError
from pathcli.settings import by_length, order

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from pathcli.settings import TrainSettings

    Collate = Callable[[list[Any], np.random.Generator], Any]
    Place = tuple[int, int]


def as_list(examples: list[Any], rng: np.random.Generator) -> list[Any]:
    """Return a batch as the list of its examples: how to collate where nothing is said."""
    del rng
    return examples


class Batches:
    """One process's share of every batch of a run, by (epoch, number in it), both from 0.

    Of `settings.batch` rows every process takes an equal, contiguous share. An epoch leaves
    out the last examples of its order that cannot be shared out evenly: fewer than there are
    processes, and others each epoch. A share comes as a list of pieces of at most
    `settings.chunk` rows, or whole, as a list of one.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Collate,
        settings: TrainSettings,
        *,
        lengths: Sequence[int] | None = None,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Know the run's one seed; nothing is read. `lengths` are the examples' own, if known.

        Raises:
            UsageError: the batch cannot be shared out evenly.
            DataError: there is nothing to share out.
        """
        if settings.batch % ranks:
            msg = f"train.batch={settings.batch} is shared out over {ranks} processes; give a "
            msg += f"multiple of {ranks}"
            raise UsageError(msg)
        self.rows = len(examples) - len(examples) % ranks
        if not self.rows:
            msg = "there is no example to train on"
            raise DataError(msg if not len(examples) else f"{msg} for each of {ranks} processes")
        self.examples, self.collate, self.rank, self.ranks = examples, collate, rank, ranks
        self.seed, self.size, self.epochs = settings.seeds[0], settings.batch, settings.epochs
        self.chunk, self.workers = settings.chunk or settings.batch, settings.workers
        self.lengths = lengths if settings.by_length else None
        self._known: tuple[int, list[int]] = (-1, [])

    @property
    def count(self) -> int:
        """Batches in an epoch; the last one may be smaller than the others."""
        return -(-self.rows // self.size)

    def __getitem__(self, place: Place) -> list[Any]:
        """Return the pieces of one batch, each as `collate` makes it."""
        epoch, number = place
        first = number * self.size
        rows = self._order(epoch)[first : min(first + self.size, self.rows)]
        share = len(rows) // self.ranks
        starts = range(self.rank * share, (self.rank + 1) * share, self.chunk)
        pieces = [(at, rows[at : min(at + self.chunk, starts.stop)]) for at in starts]
        return [
            self.collate(
                [self.examples[row] for row in piece],
                # from 1, as [seed, epoch] alone is the order's; the first piece adds nothing
                np.random.default_rng([self.seed, epoch, number + 1, at]),
            )
            for at, piece in pieces
        ]

    def _order(self, epoch: int) -> list[int]:
        if self._known[0] != epoch:
            rows = order(self.seed, epoch, len(self.examples))
            if self.lengths is not None:
                rng = np.random.default_rng([self.seed, epoch, 0])
                rows = by_length(rows, self.lengths, self.size, rng)
            self._known = epoch, rows
        return self._known[1]

    def stream(self, epoch: int, number: int, *, pinned: bool = False) -> Generator[list[Any]]:
        """Yield the batches from a place on to the end of the run.

        Workers, where there are any, go on from epoch to epoch and while the loop validates,
        two batches ahead each. `pinned` batches travel to a GPU beside its work.

        Raises:
            PathcliError: what `collate` raised, from a worker too.
        """
        places = ((e, n) for e in range(epoch, self.epochs) for n in range(self.count))
        left = (place for place in places if place >= (epoch, number))
        if not self.workers:
            yield from (self[place] for place in left)
            return
        loader = torch.utils.data.DataLoader(
            _Told(self),
            batch_size=None,
            sampler=left,
            collate_fn=_as_it_is,
            num_workers=self.workers,
            pin_memory=pinned,
            worker_init_fn=_one_thread,
            generator=torch.Generator(),  # else the loop's own random numbers would be drawn
        )
        for found in loader:
            if isinstance(found, PathcliError):
                raise found
            yield found


class _Told(torch.utils.data.Dataset[Any]):
    """Hands errors over as values: a worker that raises turns them into a traceback's text."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __getitem__(self, place: Place) -> list[Any] | PathcliError:
        try:
            return self.batches[place]
        except PathcliError as error:
            return error


def _one_thread(worker: int) -> None:
    """Keep OpenCV to the worker's own thread, as PyTorch keeps itself: workers are many."""
    import cv2  # noqa: PLC0415 - only where there are workers

    del worker
    cv2.setNumThreads(0)


def _as_it_is(found: Any) -> Any:  # noqa: ANN401 - a batch of the task's own
    return found
