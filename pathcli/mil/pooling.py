"""The baselines without attention of their own: mean of the tiles, and the highest tile."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.types import HeadOutput


class MeanPooling(nn.Module):
    """A linear classifier of the tiles' mean; attention is uniform."""

    def __init__(self, dim_in: int, classes: int) -> None:
        """Build the head for tiles of `dim_in` numbers."""
        super().__init__()
        self.classifier = nn.Linear(dim_in, classes)

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]."""
        logits = self.classifier(features.mean(0)).float()
        return HeadOutput(logits, logits.new_full((len(features),), 1 / len(features)))

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the bag."""
        return F.cross_entropy(self(features).logits, label)


class MaxPooling(nn.Module):
    """A linear classifier of every tile; the highest decides, and has all the attention.

    Of two classes the second is the positive one, and the bag's logits are those of the tile
    with the largest p(positive): the bag is as positive as its most positive tile. (Maxima
    taken class by class would come from two tiles, and a large bag of plainly negative tiles
    would hide its one positive.) With more classes no order is known: every class takes its
    own highest tile, and attention is on that of the predicted class.
    """

    def __init__(self, dim_in: int, classes: int) -> None:
        """Build the head for tiles of `dim_in` numbers."""
        super().__init__()
        self.classifier = nn.Linear(dim_in, classes)

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]."""
        scores = self.classifier(features).float()
        if scores.shape[1] == 2:  # noqa: PLR2004 - negative and positive
            tile = (scores[:, 1] - scores[:, 0]).argmax()
            logits = scores[tile]
        else:
            logits, tiles = scores.max(0)
            tile = tiles[logits.argmax()]
        return HeadOutput(logits, F.one_hot(tile, len(scores)).to(scores))

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the bag."""
        return F.cross_entropy(self(features).logits, label)
