"""What training changes, out of a module and back into one: weights, and random numbers."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load as load_tensors

from pathcli.types import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def trainable_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes: parameters with a gradient, and buffers beside them."""
    state = {name: p for name, p in module.named_parameters() if p.requires_grad}
    kept = set(module.state_dict())
    for prefix, part in module.named_modules():
        if any(p.requires_grad for p in part.parameters(recurse=False)):
            beside = part.named_buffers(prefix, recurse=False)
            state.update({name: buffer for name, buffer in beside if name in kept})
    return {  # contiguous, as safetensors wants it
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }


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
    """Put trainable weights into a module; DataError when they are of another one."""
    wanted = trainable_state(module)
    shapes = {name: tuple(value.shape) for name, value in saved.items()}
    if shapes != {name: tuple(value.shape) for name, value in wanted.items()}:
        differ = sorted(set(shapes) ^ set(wanted)) or sorted(
            name for name in shapes if shapes[name] != tuple(wanted[name].shape)
        )
        msg = f"{source}: weights of another module (first difference: {differ[0]})"
        raise DataError(msg)
    module.load_state_dict(saved, strict=False)


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
