"""Test predictions of several seeds in, metrics with honest intervals out.

Every seed has its own test rows (the same ones where the split is official). A metric is
taken on each seed's rows and averaged over seeds; its interval comes from drawing patients
(or sites, where splits kept sites whole) anew, for all seeds together, so a patient tested
five times still counts as one. The trained models are held fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.metrics.calibration import brier, ece
from pathcli.metrics.classification import (
    CLASSIFICATION,
    confusion,
    macro_auroc,
    roc_curve,
    sensitivity_specificity,
)
from pathcli.metrics.statistics import (
    Interval,
    bootstrap,
    delong,
    delong_test,
    holm,
    mean_sd,
    paired_bootstrap,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.metrics.classification import Metric
    from pathcli.mil.bags import Cohort
    from pathcli.runs import Run

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

REPLICATES = 2000
GRID = np.linspace(0, 1, 101)
Z95 = NormalDist().inv_cdf(0.975)
_TWO, _NOISE = 2, 1e-12

BARE = ("ece",)
"""Metrics stated without interval: the bias of ECE moves its bootstrap off the value itself."""

Measure = Callable[["Ints", "Floats", int], float]
"""Labels [n], probabilities [n, c] and the run's index in, a number out."""


@dataclass(frozen=True)
class Tested:
    """One run on its test bags: names, patients, sites, labels [n], probabilities [n, c].

    `threshold` was fixed on validation, None where there are more than two classes. Of
    `listed` test slides those in `lost` (a count by class) have no features.
    """

    run: Run
    names: tuple[str, ...]
    patients: tuple[str, ...]
    sites: tuple[str | None, ...]
    labels: Ints
    chances: Floats
    threshold: float | None
    listed: int
    lost: Mapping[str, int]

    def units(self, unit: str) -> list[str]:
        """Return patient or site of each row."""
        return [str(site) for site in self.sites] if unit == "site" else list(self.patients)


@dataclass(frozen=True)
class Scores:
    """All seeds of one head, as one table of rows.

    `kind` says what the test is to the runs (own, part, external), `unit` what is drawn anew
    for intervals, and `shared` how many test slides are of patients that were learnt from.
    """

    name: str
    tested: tuple[Tested, ...]
    cohort: Cohort
    kind: str = "own"
    unit: str = "patient"
    shared: int = 0
    warnings: tuple[str, ...] = ()

    @cached_property
    def run_of(self) -> Ints:
        """Index of the run of each row."""
        return np.repeat(np.arange(len(self.tested)), [len(t.names) for t in self.tested])

    @cached_property
    def labels(self) -> Ints:
        """Class index of each row."""
        return np.concatenate([t.labels for t in self.tested])

    @cached_property
    def chances(self) -> Floats:
        """Probabilities of each row."""
        return np.concatenate([t.chances for t in self.tested])

    @property
    def rows(self) -> list[tuple[int, str]]:
        """Seed and bag of each row: equal lists are the same test."""
        return [(t.run.seed, name) for t in self.tested for name in t.names]

    @property
    def patients(self) -> list[str]:
        """Patient of each row."""
        return [patient for t in self.tested for patient in t.patients]

    @property
    def units(self) -> list[str]:
        """What is drawn anew, of each row: its patient, or its site."""
        return [unit for t in self.tested for unit in t.units(self.unit)]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.chances.shape[1])

    @property
    def shared_test(self) -> bool:
        """Tell whether all seeds were tested on the same bags."""
        return len({t.names for t in self.tested}) == 1

    def over_seeds(self, measure: Measure) -> Callable[[NDArray[np.intp]], float]:
        """Return the mean of `measure` over seeds as a function of row indices.

        A seed for which a draw of patients leaves it undefined is left out of that draw's mean.
        """
        return self.over_rows(lambda rows, run: measure(self.labels[rows], self.chances[rows], run))

    def over_rows(
        self, measure: Callable[[NDArray[np.intp], int], float]
    ) -> Callable[[NDArray[np.intp]], float]:
        """Return the same of a measure that takes row indices and the run's index."""

        def statistic(rows: NDArray[np.intp]) -> float:
            runs = self.run_of[rows]
            values = [measure(rows[runs == i], i) for i in range(len(self.tested))]
            defined = [value for value in values if not np.isnan(value)]
            return float(np.mean(defined)) if defined else float("nan")

        return statistic

    def interval(self, measure: Measure, replicates: int = REPLICATES) -> Interval:
        """Return the mean over seeds with its BCa interval; undefined if it is for a seed."""
        if np.isnan(self.by_seed(measure)).any():
            return _bare(float("nan"), self)
        return bootstrap(
            self.over_seeds(measure),
            self.units,
            strata=self.labels.tolist(),
            replicates=replicates,
        )

    def by_seed(self, measure: Measure) -> list[float]:
        """Return `measure` of each seed."""
        return [measure(t.labels, t.chances, i) for i, t in enumerate(self.tested)]

    def averaged(self) -> Scores:
        """Return the shared test bags with probabilities averaged over seeds, as one run."""
        mean: Floats = np.mean([t.chances for t in self.tested], axis=0)
        return replace(self, tested=(replace(self.tested[0], chances=mean, threshold=None),))


