"""How near predicted numbers are to the true ones: errors, explained variance, correlations.

True and predicted values are float [n], in one unit. What cannot be defined (no cases, or no
variance where one is divided by) is nan, so that resampling can go on; what cannot be right
(other lengths, a value that is not finite) is a DataError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcli.errors import DataError

Floats = NDArray[np.floating[Any]]
Metric = Callable[[Floats, Floats], float]


def check_values(truth: Floats, predicted: Floats) -> None:
    """Refuse predictions that do not belong to true values, both [n].

    Raises:
        DataError: shapes differ, or a value is not finite.
    """
    if truth.shape != predicted.shape or truth.ndim != 1:
        msg = f"values {truth.shape} and predictions {predicted.shape} must be of equal length"
        raise DataError(msg)
    for what, row in (("true values", truth), ("predictions", predicted)):
        if wrong := int((~np.isfinite(row)).sum()):
            msg = f"{wrong} of {len(row)} {what} are nan or infinite; look at the model's run"
            raise DataError(msg)


def mae(truth: Floats, predicted: Floats) -> float:
    """Return the mean absolute error, in the unit of the values; nan without cases.

    Raises:
        DataError: see `check_values`.
    """
    check_values(truth, predicted)
    return float(np.abs(predicted - truth).mean()) if len(truth) else float("nan")


def rmse(truth: Floats, predicted: Floats) -> float:
    """Return the root of the mean squared error, in the unit of the values; nan without cases.

    Raises:
        DataError: see `check_values`.
    """
    check_values(truth, predicted)
    return float(np.sqrt(((predicted - truth) ** 2).mean())) if len(truth) else float("nan")


def r2(truth: Floats, predicted: Floats) -> float:
    """Return 1 - (squared error) / (squared error of the mean of these very cases).

    0 is what the cases' own mean would have, worse is negative; nan if all values are one.

    Raises:
        DataError: see `check_values`.
    """
    check_values(truth, predicted)
    if not len(truth) or np.ptp(truth) == 0:
        return float("nan")
    return float(1 - ((predicted - truth) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def pearson(truth: Floats, predicted: Floats) -> float:
    """Return the linear correlation; nan if either row is constant.

    Raises:
        DataError: see `check_values`.
    """
    check_values(truth, predicted)
    if not len(truth) or np.ptp(truth) == 0 or np.ptp(predicted) == 0:
        return float("nan")
    one, other = truth - truth.mean(), predicted - predicted.mean()
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def ranks(values: Floats) -> NDArray[np.float64]:
    """Return the rank of each value, from 1; tied ones share their mean rank."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[where], np.float64)


def spearman(truth: Floats, predicted: Floats) -> float:
    """Return the correlation of ranks, ties sharing their mean rank; nan as in `pearson`.

    Raises:
        DataError: see `check_values`.
    """
    check_values(truth, predicted)
    return pearson(ranks(truth), ranks(predicted))


REGRESSION: dict[str, Metric] = {
    "r2": r2,
    "pearson": pearson,
    "spearman": spearman,
    "mae": mae,
    "rmse": rmse,
}
"""Each takes true and predicted values, both [n]; the last two are errors in their unit."""
