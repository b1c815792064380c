"""How well cases are told apart: ROC, F1, accuracy, operating points.

Labels are int64 [n], scores float [n], probabilities float [n, c]. A case is called positive
when its score is *greater* than the threshold, which agrees with argmax at 0.5. What cannot
be defined (a class is absent, there are no cases) is nan, so that resampling can go on; what
cannot be right (other lengths, a nan score, a class out of range) is a DataError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcli.errors import DataError, UsageError

Ints = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
Metric = Callable[[Ints, Floats], float]

_TWO = 2


def check_scores(labels01: Ints, scores: Floats) -> None:
    """Refuse scores that do not belong to labels of 0 and 1, both [n].

    Raises:
        DataError: shapes differ, a label is neither 0 nor 1, or a score is not finite.
    """
    if labels01.shape != scores.shape or labels01.ndim != 1:
        msg = f"labels {labels01.shape} and scores {scores.shape} must be one row of equal length"
        raise DataError(msg)
    if not ((labels01 == 0) | (labels01 == 1)).all():
        msg = "labels must be 0 or 1; number the class of interest 1, the others 0"
        raise DataError(msg)
    wrong = int((~np.isfinite(scores)).sum())
    if wrong:
        msg = f"{wrong} of {len(scores)} scores are nan or infinite; look at the model's run"
        raise DataError(msg)


def check_probabilities(labels: Ints, probabilities: Floats) -> None:
    """Refuse probabilities [n, c] that do not belong to labels [n].

    Raises:
        DataError: shapes do not fit, a label is outside 0..c-1, or a value outside 0..1.
    """
    if probabilities.ndim != _TWO or labels.shape != probabilities.shape[:1]:
        msg = f"labels {labels.shape} do not fit probabilities {probabilities.shape}; want [n, c]"
        raise DataError(msg)
    if probabilities.shape[1] < _TWO:
        msg = "probabilities need a column for every class, two at least"
        raise DataError(msg)
    if not ((labels >= 0) & (labels < probabilities.shape[1])).all():
        msg = f"labels must lie in 0..{probabilities.shape[1] - 1}, the columns of probabilities"
        raise DataError(msg)
    if not ((probabilities >= 0) & (probabilities <= 1 + 1e-6)).all():
        msg = "probabilities must lie in 0..1; apply a softmax to logits first"
        raise DataError(msg)


# --- ranking -----------------------------------------------------------------------------


def placements(values: Floats, among: Floats) -> NDArray[np.float64]:
    """Return for each of `values` the share of `among` below it, ties half."""
    ordered = np.sort(among)
    below = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(below / (2 * len(among)))


def auroc(labels01: Ints, scores: Floats) -> float:
    """Return the share of (positive, negative) pairs in the right order, ties half.

    The Mann-Whitney form of the area under the ROC curve; nan if a class is absent.

    Raises:
        DataError: see `check_scores`.
    """
    check_scores(labels01, scores)
    positive, negative = scores[labels01 == 1], scores[labels01 == 0]
    if not len(positive) or not len(negative):
        return float("nan")
    return float(placements(positive, negative).mean())


def macro_auroc(labels: Ints, probabilities: Floats) -> float:
    """Return the AUROC of class 1 of two, or the mean over classes, each against the rest.

    nan if any class is absent: a mean over fewer classes is another quantity.

    Raises:
        DataError: see `check_probabilities`.
    """
    check_probabilities(labels, probabilities)
    classes = probabilities.shape[1]
    of_interest = [1] if classes == _TWO else range(classes)
    hits = [auroc((labels == k).astype(np.int64), probabilities[:, k]) for k in of_interest]
    return float(np.mean(hits))


def counts_above(labels01: Ints, scores: Floats) -> tuple[Ints, Ints, NDArray[np.float64]]:
    """Return true and false positives [t] above each threshold [t], thresholds falling.

    Thresholds are the distinct scores and -inf: the first calls no case positive, the last all.

    Raises:
        DataError: see `check_scores`.
    """
    check_scores(labels01, scores)
    thresholds = np.append(np.unique(scores)[::-1].astype(float), -np.inf)

    def above(part: Floats) -> Ints:
        return len(part) - np.searchsorted(np.sort(part), thresholds, "right")

    return above(scores[labels01 == 1]), above(scores[labels01 == 0]), thresholds


def shares(counts: Ints, total: int | np.int64) -> NDArray[np.float64]:
    """Return counts [t] over `total`, all nan if that is 0."""
    return counts / total if total else np.full(len(counts), np.nan)


def roc_curve(
    labels01: Ints, scores: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return false positive rate, true positive rate and threshold, each [t], rates rising.

    A rate whose class is absent is nan.

    Raises:
        DataError: see `check_scores`.
    """
    true, false, thresholds = counts_above(labels01, scores)
    return shares(false, false[-1]), shares(true, true[-1]), thresholds