def measures(scores: Scores) -> dict[str, Measure]:
    """Return every metric of an evaluation by name; the thresholded ones for two classes."""
    plain = {**CLASSIFICATION, "ece": ece, "brier": brier}
    found = {name: _of_any_run(measure) for name, measure in plain.items()}
    if scores.classes == _TWO:
        limits = [t.threshold for t in scores.tested]

        def at_threshold(which: int) -> Measure:
            def measure(labels: Ints, chances: Floats, run: int) -> float:
                limit = limits[run]
                if limit is None:
                    return float("nan")
                return sensitivity_specificity(labels, chances[:, 1], limit)[which]

            return measure

        found |= {"sensitivity": at_threshold(0), "specificity": at_threshold(1)}
    return found


def _of_any_run(metric: Metric) -> Measure:
    def measure(labels: Ints, chances: Floats, _: int) -> float:
        return metric(labels, chances)

    return measure


@dataclass(frozen=True)
class Measured:
    """A metric of one head: interval over patients, spread over seeds."""

    interval: Interval
    seeds: tuple[float, ...]

    @property
    def spread(self) -> float:
        """Standard deviation over seeds, nan for one seed."""
        return mean_sd(self.seeds)[1]


def measure_all(scores: Scores, replicates: int = REPLICATES) -> dict[str, Measured]:
    """Return every metric of a head."""
    found = {}
    for name, measure in measures(scores).items():
        seeds = tuple(scores.by_seed(measure))
        bare = _bare(float(np.mean(seeds)), scores)
        found[name] = Measured(
            bare if name in BARE else scores.interval(measure, replicates), seeds
        )
    return found


def _bare(value: float, scores: Scores) -> Interval:
    return Interval(value, float("nan"), float("nan"), len(set(scores.units)), method="none")


def compare(heads: Sequence[Scores], replicates: int = REPLICATES) -> list[dict[str, Any]]:
    """Return the AUROC difference of each pair of heads, with p values corrected by Holm.

    DeLong's test where there are two classes, one shared test set and one row a patient: it
    compares the seed-averaged scores, and so do the difference and interval beside it. Else a
    paired bootstrap of the mean over seeds. Heads tested on different rows are not compared.
    """
    found = [_compare_two(a, b, replicates) for a, b in combinations(heads, 2) if a.rows == b.rows]
    adjusted = holm([row["p"] for row in found])
    return [row | {"p_holm": p} for row, p in zip(found, adjusted, strict=True)]


def _compare_two(a: Scores, b: Scores, replicates: int) -> dict[str, Any]:
    one_each = len(set(a.tested[0].units(a.unit))) == len(a.tested[0].names)
    by_delong = a.shared_test and a.classes == _TWO and one_each
    test = f"paired bootstrap over {a.unit}s, mean over seeds"
    if by_delong:
        a, b, test = a.averaged(), b.averaged(), "DeLong, seed-averaged score"
    auroc = _of_any_run(macro_auroc)
    difference, p = paired_bootstrap(
        a.over_seeds(auroc),
        b.over_seeds(auroc),
        a.units,
        strata=a.labels.tolist(),
        replicates=replicates,
    )
    low, high = difference.low, difference.high
    if by_delong:
        said = a.chances[:, 1], b.chances[:, 1]
        p = delong_test(a.labels, *said)
        _, ((of_a, both), (_, of_b)) = delong(a.labels, np.stack(said))
        variance = of_a + of_b - 2 * both
        if variance > _NOISE:  # else both rank alike, and the bootstrap knows a bound
            width = Z95 * np.sqrt(variance)
            low, high = np.clip([difference.value - width, difference.value + width], -1, 1)
    return {
        "heads": f"{a.name} - {b.name}",
        "auroc_difference": difference.value,
        "low": float(low),
        "high": float(high),
        "test": test,
        "p": p,
    }


def confusions(scores: Scores) -> Floats:
    """Return the confusion matrix [true, predicted], mean over seeds."""
    summed = confusion(scores.labels, scores.chances.argmax(1), scores.classes)
    return summed / len(scores.tested)


def mean_curve(
    scores: Scores, replicates: int = 500, seed: int = 0
) -> Mapping[str, Sequence[float]]:
    """Return the mean ROC curve over seeds (and classes) with a pointwise 95 % band.

    Sensitivity is read at 101 false positive rates; the band is the percentiles of curves of
    patients (or sites) drawn anew.
    """
    rng = np.random.default_rng(seed)
    units = np.array(scores.units)
    names, where = np.unique(units, return_inverse=True)
    members = [np.flatnonzero(where == i) for i in range(len(names))]
    drawn = []
    for _ in range(replicates):
        rows = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        drawn.append(_curve(scores, rows))
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
    middle = _curve(scores, np.arange(len(units)))
    return {"x": GRID.tolist(), "y": middle.tolist(), "low": low.tolist(), "high": high.tolist()}


def _curve(scores: Scores, rows: NDArray[np.intp]) -> Floats:
    curves = []
    for run in range(len(scores.tested)):
        mine = rows[scores.run_of[rows] == run]
        for c in range(1 if scores.classes == _TWO else 0, scores.classes):
            truth = (scores.labels[mine] == c).astype(np.int64)
            if 0 < truth.sum() < len(truth):
                fpr, tpr, _ = roc_curve(truth, scores.chances[mine, c])
                curves.append(np.interp(GRID, fpr, tpr))
    return np.mean(curves, axis=0) if curves else np.full(len(GRID), np.nan)
