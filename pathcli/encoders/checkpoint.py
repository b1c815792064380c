"""A weights file in, a state dict out; never by running code from the file."""

from __future__ import annotations

import pickle
import warnings
from typing import TYPE_CHECKING, Any

from pathcli.types import DataError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")


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
        line = (str(error).splitlines() or [type(error).__name__])[0][:100]
        msg = f"{path}: corrupt checkpoint ({line})"
        raise DataError(msg) from error
    for wrapper in _WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        msg = f"{path}: holds no state dict of tensors"
        raise DataError(msg)
    return {_bare(name): tensor for name, tensor in state.items()}


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def shape_faults(state: dict[str, torch.Tensor], module: torch.nn.Module) -> list[str]:
    """Return what keeps `state` from being loaded into `module`, one phrase a tensor."""
    wanted = module.state_dict()
    faults = [f"{k} missing" for k in wanted if k not in state and not k.endswith("attn_mask")]
    faults += [f"{k} unexpected" for k in state if k not in wanted]
    faults += [
        f"{k} is {tuple(v.shape)}, not {tuple(wanted[k].shape)}"
        for k, v in state.items()
        if k in wanted and v.shape != wanted[k].shape
    ]
    return faults
