"""TransMIL: a transformer over the tiles in their order (Shao et al., NeurIPS 2021)."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.mil.abmil import require
from pathcli.types import HeadOutput

_REACH = 16  # tokens to either side that a value is mixed with


def segment_means(x: torch.Tensor, count: int) -> torch.Tensor:
    """Return [h, count, c], means of consecutive tokens of [h, n, c]; n is at least `count`.

    The first segments are one token longer where `count` does not divide n; nothing is padded.
    """
    size, longer = divmod(x.shape[1], count)
    cut = longer * (size + 1)
    parts = (
        x[:, :cut].reshape(len(x), longer, size + 1, x.shape[2]).mean(2),
        x[:, cut:].reshape(len(x), count - longer, size, x.shape[2]).mean(2),
    )
    return torch.cat(parts, dim=1)


def pseudo_inverse(matrix: torch.Tensor, steps: int = 6) -> torch.Tensor:
    """Return the iterated Moore-Penrose inverse of matrices [h, m, m] in float32.

    Equation 11 of the Nystromformer (Xiong et al., 2021), started from the transpose over
    the product of the largest row and column sums, head by head.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        a = matrix.float()
        size = a.abs().sum(-1).amax(-1) * a.abs().sum(-2).amax(-1)
        z = a.mT / size[:, None, None]
        unit = torch.eye(a.shape[-1], device=a.device)
        for _ in range(steps):
            az = a @ z
            z = z @ (13 * unit - az @ (15 * unit - az @ (7 * unit - az))) / 4
    return z


