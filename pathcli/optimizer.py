"""A module's trainable weights in, the optimiser that trains them out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pathcli.errors import UsageError
from pathcli.registry import did_you_mean

if TYPE_CHECKING:
    from pathcli.settings import TrainSettings


def make_optimizer(
    module: torch.nn.Module, settings: TrainSettings, lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """Return the optimiser that the section `train` describes, over what requires a gradient."""
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(
        parameter_groups(module, settings),
        lr=lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=device.type in {"cpu", "cuda"},
    )


def parameter_groups(module: torch.nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the optimiser's groups: biases and norms (fewer than 2 dimensions) do not decay.

    Where weights are shared out, those of one number, which are not, stay apart; so do parts
    whose rate is scaled.

    Raises:
        UsageError: a part is scaled that nothing trainable is of.
    """
    kinds: dict[tuple[float, bool, bool], list[torch.nn.Parameter]] = {}
    scales = settings.scale or {}
    unused = set(scales)
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        part = next((s for s in scales if f"{name}.".startswith(f"{s}.")), None)
        unused.discard(part or "")
        scale = scales[part] if part else 1.0
        alone = settings.shard == "full" and not p.ndim
        spared = not settings.decay_all and p.ndim < 2  # noqa: PLR2004
        kinds.setdefault((scale, alone, spared), []).append(p)
    if unused:
        parts = sorted({n.split(".")[0] for n, p in module.named_parameters() if p.requires_grad})
        name = min(unused)
        msg = f"train.scale: nothing trained is called {name!r}: {did_you_mean(name, parts)}"
        raise UsageError(msg)
    return [
        {
            "params": kinds[scale, alone, spared],
            "weight_decay": 0.0 if spared else settings.weight_decay,
            "scale": scale,
        }
        for scale, alone, spared in sorted(kinds)
    ]


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all groups, each times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
