"""A model of transformers in; its image tower keeps what it last said of the same images."""

from __future__ import annotations

import copy
import hashlib
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def remember(network: Any) -> None:  # noqa: ANN401 - transformers' own
    """Let a model's image tower keep what it last said of the same images.

    A second question about them, and every option that is weighed, encodes nothing.
    """
    for owner in (network, getattr(network, "model", None)):
        for name in ("vision_tower", "vision_model", "visual"):
            tower = getattr(owner, name, None)
            if isinstance(tower, torch.nn.Module):
                tower.forward = _once(tower.forward)
                return


def _once(forward: Callable[..., Any]) -> Callable[..., Any]:
    last: dict[str, Any] = {}

    def remembered(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - a module's forward
        key = _key([*enumerate(given), *sorted(named.items())])
        if key not in last:
            last.clear()
            last[key] = forward(*given, **named)
        return copy.copy(last[key])

    return remembered


def _key(values: Sequence[tuple[Any, Any]]) -> str:
    """Return a SHA-256 over tensors' bytes, and over the other values and their names."""
    sha = hashlib.sha256()
    for tensor in (value for _, value in values if isinstance(value, torch.Tensor)):
        sha.update(f"{tuple(tensor.shape)};".encode())
        sha.update(tensor.detach().cpu().float().numpy().tobytes())
    rest = [(name, value) for name, value in values if not isinstance(value, torch.Tensor)]
    sha.update(repr(rest).encode())
    return sha.hexdigest()
