"""What a head is trained on besides classes: one set of logits, or several, and a penalty."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Streams:
    """Logits float [s, k], each to be learnt with its weight of `shares`; `penalty` is added."""

    logits: torch.Tensor
    shares: tuple[float, ...]
    penalty: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


def streams_of(head: torch.nn.Module, features: torch.Tensor) -> Streams:
    """Return the streams of a head for features [n, d]: its own, or its logits as the only one.

    A head whose loss is more than that of its prediction says so by a method `streams`.
    """
    own = getattr(head, "streams", None)
    if own is not None:
        found: Streams = own(features)
        return found
    return Streams(head(features).logits[None], (1.0,))
