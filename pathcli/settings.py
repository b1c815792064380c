"""The section `train` of a recipe, and what follows from it alone: rates and orders."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence  # noqa: TC003 - a recipe's checker reads them
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from pathcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How to train: the section `train` of a recipe.

    `lr` and `seed` may be lists: every seed is a run of its own, every learning rate a
    candidate of it. `choose` names the validation metric (higher is better) by which the
    weights are chosen, ties by the lower `loss`; None keeps the last ones. `patience` is how
    many epochs without a better one stop the run.

    Batches: `epochs` counts passes over the examples, `batch` is the rows of a batch over all
    processes, `accumulate` how many batches make a step. With `chunk` a batch is embedded in
    pieces of that many rows a process, for contrastive losses whose batch does not fit.
    `workers` make batches ahead of the loop. `by_length` puts examples of about one length into
    a batch, so that little of it is padding, where the task knows lengths. `shard` "full"
    shares the weights out among the processes, so that each holds a part.

    Rates: in the first `warmup_steps`, or the share `warmup` of all steps, the rate rises
    from `warmup_lr` to `lr`; then `schedule` takes it to `min_lr` at the end (cosine, linear),
    leaves it (constant), or multiplies it by `gamma` every `step_epochs` epochs of the run,
    not below `min_lr` (step). `scale` multiplies the rate of the parts that its names begin
    (`{connector: 0.5}`).

    Weights: `decay_all` puts weight decay on biases and norms too, `clip` is the largest norm
    of a gradient, `ema` the decay per step of a running mean of the weights, which is what is
    then validated and kept. `tensorboard` writes the curves for that viewer as well.
    """

    epochs: int = 50
    batch: int = 1
    accumulate: int = 1
    chunk: int | None = None
    by_length: bool = False
    lr: float | list[float] = 1e-4
    min_lr: float = 0.0
    schedule: Literal["cosine", "linear", "constant", "step"] = "cosine"
    step_epochs: int = 1
    gamma: float = 0.9
    warmup: float = 0.0
    warmup_steps: int | None = None
    warmup_lr: float = 0.0
    scale: Mapping[str, float] | None = None
    optimizer: Literal["adamw", "adam"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-5
    decay_all: bool = False
    clip: float | None = None
    ema: float | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    shard: Literal["none", "full"] = "none"
    choose: str | None = None
    patience: int | None = None
    seed: int | list[int] = 1
    workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Refuse what no run could do.

        Raises:
            UsageError: a number outside its range, an empty list, a choice without its metric.
        """
        wrong = [*self._numbers(), *self._rates()]
        if len(self.rates) > 1 and self.choose is None:
            wrong.append("several lr need `choose`, the validation metric that picks one")
        if self.patience is not None and self.choose is None:
            wrong.append("patience needs `choose`, the validation metric that must improve")
        if self.shard == "full" and self.precision == "float16":
            wrong.append("shard=full trains in float32 or bfloat16")
        if wrong:
            raise UsageError(", ".join(wrong))

    def _numbers(self) -> Iterator[str]:
        """Yield what is said of each number outside its range."""
        for name in ("epochs", "batch", "accumulate", "chunk", "step_epochs", "patience"):
            number = getattr(self, name)
            if number is not None and number < 1:
                yield f"{name} must be at least 1"
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            yield "seed must name different seeds of at least 0"
        for name in ("min_lr", "warmup_lr", "weight_decay", "workers"):
            if getattr(self, name) < 0:
                yield f"{name} must be at least 0"
        if not all(0 <= beta < 1 for beta in self.betas):
            yield "betas must be at least 0 and below 1"
        for name in ("eps", "clip"):
            number = getattr(self, name)
            if number is not None and number <= 0:
                yield f"{name} must be positive" + ", or null for no clipping" * (name == "clip")
        if self.ema is not None and not 0 <= self.ema < 1:
            yield "ema is a decay, at least 0 and below 1, or null for none"

    def _rates(self) -> Iterator[str]:
        """Yield what is wrong with the rates and their course."""
        if not self.rates or min(self.rates) <= 0:
            yield "lr must be positive"
        if not 0 <= self.warmup < 1:
            yield "warmup is a share of the steps, at least 0 and below 1"
        if self.warmup_steps is not None and self.warmup_steps < 0:
            yield "warmup_steps must be at least 0"
        if self.warmup and self.warmup_steps is not None:
            yield "warmup and warmup_steps say the same thing; give one"
        if min((self.scale or {}).values(), default=1) <= 0:
            yield "scale multiplies rates: positive numbers, {connector: 0.5}"
        if not 0 < self.gamma <= 1:
            yield "gamma must be above 0 and at most 1"

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
    given = settings.warmup_steps
    warm = math.ceil(settings.warmup * steps) if given is None else given
    if step < warm:
        return settings.warmup_lr + (lr - settings.warmup_lr) * (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    match settings.schedule:
        case "cosine":
            return settings.min_lr + (lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
        case "linear":
            return settings.min_lr + (lr - settings.min_lr) * (1 - share)
        case "step":
            epoch = step * settings.epochs // steps
            return max(settings.min_lr, lr * settings.gamma ** (epoch // settings.step_epochs))
        case "constant":
            return lr


def order(seed: int, epoch: int, n: int) -> list[int]:
    """Return the order of `n` examples in one epoch, a function of the seed and the epoch."""
    shuffled: list[int] = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    return shuffled


_WINDOW = 64
"""Batches within which examples are sorted by length."""


def by_length(
    shuffled: Sequence[int], lengths: Sequence[int], batch: int, rng: np.random.Generator
) -> list[int]:
    """Return an order whose batches hold examples of about one length, the batches shuffled.

    Examples are sorted within windows of 64 batches, so that epochs differ; what does not fill
    a batch stays last.
    """
    whole = len(shuffled) - len(shuffled) % batch
    window = _WINDOW * batch
    ordered = [
        row
        for start in range(0, whole, window)
        for row in sorted(shuffled[start : min(start + window, whole)], key=lengths.__getitem__)
    ]
    starts = (batch * rng.permutation(whole // batch)).tolist()
    grouped = [row for start in starts for row in ordered[start : start + batch]]
    return [*grouped, *shuffled[whole:]]
