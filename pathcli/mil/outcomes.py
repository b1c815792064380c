"""What a MIL head can learn besides classes: a number, or how soon something happens.

An outcome is a section of a recipe. It says which columns it reads, how many logits the head
gives, what the loss is, and what predictions are. `fit` is what it takes from the train part
(never from validation or test), `conclude` what it adds once the weights are chosen; both are
plain JSON, kept with the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.errors import DataError, UsageError
from pathcli.metrics.regression import REGRESSION
from pathcli.metrics.survival import breslow, c_index, kaplan_meier
from pathcli.mil.outcome_losses import cox_log_likelihood, hazards_nll
from pathcli.mil.targets import Columns, event, number, time

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

Fit = Mapping[str, Any]
_QUARTERS, _A_STRATUM = 4, 10
FEW_EVENTS = 20
"""Events of a train part below which a run warns."""
HORIZON = 0.8
"""Curves are judged up to this quantile of the train part's times of events,"""
GRID = 51
"""at so many times from 0 on."""


class Outcome(Columns, Protocol):
    """One way to learn from numbers; logits are float [n, k], targets float [n, m]."""

    unit: str
    joint: ClassVar[bool]  # the loss compares the bags of a batch
    survival: ClassVar[bool]
    choices: ClassVar[tuple[str, ...]]

    @property
    def logits(self) -> int:
        """How many numbers the head gives."""
        ...

    def fit(self, targets: Floats) -> dict[str, Any]:
        """Return what is taken from the train part; DataError where it cannot be learnt from."""
        ...

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, fit: Fit) -> torch.Tensor:
        """Return the loss of a batch, a scalar."""
        ...

    def predicted(self, logits: Floats, fit: Fit) -> Floats:
        """Return a number for each bag [n]: the value in its unit, or the risk."""
        ...

    def measure(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, float]:
        """Return the validation metrics."""
        ...

    def conclude(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, Any]:
        """Return what the chosen weights add to the fit, from the train part."""
        ...


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A number of a column; it is learnt in standard deviations of the train part."""

    column: str
    unit: str = ""
    joint: ClassVar[bool] = False
    survival: ClassVar[bool] = False
    of_patients: ClassVar[bool] = False
    choices: ClassVar[tuple[str, ...]] = ("r2", "pearson", "spearman")
    logits: ClassVar[int] = 1

    @property
    def columns(self) -> tuple[str, ...]:
        """The one column."""
        return (self.column,)

    @property
    def checks(self) -> tuple[Callable[[str], float], ...]:
        """Any finite number."""
        return (number,)

    def strata(self, targets: Floats) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
        """Return the quarter of each value, of few values the half; no part needs every one."""
        values = targets[:, 0]
        if np.ptp(values) == 0:
            msg = f"column {self.column!r} is {values[0]:g} in every row; nothing to learn"
            raise ValueError(msg)
        parts = int(np.clip(len(values) // _A_STRATUM, 1, _QUARTERS))
        edges = np.unique(np.quantile(values, np.arange(1, parts) / parts))
        at = np.searchsorted(edges, values, "right")
        _, at = np.unique(at, return_inverse=True)
        names = [f"{min(x):g} to {max(x):g}" for x in (values[at == i] for i in range(max(at) + 1))]
        return at.tolist(), tuple(names), ()

    def fit(self, targets: Floats) -> dict[str, Any]:
        """Return mean, standard deviation and range of the train part."""
        values = targets[:, 0]
        if np.ptp(values) == 0:
            msg = f"column {self.column!r} is {values[0]:g} in all the train part; nothing to learn"
            raise DataError(msg)
        known = {"mean": values.mean(), "sd": values.std(), "low": min(values), "high": max(values)}
        return {name: float(value) for name, value in known.items()}

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, fit: Fit) -> torch.Tensor:
        """Return the mean squared error in standard deviations of the train part."""
        wanted = (targets[:, 0] - fit["mean"]) / fit["sd"]
        return F.mse_loss(logits[:, 0], wanted.to(logits))

    def predicted(self, logits: Floats, fit: Fit) -> Floats:
        """Return the values in the table's own unit."""
        return np.asarray(fit["mean"] + fit["sd"] * logits[:, 0])

    def measure(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, float]:
        """Return every metric of `REGRESSION`."""
        said = self.predicted(logits, fit)
        return {name: metric(targets[:, 0], said) for name, metric in REGRESSION.items()}

    def conclude(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, Any]:
        """Return nothing: the fit is all."""
        del targets, logits, fit
        return {}


