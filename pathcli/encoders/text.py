"""What every text tower needs: texts in batches, and the scale of its cosines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

BATCH = 256
_MOST = 100.0
"""CLIP's upper limit of what cosines are multiplied by."""


class TextTower(Protocol):
    """What gives vectors [b, d] for a batch of tokens."""

    def __call__(self, tokens: Any, /) -> torch.Tensor:  # noqa: ANN401 - as its tokenizer makes them
        """Return the embeddings of a batch."""
        ...


def run_texts(
    tower: TextTower,
    tokenise: Callable[[list[str]], Any],
    texts: Sequence[str],
    device: torch.device,
    precision: str,
) -> torch.Tensor:
    """Return float32 [n, d] for texts, without gradients; `tokenise` gives what has `to`."""
    import torch  # noqa: PLC0415

    lower = precision != "float32"
    kind = getattr(torch, precision)
    with torch.inference_mode(), torch.autocast(device.type, kind, enabled=lower):
        parts = [
            tower(tokenise(list(texts[start : start + BATCH])).to(device)).float()
            for start in range(0, len(texts), BATCH)
        ]
    return torch.cat(parts)


def scale_of(logarithm: torch.Tensor | None) -> float:
    """Return what cosines are multiplied by: the checkpoint's own, or 100, CLIP's upper limit."""
    return _MOST if logarithm is None else float(logarithm.float().exp())


def clamped(log_scale: torch.nn.Parameter) -> torch.Tensor:
    """Return exp of a trained scale, kept within 1..100 as open_clip does after each step."""
    import torch  # noqa: PLC0415

    with torch.no_grad():
        log_scale.clamp_(0, math.log(_MOST))
    return log_scale.exp()