def pr_curve(
    labels01: Ints, scores: Floats
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return precision, recall and threshold, each [t], recall rising.

    Where no case is called positive the precision is 1. Recall is nan without positives.

    Raises:
        DataError: see `check_scores`.
    """
    true, false, thresholds = counts_above(labels01, scores)
    precision = np.where(true + false == 0, 1.0, true / np.maximum(true + false, 1))
    return precision, shares(true, true[-1]), thresholds


def average_precision(labels01: Ints, scores: Floats) -> float:
    """Return the mean precision over the steps of recall; nan without positives.

    Raises:
        DataError: see `check_scores`.
    """
    precision, recall, _ = pr_curve(labels01, scores)
    return float((np.diff(recall) * precision[1:]).sum()) if (labels01 == 1).any() else float("nan")


# --- operating points --------------------------------------------------------------------


def threshold_at_specificity(labels01: Ints, scores: Floats, specificity: float) -> float:
    """Return the smallest threshold whose specificity is at least the one asked for.

    It is the score of one of the negatives, or -inf where a specificity of 0 will do. Find it
    on validation cases, then use it on test cases. nan without negatives.

    Raises:
        UsageError: the specificity is not a share in 0..1.
        DataError: see `check_scores`.
    """
    if not 0 <= specificity <= 1:
        msg = f"specificity is a share between 0 and 1, got {specificity:g}"
        raise UsageError(msg)
    check_scores(labels01, scores)
    negative = np.sort(scores[labels01 == 0])
    if not len(negative):
        return float("nan")
    reachable = np.arange(len(negative) + 1) / len(negative)
    right = int(np.searchsorted(reachable, specificity, "left"))  # negatives to be called so
    return float(negative[right - 1]) if right else -float("inf")


def sensitivity_specificity(
    labels01: Ints, scores: Floats, threshold: float
) -> tuple[float, float]:
    """Return both at `score > threshold`; nan for the one whose class is absent.

    Raises:
        DataError: see `check_scores`.
    """
    check_scores(labels01, scores)
    above = scores > threshold
    positive = labels01 == 1
    return _mean(above[positive]), _mean(~above[~positive])


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")


# --- decisions ---------------------------------------------------------------------------


def confusion(labels: Ints, predicted: Ints, classes: int) -> Ints:
    """Return how often [truth, prediction] occur together, int64 [c, c].

    An absent class has a row of zeros.

    Raises:
        DataError: lengths differ, or a class is outside 0..classes-1.
    """
    if labels.shape != predicted.shape or labels.ndim != 1:
        msg = f"labels {labels.shape} and predictions {predicted.shape} must be of equal length"
        raise DataError(msg)
    for row in (labels, predicted):
        if len(row) and (row.min() < 0 or row.max() >= classes):
            msg = f"classes must lie in 0..{classes - 1}, got {row.min()}..{row.max()}"
            raise DataError(msg)
    pairs = np.bincount(labels * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes).astype(np.int64)


def accuracy(labels: Ints, predicted: Ints) -> float:
    """Return the share of cases that are right, whatever classes occur; nan without cases.

    Raises:
        DataError: see `confusion`.
    """
    return _over_classes(labels, predicted, lambda table: table.trace() / table.sum())


def balanced_accuracy(labels: Ints, predicted: Ints) -> float:
    """Return the mean recall over the classes that occur in `labels`; nan without cases.

    An absent class is left out of the mean, as in scikit-learn.

    Raises:
        DataError: see `confusion`.
    """

    def mean_recall(table: Ints) -> float:
        total = table.sum(1)
        return float((table.diagonal()[total > 0] / total[total > 0]).mean())

    return _over_classes(labels, predicted, mean_recall)


def macro_f1(labels: Ints, predicted: Ints) -> float:
    """Return the mean F1 over the classes in `labels` or `predicted`; nan without cases.

    A class that is never predicted, or predicted but absent, counts as 0; one that is neither
    is left out of the mean, as in scikit-learn.

    Raises:
        DataError: see `confusion`.
    """

    def mean_f1(table: Ints) -> float:
        total = table.sum(0) + table.sum(1)
        return float((2 * table.diagonal()[total > 0] / total[total > 0]).mean())

    return _over_classes(labels, predicted, mean_f1)


def weighted_f1(labels: Ints, predicted: Ints) -> float:
    """Return the mean F1 over the classes in `labels`, each by its cases; nan without cases.

    A class that is never predicted rightly counts as 0, as in scikit-learn.

    Raises:
        DataError: see `confusion`.
    """

    def mean_f1(table: Ints) -> float:
        cases = table.sum(1)
        f1 = 2 * table.diagonal() / np.maximum(table.sum(0) + cases, 1)
        return float((f1 * cases).sum() / cases.sum())

    return _over_classes(labels, predicted, mean_f1)


def _over_classes(labels: Ints, predicted: Ints, of_table: Callable[[Ints], float]) -> float:
    highest = max(labels.max(initial=0), predicted.max(initial=0))
    table = confusion(labels, predicted, int(highest) + 1)
    return float(of_table(table)) if len(labels) else float("nan")


def _by_argmax(metric: Callable[[Ints, Ints], float]) -> Metric:
    def of_probabilities(labels: Ints, probabilities: Floats) -> float:
        check_probabilities(labels, probabilities)
        return metric(labels, probabilities.argmax(1))

    return of_probabilities


CLASSIFICATION: dict[str, Metric] = {
    "auroc": macro_auroc,
    "macro_f1": _by_argmax(macro_f1),
    "accuracy": _by_argmax(accuracy),
    "balanced_accuracy": _by_argmax(balanced_accuracy),
}
"""Each takes labels [n] and probabilities [n, c]; the most probable class is the prediction."""
