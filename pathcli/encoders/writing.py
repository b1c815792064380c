"""Features in, rows on disk out, in a thread of its own: the encoder never waits for a disk."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Self

import numpy as np

from pathcli.errors import DataError
from pathcli.types import TileStatus

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from pathcli.encoders.reading import Batch
    from pathcli.store.entries import Writer

WAITING = 2
"""Batches of features that may wait to be written."""


class Writing:
    """Hands features to a `Writer`, in order; leaving the block waits for the last.

    What goes wrong in the thread is raised by the next `put`, or when the block is left without
    another error.
    """

    def __init__(self, writer: Writer) -> None:
        """Know the writer, which is open."""
        self._writer = writer
        self._waiting: queue.Queue[tuple[torch.Tensor, Batch] | None] = queue.Queue(WAITING)
        self._error: BaseException | None = None
        # nobody waits for it where a signal strikes between its start and the block
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)

    def put(self, features: torch.Tensor, batch: Batch) -> None:
        """Have the features [b, *row_shape] of a batch written, on whatever device they are.

        Raises:
            DataError: an earlier batch has values that float16 cannot hold.
            ResourceError: the disk is full.
        """
        if self._error:
            raise self._error
        self._waiting.put((features, batch))

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error:
                continue
            try:
                features, batch = item
                self._writer.write(half(features, batch), batch.status)
            except BaseException as error:  # noqa: BLE001 - raised again where it can be handled
                self._error = error

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait until all that was put is written."""
        self._waiting.put(None)
        self._thread.join()
        if isinstance(self._error, DataError):  # what bad weights gave is not to be resumed
            self._writer.discard()
        if self._error and kind is None:
            raise self._error


def half(features: torch.Tensor, batch: Batch) -> NDArray[np.float16]:
    """Return float16 [b, *row_shape]; rows that could not be read are NaN."""
    with np.errstate(over="ignore"):
        values: NDArray[np.float16] = features.cpu().numpy().astype(np.float16)
    values[batch.status != TileStatus.OK] = np.nan
    return values
