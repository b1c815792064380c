"""Linear classifiers against numpy, scikit-learn, and AdamW by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from pathcli.errors import DataError
from pathcli.evals import linear
from pathcli.evals.linear import Learnt, fit, standardised


def overlapping(n: int = 60, classes: int = 3, wide: int = 5, seed: int = 0) -> Learnt:
    """Return overlapping classes, two images a group."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    features = rng.normal(size=(n, wide)) + 1.2 * np.eye(classes, wide)[labels]
    groups = [f"{labels[i]}-{i // (2 * classes)}" for i in range(n)]
    return Learnt(features.astype(np.float32), labels, groups)


# --- the three ways to learn -------------------------------------------------------------


def test_ridge_is_the_closed_form() -> None:
    rows = overlapping()
    made = fit("ridge", rows, 3, val=overlapping(seed=1))
    x = rows.features.astype(float)
    one_hot = np.eye(3)[rows.labels]
    centred, target = x - x.mean(0), one_hot - one_hot.mean(0)
    gram = centred.T @ centred + made.strength * np.eye(5)
    weights = np.linalg.solve(gram, centred.T @ target)
    assert made.weights == pytest.approx(weights, abs=1e-5)
    assert made.bias == pytest.approx(one_hot.mean(0) - x.mean(0) @ weights, abs=1e-5)
    assert made.scores(x).sum(1) == pytest.approx(np.ones(60), abs=1e-5)


@pytest.mark.parametrize("classes", [2, 3])
def test_logistic_regression_is_scikit_learns(classes: int) -> None:
    rows, other = overlapping(classes=classes), overlapping(classes=classes, seed=1)
    made = fit("logistic", rows, classes, val=other)
    known = LogisticRegression(C=1 / made.strength, max_iter=500).fit(rows.features, rows.labels)
    expected = known.predict_proba(other.features)
    assert made(other.features) == pytest.approx(expected, abs=1e-4)


def test_adamw_is_adamw_by_hand() -> None:
    rows = overlapping(n=29)  # one batch an epoch: the order does not matter
    made = fit("adamw", rows, 3, seed=5)
    x = np.hstack([rows.features, np.ones((29, 1))]).astype(float)
    weights, first, second = np.zeros((6, 3)), np.zeros((6, 3)), np.zeros((6, 3))
    for step in range(1, 21):
        powers = np.exp(x @ weights)
        gradient = x.T @ (powers / powers.sum(1, keepdims=True) - np.eye(3)[rows.labels]) / 29
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        weights *= 1 - 1e-2 * 1e-2
        move = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        weights -= 1e-2 * move
    assert made.weights == pytest.approx(weights[:5], abs=1e-4)
    assert made.bias == pytest.approx(weights[5], abs=1e-4)
    assert made.strength is None


def test_adamw_depends_on_nothing_but_data_and_seed() -> None:
    rows = overlapping(n=120)
    a, b, c = (fit("adamw", rows, 3, seed=seed) for seed in (1, 1, 2))
    assert (a.weights == b.weights).all()
    assert not (a.weights == c.weights).all()


@pytest.mark.parametrize("method", linear.METHODS)
def test_probabilities_sum_to_one_and_tell_the_classes(method: str) -> None:
    chances = fit(method, overlapping(n=300), 3)(overlapping(n=300, seed=1).features)
    assert chances.sum(1) == pytest.approx(np.ones(300))
    assert 0.55 < (chances.argmax(1) == overlapping(n=300, seed=1).labels).mean() < 0.9


def test_the_strength_is_the_one_of_least_loss_on_validation() -> None:
    rows, val = overlapping(n=45, wide=30), overlapping(n=300, wide=30, seed=1)
    made = fit("logistic", rows, 3, val=val)
    losses = {}
    for strength in linear.STRENGTHS:
        known = LogisticRegression(C=1 / strength, max_iter=500).fit(rows.features, rows.labels)
        own = known.predict_proba(val.features)[np.arange(300), val.labels]
        losses[strength] = -np.log(own).mean()
    assert made.strength == min(losses, key=losses.get)
    assert made.chosen == "on 300 validation images"
    noise = replace(val, labels=np.roll(val.labels, 1))
    assert fit("logistic", rows, 3, val=noise).strength == linear.STRENGTHS[-1]


def test_cross_validation_keeps_groups_whole_and_every_class() -> None:
    rows = overlapping(n=60)
    pairs = linear._folds(rows, 3, seed=0)
    assert len(pairs) == 5
    for learn, out in pairs:
        assert not set(learn.groups) & set(out.groups)
        assert set(learn.labels) == {0, 1, 2}
    assert sum(len(out.labels) for _, out in pairs) == 60
    assert fit("ridge", rows, 3).chosen == "by 5-fold cross-validation"


def test_one_group_a_class_is_too_few_to_choose() -> None:
    rows = replace(overlapping(n=12), groups=["a", "b", "c"] * 4)
    assert linear._folds(rows, 3, seed=0) == []
    made = fit("ridge", rows, 3)
    assert (made.strength, made.chosen) == (1.0, "not at all, too few groups")


def test_a_class_that_is_not_there_cannot_be_overlapping() -> None:
    with pytest.raises(DataError, match=r"class \[3\]"):
        fit("ridge", overlapping(), 4)


def test_features_are_standardised_with_what_is_learnt_from(rng: np.random.Generator) -> None:
    train, test = rng.normal(3, 2, (50, 4)), rng.normal(9, 1, (20, 4))
    train[:, 3] = test[:, 3] = 7
    a, b = standardised(train.astype(np.float16), test.astype(np.float16))
    assert a.mean(0) == pytest.approx(np.zeros(4), abs=1e-3)
    assert a.std(0)[:3] == pytest.approx(np.ones(3), abs=1e-3)
    assert b[:, :3] == pytest.approx((test - train.mean(0))[:, :3] / train.std(0)[:3], abs=0.02)
    assert (b[:, 3] == 0).all()
