"""How well risks and survival curves fit what happened: concordance, Kaplan-Meier, Brier.

Times are float [n] of at least 0, events bool [n]: True where the event was seen at that time,
False where the patient was only followed until then (censored). A higher risk means sooner.
What cannot be defined (no comparable pair, no event) is nan, so that resampling can go on;
what cannot be right is a DataError.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcli.errors import DataError

Floats = NDArray[np.floating[Any]]
Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

_BLOCK = 1 << 22
"""Pairs that are compared at a time."""
_TWO = 2
_NOISE = 1e-9


def check_times(times: Floats, events: Bools) -> None:
    """Refuse times and events that do not belong together, both [n].

    Raises:
        DataError: shapes differ, events are not bool, or a time is negative or not finite.
    """
    if times.shape != events.shape or times.ndim != 1 or events.dtype != np.bool_:
        msg = f"times {times.shape} and events {events.shape} must be rows of one length, bool"
        raise DataError(msg)
    if wrong := int((~(np.isfinite(times) & (times >= 0))).sum()):
        msg = f"{wrong} of {len(times)} times are negative, nan or infinite"
        raise DataError(msg)


# --- concordance -------------------------------------------------------------------------


def c_index(times: Floats, events: Bools, risks: Floats) -> float:
    """Return the share of comparable pairs in which the higher risk had the event first.

    Harrell et al. 1982. A pair is comparable where one has the event before the other's time,
    or at it while the other is censored there; two events at one time are not compared. Equal
    risks count half. nan without a comparable pair.

    Raises:
        DataError: see `check_times`; or risks of another length, or not finite.
    """
    check_times(times, events)
    if risks.shape != times.shape or not np.isfinite(risks).all():
        msg = f"risks {risks.shape} must be finite, one for each of {len(times)} times"
        raise DataError(msg)
    first = np.flatnonzero(events)
    right = pairs = 0.0
    step = max(1, _BLOCK // max(1, len(times)))
    for start in range(0, len(first), step):
        rows = first[start : start + step, None]
        later = (times > times[rows]) | ((times == times[rows]) & ~events)
        pairs += later.sum()
        right += (later & (risks[rows] > risks)).sum() + (later & (risks[rows] == risks)).sum() / 2
    return float(right / pairs) if pairs else float("nan")


# --- curves ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Steps of a survival curve: from `times[i]` on it has `survival[i]`, both [k], from time 0.

    `low` and `high` are its 95 % band, `at_risk` how many are followed just before each time.
    """

    times: Array
    survival: Array
    low: Array
    high: Array
    at_risk: NDArray[np.int64]

    def at(self, when: Floats) -> Array:
        """Return the curve at times of at least 0, of any shape."""
        return np.asarray(self.survival[np.searchsorted(self.times, when, "right") - 1])

    def before(self, when: Floats) -> Array:
        """Return the curve just before times, 1 at time 0."""
        place = np.searchsorted(self.times, when, "left") - 1
        return np.where(place < 0, 1.0, self.survival[np.maximum(place, 0)])


