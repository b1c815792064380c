"""ACMIL: several attentions, their peaks masked, kept apart (Zhang et al., ECCV 2024).

Where paper and released code differ, this is the released code.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.mil.abmil import AttentionScores, hidden_width, projection, require
from pathcli.mil.streams import Streams
from pathcli.types import HeadOutput


def draw_ranks(rows: int, tiles: int, top: int, share: float) -> torch.Tensor:
    """Draw which of the `top` highest scores of each row are masked, uniformly.

    The draw is made on the CPU by torch's global generator, so it is the same on any device.

    Returns:
        int64 [rows, int(min(top, tiles) * share)] distinct ranks, 0 for the highest score;
        one fewer where no tile would be left.
    """
    top = min(top, tiles)
    count = min(int(top * share), tiles - 1)
    return torch.rand(rows, top).argsort(1)[:, :count]


def mask_ranks(scores: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:
    """Return scores [m, n] with the tiles of `ranks` [m, k] at minus infinity, row by row."""
    if ranks.numel() == 0:
        return scores
    order = scores.topk(int(ranks.max()) + 1, dim=1).indices
    return scores.scatter(1, order.gather(1, ranks.to(scores.device)), -math.inf)


def mean_similarity(weights: torch.Tensor) -> torch.Tensor:
    """Return the mean cosine similarity of all pairs of branches, weights [..., m, n]."""
    m = weights.shape[-2]
    one, other = torch.triu_indices(m, m, offset=1, device=weights.device)
    return F.cosine_similarity(weights[..., one, :], weights[..., other, :], dim=-1).mean()


class QueryScores(nn.Module):
    """Scores of learnt queries, one for each branch and head, [heads, m, n].

    q (x K)' is computed as (q K') x': no keys of n tiles are held. The projection of a
    learnt query is itself a learnt query, and a bias of the keys would vanish in softmax.
    """

    def __init__(self, dim: int, branches: int, heads: int) -> None:
        """Make the queries and keys of `branches` attentions of `heads` heads."""
        super().__init__()
        self.query = nn.Parameter(torch.randn(branches, heads, dim // heads) / math.sqrt(dim))
        self.key = nn.Linear(dim, branches * dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [heads, m, n] for tiles [n, dim]."""
        key = self.key.weight.view(*self.query.shape, -1)
        probes = torch.einsum("mhc,mhcd->hmd", self.query, key)
        return probes @ x.T / math.sqrt(self.query.shape[-1])


class HeadPool(nn.Module):
    """Multi-head weighted sum: values, heads side by side, output layer, layer norm.

    a (x V) is computed as (a x) V, which is the same since the weights sum to one.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        """Make the values and the output layer."""
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(dim, dim)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout), nn.LayerNorm(dim))

    def forward(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return [dim] for weights [heads, n] and tiles [n, dim]."""
        value = self.value.weight.view(self.heads, -1, x.shape[1])
        pooled = torch.einsum("hcd,hd->hc", value, weights @ x).flatten() + self.value.bias
        out: torch.Tensor = self.out(pooled)
        return out


class SumPool(nn.Module):
    """The weighted sum itself."""

    def forward(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return [dim] for weights [n] and tiles [n, dim]."""
        return weights @ x


class ACMIL(nn.Module):
    """Attention-challenging MIL: M branches, masking of top tiles (STKIM), diversity.

    Attention is the mean of the branches' softmaxed attentions (and of their heads); the
    prediction is the bag's alone. With one branch there are no branch classifiers, and with
    `masked` 0 besides the head is ABMIL: the weights are interchangeable.
    """

    def __init__(
        self,
        dim_in: int,
        classes: int,
        *,
        hidden: int | None = None,
        branches: int = 5,
        masked: int = 10,
        mask_drop: float = 0.6,
        attention: Literal["gated", "multi-head"] = "gated",
        heads: int = 8,
        head_dropout: float = 0.1,
    ) -> None:
        """Build the head.

        Args:
            dim_in: numbers of a tile.
            classes: number of classes.
            hidden: width of the projected tiles (default: 128 for `dim_in` 384, else half).
            branches: number of attentions, M.
            masked: how many top tiles of a branch may be masked in training, K.
            mask_drop: share of them that is, p.
            attention: one gated net with M outputs, or M learnt multi-head queries.
            heads: heads of a multi-head attention; they divide the width.
            head_dropout: dropout after a multi-head attention.

        Raises:
            UsageError: an argument out of its range, or heads that do not divide the width.
        """
        super().__init__()
        width = hidden_width(dim_in, hidden)
        gated = attention == "gated"
        require(
            gated or attention == "multi-head",
            f"attention is gated or multi-head, got {attention!r}",
        )
        require(branches >= 1, f"branches must be at least 1, got {branches}")
        require(masked >= 0, f"masked must be at least 0, got {masked}")
        require(0 <= mask_drop <= 1, f"mask_drop is a share between 0 and 1, got {mask_drop:g}")
        require(gated or width % heads == 0, f"{heads} heads do not divide the width {width}")
        self.masked, self.mask_drop = masked, mask_drop
        self.project = projection(dim_in, width)
        self.attention = (
            AttentionScores(width, outputs=branches)
            if gated
            else QueryScores(width, branches, heads)
        )
        pools = [
            SumPool() if gated else HeadPool(width, heads, head_dropout)
            for _ in range(branches + 1 if branches > 1 else 1)
        ]
        self.pool, self.branch_pools = pools[0], nn.ModuleList(pools[1:])
        self.classifier = nn.Linear(width, classes)
        self.branch_classifiers = nn.ModuleList(nn.Linear(width, classes) for _ in pools[1:])

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]; masks nothing."""
        x = self.project(features)
        weights = self.attention(x).softmax(-1).mean(-2)
        logits = self.classifier(self.pool(weights, x))
        return HeadOutput(logits.float(), weights.float().view(-1, len(x)).mean(0))

    def streams(self, features: torch.Tensor) -> Streams:
        """Return the logits of the bag and of each branch; masks in training mode.

        The branches' losses are averaged, and their similarity is the penalty; with one branch
        there is the bag alone.
        """
        x = self.project(features)
        scores = self.attention(x)  # [m, n], or [heads, m, n]
        if self.training:
            rows = scores.flatten(0, -2)
            ranks = draw_ranks(len(rows), len(x), self.masked, self.mask_drop)
            scores = mask_ranks(rows, ranks).view_as(scores)
        weights = scores.softmax(-1)
        bag = self.classifier(self.pool(weights.mean(-2), x))
        if not self.branch_classifiers:
            return Streams(bag[None], (1.0,))
        branches = zip(self.branch_classifiers, self.branch_pools, weights.unbind(-2), strict=True)
        logits = torch.stack([bag, *(classifier(pool(w, x)) for classifier, pool, w in branches)])
        m = len(self.branch_classifiers)
        return Streams(logits, (1.0, *[1 / m] * m), mean_similarity(weights))

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return bag loss + mean branch loss + similarity of branches; masks in training mode.

        The last two are nought with one branch.
        """
        found = self.streams(features)
        bag, branches = F.cross_entropy(found.logits[0], label), found.logits[1:]
        if not len(branches):
            return bag
        return bag + F.cross_entropy(branches, label.expand(len(branches))) + found.penalty
