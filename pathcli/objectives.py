"""What image-text training minimises: pure functions of tensors, each beside its source.

Embeddings come unnormalised and are normalised here. Contrastive losses compare the rows of
this process with the columns of all of them, and weigh the rows so that the mean over
processes, of the loss and of its gradients, is that of one process with the joint batch;
`joint=False` looks at this process alone, as validation does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy, log_softmax, normalize, pad
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pathcli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

IGNORED = -100
"""The label that `itg` passes over."""


# --- processes ---------------------------------------------------------------------------


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Gather(torch.autograd.Function):
    """Rows of all processes in rank order; backwards, each gets its rows' gradient from all."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:  # noqa: ANN401 - torch's own context
        world, rank = dist.get_world_size(), dist.get_rank()
        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
        dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device))
        counts = torch.cat(sizes).tolist()
        ctx.span = (sum(counts[:rank]), sum(counts[: rank + 1]))
        most = max(counts)
        filled = pad(rows, [0, 0] * (rows.ndim - 1) + [0, most - len(rows)]).contiguous()
        parts = [torch.empty_like(filled) for _ in range(world)]
        dist.all_gather(parts, filled)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ANN401
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        first, last = ctx.span
        return total[first:last]


def gather(rows: Tensor) -> Tensor:
    """Return the rows [n, ...] of all processes, in rank order; processes may differ in n.

    Gradients flow back to the process a row is from. One process gets its own rows.
    """
    if _processes() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def _columns(rows: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """Return what rows [n, ...] are compared with, and int64 [n]: where each finds itself."""
    here = torch.arange(len(rows), device=rows.device)
    if not joint or _processes() == 1:
        return rows, here
    counts = gather(torch.tensor([len(rows)], device=rows.device))
    return gather(rows), here + counts[: dist.get_rank()].sum()


def _mean(losses: Tensor, columns: int, *, joint: bool) -> Tensor:
    """Return the mean of row losses, weighted so that processes of unequal rows average right."""
    return losses.sum() * ((_processes() if joint else 1) / columns)


def weighed(mean: Tensor, count: Tensor) -> Tensor:
    """Return a mean over `count` things so that its mean over processes is the joint one.

    Both are scalars, of this process; all of them have to ask.
    """
    if _processes() == 1:
        return mean
    total = count.clone()
    dist.all_reduce(total)
    return mean * (count * _processes()) / total


# --- contrast ----------------------------------------------------------------------------


def contrastive(
    images: Tensor, texts: Tensor, scale: Tensor | float, *, joint: bool = True
) -> Tensor:
    """Return symmetric InfoNCE of pairs images, texts [b, d]; cosines are multiplied by `scale`.

    Source: Radford et al. 2021 (arXiv:2103.00020), figure 3; open_clip's `ClipLoss`.
    """
    images, texts = normalize(images, dim=-1), normalize(texts, dim=-1)
    all_images, own = _columns(images, joint=joint)
    all_texts, _ = _columns(texts, joint=joint)
    losses = cross_entropy(scale * images @ all_texts.T, own, reduction="none")
    losses = losses + cross_entropy(scale * texts @ all_images.T, own, reduction="none")
    return _mean(losses / 2, len(all_texts), joint=joint)


def multi_positive(
    images: Tensor, texts: Tensor, labels: Tensor, scale: Tensor | float, *, joint: bool = True
) -> Tensor:
    """Return symmetric InfoNCE where all rows of one label, int64 [b], are each other's pairs.

    The targets are uniform over a row's positives, in both directions; with labels all
    different it is `contrastive`. Source: Yang et al. 2022, UniCL (arXiv:2204.03610), eq. 1-3.
    """
    images, texts = normalize(images, dim=-1), normalize(texts, dim=-1)
    all_images, _ = _columns(images, joint=joint)
    all_texts, _ = _columns(texts, joint=joint)
    all_labels, _ = _columns(labels, joint=joint)
    same = (labels[:, None] == all_labels[None]).to(images.dtype)
    targets = same / same.sum(1, keepdim=True)
    losses = _soft(scale * images @ all_texts.T, targets)
    losses = losses + _soft(scale * texts @ all_images.T, targets)
    return _mean(losses / 2, len(all_texts), joint=joint)


def _soft(logits: Tensor, targets: Tensor) -> Tensor:
    """Return cross-entropy [n] of logits [n, m] against targets [n, m] that sum to one."""
    return -(log_softmax(logits, -1) * targets).sum(-1)


def query_similarity(queries: Tensor, texts: Tensor) -> Tensor:
    """Return [n, m], the largest cosine of queries [n, q, d] with each text [m, d]."""
    cosines = torch.einsum("nqd,md->nmq", normalize(queries, dim=-1), normalize(texts, dim=-1))
    return cosines.amax(-1)


def query_itc(
    queries: Tensor,
    texts: Tensor,
    temperature: Tensor | float,
    *,
    smoothing: float = 0.1,
    joint: bool = True,
) -> Tensor:
    """Return the contrast of image queries [b, q, d] with texts [b, d], smoothed, without queue.

    An image and a text are as similar as the best of the image's queries. Source: BLIP-2
    (arXiv:2301.12597), section 3.2, with the label smoothing of CLOVER's code.
    """
    all_queries, own = _columns(queries, joint=joint)
    all_texts, _ = _columns(texts, joint=joint)
    to_text = query_similarity(queries, all_texts) / temperature
    to_image = query_similarity(all_queries, texts).T / temperature
    losses = cross_entropy(to_text, own, label_smoothing=smoothing, reduction="none")
    losses = losses + cross_entropy(to_image, own, label_smoothing=smoothing, reduction="none")
    return _mean(losses / 2, len(all_texts), joint=joint)


# --- momentum ----------------------------------------------------------------------------


def momentum_itc(
    images: Tensor,
    texts: Tensor,
    slow: tuple[Tensor, Tensor],
    queues: tuple[Tensor, Tensor],
    temperature: Tensor | float,
    *,
    alpha: Tensor | float,
    joint: bool = True,
) -> Tensor:
    """Return the contrast of images, texts [b, d] with the momentum model's, soft targets mixed in.

    `slow` are the momentum model's images and texts [b, d], `queues` those of earlier batches
    [size, d], unit rows; both without gradient. The target of a row is its own pair with
    weight 1 - `alpha`, and what the momentum model would say with weight `alpha`. Source:
    ALBEF (arXiv:2107.07651), eq. 1 and 6, as BLIP and PA-LLaVA's PLIP use it; their positives
    and soft targets are of one process, ours of all, so that the loss does not depend on
    their number.
    """
    images, texts = normalize(images, dim=-1), normalize(texts, dim=-1)
    with torch.no_grad():
        slow_images, slow_texts = (normalize(rows, dim=-1) for rows in slow)
        all_images, own = _columns(slow_images, joint=joint)
        all_texts, _ = _columns(slow_texts, joint=joint)
    losses = torch.zeros(len(images), device=images.device)
    for rows, slow_rows, columns, queue in (
        (images, slow_images, all_texts, queues[1]),
        (texts, slow_texts, all_images, queues[0]),
    ):
        others = torch.cat([columns, queue.to(columns.dtype)]).T
        with torch.no_grad():
            targets = alpha * torch.softmax(slow_rows @ others / temperature, -1)
            targets[torch.arange(len(own), device=own.device), own] += 1 - alpha
        losses = losses + _soft(rows @ others / temperature, targets)
    return _mean(losses / 2, len(all_texts), joint=joint)


@torch.no_grad()
def enqueue(queue: Tensor, position: Tensor, rows: Tensor) -> None:
    """Write the normalised rows [b, d] of all processes over the oldest of `queue` [size, d].

    `position`, int64 [1], is where the next row goes; it moves on, and wraps at the end.
    """
    rows = normalize(gather(rows.detach()), dim=-1)[-len(queue) :]
    places = (position + torch.arange(len(rows), device=queue.device)) % len(queue)
    queue[places] = rows.to(queue.dtype)
    position.copy_((position + len(rows)) % len(queue))


def momentum_update(slow: Iterable[Tensor], fast: Iterable[Tensor], momentum: float) -> None:
    """Move the slow weights towards the fast ones: m * slow + (1 - m) * fast, in place.

    Source: He et al. 2020, MoCo (arXiv:1911.05722), eq. 2.
    """
    average = get_ema_multi_avg_fn(momentum)  # type: ignore[no-untyped-call]
    average(list(slow), [weight.detach() for weight in fast], 0)


# --- matching and captioning -------------------------------------------------------------


def hard_negatives(
    similarity: Tensor, generator: torch.Generator | None = None, exclude: Tensor | None = None
) -> Tensor:
    """Return int64 [n]: for every row of `similarity` [n, m] a column drawn by its softmax.

    `exclude`, bool [n, m], marks what may not be drawn; the diagonal, where nothing is given.
    Source: ALBEF (arXiv:2107.07651), section 3.2.

    Raises:
        DataError: a row has no column left.
    """
    if exclude is None:
        exclude = torch.eye(*similarity.shape, dtype=torch.bool, device=similarity.device)
    if bool(exclude.all(1).any()):
        msg = "no negative for a pair: all texts of the batch are the same; use a larger batch"
        raise DataError(msg)
    weights = similarity.detach().float().masked_fill(exclude, -torch.inf).softmax(-1)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1)


def itm(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the matching loss of logits [n, 2], or [n, q, 2] averaged over queries.

    `labels` int64 [n]: 1 is a pair that belongs together. Source: ALBEF (arXiv:2107.07651),
    eq. 4; the mean over queries is that of BLIP-2 (arXiv:2301.12597), section 3.2.
    """
    return cross_entropy(logits.mean(1) if logits.ndim == 3 else logits, labels)  # noqa: PLR2004


def itg(logits: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Return the next-token loss of logits [b, t, v] on token ids int64 [b, t], -100 passed over.

    The logits of one place are held against the label of the next. Source: BLIP-2
    (arXiv:2301.12597), section 3.2.

    Raises:
        DataError: no label is left to learn from.
    """
    following = labels[:, 1:].flatten()
    if not bool((following != IGNORED).any()):
        msg = "a batch without a token to predict: captions are empty, or masked whole"
        raise DataError(msg)
    heard = logits[:, :-1].flatten(0, 1)
    return cross_entropy(heard, following, ignore_index=IGNORED, label_smoothing=smoothing)
