"""What training changes, out of a module and back into one: weights, and random numbers."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors

from pathcli.errors import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path


def trainable_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes: parameters with a gradient, and buffers beside them.

    It is on the CPU. Weights that processes share out are whole again in the first of them and
    left out in the others, but all have to ask. The peak: in the first process all trained
    weights on the CPU, in every process one whole weight beside its own part on the device.
    """
    return {  # contiguous, as safetensors wants it
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in _gathered(_trainable(module))
    }


def _trainable(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {
        name: p for name, p in module.named_parameters() if p.requires_grad
    }
    kept = set(module.state_dict())
    for prefix, part in module.named_modules():
        if any(p.requires_grad for p in part.parameters(recurse=False)):
            beside = part.named_buffers(prefix, recurse=False)
            state.update({name: buffer for name, buffer in beside if name in kept})
    return state


def load_trainable(module: torch.nn.Module, path: Path) -> None:
    """Put saved weights back into a module of the same recipe.

    Raises:
        ResourceError: there are none.
        DataError: they are damaged, or of another module.
    """
    try:
        saved = load_tensors(path.read_bytes())
    except FileNotFoundError:
        msg = f"{path}: no weights here; is the run finished?"
        raise ResourceError(msg) from None
    except Exception as error:  # safetensors has its own, undocumented error
        msg = f"{path}: damaged weights ({error})"
        raise DataError(msg) from error
    fill(module, saved, str(path))


def fill(module: torch.nn.Module, saved: Mapping[str, torch.Tensor], source: str) -> None:
    """Put trainable weights into a module; DataError when they are of another one.

    Of weights that processes share out the first one's count, and the others need none of them.
    """
    wanted = _trainable(module)
    given = {name for name, value in wanted.items() if name in saved or _elsewhere(value)}
    differ = sorted({*saved, *given} ^ set(wanted)) or sorted(
        name for name, value in saved.items() if value.shape != wanted[name].shape
    )
    if differ:
        msg = f"{source}: weights of another module (first difference: {differ[0]})"
        raise DataError(msg)
    here = module.state_dict()
    parts = {name: _like(saved.get(name), here[name]) for name in wanted}
    module.load_state_dict(parts, strict=False)


def _gathered(values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield values with their names, tensors whole and on the CPU.

    What processes share out is gathered one tensor after the other, and comes in the first
    process alone.
    """
    for name, value in values.items():
        whole: Any = value.detach() if isinstance(value, torch.Tensor) else value
        if hasattr(value, "full_tensor"):
            whole = whole.full_tensor()
        if not _elsewhere(value):
            yield name, whole.cpu() if isinstance(value, torch.Tensor) else whole


def _elsewhere(value: Any) -> bool:  # noqa: ANN401 - an optimiser keeps numbers too
    """Tell whether a value is shared out, and kept whole by another process."""
    return hasattr(value, "full_tensor") and bool(value.device_mesh.get_rank())


def _like(value: torch.Tensor | None, target: torch.Tensor) -> torch.Tensor:
    """Return a whole tensor, or the first process's part of it for this one if it is shared out."""
    if not hasattr(target, "full_tensor"):
        assert value is not None, "what is not shared out is everywhere"  # noqa: S101
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415 - not in every PyTorch

    whole = torch.empty(target.shape) if value is None else value
    whole = whole.to(target.device, target.dtype)
    return distribute_tensor(whole, target.device_mesh, target.placements)  # type: ignore[attr-defined]


def kept_here(
    module: torch.nn.Module, saved: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return what of a whole `trainable_state` this process would have got itself."""
    wanted = _trainable(module)
    return {name: value for name, value in saved.items() if not _elsewhere(wanted[name])}


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimiser's state, whole and on the CPU as `trainable_state`; all have to ask."""
    state: dict[str, Any] = optimizer.state_dict()
    whole = {i: dict(_gathered(kept)) for i, kept in state["state"].items()}
    return {**state, "state": whole}


def fill_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` returned, in as many processes as there are now."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        i: {k: _like(v, params[i]) if v.shape == params[i].shape else v for k, v in kept.items()}
        for i, kept in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": parts})


class Average:
    """The running mean of the trained weights: decay * mean + (1 - decay) * weights, each step.

    It begins at the first weights and is not corrected for that.
    """

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        """Begin at the weights as they are."""
        self.named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.means = {name: p.detach().clone() for name, p in self.named.items()}
        self.decay = decay

    @torch.no_grad()
    def update(self) -> None:
        """Take one step's weights in."""
        for name, value in self.named.items():
            self.means[name].lerp_(value, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the means into the module for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self.named.items():
            kept = value.clone()
            value.copy_(self.means[name])
            self.means[name].copy_(kept)

    def state(self) -> dict[str, torch.Tensor]:
        """Return the means, whole and on the CPU as `trainable_state`; all have to ask."""
        return dict(_gathered(self.means))

    def fill(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Put back what `state` returned."""
        for name, value in self.means.items():
            value.copy_(_like(saved[name], value))


def random_state() -> dict[str, Any]:
    """Return the state of every generator of random numbers, as plain values and tensors."""
    kind, numbers, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [kind, list(numbers), gauss]}
    known: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - libraries use it
    state["numpy"] = {**known, "state": {**known["state"], "key": known["state"]["key"].tolist()}}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    kind, numbers, gauss = state["python"]
    random.setstate((kind, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