@dataclass(frozen=True, kw_only=True)
class Survival(ABC):
    """What both kinds share: time and event of each patient, and curves from logits.

    A curve is given by its knots; between them it is constant (`steps`) or linear.
    """

    time: str = "time"
    event: str = "event"
    unit: str = ""
    survival: ClassVar[bool] = True
    of_patients: ClassVar[bool] = True
    choices: ClassVar[tuple[str, ...]] = ("c_index",)
    steps: ClassVar[bool]

    @property
    def columns(self) -> tuple[str, ...]:
        """Time, then event."""
        return self.time, self.event

    @property
    def checks(self) -> tuple[Callable[[str], float], ...]:
        """A time of at least 0, and 1 or 0."""
        return time, event

    def strata(self, targets: Floats) -> tuple[list[int], tuple[str, ...], tuple[str, ...]]:
        """Return 1 for an event, 0 for a censored patient; every part needs an event."""
        if not targets[:, 1].any():
            msg = f"column {self.event!r} has no event (1); nothing can be learnt"
            raise ValueError(msg)
        return targets[:, 1].astype(int).tolist(), ("censored", "event"), ("event",)

    def fit(self, targets: Floats) -> dict[str, Any]:
        """Return the last time, the times at which curves are judged, and the part's own curve."""
        times, events = targets[:, 0], targets[:, 1] > 0
        if not events.any():
            msg = f"no patient to train on has an event ({self.event} 1); nothing can be learnt"
            raise DataError(msg)
        grid = np.linspace(0, np.quantile(times[events], HORIZON), GRID)
        blind = kaplan_meier(times, events).at(grid)
        known = {"events": int(events.sum()), "last": float(max(times))}
        return known | {"grid": grid.tolist(), "blind": blind.tolist()}

    @abstractmethod
    def risk(self, logits: Floats) -> Floats:
        """Return a number for each bag [n] that is higher where the event is sooner."""

    @abstractmethod
    def knots(self, logits: Floats, fit: Fit) -> tuple[Floats, Floats]:
        """Return times [k], from 0, and the survival of each bag at them [n, k]."""

    def predicted(self, logits: Floats, fit: Fit) -> Floats:
        """Return the risks."""
        del fit
        return self.risk(logits)

    def measure(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, float]:
        """Return Harrell's C."""
        del fit
        return {"c_index": c_index(targets[:, 0], targets[:, 1] > 0, self.risk(logits))}

    def conclude(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, Any]:
        """Return the median risk of the train part: what parts high from low."""
        del targets, fit
        return {"cut": float(np.median(self.risk(logits)))}

    def curves(self, logits: Floats, fit: Fit, when: Floats) -> Floats:
        """Return the survival of each bag at times [t], float [n, t]; beyond the last it stays."""
        times, survival = self.knots(logits, fit)
        if self.steps:
            return survival[:, np.searchsorted(times, when, "right") - 1]
        return np.stack([np.interp(when, times, row) for row in survival])

    def median(self, logits: Floats, fit: Fit) -> list[float | None]:
        """Return when each bag's curve falls to one half; None where it does not."""
        times, survival = self.knots(logits, fit)
        found: list[float | None] = []
        for row in survival:
            below = np.flatnonzero(row <= 1 / 2)
            if not len(below):
                found.append(None)
            elif self.steps or not below[0]:
                found.append(float(times[below[0]]))
            else:
                i = below[0]
                share = (row[i - 1] - 1 / 2) / (row[i - 1] - row[i])
                found.append(float(times[i - 1] + share * (times[i] - times[i - 1])))
        return found


