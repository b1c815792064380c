"""The section `train` of a recipe, and what follows from it alone: rates and orders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pathcli.types import UsageError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train: the section `train` of a recipe.

    `lr` and `seed` may be lists: every seed is a run of its own, every learning rate a
    candidate of it. `epochs` counts passes over the examples, `warmup` is the share of all
    steps in which the rate rises from 0, `min_lr` is where the schedule ends, `decay_all`
    puts weight decay on biases and norms too, `choose` names the validation metric (higher
    is better) by which the weights are chosen, ties by the lower `loss`; None keeps the last
    ones. `patience` is how many epochs without a better one stop the run.
    """

    epochs: int = 50
    batch: int = 1
    accumulate: int = 1
    lr: float | list[float] = 1e-4
    min_lr: float = 0.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-5
    decay_all: bool = False
    clip: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    choose: str | None = None
    patience: int | None = None
    seed: int | list[int] = 1
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse what no run could do.

        Raises:
            UsageError: a number outside its range, an empty list, a choice without its metric.
        """
        counts = {"epochs": self.epochs, "batch": self.batch, "accumulate": self.accumulate}
        if self.patience is not None:
            counts["patience"] = self.patience
        wrong = [f"{name} must be at least 1" for name, n in counts.items() if n < 1]
        if not self.rates or min(self.rates) <= 0:
            wrong.append("lr must be positive")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            wrong.append("seed must name different seeds of at least 0")
        lowest = {"min_lr": self.min_lr, "weight_decay": self.weight_decay, "workers": self.workers}
        wrong += [f"{name} must be at least 0" for name, n in lowest.items() if n < 0]
        if not all(0 <= beta < 1 for beta in self.betas):
            wrong.append("betas must be at least 0 and below 1")
        if self.clip is not None and self.clip <= 0:
            wrong.append("clip must be positive, or null for no clipping")
        if not 0 <= self.warmup < 1:
            wrong.append("warmup is a share of the steps, at least 0 and below 1")
        if len(self.rates) > 1 and self.choose is None:
            wrong.append("several lr need `choose`, the validation metric that picks one")
        if self.patience is not None and self.choose is None:
            wrong.append("patience needs `choose`, the validation metric that must improve")
        if wrong:
            raise UsageError(", ".join(wrong))

    @property
    def seeds(self) -> list[int]:
        """All seeds."""
        return self.seed if isinstance(self.seed, list) else [self.seed]

    @property
    def rates(self) -> list[float]:
        """All candidate learning rates."""
        return self.lr if isinstance(self.lr, list) else [self.lr]


def learning_rate(settings: TrainSettings, lr: float, step: int, steps: int) -> float:
    """Return the rate of optimiser step `step` of `steps`, both from 0: warm-up, then schedule."""
    warm = math.ceil(settings.warmup * steps)
    if step < warm:
        return lr * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    fall = {
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "linear": 1 - share,
        "constant": 1.0,
    }[settings.schedule]
    floor = settings.min_lr if settings.schedule != "constant" else 0.0
    return floor + (lr - floor) * fall


def order(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order of `n` examples in one epoch, a function of the seed and the epoch."""
    shuffled: list[int] = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    return shuffled
