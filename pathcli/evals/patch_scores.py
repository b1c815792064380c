"""Predictions on labelled images in, metrics with honest intervals out.

Zero-shot classification and probes are measured here alike. Intervals come from drawing whole
groups (patients, slides, original tiles) anew where samples carry one, else single images; the
model is held fixed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.metrics.classification import (
    accuracy,
    balanced_accuracy,
    check_probabilities,
    confusion,
    macro_f1,
    weighted_f1,
)
from pathcli.metrics.statistics import Interval, bootstrap, clopper_pearson

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.types import Encoder, Sample

    Bools = NDArray[np.bool_]
    Floats = NDArray[np.floating[Any]]
    Ints = NDArray[np.int64]

REPLICATES = 2000
_TWO = 2

Statistic = Callable[["NDArray[np.intp]"], float]
"""Row indices (with repeats) in, a number out."""

DECIDED = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "weighted_f1": weighted_f1,
    "macro_f1": macro_f1,
}
"""Metrics of labels and the most probable class, each int64 [n]."""


@dataclass(frozen=True)
class Scored:
    """Labelled images as a model saw them; every array has a row a sample.

    `labels` int64 [n] are indices of `classes`; `probabilities` [n, c] sum to one a row;
    `features` float32 [n, d] are for the map; `abstained` bool [n] tells which images the model
    would not name, though it has probabilities for them all. `dropped` counts what was left out
    of the data, by reason. `texts` are what each class was called, `published` flat rows of
    other people's numbers with at least `metric`, `value` and `source`; `lead` is the sentence
    under the title, and `provenance` any JSON that says where all came from.
    """

    title: str
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    labels: Ints
    probabilities: Floats
    features: Floats | None = None
    abstained: Bools | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    published: tuple[Mapping[str, Any], ...] = ()
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lead: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together.

        Raises:
            DataError: no images, another number of rows, or labels and probabilities no
                metric could take.
        """
        n = len(self.samples)
        rows = {
            "labels": self.labels,
            "probabilities": self.probabilities,
            "features": self.features,
            "abstained": self.abstained,
        }
        wrong = [f"{len(a)} {name}" for name, a in rows.items() if a is not None and len(a) != n]
        if wrong or not n:
            msg = f"{self.title}: {n} images, {', '.join(wrong) or 'so nothing to measure'}"
            raise DataError(msg)
        check_probabilities(self.labels, self.probabilities)
        columns = self.probabilities.shape[1]
        if columns != len(self.classes):
            msg = f"{self.title}: {len(self.classes)} classes but {columns} probabilities an image"
            raise DataError(msg)

    @cached_property
    def predicted(self) -> Ints:
        """Index of the most probable class of each image, int64 [n]."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @cached_property
    def units(self) -> list[str]:
        """What is drawn anew, for each image: its group, or itself."""
        return units_of(self.samples)

    @property
    def grouped(self) -> bool:
        """Tell whether any sample says to which group it belongs."""
        return any(sample.group for sample in self.samples)

    @cached_property
    def confusion(self) -> Ints:
        """How often [truth, prediction] occur together, int64 [c, c]."""
        return confusion(self.labels, self.predicted, len(self.classes))


def seen_before(encoder: Encoder, dataset: str) -> str:
    """Return what to say of an encoder that was trained on a data set, or may have been.

    An encoder that knows has `trained_on`: names of sets, and which part of each it saw.
    """
    known: Mapping[str, str] | None = getattr(encoder, "trained_on", None)
    if known is None:
        return "Whether the encoder saw these images or classes in training, its model card says."
    if dataset not in known:
        return ""
    return f"These are classes {encoder.name} has seen: it was trained on {known[dataset]}."


def units_of(samples: Sequence[Sample]) -> list[str]:
    """Return the independent unit of each sample: its group, or the sample itself."""
    return [f"group {s.group}" if s.group else f"image {i}" for i, s in enumerate(samples)]


def measure_patches(scored: Scored, replicates: int = REPLICATES) -> dict[str, Interval]:
    """Return every metric of `scored` by name, over all images whatever was abstained from.

    `recall.<class>` is over the images of a class. With abstention come `abstained`, the share
    with its exact binomial interval over images; `abstained_groups`, the same share with groups
    drawn anew; and `answered.<metric>`, over the images the model did name.
    """
    labels, units = scored.labels, scored.units
    found = measure_draws(labels, [scored.probabilities], units, replicates)
    right = (labels == scored.predicted).astype(float)
    for k, name in enumerate(scored.classes):
        of_class = np.flatnonzero(labels == k)
        found[f"recall.{name}"] = _share(right[of_class], _at(units, of_class), replicates)
    if scored.abstained is None:
        return found
    found["abstained"] = clopper_pearson(int(scored.abstained.sum()), len(labels))
    if scored.grouped:
        found["abstained_groups"] = _share(scored.abstained.astype(float), units, replicates)
    answered = np.flatnonzero(~scored.abstained)
    chances = scored.probabilities[answered]
    of_answered = measure_draws(labels[answered], [chances], _at(units, answered), replicates)
    return found | {f"answered.{name}": interval for name, interval in of_answered.items()}


def measure_draws(
    labels: Ints, draws: Sequence[Floats], units: Sequence[str], replicates: int = REPLICATES
) -> dict[str, Interval]:
    """Return each metric's mean over `draws`, probabilities [n, c] of the same images.

    Units are drawn anew for all draws together, the number of each class kept; so the interval
    is that of the images, not of the draws. Metrics: those of `DECIDED`, and `auroc` (macro).

    Raises:
        DataError: labels and probabilities do not fit.
    """
    statistics = metrics_of(labels, draws)
    if not len(labels):
        return {name: _undefined() for name in statistics}
    return {
        name: bootstrap(
            lambda rows, each=each: float(np.mean([of_rows(rows) for of_rows in each])),  # type: ignore[misc]
            units,
            strata=labels.tolist(),
            replicates=replicates,
        )
        for name, each in statistics.items()
    }


def metrics_of(labels: Ints, draws: Sequence[Floats]) -> dict[str, list[Statistic]]:
    """Return for each metric its function of row indices, one for each of `draws`."""
    found: dict[str, list[Statistic]] = {name: [] for name in (*DECIDED, "auroc")}
    for chances in draws:
        check_probabilities(labels, chances)
        predicted = chances.argmax(1).astype(np.int64)
        for name, metric in DECIDED.items():
            found[name].append(
                lambda rows, metric=metric, predicted=predicted: metric(  # type: ignore[misc]
                    labels[rows], predicted[rows]
                )
            )
        found["auroc"].append(auroc_of_rows(labels, chances))
    return found


def auroc_of_rows(labels: Ints, chances: Floats) -> Statistic:
    """Return `macro_auroc` as a function of row indices; scores are sorted once, not each time."""
    n, classes = chances.shape
    of_interest = [1] if classes == _TWO else range(classes)
    ranked = []
    for k in of_interest:
        order = np.argsort(chances[:, k], kind="stable")
        new = np.diff(chances[order, k], prepend=-1.0) != 0
        ranked.append((order, np.flatnonzero(new), labels[order] == k))

    def statistic(rows: NDArray[np.intp]) -> float:
        times = np.bincount(rows, minlength=n).astype(float)
        hits = []
        for order, first_of_tie, positive in ranked:
            weight = times[order]
            up = np.add.reduceat(np.where(positive, weight, 0), first_of_tie)
            down = np.add.reduceat(np.where(positive, 0, weight), first_of_tie)
            pairs = up.sum() * down.sum()
            below = np.cumsum(down) - down / 2
            hits.append(float((up * below).sum() / pairs) if pairs else float("nan"))
        return float(np.mean(hits))

    return statistic


def _share(values: Floats, units: Sequence[str], replicates: int) -> Interval:
    """Return the mean of `values` [n] of 0 and 1 with units drawn anew; undefined for none."""
    if not len(values):
        return _undefined()
    return bootstrap(lambda rows: float(values[rows].mean()), units, replicates=replicates)


def _at(units: Sequence[str], rows: NDArray[np.intp]) -> list[str]:
    return [units[i] for i in rows.tolist()]


def _undefined() -> Interval:
    return Interval(float("nan"), float("nan"), float("nan"), 0, method="undefined")
