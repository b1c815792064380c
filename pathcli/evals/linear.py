"""Features and labels in, a linear classifier out: AdamW, logistic regression, or ridge.

Features are expected standardised. The strength of logistic regression and ridge is chosen on
validation images, or by cross-validation that keeps groups whole; AdamW has nothing to choose.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.floating[Any]]
    Ints = NDArray[np.int64]

EPOCHS, BATCH, LR = 20, 32, 1e-2
"""Of AdamW, as PathGen-1.6M probes (arXiv:2407.00203)."""

STRENGTHS = tuple(10.0**power for power in range(-1, 6))
"""What is tried: ridge's penalty, and 1 / C of logistic regression, on one-hot targets."""

FOLDS = 5
_TEMPERATURES = tuple(np.geomspace(0.02, 2, 21).tolist())
_STEPS = 500
_TWO = 2


@dataclass(frozen=True)
class Linear:
    """A linear classifier: weights [d, c], bias [c], and how it was made.

    `strength` is None where nothing was to choose, `chosen` says how it was chosen. Scores are
    divided by `temperature` before the softmax.
    """

    weights: Floats
    bias: Floats
    strength: float | None = None
    chosen: str = ""
    temperature: float = 1.0

    def scores(self, features: Floats) -> Floats:
        """Return the scores [n, c] of features [n, d]."""
        scores: Floats = features @ self.weights + self.bias
        return scores

    def __call__(self, features: Floats) -> Floats:
        """Return the probabilities float64 [n, c] of features [n, d]."""
        return _softmax(self.scores(features) / self.temperature)


@dataclass(frozen=True)
class Learnt:
    """Rows to learn from: features [n, d], labels int64 [n], and the group of each."""

    features: Floats
    labels: Ints
    groups: Sequence[str]

    def at(self, rows: NDArray[np.intp]) -> Learnt:
        """Return some of the rows."""
        return Learnt(self.features[rows], self.labels[rows], [self.groups[i] for i in rows])


def fit(
    method: str, train: Learnt, classes: int, *, val: Learnt | None = None, seed: int = 0
) -> Linear:
    """Return a classifier of `classes` learnt from `train`, its strength chosen on `val`.

    Without `val` the strength is chosen by cross-validation within `train`, groups whole; where
    a class has a single group there, it is 1.

    Raises:
        UsageError: an unknown method.
        DataError: a class has no image to learn from.
    """
    missing = np.setdiff1d(np.arange(classes), train.labels)
    if len(missing):
        msg = f"no image to learn class {missing.tolist()} from, of {len(train.labels)} images"
        raise DataError(msg)
    if method == "adamw":
        return _adamw(train, classes, seed)
    if method not in _SOLVERS:
        msg = f"--method is {', '.join(METHODS)}, not {method!r}"
        raise UsageError(msg)
    solve = _SOLVERS[method]
    if val is not None:
        held = [(train, val)]
        chosen = f"on {len(val.labels)} validation images"
    else:
        held = _folds(train, classes, seed)
        chosen = f"by {len(held)}-fold cross-validation" if held else "not at all, too few groups"
    strength, temperature = _choose(method, held, classes)
    weights, bias = solve(train, classes, strength)
    return Linear(weights, bias, strength, chosen, temperature)


# --- the three ---------------------------------------------------------------------------


def _adamw(train: Learnt, classes: int, seed: int) -> Linear:
    """Return a layer trained from zeros for 20 epochs, batches of 32, weight decay 0.01."""
    import torch  # noqa: PLC0415
    from torch.nn.functional import cross_entropy  # noqa: PLC0415

    x = torch.from_numpy(np.asarray(train.features, np.float32))
    y = torch.from_numpy(train.labels)
    layer = torch.nn.Linear(x.shape[1], classes)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LR)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.split(torch.randperm(len(y), generator=rng), BATCH):
            optimizer.zero_grad()
            cross_entropy(layer(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    weights, bias = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
    return Linear(weights.astype(float), bias.astype(float))


def _ridge(train: Learnt, classes: int, strength: float) -> tuple[Floats, Floats]:
    """Return the least squares fit to one-hot labels, in closed form."""
    from scipy.linalg import LinAlgWarning  # noqa: PLC0415
    from sklearn.linear_model import Ridge  # noqa: PLC0415 - costs a second

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)  # weak penalties, seldom chosen
        fitted = Ridge(alpha=strength).fit(
            train.features.astype(np.float64), np.eye(classes)[train.labels]
        )
    return fitted.coef_.T, fitted.intercept_


def _logistic(train: Learnt, classes: int, strength: float) -> tuple[Floats, Floats]:
    """Return multinomial logistic regression, the sum of losses plus half the penalty."""
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415
    from sklearn.linear_model import LogisticRegression  # noqa: PLC0415

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # weak penalties, seldom chosen
        made = LogisticRegression(C=1 / strength, max_iter=_STEPS)
        made.fit(train.features, train.labels)
    weights, bias = made.coef_.T, made.intercept_
    if classes == _TWO:  # one column tells both classes
        return np.hstack([np.zeros_like(weights), weights]), np.array([0.0, bias[0]])
    return weights, bias


_SOLVERS: dict[str, Callable[[Learnt, int, float], tuple[Floats, Floats]]] = {
    "logistic": _logistic,
    "ridge": _ridge,
}
METHODS = ("adamw", *_SOLVERS)


# --- what strength -----------------------------------------------------------------------


def _choose(
    method: str, held: Sequence[tuple[Learnt, Learnt]], classes: int
) -> tuple[float, float]:
    """Return the strength (and ridge's temperature) of the least log loss on what is held out."""
    best = (np.inf, 1.0, 1.0)
    temperatures = _TEMPERATURES if method == "ridge" else (1.0,)
    labels = np.concatenate([out.labels for _, out in held]) if held else None
    for strength in STRENGTHS if held else ():
        fitted = [(Linear(*_SOLVERS[method](train, classes, strength)), out) for train, out in held]
        scores = np.concatenate([made.scores(out.features) for made, out in fitted])
        for temperature in temperatures:
            own = _softmax(scores / temperature)[np.arange(len(scores)), labels]
            loss = -float(np.log(np.maximum(own, 1e-12)).mean())
            best = min(best, (loss, strength, temperature))
    return best[1], best[2]


def _folds(train: Learnt, classes: int, seed: int) -> list[tuple[Learnt, Learnt]]:
    """Return (learn, hold out) pairs, groups whole; none where a class has too few groups."""
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415

    groups = np.array(train.groups)
    fewest = min(len(set(groups[train.labels == k])) for k in range(classes))
    if fewest < _TWO:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class has fewer images than folds
        dealt = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
        pairs = list(dealt.split(train.features, train.labels, groups))
    whole = [len(set(train.labels[learn])) == classes for learn, _ in pairs]
    return [(train.at(learn), train.at(out)) for learn, out in pairs] if all(whole) else []


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(1, keepdims=True), dtype=float)
    shares: Floats = powers / powers.sum(1, keepdims=True)
    return shares


def standardised(train: Floats, *others: Floats) -> list[Floats]:
    """Return all arrays [n, d] less the mean of `train`, over its standard deviation."""
    mean, sd = train.mean(0, dtype=float), train.std(0, dtype=float)
    sd[sd < 1e-6] = 1  # noqa: PLR2004 - a feature that never varies says nothing
    return [((array - mean) / sd).astype(np.float32) for array in (train, *others)]
