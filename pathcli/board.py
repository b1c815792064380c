"""Curves of a run for TensorBoard, beside `metrics.jsonl`; its package is an extra."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from pathcli.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def require_tensorboard() -> None:
    """Refuse to begin without TensorBoard.

    Raises:
        ResourceError: the package is not installed.
    """
    if find_spec("tensorboard") is None:
        msg = "train.tensorboard needs a package that is not here: pip install tensorboard"
        raise ResourceError(msg)


class Board:
    """The event file of one run's folder; what an interrupted run wrote after `step` is void."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open a file of its own.

        Raises:
            ResourceError: the package is not installed.
        """
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line of `metrics.jsonl`, each number under its name."""
        for name, value in line.items():
            if name not in {"step", "epoch"} and value is not None:
                self.writer.add_scalar(name, value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        """Close the file."""
        self.writer.close()
