"""How sure a number is: intervals, tests and corrections, over patients and not over rows.

What cannot be defined is nan. An interval that resampling cannot find, because every resample
says the same (a perfect AUROC), is widened by what so few cases could not have shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcli.errors import DataError, UsageError
from pathcli.metrics.classification import Floats, Ints, check_scores, placements

Statistic = Callable[[NDArray[np.intp]], float]
"""Row indices (with repeats) in, a number out; nan where it is undefined."""

Array = NDArray[np.float64]

_NORMAL = NormalDist()
_NOISE = 1e-12
_LEFT_OUT = 1000


@dataclass(frozen=True)
class Interval:
    """A number and the interval it has at `level`.

    `n` counts independent units: groups, cases, trials. `method` says how it was made, and
    `dropped` how many resamples were undefined and left out.
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: str = ""
    dropped: int = 0


# --- bootstrap ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Rows ordered by group, each group's first place and size, and the groups of each stratum."""

    order: NDArray[np.intp]
    starts: NDArray[np.intp]
    sizes: NDArray[np.intp]
    strata: list[NDArray[np.intp]]

    @property
    def fewest(self) -> int:
        return min(len(stratum) for stratum in self.strata)

    def rows(self, groups: NDArray[np.intp]) -> NDArray[np.intp]:
        sizes = self.sizes[groups]
        shift = self.starts[groups] - np.cumsum(sizes) + sizes
        places = np.repeat(shift, sizes) + np.arange(sizes.sum())
        return np.asarray(self.order[places], np.intp)

    def resample(self, rng: np.random.Generator) -> NDArray[np.intp]:
        drawn = [part[rng.integers(len(part), size=len(part))] for part in self.strata]
        return self.rows(np.concatenate(drawn))

    def without(self, group: int) -> NDArray[np.intp]:
        return np.delete(self.order, self.starts[group] + np.arange(self.sizes[group]))


def _plan(groups: Sequence[Hashable], strata: Sequence[int] | None) -> _Plan:
    if strata is not None and len(strata) != len(groups):
        msg = f"{len(groups)} groups but {len(strata)} strata; both are given once a row"
        raise DataError(msg)
    if not len(groups):
        msg = "there are no rows to resample; look at what was left out and why"
        raise DataError(msg)
    number: dict[Hashable, int] = {}
    group_of = np.array([number.setdefault(group, len(number)) for group in groups], np.intp)
    order, sizes = np.argsort(group_of, kind="stable"), np.bincount(group_of)
    starts = np.cumsum(sizes) - sizes
    highest = np.zeros(len(number))
    if strata is not None:
        highest = np.maximum.reduceat(np.asarray(strata)[order], starts)
    return _Plan(order, starts, sizes, [np.flatnonzero(highest == v) for v in np.unique(highest)])