@dataclass(frozen=True, kw_only=True)
class Cox(Survival):
    """Proportional hazards: the head's one logit is the log risk (Cox 1972).

    The risk set of an event is formed among the patients of its batch: `train.batch` says how
    many, over all processes, and with `train.chunk` as few as one of them is held in memory at
    a time, with the same gradient. `train.accumulate` averages the losses of batches, each
    with its own risk sets.
    """

    ties: Literal["efron", "breslow"] = "efron"
    joint: ClassVar[bool] = True
    steps: ClassVar[bool] = True
    logits: ClassVar[int] = 1

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, fit: Fit) -> torch.Tensor:
        """Return minus the log partial likelihood of the batch over its events; 0 without any."""
        del fit
        events = targets[:, 1] > 0
        found = cox_log_likelihood(logits[:, 0], targets[:, 0], events, efron=self.ties == "efron")
        return -found / events.sum().clamp(min=1)

    def risk(self, logits: Floats) -> Floats:
        """Return the log risks."""
        return np.asarray(logits[:, 0])

    def conclude(self, targets: Floats, logits: Floats, fit: Fit) -> dict[str, Any]:
        """Return the median risk, and Breslow's baseline at the mean log risk."""
        centre = float(logits[:, 0].mean())
        times, hazard = breslow(targets[:, 0], targets[:, 1] > 0, logits[:, 0] - centre)
        base = {"centre": centre, "times": times.tolist(), "hazard": hazard.tolist()}
        return super().conclude(targets, logits, fit) | {"baseline": base}

    def knots(self, logits: Floats, fit: Fit) -> tuple[Floats, Floats]:
        """Return the times of events of the train part, and exp(-baseline * risk) at them."""
        base = fit["baseline"]
        hazard = np.array([0.0, *base["hazard"]])
        times = np.array([0.0, *base["times"]])
        if times[1] == 0:  # an event at time 0
            times, hazard = times[1:], hazard[1:]
        risks = np.exp(np.minimum(logits[:, :1] - base["centre"], 700))
        return times, np.exp(-risks * hazard)


@dataclass(frozen=True, kw_only=True)
class Hazards(Survival):
    """Discrete time: a logit for the hazard of each bin (Zadeh and Schmid 2020).

    Bins part the times of the train part's events into equal numbers. The risk is minus the
    summed survival of the bins, as in MCAT; within a bin survival is taken to fall linearly.
    """

    bins: int = 4
    alpha: float = 0.0
    joint: ClassVar[bool] = False
    steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what no loss could use.

        Raises:
            UsageError: fewer than two bins, or alpha outside 0..1.
        """
        if self.bins < 2 or not 0 <= self.alpha <= 1:  # noqa: PLR2004 - one bin tells nothing
            msg = f"bins must be at least 2 and alpha in 0..1, got {self.bins} and {self.alpha:g}"
            raise UsageError(msg)

    @property
    def logits(self) -> int:
        """A hazard for each bin."""
        return self.bins

    def fit(self, targets: Floats) -> dict[str, Any]:
        """Return the bins' inner edges besides; a time at an edge belongs to the later bin."""
        times, events = targets[:, 0], targets[:, 1] > 0
        known = super().fit(targets)
        edges = np.quantile(times[events], np.arange(1, self.bins) / self.bins)
        if len(np.unique([0.0, *edges, known["last"]])) < self.bins + 1:
            msg = (
                f"{len(np.unique(times[events]))} different times of events in the train part are "
                f"too few for {self.bins} bins; set outcome.bins lower"
            )
            raise DataError(msg)
        return known | {"edges": edges.tolist()}

    def loss(self, logits: torch.Tensor, targets: torch.Tensor, fit: Fit) -> torch.Tensor:
        """Return the mean negative log likelihood of the batch."""
        edges = targets.new_tensor(fit["edges"])
        bins = torch.searchsorted(edges, targets[:, 0].contiguous(), right=True)
        return hazards_nll(logits, bins, targets[:, 1] > 0, alpha=self.alpha)

    def risk(self, logits: Floats) -> Floats:
        """Return minus the summed survival at the ends of the bins."""
        return np.asarray(-self._survival(logits).sum(1))

    @staticmethod
    def _survival(logits: Floats) -> Floats:
        return np.asarray(np.exp(-np.cumsum(np.logaddexp(0, logits), 1)))

    def knots(self, logits: Floats, fit: Fit) -> tuple[Floats, Floats]:
        """Return 0, the edges and the last time of the train part, and the survival at them."""
        times = np.array([0.0, *fit["edges"], fit["last"]])
        return times, np.concatenate([np.ones((len(logits), 1)), self._survival(logits)], 1)