def kaplan_meier(times: Floats, events: Bools) -> Curve:
    """Return the product-limit curve (Kaplan and Meier 1958) with a pointwise 95 % band.

    The band is Greenwood's on the log(-log) scale (Kalbfleisch and Prentice 1980); it is nan
    where the curve is 0, and 1 where it still is 1.

    Raises:
        DataError: see `check_times`.
    """
    check_times(times, events)
    when = _from_0(times)
    at_risk, died = _counts(times, events, when)
    left = np.maximum(at_risk, 1)
    survival = np.asarray(np.cumprod(1 - died / left), np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        greenwood = np.cumsum(died / (left * (left - died)))
        log = np.log(survival)
        width = NormalDist().inv_cdf(0.975) * np.sqrt(greenwood) / log
        low, high = survival ** np.exp(-width), survival ** np.exp(width)
    whole = survival == 1
    low, high = np.where(whole, 1.0, low), np.where(whole, 1.0, high)
    return Curve(when, survival, low, high, at_risk)


def _from_0(times: Floats) -> Array:
    return np.unique(np.append(times, 0.0)).astype(np.float64)


def _counts(times: Floats, events: Bools, when: Floats) -> tuple[NDArray[np.int64], Array]:
    """Return how many are at risk just before each time of `when`, and have the event at it."""
    at_risk = len(times) - np.searchsorted(np.sort(times), when, "left")
    seen = np.sort(times[events])
    died = np.searchsorted(seen, when, "right") - np.searchsorted(seen, when, "left")
    return at_risk.astype(np.int64), died.astype(np.float64)


def logrank(times: Floats, events: Bools, second: Bools) -> float:
    """Return the two-sided p value that two groups have one survival curve (Mantel 1966).

    `second` is True for the second group. nan where a group is empty or no time tells them
    apart. The p value is the chi-squared one, for many patients.

    Raises:
        DataError: see `check_times`; or groups of another length.
    """
    from scipy.stats import chi2  # noqa: PLC0415 - costs a second

    check_times(times, events)
    if second.shape != times.shape:
        msg = f"groups {second.shape} must be one for each of {len(times)} times"
        raise DataError(msg)
    when = np.unique(times[events])
    n, died = _counts(times, events, when)
    mine, of_mine = _counts(times[second], events[second], when)
    share = mine / np.maximum(n, 1)
    variance = (died * share * (1 - share) * (n - died) / np.maximum(n - 1, 1)).sum()
    if variance <= 0:
        return float("nan")
    return float(chi2.sf((of_mine - died * share).sum() ** 2 / variance, 1))


def breslow(times: Floats, events: Bools, log_risks: Floats) -> tuple[Array, Array]:
    """Return the times of events [k] and the baseline cumulative hazard from each on [k].

    Breslow 1974: the hazard at a time is the events there over the summed exp(log risk) of
    those at risk. A patient's survival is exp(-baseline * exp(log risk)).

    Raises:
        DataError: see `check_times`.
    """
    check_times(times, events)
    when: Array = np.unique(times[events]).astype(np.float64)
    _, died = _counts(times, events, when)
    order = np.argsort(times, kind="stable")
    above = np.append(np.cumsum(np.exp(log_risks[order])[::-1])[::-1], 0.0)
    return when, np.cumsum(died / above[np.searchsorted(times[order], when, "left")])


# --- Brier -------------------------------------------------------------------------------


def brier(times: Floats, events: Bools, survival: Floats, when: Floats) -> Array:
    """Return the Brier score at each time of `when` [t] for survival [n, t] predicted there.

    Graf et al. 1999: the squared distance of the predicted survival from 0 (the event came) or
    1 (not yet); who was censored before is left out, and the others weigh more for it, by the
    inverse chance of still being followed, which is the Kaplan-Meier curve of censoring among
    these patients (an event at the same time comes first). Lower is better; nan from the time
    on at which nobody is followed any more, unless the last of them had the event.

    Raises:
        DataError: see `check_times`; or survival of another shape or outside 0..1.
    """
    check_times(times, events)
    if survival.shape != (len(times), len(when)):
        msg = f"survival {survival.shape} must be [patients, times] ({len(times)}, {len(when)})"
        raise DataError(msg)
    if not ((survival >= -_NOISE) & (survival <= 1 + _NOISE)).all():
        msg = "survival must lie in 0..1"
        raise DataError(msg)
    followed = _censoring(times, events)
    came = events[:, None] & (times[:, None] <= when)
    not_yet = times[:, None] > when
    weight = came / followed.before(times)[:, None] + not_yet / np.where(
        not_yet.any(0), followed.at(when), 1.0
    )
    scores = np.asarray((weight * (survival - not_yet) ** 2).mean(0))
    if followed.survival[-1] == 0:  # the last were lost: whether the event came is not known
        scores[~not_yet.any(0)] = np.nan
    return scores


def _censoring(times: Floats, events: Bools) -> Curve:
    """Return the Kaplan-Meier curve of being followed; events leave before censorings."""
    when = _from_0(times)
    at_risk, died = _counts(times, events, when)
    _, lost = _counts(times, ~events, when)
    left = np.maximum(at_risk - died, 1)
    followed = np.asarray(np.cumprod(1 - lost / left), np.float64)
    return Curve(when, followed, followed, followed, at_risk)


def integrated_brier(times: Floats, events: Bools, survival: Floats, when: Floats) -> float:
    """Return the mean of `brier` over the times of `when`, by the trapezium rule.

    Times at which it is nan, the last ones, are left out. nan without patients, or with fewer
    than two times that differ.

    Raises:
        DataError: see `brier`.
    """
    if not len(times):
        return float("nan")
    scores = brier(times, events, survival, when)
    scores, when = scores[np.isfinite(scores)], when[np.isfinite(scores)]
    if len(when) < _TWO or when[-1] == when[0]:
        return float("nan")
    return float(((scores[1:] + scores[:-1]) / 2 * np.diff(when)).sum() / (when[-1] - when[0]))
