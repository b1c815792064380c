"""CLAM with a single branch: attention plus clustering of tiles (Lu et al., 2021)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.mil.abmil import AttentionScores, require
from pathcli.types import HeadOutput


def instance_loss(logits: torch.Tensor, targets: torch.Tensor, margin: float) -> torch.Tensor:
    """Return the mean loss of two-class logits [k, 2] against targets int64 [k].

    The smooth top-1 SVM at temperature 1 (Berrada et al., 2018) is logsumexp over the
    classes j of s_j - s_y + margin [j != y]. With two classes this is
    softplus(margin - (s_y - s_other)): margin 1 is the SVM, margin 0 the cross-entropy.
    The released code switches to the hard SVM where the classes lie far apart; this does
    not.
    """
    lead = logits[:, 1] - logits[:, 0]
    return F.softplus(margin - torch.where(targets == 1, lead, -lead)).mean()


class ClamSB(nn.Module):
    """CLAM-SB; attention is the softmax of the one branch's scores, over the tiles.

    The most and the least attended tiles are examples for and against the true class, and
    that class's instance classifier learns them. The other classes' are not used (subtyping
    off, as published by default).
    """

    def __init__(
        self,
        dim_in: int,
        classes: int,
        *,
        hidden: int = 512,
        attention_width: int = 256,
        dropout: float = 0.25,
        instances: int = 8,
        inst_loss: Literal["svm", "ce"] = "svm",
        bag_weight: float = 0.7,
    ) -> None:
        """Build the head; the defaults are the published "small" size.

        Args:
            dim_in: numbers of a tile.
            classes: number of classes.
            hidden: width of the projected tiles.
            attention_width: units of the gated attention.
            dropout: dropout of the projected tiles and inside the attention.
            instances: tiles at each end of the attention that are clustered, B.
            inst_loss: smooth top-1 SVM (margin and temperature 1) or cross-entropy.
            bag_weight: share of the bag's loss in the whole.

        Raises:
            UsageError: an argument out of its range.
        """
        super().__init__()
        require(inst_loss in {"svm", "ce"}, f"inst_loss is svm or ce, got {inst_loss!r}")
        require(instances >= 1, f"instances must be at least 1, got {instances}")
        require(0 <= bag_weight <= 1, f"bag_weight is a share between 0 and 1, got {bag_weight:g}")
        self.instances, self.bag_weight = instances, bag_weight
        self.of_classes = (
            "clam-sb clusters tiles for and against a class; set head.bag_weight=1 to learn from "
            "the bag alone"
        ) * (bag_weight < 1)
        self.margin = 1.0 if inst_loss == "svm" else 0.0
        self.project = nn.Sequential(
            nn.Linear(dim_in, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)
        )
        self.attention = AttentionScores(hidden, width=attention_width, dropout=dropout)
        self.classifier = nn.Linear(hidden, classes)
        self.instance_classifiers = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(classes))

    def _read(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return tiles [n, hidden], attention [n] and logits [classes]."""
        x = self.project(features)
        weights = self.attention(x)[0].softmax(0)
        return x, weights, self.classifier(weights @ x)

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]."""
        _, weights, logits = self._read(features)
        return HeadOutput(logits.float(), weights.float())

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the weighted mean of the bag's cross-entropy and the instance loss.

        A bag of fewer than 2 B tiles gives half of them to each end; a single tile stands
        at both.
        """
        x, weights, logits = self._read(features)
        count = max(1, min(self.instances, len(x) // 2))
        order = weights.argsort(descending=True)
        chosen = x[torch.cat([order[:count], order[-count:]])]
        targets = (torch.arange(2 * count, device=x.device) < count).long()
        instance = instance_loss(
            self.instance_classifiers[int(label)](chosen), targets, self.margin
        )
        bag = F.cross_entropy(logits, label)
        return self.bag_weight * bag + (1 - self.bag_weight) * instance
