"""Answers by option: which is chosen, how steadily as options change places, as classes.

Options are numbered as they are given; a reply that names none of them is `UNMAPPED`, agrees
with nothing and is wrong: nothing is drawn at random, as MMMU and PathMMU do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, permutations
from math import factorial, nan

import numpy as np
from numpy.typing import NDArray

from pathcli.errors import DataError
from pathcli.metrics import vqa_text as text
from pathcli.metrics.classification import Ints, confusion

Options = Sequence[str]
Scored = NDArray[np.float64]
"""A score for each row [n], nan where a rule says nothing of it."""

UNMAPPED = -1
"""The class of a reply that names none of the options."""


def right_option(answer: str, options: Options) -> int:
    """Return which option is right.

    Raises:
        DataError: the reference is none of them.
    """
    place = text.answer_index(answer, options)
    if place is None:
        msg = f"the answer {answer!r} is none of the options {list(options)}; look at the data"
        raise DataError(msg)
    return place


def chosen(predictions: Sequence[str], options: Sequence[Options]) -> Ints:
    """Return the option that each reply chooses by the rule `choice`, `UNMAPPED` for none."""
    places = [text.choice(*asked) for asked in zip(predictions, options, strict=True)]
    return np.array([UNMAPPED if place is None else place for place in places], np.int64)


def orders(options: int, count: int) -> list[tuple[int, ...]]:
    """Return up to `count` orders of options, the given one first.

    Shifts come first: over `options` of them each option has stood in each place once. There
    are no more than the factorial.
    """
    shifts = (
        (0, *rest)[start:] + (0, *rest)[:start]
        for rest in permutations(range(1, options))
        for start in range(options)
    )
    return list(islice(shifts, min(count, factorial(options))))


@dataclass(frozen=True)
class Consistency:
    """Per question [n]: is it answered alike in all orders, and what share of pairs of orders.

    `vote` is the option chosen most often, of equals the one chosen first, `UNMAPPED` if no
    order chose any. A reply that chooses nothing agrees with no other.
    """

    alike: Scored
    agreement: Scored
    vote: Ints


def consistency(picks: Ints) -> Consistency:
    """Return how far answers keep to the same option when options change places.

    Args:
        picks: int64 [n, orders], the option chosen, numbered as first given: where `order` was
            shown and place p chosen, order[p].

    Raises:
        DataError: there are fewer than two orders.
    """
    if picks.ndim != 2 or picks.shape[1] < 2:  # noqa: PLR2004 - a table, and a pair
        msg = f"consistency needs picks [questions, orders], two orders at least, got {picks.shape}"
        raise DataError(msg)
    same = (picks[:, :, None] == picks[:, None]) & (picks != UNMAPPED)[:, :, None]
    pairs = np.triu_indices(picks.shape[1], 1)
    agreement = same[:, pairs[0], pairs[1]].mean(1)
    votes = same.sum(2)  # of each order's pick; 0 for none
    vote = np.take_along_axis(picks, votes.argmax(1)[:, None], 1)[:, 0]
    return Consistency((agreement == 1).astype(np.float64), agreement, vote)


def chance(options: Sequence[Options]) -> float:
    """Return the accuracy of guessing: the mean of 1 / options over rows that have any."""
    shares = [1 / len(row) for row in options if row]
    return float(np.mean(shares)) if shares else nan


@dataclass(frozen=True)
class Classification:
    """Answers taken as classes; `recall`, `precision` and `f1` are means over classes."""

    accuracy: float
    recall: float
    precision: float
    f1: float
    unmapped: int


def classification(labels: Ints, predicted: Ints) -> Classification:
    """Return what PA-LLaVA's Table II has, a reply of no class (`UNMAPPED`) being wrong.

    Means are over the classes that occur in `labels` [n]; a class never predicted has a
    precision of 0, and an unmapped reply counts against its own class's recall alone.

    Raises:
        DataError: lengths differ, or a class is below 0 and not `UNMAPPED`.
    """
    classes = int(max(labels.max(initial=0), predicted.max(initial=0))) + 1
    table = confusion(labels, np.where(predicted == UNMAPPED, classes, predicted), classes + 1)
    occurs = table.sum(1) > 0
    if not occurs.any():
        return Classification(nan, nan, nan, nan, 0)
    hits, truths, calls = (part[occurs] for part in (table.diagonal(), table.sum(1), table.sum(0)))
    return Classification(
        accuracy=float(table.trace() / table.sum()),
        recall=float((hits / truths).mean()),
        precision=float((hits / np.maximum(calls, 1)).mean()),
        f1=float((2 * hits / (truths + calls)).mean()),
        unmapped=int(table[:, classes].sum()),
    )
