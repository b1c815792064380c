"""Memory that runs full is told in one line; a language model too large for a GPU is divided."""

from __future__ import annotations

import logging
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pathcli.errors import ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger("pathcli")

Row = TypeVar("Row")
Said = TypeVar("Said")

ROOM = 3 * 2**30
"""Bytes of a GPU that are left for images, and for what is computed of words."""
_FULL = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def is_full(error: BaseException) -> bool:
    """Tell whether an error says that memory, of whichever device, is full."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and bool(_FULL.search(str(error))))


def full(name: str, device: object) -> ResourceError:
    """Return the error of a full memory: whose model, where, and what to do."""
    kind = str(device).partition(":")[0]
    rest = "" if kind == "cpu" else ", or --device cpu"
    return ResourceError(
        f"{name}: the memory of {kind} is full; give a smaller --load (bfloat16, 8bit, 4bit), "
        f"fewer images at once{rest}"
    )


@contextmanager
def memory(name: str, device: object) -> Iterator[None]:
    """Say in one line that a device's memory is full.

    Raises:
        ResourceError: it is.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full(error):
            raise
        raise full(name, device) from error


def in_parts(
    rows: Sequence[Row], size: int, do: Callable[[Sequence[Row]], Sequence[Said]]
) -> Iterator[Said]:
    """Yield what `do` says of each row, given `size` rows at a time; fewer where memory is full.

    Raises:
        RuntimeError, MemoryError: a row alone does not fit; see `is_full`.
    """
    start = 0
    while start < len(rows):
        part = rows[start : start + size]
        try:
            found = do(part)
        except (RuntimeError, MemoryError) as error:
            if not is_full(error) or len(part) == 1:
                raise
            size = len(part) // 2
            log.info("memory is full with %d at a time; now %d", len(part), size)
            continue
        yield from found
        start += len(part)


def place(network: Any, device: torch.device, *, room: int | None = None) -> None:  # noqa: ANN401
    """Put a language model on a device; layers that do not fit on a GPU stay in main memory.

    Those come to the GPU each time they are needed (accelerate's `cpu_offload`), which is slow.

    Args:
        network: a model of transformers, its weights in main memory and final.
        device: where it computes.
        room: bytes there are for it (default: what a GPU has free, less `ROOM`).

    Raises:
        ResourceError: it does not fit even so.
    """
    if next(network.parameters()).device.type == "cuda":
        return  # in 8 or 4 bits it was read right there
    if room is None and device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] - ROOM
    over = 0 if room is None else _bytes(network) - room
    away: list[Any] = []
    for layer in reversed(_layers(network)) if over > 0 else ():
        if over > 0:
            away.append(layer)
            over -= _bytes(layer)
    if over > 0:
        raise full(network.name_or_path or type(network).__name__, device)
    if away:
        from accelerate import cpu_offload  # noqa: PLC0415

        log.warning(
            "%d layers of the language model do not fit on %s and come from main memory each time, "
            "which is slow; a smaller --load helps",
            len(away),
            device,
        )
        for layer in away:
            cpu_offload(layer, execution_device=device)
    network._apply(lambda part: part if part.is_meta else part.to(device))  # noqa: SLF001 - as `to`


def _bytes(module: torch.nn.Module) -> int:
    return sum(part.nbytes for part in (*module.parameters(), *module.buffers()))


def _layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a model of transformers, first to last; together nearly all of it."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415

    return [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
