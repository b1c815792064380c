"""Labelled images with features in, the rows to learn from, to choose on and to test on out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.evals.patch_scores import units_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pathcli.types import Sample

    Floats = NDArray[np.floating[Any]]
    Ints = NDArray[np.int64]
    Rows = NDArray[np.intp]

TEST_SHARE = 4
"""One in so many images is tested on, where nobody says which."""


@dataclass(frozen=True)
class Images:
    """Samples with a row each of `features` float [n, d] and `labels` int64 [n].

    `splits` has a name for each sample, "" where nobody says.
    """

    samples: Sequence[Sample]
    features: Floats
    labels: Ints
    classes: tuple[str, ...]
    splits: Sequence[str]

    def units(self, rows: Rows) -> list[str]:
        """Return the independent unit of each of `rows`: its group, or itself."""
        known = units_of(self.samples)
        return [known[i] for i in rows.tolist()]


@dataclass(frozen=True)
class Sides:
    """Row indices to learn from, to choose on (maybe none) and to test on; `how` says whose.

    Rows on no side are of splits the probe does not know.
    """

    train: Rows
    val: Rows
    test: Rows
    how: str
    warnings: tuple[str, ...] = ()


def sides_of(images: Images, seed: int = 0) -> Sides:
    """Return the official sides where splits name train and test, else sides drawn by group.

    Without an official test part its validation part is the test. Drawn sides are a quarter of
    the groups to test on, the rest to learn from.

    Raises:
        DataError: a group is on two sides, or a class cannot be learnt.
    """
    train, val, test = (
        np.flatnonzero([split == part for split in images.splits])
        for part in ("train", "val", "test")
    )
    if len(train) and len(test):
        sides = Sides(train, val, test, "the data set's own")
    elif len(train) and len(val):
        sides = Sides(train, test, val, "the data set's own, its validation part as the test")
    else:
        sides = _drawn(images, seed)
    _refuse(images, sides)
    return replace(sides, warnings=tuple(_remarks(images, sides)))


def _drawn(images: Images, seed: int) -> Sides:
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415 - costs a second

    units = np.array(units_of(images.samples))
    grouped = any(sample.group for sample in images.samples)
    for k, name in enumerate(images.classes):
        groups = len(set(units[images.labels == k]))
        if groups < TEST_SHARE:
            what = "groups" if grouped else "images"
            msg = (
                f"class {name} has {groups} {what}; to learn from some and test on others takes "
                f"{TEST_SHARE} of every class"
            )
            raise DataError(msg)
    dealt = StratifiedGroupKFold(TEST_SHARE, shuffle=True, random_state=seed)
    train, test = next(dealt.split(images.labels, images.labels, units))
    whole = ", groups whole" if grouped else ""
    how = f"drawn here{whole}, one in {TEST_SHARE} to test on (seed {seed})"
    return Sides(train, np.zeros(0, np.intp), test, how)


def _refuse(images: Images, sides: Sides) -> None:
    """Refuse groups on two sides, and classes without an image to learn from.

    Raises:
        DataError: either.
    """
    groups = [
        {images.samples[i].group for i in rows.tolist()} - {""}
        for rows in (sides.train, sides.val, sides.test)
    ]
    train, val, test = groups
    shared = sorted((train & val) | (train & test) | (val & test))
    if shared:
        msg = (
            f"groups on two sides of the split: {len(shared)} (first: {shared[0]!r}); mend the "
            "column `split`, or leave it out: then sides are drawn by group"
        )
        raise DataError(msg)
    for k in np.setdiff1d(np.arange(len(images.classes)), images.labels[sides.train]).tolist():
        msg = f"class {images.classes[k]} has no image to learn from; the split is {sides.how}"
        raise DataError(msg)


def _remarks(images: Images, sides: Sides) -> list[str]:
    """Return what a reader must know to trust the numbers."""
    found = []
    if not any(sample.group for sample in images.samples):
        found.append(
            "without groups (a column `group` of the labels) images of one patient may be on both "
            "sides, and these numbers too good"
        )
    learnt = {images.features[i].tobytes() for i in (*sides.train.tolist(), *sides.val.tolist())}
    twins = sum(images.features[i].tobytes() in learnt for i in sides.test.tolist())
    if twins:
        found.append(f"test images that equal one learnt from, by their features: {twins}")
    absent = np.setdiff1d(np.arange(len(images.classes)), images.labels[sides.test])
    if len(absent):
        names = ", ".join(images.classes[k] for k in absent.tolist())
        found.append(f"no test image is of class {names}, so there is no AUROC")
    left = len(images.samples) - sum(len(rows) for rows in (sides.train, sides.val, sides.test))
    if left:
        found.append(f"images of no known part (train, val, test), not used: {left}")
    return found