def between_landmarks(
    q: torch.Tensor, k: torch.Tensor, landmarks: int, steps: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return landmarks of queries and keys [h, m, c], and the inverse of their attention.

    There are no more landmarks than tokens.
    """
    count = min(landmarks, q.shape[1])
    q_mark, k_mark = segment_means(q, count), segment_means(k, count)
    kernel = (q_mark @ k_mark.mT / math.sqrt(q.shape[2])).softmax(-1)
    return q_mark, k_mark, pseudo_inverse(kernel, steps)


def nystrom(  # noqa: PLR0917 - q, k, v as everywhere
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    landmarks: int,
    rows: int | None = None,
    steps: int = 6,
) -> torch.Tensor:
    """Return approximate attention of the first `rows` queries (default: all), [h, rows, c].

    softmax(q k~') softmax(q~ k~')^+ softmax(q~ k') v with landmarks q~ and k~: the outer
    factors are attentions themselves, so memory and time are linear in n, and no matrix of
    n columns is held.
    """
    q_mark, k_mark, inverse = between_landmarks(q, k, landmarks, steps)
    values = (inverse @ attend(q_mark, k, v).float()).to(v.dtype)
    return attend(q[:, :rows], k_mark, values)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return exact attention [h, n, c]; torch's lean kernels ask for a batch."""
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def nystrom_row(q: torch.Tensor, k: torch.Tensor, landmarks: int) -> torch.Tensor:
    """Return what the first token attends to, [n], the mean over heads; may be negative."""
    q_mark, k_mark, inverse = between_landmarks(q, k, landmarks)
    scale = 1 / math.sqrt(q.shape[2])
    first = (q[:, :1] @ k_mark.mT * scale).softmax(-1).float() @ inverse
    row = torch.zeros_like(k[0, :, 0], dtype=torch.float32)
    for f, marks, keys in zip(first, q_mark, k, strict=True):  # [m, n] of one head at a time
        row += (f @ (marks @ keys.T * scale).softmax(-1).float())[0] / len(q)
    return row


class NystromLayer(nn.Module):
    """Pre-norm self-attention with a skip, and a convolution of values over 33 tokens."""

    def __init__(self, width: int, heads: int, landmarks: int, dropout: float) -> None:
        """Make the layer."""
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        kernel, padding = (2 * _REACH + 1, 1), (_REACH, 0)
        self.values = nn.Conv2d(heads, heads, kernel, padding=padding, groups=heads, bias=False)
        self.out = nn.Sequential(nn.Linear(width, width), nn.Dropout(dropout))

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values [3, heads, n, c] of tokens [n, width]."""
        qkv: torch.Tensor = self.qkv(self.norm(x)).view(len(x), 3, self.heads, -1)
        return qkv.permute(1, 2, 0, 3)

    def forward(self, x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        """Return the first `rows` tokens (default: all) [rows, width] for tokens [n, width]."""
        q, k, v = self._split(x)
        rows = rows or len(x)
        near = self.values(v[:, : rows + _REACH])[:, :rows]
        mixed = nystrom(q, k, v, self.landmarks, rows) + near
        out: torch.Tensor = x[:rows] + self.out(mixed.transpose(0, 1).flatten(1))
        return out

    def first_row(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the first token attends to, [n]."""
        q, k, _ = self._split(x)
        return nystrom_row(q, k, self.landmarks)


class PositionEncoding(nn.Module):
    """PPEG: the square of tiles plus its depthwise convolutions of 7, 5 and 3 tiles."""

    def __init__(self, width: int) -> None:
        """Make the three convolutions."""
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in (7, 5, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return tokens [1 + s * s, width]; the first is the class token and stays."""
        side = math.isqrt(len(x) - 1)
        square = x[1:].T.reshape(-1, side, side)
        square = square + sum(convolve(square[None])[0] for convolve in self.convolutions)
        return torch.cat([x[:1], square.flatten(1).T])


class TransMIL(nn.Module):
    """Transformer MIL: the order of the tiles matters, they come by (y, x).

    The tiles are laid out row by row in the smallest square, its rest filled with the first
    tiles again. Attention is that of the class token in the last layer, the mean over heads:
    a repeated tile has its copies' too, the approximation's small negatives are clamped, the
    rest is scaled to one. It carries no gradient.
    """

    def __init__(
        self,
        dim_in: int,
        classes: int,
        *,
        width: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        dropout: float = 0.1,
    ) -> None:
        """Build the head.

        Args:
            dim_in: numbers of a tile.
            classes: number of classes.
            width: numbers of a token.
            heads: heads of an attention; they divide the width.
            landmarks: tokens that stand for all in the approximation of the attention.
            dropout: dropout after an attention.

        Raises:
            UsageError: heads that do not divide the width, or no landmarks.
        """
        super().__init__()
        require(width % heads == 0, f"{heads} heads do not divide the width {width}")
        require(landmarks >= 1, f"landmarks must be at least 1, got {landmarks}")
        self.project = nn.Sequential(nn.Linear(dim_in, width), nn.ReLU(inplace=True))
        self.class_token = nn.Parameter(torch.randn(1, width))
        self.first = NystromLayer(width, heads, landmarks, dropout)
        self.position = PositionEncoding(width)
        self.last = NystromLayer(width, heads, landmarks, dropout)
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def _tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Return the last layer's input [1 + s * s, width], the class token first."""
        x = self.project(features)
        side = math.isqrt(len(x) - 1) + 1
        x = torch.cat([self.class_token.to(x.dtype), x, x[: side * side - len(x)]])
        tokens: torch.Tensor = self.position(self.first(x))
        return tokens

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier(self.norm(self.last(tokens, rows=1)[0]))
        return logits.float()

    def forward(self, features: torch.Tensor) -> HeadOutput:
        """Return logits [classes] and attention [n] for features [n, dim_in]."""
        tokens, n = self._tokens(features), len(features)
        with torch.no_grad():
            row = self.last.first_row(tokens)[1:]
            row[: len(row) - n] += row[n:]
            row = row[:n].clamp(min=torch.finfo(row.dtype).tiny)  # never nought in all
        return HeadOutput(self._logits(tokens), row / row.sum())

    def loss(self, features: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the bag."""
        return F.cross_entropy(self._logits(self._tokens(features)), label)
