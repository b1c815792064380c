"""DSMIL: the critical tile of a class, and attention to what resembles it (Li et al., 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.mil.streams import Streams
from pathcli.types import HeadOutput


class DSMIL(nn.Module):
    """Dual-stream MIL: max pooling of tile scores, and attention to each class's critical tile.

    The bag's logits are the mean of the two streams' (section 3.2). Attention is the mean of
    the classes' attentions, weighted by the predicted probabilities (softmax of the logits).
    """

    def __init__(self, dim_in: int, classes: int, *, width: int = 128) -> None:
        """Build the head.

        Args:
            dim_in: numbers of a tile.
            classes: number of classes.
            width: numbers of a query.
        """
        super().__init__()
        self.instance = nn.Linear(dim_in, classes)
        self.query = nn.Linear(dim_in, width)
        self.value = nn.Linear(dim_in, dim_in)
        self.classifier = nn.Linear(classes * dim_in, classes)

    def _streams(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return both streams' logits [classes], and attention [classes, n].

        a (x V) is computed as (a x) V, which is the same since the weights sum to one.
        """
        highest, critical = self.instance(features).max(0)
        query = self.query(features)
        scores = query[critical] @ query.T / math.sqrt(query.shape[1])
        weights = scores.softmax(1)
        bag = self.classifier(self.value(weights @ features).flatten())
        return highest, bag, weights

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]."""
        highest, bag, weights = self._streams(features)
        logits = ((highest + bag) / 2).float()
        return HeadOutput(logits, (logits.softmax(0)[:, None] * weights.float()).sum(0))

    def streams(self, features: torch.Tensor) -> Streams:
        """Return the logits of both streams, of equal weight."""
        highest, bag, _ = self._streams(features)
        return Streams(torch.stack([highest, bag]), (0.5, 0.5))

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the mean of the two streams' cross-entropies."""
        highest, bag, _ = self._streams(features)
        return (F.cross_entropy(highest, label) + F.cross_entropy(bag, label)) / 2
