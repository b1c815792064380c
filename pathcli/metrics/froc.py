"""How well lesions are found: CAMELYON16's FROC, and attention inside against outside.

Source: Ehteshami Bejnordi et al. 2017 (JAMA 318:2199), supplement, and the challenge's rules.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.metrics.classification import Floats, Ints, auroc, counts_above, shares

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per slide at which the challenge reads the sensitivity."""


@dataclass(frozen=True)
class Detections:
    """Candidates of one slide: `scores` float [k], `hits` int [k] the lesion hit, or -1.

    `lesions` is how many lesions the slide has, numbered from 0, and `ignored` are those that
    count for nothing (isolated tumour cells): hitting one is neither right nor wrong.
    """

    scores: Floats = field(repr=False)
    hits: Ints = field(repr=False)
    lesions: int
    ignored: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Refuse detections that contradict themselves.

        Raises:
            DataError: lengths differ, a score is not finite, or a lesion is not one of the slide's.
        """
        if self.scores.shape != self.hits.shape or self.scores.ndim != 1:
            msg = f"scores {self.scores.shape} and hits {self.hits.shape} must be of equal length"
            raise DataError(msg)
        if not np.isfinite(self.scores).all():
            msg = "a detection's score is nan or infinite; look at the model's run"
            raise DataError(msg)
        named = {*self.hits.tolist(), *self.ignored} - {-1}
        if named and not (min(named) >= 0 and max(named) < self.lesions):
            msg = f"lesions must lie in 0..{self.lesions - 1}, got {min(named)}..{max(named)}"
            raise DataError(msg)


@dataclass(frozen=True)
class Froc:
    """The curve: `fps` false positives per slide [t], rising, and `sensitivity` [t].

    `at` is the sensitivity at each of `RATES`, `score` their mean; `lesions` and `slides` are
    what was counted. Without lesions, or without slides, the numbers are nan.
    """

    fps: NDArray[np.float64] = field(repr=False)
    sensitivity: NDArray[np.float64] = field(repr=False)
    at: tuple[float, ...]
    score: float
    lesions: int
    slides: int


def froc(slides: Sequence[Detections]) -> Froc:
    """Return the FROC curve of all `slides`, those without any detection included.

    A lesion counts once, by its highest detection; further hits of it count for nothing. Every
    detection outside lesions is a false positive, on tumour slides too, and false positives
    are averaged over all slides. The curve is a step function: at a given rate stands the best
    sensitivity that costs no more. (The challenge's script takes the next point at or beyond
    the rate, others interpolate; both spend false positives that the rate does not allow.)
    """
    found: list[float] = []
    false: list[float] = []
    for slide in slides:
        false += slide.scores[slide.hits < 0].tolist()
        hit = set(slide.hits.tolist()) - slide.ignored - {-1}
        found += [float(slide.scores[slide.hits == lesion].max()) for lesion in sorted(hit)]
    lesions = sum(slide.lesions - len(slide.ignored) for slide in slides)
    truth = np.repeat([1, 0], [len(found), len(false)])
    true_above, false_above, _ = counts_above(truth, np.array([*found, *false], float))
    fps = shares(false_above, len(slides))
    sensitivity = shares(true_above, lesions)
    last = np.searchsorted(fps, RATES, "right") - 1  # the last point that costs no more
    at = tuple(sensitivity[last].tolist()) if slides else (float("nan"),) * len(RATES)
    return Froc(fps, sensitivity, at, float(np.mean(at)), lesions, len(slides))


def auc_in_lesion(attention: Floats, inside: NDArray[np.bool_] | NDArray[Any]) -> float:
    """Return how well attention [n] tells tiles inside lesions (bool [n]) from those outside.

    The chance that a tile inside has more attention than one outside, ties half; nan if all
    tiles are on one side.

    Raises:
        DataError: lengths differ, or attention is not finite.
    """
    return auroc(inside.astype(np.int64), attention)
