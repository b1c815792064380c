"""Several processes that train one module: who is who, and what they tell each other.

`torchrun` or `accelerate launch` starts them, each with the same command. All do the same
steps; the first alone writes. When one dies, the launcher stops the others. Alone, every
function here returns at once what one process would find.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState

from pathcli.device import pick_device
from pathcli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from pathcli.settings import TrainSettings

T = TypeVar("T")

BLOCK = 1_000_000
"""A block of a model is gathered on its own from this many weights on."""
_WAIT = timedelta(days=2)  # the first process may make features for long; the rest wait for it
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


# --- who is who --------------------------------------------------------------------------


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _several() else 0


def ranks() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def join(device: str) -> None:
    """Meet the other processes, where a launcher started several; each takes a GPU of its own.

    Raises:
        UsageError: one GPU is named for all of them.
        ResourceError: the device is not here.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _several():
        return
    if ":" in device:
        msg = f"--device {device} is one GPU, and there are several processes; give --device cuda"
        raise UsageError(msg)
    on_gpu = pick_device(device) == "cuda"
    if on_gpu:
        pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gloo beside nccl: small facts are told without waiting for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_WAIT)


def leave() -> None:
    """Part from the other processes, when all work is done."""
    if _several():
        dist.destroy_process_group()


# --- what they tell each other -----------------------------------------------------------


def told(value: T) -> T:
    """Return what the first process has, in every process."""
    if ranks() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_of(value: T) -> list[T]:
    """Return what every process has, in their order."""
    if ranks() == 1:
        return [value]
    box: list[Any] = [None] * ranks()
    dist.all_gather_object(box, value)
    return box


@contextmanager
def first_alone() -> Iterator[None]:
    """Let the first process go through the body before the others do: they find its files."""
    if rank():
        told(None)
    yield
    if not rank():
        told(None)


# --- one module in several processes -----------------------------------------------------


def accelerator(settings: TrainSettings, device: str) -> Accelerator:
    """Return accelerate's handle on a device and a precision; several in one process are fine.

    Raises:
        UsageError: one GPU is named for several processes.
        ResourceError: the device is not here.
    """
    join(device)
    device = pick_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - one per process, else
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision=_PRECISIONS[settings.precision],
        # some modules leave weights unused in some batches: a class that is absent, say
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def spread(module: torch.nn.Module, handle: Accelerator, shard: str) -> torch.nn.Module:
    """Return a module on its device, as all processes train it.

    Each holds a copy, and gradients are averaged (DDP); or with `shard` "full" each holds an
    equal part of every weight, gathered when it is used (PyTorch's FSDP2; accelerate's own
    handle on it knows no CPU). Alone, a module is always whole.

    Raises:
        ResourceError: this PyTorch cannot share weights out.
    """
    if shard == "none" or ranks() == 1:
        prepared: torch.nn.Module = handle.prepare_model(module)
        return prepared
    try:
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
        from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - not in every PyTorch
    except ImportError:
        msg = f"train.shard=full needs PyTorch 2.7 or later, here is {torch.__version__}"
        raise ResourceError(msg) from None
    module = module.to(handle.device)
    for value in (*module.parameters(), *module.buffers()):
        dist.broadcast(value.data, 0)
    how: dict[str, Any] = {
        "mesh": init_device_mesh(handle.device.type, (ranks(),)),
        "ignored_params": set(_scalars(module)),  # cannot be divided
        "reshard_after_forward": True,  # so that weights may change after any pass
    }
    for part in reversed(list(module.modules())):  # from the inside out
        if isinstance(part, torch.nn.ModuleList | torch.nn.Sequential):
            for block in part:
                if sum(p.numel() for p in block.parameters()) >= BLOCK:
                    fully_shard(block, **how)
    fully_shard(module, **how)
    return module


def _scalars(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if not p.ndim]


def is_shared_out(value: torch.nn.Module | torch.Tensor) -> bool:
    """Tell whether this process holds only a part of a weight, or of any of a module's."""
    values = value.parameters() if isinstance(value, torch.nn.Module) else [value]
    return any(hasattr(part, "full_tensor") for part in values)


def sync(module: torch.nn.Module, on: bool) -> AbstractContextManager[None]:
    """Return a context in which backward passes join the gradients of all processes, or not."""
    if on:
        return nullcontext()
    if is_shared_out(module):
        return _held(module.set_requires_gradient_sync)  # type: ignore[arg-type]
    skip: Callable[[], AbstractContextManager[None]] = getattr(module, "no_sync", nullcontext)
    return skip()


@contextmanager
def _held(switch: Callable[[bool], None]) -> Iterator[None]:
    switch(False)  # noqa: FBT003 - PyTorch's own signature
    try:
        yield
    finally:
        switch(True)  # noqa: FBT003


def join_scalars(module: torch.nn.Module) -> None:
    """Average the gradients that sharding leaves out: those of weights of one number."""
    if ranks() == 1 or not is_shared_out(module):
        return
    for value in _scalars(module):
        if value.grad is not None:
            dist.all_reduce(value.grad)
            value.grad /= ranks()
