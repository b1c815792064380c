"""A weights file in, a state dict out; never by running code from the file."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
_BYSTANDERS = {"input_resolution", "context_length", "vocab_size", "logit_scale", "logit_bias"}
_BUFFERS = ("attn_mask", "position_ids", "num_batches_tracked")


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint: safetensors, or a torch file of tensors alone.

    Wrappers such as `{"state_dict": ...}` and the prefixes of distributed or compiled
    training are taken off.

    Raises:
        DataError: the file is corrupt, or holds more than tensors.
    """
    import torch  # noqa: PLC0415
    from safetensors.torch import load_file  # noqa: PLC0415

    state: Any
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about bytes that then fail to load anyway
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        msg = (
            f"{path}: not a checkpoint of plain tensors (corrupt, or it would run code when "
            "loaded); save it as safetensors"
        )
        raise DataError(msg) from error
    except Exception as error:  # unpicklers raise whatever the bytes provoke
        empty = "empty file" if path.stat().st_size == 0 else "not a checkpoint, or cut short"
        msg = f"{path}: corrupt checkpoint ({empty})"
        raise DataError(msg) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        msg = f"{path}: holds no state dict of tensors"
        raise DataError(msg)
    if state and all(name.startswith("model.") for name in state):  # Lightning's wrapper
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return {_bare(name): tensor for name, tensor in state.items()}


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
    return name


def _counts(name: str) -> bool:
    """Tell whether a tensor decides what a network gives; some only scale a loss, or are made."""
    return name not in _BYSTANDERS and not name.endswith(_BUFFERS)


def shape_faults(state: dict[str, torch.Tensor], module: torch.nn.Module) -> list[str]:
    """Return what keeps `state` from being loaded into `module`, one phrase a tensor."""
    wanted = module.state_dict()
    faults = [f"{k} missing" for k in wanted if k not in state and _counts(k)]
    faults += [f"{k} unexpected" for k in state if k not in wanted and _counts(k)]
    faults += [
        f"{k} is {tuple(v.shape)}, not {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and v.shape != wanted[k].shape and _counts(k)
    ]
    return faults


def fitting_part(
    state: dict[str, torch.Tensor], module: torch.nn.Module
) -> dict[str, torch.Tensor]:
    """Return the tensors that have a place of their shape in `module`."""
    places = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return {k: v for k, v in state.items() if places.get(k) == v.shape}
