"""ABMIL: a bag is the attention-weighted sum of its tiles (Ilse et al., ICML 2018)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.errors import UsageError
from pathcli.types import HeadOutput


def require(ok: bool, message: str) -> None:
    """Refuse an argument of a head.

    Raises:
        UsageError: not `ok`.
    """
    if not ok:
        raise UsageError(message)


def hidden_width(dim_in: int, hidden: int | None) -> int:
    """Return `hidden`, or the width ACMIL's code gives features of `dim_in` numbers."""
    if hidden is not None:
        return hidden
    return 128 if dim_in == 384 else max(1, dim_in // 2)  # noqa: PLR2004 - ViT-S


def projection(dim_in: int, width: int) -> nn.Sequential:
    """Return the layer every tile passes first, [n, dim_in] to [n, width]."""
    return nn.Sequential(nn.Linear(dim_in, width, bias=False), nn.ReLU(inplace=True))


class AttentionScores(nn.Module):
    """Scores before softmax: tanh, times sigmoid if gated (equations 8 and 9).

    The last layer has no bias, as in the paper: softmax would not see it.
    """

    def __init__(
        self,
        dim: int,
        *,
        width: int = 128,
        outputs: int = 1,
        gated: bool = True,
        dropout: float = 0.0,
    ) -> None:
        """Make `outputs` scores of tiles of `dim` numbers, through `width` units."""
        super().__init__()
        self.value = nn.Linear(dim, width)
        self.gate = nn.Linear(dim, width) if gated else None
        self.dropout = nn.Dropout(dropout)
        self.score = nn.Linear(width, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [outputs, n] for tiles [n, dim]."""
        units = self.dropout(self.value(x).tanh())
        if self.gate is not None:
            units = units * self.dropout(self.gate(x).sigmoid())
        scores: torch.Tensor = self.score(units).T
        return scores


class ABMIL(nn.Module):
    """Attention-based MIL; attention is the softmax of the scores, over the tiles."""

    def __init__(
        self,
        dim_in: int,
        classes: int,
        *,
        hidden: int | None = None,
        attention: Literal["gated", "plain"] = "gated",
        dropout: float = 0.0,
    ) -> None:
        """Build the head.

        Args:
            dim_in: numbers of a tile.
            classes: number of classes.
            hidden: width of the projected tiles (default: as in ACMIL's code, 128 for
                `dim_in` 384, else half of it).
            attention: gated (tanh times sigmoid) or plain (tanh).
            dropout: share of the bag's numbers dropped before the classifier.

        Raises:
            UsageError: an attention of another name.
        """
        super().__init__()
        require(attention in {"gated", "plain"}, f"attention is gated or plain, got {attention!r}")
        width = hidden_width(dim_in, hidden)
        self.project = projection(dim_in, width)
        self.attention = AttentionScores(width, gated=attention == "gated")
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, classes)

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]."""
        x = self.project(features)
        weights = self.attention(x)[0].softmax(0)
        logits = self.classifier(self.dropout(weights @ x))
        return HeadOutput(logits.float(), weights.float())

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the bag."""
        return F.cross_entropy(self(features).logits, label)
