"""Two judges' verdicts on a sample in, how far they agree out, with intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from pathcli.metrics.statistics import bootstrap, wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pathcli.metrics.statistics import Interval

T = TypeVar("T")


@dataclass
class Drawn(Generic[T]):
    """A uniform sample of `size` of what is offered, in one pass (Vitter 1985, algorithm R)."""

    size: int
    seed: int = 0
    found: list[T] = field(default_factory=list)
    offered: int = 0

    def __post_init__(self) -> None:
        """Begin with nothing drawn."""
        self._rng = np.random.default_rng(self.seed)

    def offer(self, one: T) -> None:
        """Take one more into account."""
        self.offered += 1
        if len(self.found) < self.size:
            self.found.append(one)
        elif (place := int(self._rng.integers(self.offered))) < self.size:
            self.found[place] = one


@dataclass(frozen=True)
class Agreement:
    """How a cheap judge's verdicts compare with a dear one's, on `n` that the dear one decided.

    `table` counts [dear, cheap], first those that stay in, then those that are out. `precision`
    is the share of what the cheap judge throws out that the dear one does too, `recall` the
    share of what the dear one throws out that the cheap one finds. `kappa` is Cohen's (1960).
    """

    n: int
    undecided: int
    table: tuple[tuple[int, int], tuple[int, int]]
    kappa: Interval
    precision: Interval
    recall: Interval

    def rows(self) -> list[dict[str, Any]]:
        """Return the numbers as rows of a table."""
        told = {"kappa": self.kappa, "precision": self.precision, "recall": self.recall}
        return [
            {
                "measure": name,
                "value": _number(found.value),
                "low": _number(found.low),
                "high": _number(found.high),
                "n": found.n,
            }
            for name, found in told.items()
        ]


def agreement(cheap: Sequence[bool], dear: Sequence[bool | None]) -> Agreement:
    """Return how `cheap` verdicts agree with `dear` ones, True being out, None undecided."""
    pairs = [(c, d) for c, d in zip(cheap, dear, strict=True) if d is not None]
    a, b = (np.array([pair[k] for pair in pairs], dtype=bool) for k in (0, 1))
    table = ((int((~b & ~a).sum()), int((~b & a).sum())), (int((b & ~a).sum()), int((b & a).sum())))
    both = table[1][1]
    nothing = wilson(0, 0)
    return Agreement(
        n=len(pairs),
        undecided=len(cheap) - len(pairs),
        table=table,
        kappa=bootstrap(lambda i: kappa(a[i], b[i]), range(len(pairs)), limits=(-1.0, 1.0))
        if pairs
        else nothing,
        precision=wilson(both, int(a.sum())),
        recall=wilson(both, int(b.sum())),
    )


def kappa(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Return Cohen's kappa of two rows of verdicts; nan where chance alone makes them agree."""
    agreed = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return (agreed - chance) / (1 - chance) if chance < 1 else float("nan")


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
