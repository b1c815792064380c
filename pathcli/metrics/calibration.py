"""Whether probabilities mean what they say: Brier score, expected calibration error.

Labels are int64 [n], probabilities float [n, c]. An absent class changes no definition here;
without cases everything is nan.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pathcli.errors import UsageError
from pathcli.metrics.classification import Floats, Ints, check_probabilities

_BINARY = 2


class Bin(NamedTuple):
    """Cases whose confidence is in (low, high]: how sure they are and how often right.

    `confidence` and `accuracy` are means over the `n` cases, nan where there are none.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def brier(labels: Ints, probabilities: Floats) -> float:
    """Return the mean squared distance of probabilities from the truth; 0 is best.

    For two classes it is the familiar mean of (p1 - y)^2, at most 1. For more it is Brier's
    own sum over the classes (Brier 1950), at most 2.

    Raises:
        DataError: see `check_probabilities`.
    """
    check_probabilities(labels, probabilities)
    if not len(labels):
        return float("nan")
    classes = probabilities.shape[1]
    off = probabilities - np.eye(classes)[labels]
    squares = off[:, 1] ** 2 if classes == _BINARY else (off**2).sum(1)
    return float(squares.mean())


def reliability(labels: Ints, probabilities: Floats, bins: int = 10) -> tuple[Bin, ...]:
    """Return `bins` rows of equal width over 0..1 for the reliability diagram.

    Confidence is the probability of the most probable class, whichever it is.

    Raises:
        UsageError: fewer than one bin.
        DataError: see `check_probabilities`.
    """
    if bins < 1:
        msg = f"bins must be at least 1, got {bins}"
        raise UsageError(msg)
    check_probabilities(labels, probabilities)
    confidence = probabilities.max(1).astype(float)
    right = (probabilities.argmax(1) == labels).astype(float)
    edges = np.arange(bins + 1) / bins
    which = np.searchsorted(edges[1:-1], confidence, "left")
    n = np.bincount(which, minlength=bins)
    mean = [
        np.where(n > 0, np.bincount(which, values, bins) / np.maximum(n, 1), np.nan)
        for values in (confidence, right)
    ]
    columns = (edges[:-1], edges[1:], n, *mean)
    return tuple(Bin(*row) for row in zip(*(c.tolist() for c in columns), strict=True))


def ece(labels: Ints, probabilities: Floats, bins: int = 10) -> float:
    """Return the expected calibration error: mean |accuracy - confidence| over the cases.

    Top-label confidence in equal-width bins (Guo et al. 2017, eq. 3). It is biased upwards
    when bins hold few cases. nan without cases.

    Raises:
        UsageError: fewer than one bin.
        DataError: see `check_probabilities`.
    """
    filled = [row for row in reliability(labels, probabilities, bins) if row.n]
    gaps = sum(row.n * abs(row.accuracy - row.confidence) for row in filled)
    return gaps / len(labels) if len(labels) else float("nan")
