"""Test predictions of outcomes in, metrics with intervals out, beside those of what is blind."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.evals.mil_outcome import runs_of
from pathcli.evals.mil_scores import REPLICATES, Measured
from pathcli.metrics.regression import REGRESSION
from pathcli.metrics.statistics import Interval, bootstrap, holm, paired_bootstrap
from pathcli.metrics.survival import c_index, integrated_brier, logrank
from pathcli.mil.outcome_task import run_outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.evals.mil_outcome import OutcomeEvaluation, OutcomeTested
    from pathcli.evals.mil_scores import Scores

    Rows = NDArray[np.intp]
    Of = Callable[[Rows, int], float]

LIMITS: dict[str, tuple[float, float] | None] = {
    "c_index": (0.0, 1.0),
    "integrated_brier": (0.0, 1.0),
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
}
"""The ranges of metrics; what is not named has none."""


@dataclass(frozen=True)
class OutcomeMeasurements:
    """All numbers of an evaluation: metrics by head, blind ones by head, comparisons of heads."""

    heads: Mapping[str, Mapping[str, Measured]]
    blind: Mapping[str, Mapping[str, float]]
    pairs: Sequence[Mapping[str, Any]]


def measure_outcomes(found: OutcomeEvaluation, replicates: int = REPLICATES) -> OutcomeMeasurements:
    """Return every metric of every head with its interval over patients, and compare the heads."""
    return OutcomeMeasurements(
        {s.name: _measured(s, _measures(s), replicates) for s in found.heads},
        {s.name: _blind(s) for s in found.heads},
        _compare(found, replicates),
    )


def _measures(scores: Scores, *, blind: bool = False) -> dict[str, Of]:
    """Return the metrics of a head by name, or those of what sees no slide.

    Blind are the train part's mean value, and its Kaplan-Meier curve for everybody.
    """
    tested = runs_of(scores)
    fits = [run_outcome(t.run)[1] for t in tested]
    targets = np.concatenate([t.targets for t in tested])
    said = np.concatenate([t.predicted for t in tested])
    if not run_outcome(tested[0].run)[0].survival:

        def of(name: str) -> Of:
            return lambda rows, run: REGRESSION[name](
                targets[rows, 0], np.full(len(rows), fits[run]["mean"]) if blind else said[rows]
            )

        return {name: of(name) for name in REGRESSION}
    times, events = targets[:, 0], targets[:, 1] > 0
    curves = np.concatenate([t.curves for t in tested])

    def concordance(rows: Rows, _: int) -> float:
        return c_index(times[rows], events[rows], np.zeros(len(rows)) if blind else said[rows])

    def distance(rows: Rows, run: int) -> float:
        grid, base = np.array(fits[run]["grid"]), np.array(fits[run]["blind"])
        curve = np.tile(base, (len(rows), 1)) if blind else curves[rows]
        return integrated_brier(times[rows], events[rows], curve, grid)

    return {"c_index": concordance, "integrated_brier": distance}


def _measured(scores: Scores, measures: Mapping[str, Of], replicates: int) -> dict[str, Measured]:
    survival = run_outcome(scores.tested[0].run)[0].survival
    found = {}
    for name, of in measures.items():
        seeds = tuple(_by_seed(scores, of))
        nan, units = float("nan"), len(set(scores.units))
        interval = Interval(nan, nan, nan, units, method="none")
        if not np.isnan(seeds).any():
            interval = bootstrap(
                scores.over_rows(of),
                scores.units,
                strata=scores.labels.tolist() if survival else None,
                replicates=replicates,
                limits=LIMITS.get(name),
            )
        found[name] = Measured(interval, seeds)
    return found


def _by_seed(scores: Scores, of: Of) -> list[float]:
    return [of(np.flatnonzero(scores.run_of == i), i) for i in range(len(scores.tested))]


def _blind(scores: Scores) -> dict[str, float]:
    measures = _measures(scores, blind=True)
    return {name: float(np.mean(_by_seed(scores, of))) for name, of in measures.items()}


def _compare(found: OutcomeEvaluation, replicates: int) -> list[dict[str, Any]]:
    """Return a row for each pair of heads tested on the same rows: difference, interval, p."""
    name = "c_index" if found.survival else "mae"
    rows: list[dict[str, Any]] = []
    for a, b in combinations(found.heads, 2):
        if a.rows != b.rows:
            continue
        difference, p = paired_bootstrap(
            a.over_rows(_measures(a)[name]),
            b.over_rows(_measures(b)[name]),
            a.units,
            strata=a.labels.tolist() if found.survival else None,
            replicates=replicates,
            limits=LIMITS.get(name),
        )
        low, high = difference.low, difference.high
        row = {"heads": f"{a.name} - {b.name}", "metric": name, "difference": difference.value}
        rows.append(row | {"low": low, "high": high, "p": p})
    adjusted = holm([row["p"] for row in rows])
    return [{**row, "p_holm": p} for row, p in zip(rows, adjusted, strict=True)]


def risk_groups(scores: Scores) -> list[dict[str, Any]]:
    """Return a row a seed: how many patients of high and low risk, their events, logrank's p.

    The cut is the median risk of the train part, fixed before any test patient was seen.
    """
    rows = []
    for t in runs_of(scores):
        high, times, events = parted(t)
        rows.append(
            {
                "head": scores.name,
                "seed": t.run.seed,
                "high": int(high.sum()),
                "events, high": int(events[high].sum()),
                "low": int((~high).sum()),
                "events, low": int(events[~high].sum()),
                "logrank p": rounded_p(logrank(times, events, high)),
            }
        )
    return rows


def rounded_p(p: float) -> float | None:
    """Return a p value to three digits, None where no test was possible."""
    return float(f"{p:.3g}") if np.isfinite(p) else None


def parted(t: OutcomeTested) -> tuple[NDArray[np.bool_], NDArray[Any], NDArray[np.bool_]]:
    """Return who is of high risk, with times and events."""
    return t.predicted > run_outcome(t.run)[1]["cut"], t.targets[:, 0], t.targets[:, 1] > 0
