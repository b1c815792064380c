"""Gradients of a batch that does not fit: embed it in pieces, twice.

GradCache, Gao et al. 2021, arXiv:2101.06983, section 3.2: a contrastive loss sees the
encoder only through the embeddings, so their gradients are found first, without the
encoder's activations, and then sent back through it piece by piece.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor


def cached_backward(
    call: Callable[..., Any],
    module: Any,  # noqa: ANN401 - has `embed` and `loss_of`
    pieces: Sequence[Any],
    *,
    backward: Callable[[Tensor], None],
    sync: Callable[[bool], AbstractContextManager[None]],
    last: bool,
) -> Tensor:
    """Add a batch's gradient to its module's parameters; return the loss, a scalar, detached.

    `embed` of a piece returns tensors of as many rows each; `loss_of` gets them for the whole
    batch. What is not floating point (labels, say) is handed on as it is. Random numbers
    are drawn once: the second pass repeats the first one's. Norms that keep running
    statistics see every piece twice.

    Args:
        call: calls one of the module's functions where its weights are whole.
        module: what is trained.
        pieces: the batch.
        backward: sends a loss, scaled as the optimiser wants it, back.
        sync: a context in which backward passes join the processes' gradients, or do not.
        last: whether the gradients are joined with this batch, in its last backward pass.
    """
    draws, found = [], []
    with torch.no_grad():
        for piece in pieces:
            draws.append(_generators())
            found.append(call(module.embed, piece))
    whole = [torch.cat(part).detach() for part in zip(*found, strict=True)]
    leaves = [part.requires_grad_() if part.is_floating_point() else part for part in whole]
    with sync(False):  # noqa: FBT003 - reads well
        loss: Tensor = call(module.loss_of, *leaves)
        backward(loss)
    at, after = [0] * len(leaves), _generators()
    for number, piece in enumerate(pieces):
        _set_generators(draws[number])
        with sync(last and number == len(pieces) - 1):
            outputs = call(module.embed, piece)
            ends = [start + len(part) for start, part in zip(at, outputs, strict=True)]
            torch.autograd.backward(*_pairs(outputs, leaves, at, ends))
        at = ends
    _set_generators(after)
    return loss.detach()


def _pairs(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], starts: Sequence[int], ends: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what of a piece goes back, and the gradient of each."""
    found = [
        (output, leaf.grad[start:end])
        for output, leaf, start, end in zip(outputs, leaves, starts, ends, strict=True)
        if output.requires_grad and leaf.grad is not None
    ]
    return [output for output, _ in found], [gradient for _, gradient in found]


def _generators() -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *on_gpu]


def _set_generators(states: Sequence[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