def bootstrap(
    statistic: Statistic,
    groups: Sequence[Hashable],
    *,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: Sequence[int] | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> Interval:
    """Return the BCa interval of `statistic` (Efron 1987) when whole groups are drawn anew.

    `groups` names the independent unit of every row, usually the patient. `strata`, one a row,
    usually the label, keeps the number of groups of each class; a group counts in the highest
    stratum of its rows. A stratum of one group never varies, so its share of the uncertainty is
    missing. The acceleration is from leaving out one group at a time, of a random thousand where
    there are more.

    `limits` is the range the statistic can take, None if it has none. When all replicates
    agree, the interval is the value plus and minus `unseen(k)` of that range, cut to it, where
    k is the number of groups of the smallest stratum; so give strata to what compares classes.
    For a perfect AUROC or accuracy this is an exact bound: k separate pairs of cases, all in
    order, do not rule out more. Without limits the interval is the value alone. Method: "BCa",
    "exact bound", "constant", or "undefined".

    Undefined (nan) bounds: the statistic is nan on the data, no stratum has two groups, or more
    than half of the replicates are nan.

    Raises:
        UsageError: fewer than 2 replicates, or a level outside 0..1.
        DataError: no rows, or `strata` of another length.
    """
    _check(replicates, level)
    plan = _plan(groups, strata)
    return _interval(_evaluate(statistic, plan, replicates, seed), plan, level, limits)


def paired_bootstrap(
    statistic_a: Statistic,
    statistic_b: Statistic,
    groups: Sequence[Hashable],
    *,
    replicates: int = 2000,
    level: float = 0.95,
    seed: int = 0,
    strata: Sequence[int] | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> tuple[Interval, float]:
    """Return the BCa interval of a - b on common resamples, and the two-sided p value.

    Arguments as in `bootstrap`; `limits` are those of each statistic. The null distribution is
    that of the resampled difference moved to 0: p is the share of replicates that lie as far
    from the difference as it lies from 0, as (count + 1) / (B + 1). It is never below 2^(1-n),
    the least that swapping a and b within n groups could give; nan where the interval is.

    Raises:
        UsageError: fewer than 2 replicates, or a level outside 0..1.
        DataError: no rows, or `strata` of another length.
    """
    _check(replicates, level)
    plan = _plan(groups, strata)
    a = _evaluate(statistic_a, plan, replicates, seed)
    b = _evaluate(statistic_b, plan, replicates, seed)
    difference = _Result(a.value - b.value, a.drawn - b.drawn, a.left_out - b.left_out)
    # where a and b vary but never their difference, the two are the same: no limits needed
    steady = _constant(a.kept) and _constant(b.kept)
    reach = (limits[0] - limits[1], limits[1] - limits[0]) if limits and steady else None
    interval = _interval(difference, plan, level, reach)
    if math.isnan(interval.low):
        return interval, math.nan
    kept = difference.kept
    count = int((abs(kept - interval.value) >= abs(interval.value) - _NOISE).sum())
    return interval, max((count + 1) / (len(kept) + 1), min(1.0, 2.0 ** (1 - interval.n)))


def _check(replicates: int, level: float) -> None:
    if replicates < 2 or not 0 < level < 1:  # noqa: PLR2004 - one replicate has no spread
        msg = f"want 2 replicates or more and a level inside 0..1, got {replicates}, {level:g}"
        raise UsageError(msg)


@dataclass(frozen=True)
class _Result:
    """A statistic of the data, of each resample, and without each group."""

    value: float
    drawn: Array
    left_out: Array

    @property
    def kept(self) -> Array:
        return self.drawn[~np.isnan(self.drawn)]


def _evaluate(statistic: Statistic, plan: _Plan, replicates: int, seed: int) -> _Result:
    rng = np.random.default_rng(seed)
    drawn = np.array([statistic(plan.resample(rng)) for _ in range(replicates)], float)
    n = len(plan.sizes)
    left_out = np.full(n, np.nan)
    for group in rng.permutation(n)[:_LEFT_OUT] if n > 1 else ():
        left_out[group] = statistic(plan.without(group))
    return _Result(float(statistic(np.arange(len(plan.order)))), drawn, left_out)


def _constant(kept: Array) -> bool:
    return bool(len(kept) and np.ptp(kept) <= _NOISE)


def _interval(
    result: _Result, plan: _Plan, level: float, limits: tuple[float, float] | None
) -> Interval:
    value, kept, n = result.value, result.kept, len(plan.sizes)
    dropped = len(result.drawn) - len(kept)
    if math.isnan(value) or n == len(plan.strata) or 2 * dropped > len(result.drawn):
        return Interval(value, math.nan, math.nan, n, level, "undefined", dropped)
    if not _constant(kept):
        influence = [_influence(result.left_out[stratum]) for stratum in plan.strata]
        low, high = _bca(value, kept, influence, n, level)
        return Interval(value, low, high, n, level, "BCa", dropped)
    if limits is None:
        return Interval(value, value, value, n, level, "constant", dropped)
    reach = unseen(plan.fewest, level) * (limits[1] - limits[0])
    low, high = max(limits[0], value - reach), min(limits[1], value + reach)
    return Interval(value, low, high, n, level, "exact bound", dropped)


def _influence(left_out: Array) -> Array:
    """Return each group's influence over the size of its stratum; undefined ones left out."""
    kept = left_out[~np.isnan(left_out)]
    return (len(kept) - 1) * (kept.mean() - kept) / len(kept) if len(kept) else kept


def _bca(
    value: float, drawn: Array, influence: list[Array], groups: int, level: float
) -> tuple[float, float]:
    below, not_above = drawn < value - _NOISE, drawn <= value + _NOISE  # rounding keeps ties ties
    share = (below.mean() + not_above.mean()) / 2
    bias = _NORMAL.inv_cdf(float(np.clip(share, 1 / (len(drawn) + 1), 1 - 1 / (len(drawn) + 1))))
    cubes = sum(float((part**3).sum()) for part in influence)
    squares = sum(float((part**2).sum()) for part in influence)
    tried = sum(len(part) for part in influence) / groups
    acceleration = math.sqrt(tried) * cubes / (6 * squares**1.5) if squares > 0 else 0.0

    def bound(tail: float) -> float:
        z = bias + _NORMAL.inv_cdf(tail)
        return float(np.quantile(drawn, _NORMAL.cdf(bias + z / (1 - acceleration * z))))

    return bound((1 - level) / 2), bound((1 + level) / 2)


def unseen(trials: int, level: float = 0.95) -> float:
    """Return the rate that `trials` without an event still allow (Clopper and Pearson).

    With 30 trials at 95 % that is 0.116; with none it is 1.
    """
    return 1 - ((1 - level) / 2) ** (1 / trials) if trials else 1.0


# --- DeLong ------------------------------------------------------------------------------


def delong(labels01: Ints, scores: Floats) -> tuple[Array, Array]:
    """Return the AUROC of each row of scores [k, n], and their covariance [k, k].

    DeLong et al. 1988 by sorting, as fast as Sun and Xu 2014. Rows of the data must be
    independent, one a patient; else use `bootstrap`. AUROC is nan if a class is absent, the
    covariance also if a class has one case.

    Raises:
        DataError: shapes differ, a label is neither 0 nor 1, or a score is not finite.
    """
    positive, negative = _components(labels01, scores)
    aucs = positive.mean(1) if positive.size else np.full(len(scores), np.nan)
    return aucs, _spread(positive) + _spread(negative)


def delong_interval(labels01: Ints, scores: Floats, level: float = 0.95) -> Interval:
    """Return the AUROC of scores [n] with DeLong's interval on the logit scale.

    Where the variance is 0 (perfect separation, or all scores tied) the interval is the value
    plus and minus `unseen(k)`, k the cases of the smaller class, as in `bootstrap`. nan bounds
    if a class has fewer than two cases.

    Raises:
        DataError: see `delong`.
    """
    aucs, covariance = delong(labels01, scores[np.newaxis])
    value, variance, n = float(aucs[0]), float(covariance[0, 0]), len(labels01)
    if math.isnan(variance):
        return Interval(value, math.nan, math.nan, n, level, "undefined")
    if variance <= _NOISE**2 or not 0 < value < 1:
        reach = unseen(min(int(labels01.sum()), n - int(labels01.sum())), level)
        low, high = max(0.0, value - reach), min(1.0, value + reach)
        return Interval(value, low, high, n, level, "exact bound")
    logit = math.log(value / (1 - value))
    width = _NORMAL.inv_cdf((1 + level) / 2) * math.sqrt(variance) / (value * (1 - value))
    low, high = ((1 + math.tanh((logit + side * width) / 2)) / 2 for side in (-1, 1))
    return Interval(value, low, high, n, level, "DeLong, logit")


def delong_test(labels01: Ints, a: Floats, b: Floats) -> float:
    """Return the two-sided p value that scores a [n] and b [n] have one AUROC.

    1 where both rank every pair alike (identical scores, or two perfect ones). Never below
    2^(1-n), the least that swapping a and b within n cases could give. nan if a class has fewer
    than two cases.

    Raises:
        DataError: see `delong`.
    """
    positive, negative = (c[:1] - c[1:] for c in _components(labels01, np.stack([a, b])))
    variance = float((_spread(positive) + _spread(negative))[0, 0])
    if math.isnan(variance):
        return math.nan
    difference = abs(float(positive.mean()))
    if difference <= _NOISE:
        return 1.0
    z = difference / math.sqrt(variance) if variance > 0 else math.inf
    return max(math.erfc(z / math.sqrt(2)), 2.0 ** (1 - len(labels01)))


def _components(labels01: Ints, scores: Floats) -> tuple[Array, Array]:
    """Return V10 [k, positives] and V01 [k, negatives]; empty if either class is absent."""
    for row in scores:
        check_scores(labels01, row)
    positive, negative = scores[:, labels01 == 1], scores[:, labels01 == 0]
    if not positive.size or not negative.size:
        return np.empty((len(scores), 0)), np.empty((len(scores), 0))
    pairs = list(zip(positive, negative, strict=True))
    return (
        np.array([placements(p, n) for p, n in pairs]),
        np.array([1 - placements(n, p) for p, n in pairs]),
    )


def _spread(components: Array) -> Array:
    """Return the covariance [k, k] of the means of components [k, m]; nan for m below 2."""
    k, m = components.shape
    if m < 2:  # noqa: PLR2004 - one case has no spread
        return np.full((k, k), np.nan)
    return np.asarray(np.atleast_2d(np.cov(components)) / m, float)


# --- small ones --------------------------------------------------------------------------


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Return p values adjusted for their number (Holm 1979), in the order given.

    nan (no test was possible) stays nan and is not counted.

    Raises:
        DataError: a value outside 0..1.
    """
    p = np.asarray(p_values, float)
    if ((p < 0) | (p > 1)).any():
        msg = f"p values must lie in 0..1, got {p.tolist()}"
        raise DataError(msg)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted = np.full(len(p), np.nan)
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(steps))
    return tuple(adjusted.tolist())


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation (n - 1); nan sd for one value."""
    row: NDArray[Any] = np.asarray(values, float)
    mean = float(row.mean()) if len(row) else math.nan
    return mean, float(row.std(ddof=1)) if len(row) > 1 else math.nan


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return a share with Wilson's interval (1927); nan for no trials.

    Raises:
        DataError: successes outside 0..n.
    """
    share, z = _rate(successes, n), _NORMAL.inv_cdf((1 + level) / 2)
    if n == 0:
        return Interval(share, math.nan, math.nan, 0, level, "undefined")
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n, level, "Wilson")


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Return a share with the exact binomial interval (Clopper and Pearson 1934).

    Arguments and errors as in `wilson`; it covers at least `level` whatever the true share is.
    """
    from scipy.stats import binomtest  # noqa: PLC0415 - costs a second

    share = _rate(successes, n)
    if n == 0:
        return Interval(share, math.nan, math.nan, 0, level, "undefined")
    low, high = binomtest(successes, n).proportion_ci(level, "exact")
    return Interval(share, float(low), float(high), n, level, "Clopper-Pearson")


def _rate(successes: int, n: int) -> float:
    if not 0 <= successes <= n:
        msg = f"successes must lie in 0..{n}, got {successes}"
        raise DataError(msg)
    return successes / n if n else math.nan
