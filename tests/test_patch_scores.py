"""What zero-shot and probes are measured by: scikit-learn, scipy, numbers worked by hand."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from pathcli.errors import DataError
from pathcli.evals.patch_scores import (
    DECIDED,
    Scored,
    auroc_of_rows,
    measure_draws,
    measure_patches,
    metrics_of,
)
from pathcli.metrics.classification import macro_auroc, weighted_f1
from pathcli.metrics.statistics import bootstrap, clopper_pearson
from pathcli.types import Sample


def made(n: int = 120, classes: int = 3, groups: int = 30, seed: int = 0) -> Scored:
    """Return a made-up evaluation; `groups` of 0 leaves samples without a group."""
    rng = np.random.default_rng(seed)
    labels = np.sort(np.arange(n) % classes)
    scores = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    chances = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    samples = [
        Sample(f"{i}.png", (f"{i}.png",), group=f"g{i * groups // n}" if groups else "")
        for i in range(n)
    ]
    names = tuple(f"class {k}" for k in range(classes))
    return Scored("made", names, samples, labels, chances.round(2))


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_the_numbers_are_scikit_learns(classes: int) -> None:
    scored = made(classes=classes)
    found = measure_patches(scored, replicates=20)
    labels, said = scored.labels, scored.predicted
    assert found["accuracy"].value == pytest.approx(metrics.accuracy_score(labels, said))
    balanced = metrics.balanced_accuracy_score(labels, said)
    assert found["balanced_accuracy"].value == pytest.approx(balanced)
    for average in ("weighted", "macro"):
        f1 = metrics.f1_score(labels, said, average=average)
        assert found[f"{average}_f1"].value == pytest.approx(f1)
    recalls = metrics.recall_score(labels, said, average=None)
    assert [found[f"recall.{c}"].value for c in scored.classes] == pytest.approx(recalls.tolist())
    assert found["auroc"].value == pytest.approx(macro_auroc(labels, scored.probabilities))
    assert found["accuracy"].n == 30
    assert found["accuracy"].low < found["accuracy"].value < found["accuracy"].high


def test_weighted_f1_is_scikit_learns_where_classes_are_missing(rng: np.random.Generator) -> None:
    for _ in range(20):
        labels, said = rng.integers(0, 4, 6), rng.integers(0, 4, 6)
        known = metrics.f1_score(labels, said, average="weighted", zero_division=0)
        assert weighted_f1(labels, said) == pytest.approx(known)
    assert math.isnan(weighted_f1(np.array([], int), np.array([], int)))


@pytest.mark.parametrize("classes", [2, 4])
def test_auroc_of_resampled_rows_is_auroc_of_the_resample(
    classes: int, rng: np.random.Generator
) -> None:
    labels = rng.integers(0, classes, 80)
    chances = rng.dirichlet(np.ones(classes), 80).round(1)  # many ties
    chances /= chances.sum(1, keepdims=True)
    of_rows = auroc_of_rows(labels, chances)
    for size in (80, 200):
        rows = rng.integers(0, 80, size)
        assert of_rows(rows) == pytest.approx(macro_auroc(labels[rows], chances[rows]), abs=1e-12)
    one = np.flatnonzero(labels == 0)
    assert math.isnan(of_rows(one))


def test_groups_that_move_together_widen_the_interval() -> None:
    scored = made(n=300)
    labels = np.tile([0, 1, 2], 100)
    right = np.repeat(np.arange(30) % 3 > 0, 10)  # ten images of a group are all right or wrong
    said = np.where(right, labels, (labels + 1) % 3)
    scored = replace(scored, labels=labels, probabilities=np.eye(3)[said])
    alone = [replace(sample, group="") for sample in scored.samples]
    grouped = measure_patches(scored, 400)["accuracy"]
    single = measure_patches(replace(scored, samples=alone), 400)["accuracy"]
    assert grouped.value == single.value == pytest.approx(2 / 3)
    assert (grouped.n, single.n) == (30, 300)
    assert grouped.high - grouped.low > 2.5 * (single.high - single.low)


def test_abstention_is_counted_exactly_and_measured_beside() -> None:
    scored = made()
    stays = scored.probabilities.max(1) < 0.5
    found = measure_patches(replace(scored, abstained=stays), 50)
    exact = stats.binomtest(int(stays.sum()), 120).proportion_ci(method="exact")
    assert (found["abstained"].low, found["abstained"].high) == pytest.approx(tuple(exact))
    assert found["abstained"].n == 120
    assert found["abstained_groups"].value == pytest.approx(stays.mean())
    assert found["abstained_groups"].n == 30
    plain = measure_patches(scored, 50)
    assert found["accuracy"] == plain["accuracy"]
    right = scored.labels == scored.predicted
    assert found["answered.accuracy"].value == pytest.approx(right[~stays].mean())
    assert found["answered.accuracy"].value > plain["accuracy"].value
    assert not [name for name in plain if "answered" in name or "abstained" in name]


def test_a_model_that_answers_nothing_has_no_answered_metrics() -> None:
    scored = made(groups=0)
    found = measure_patches(replace(scored, abstained=np.ones(120, bool)), 20)
    assert found["abstained"].value == 1
    assert found["abstained"].low == pytest.approx(0.025 ** (1 / 120))
    assert found["abstained"].high == 1
    assert "abstained_groups" not in found
    assert math.isnan(found["answered.auroc"].value)
    assert found["answered.auroc"].n == 0


def test_a_class_without_images_has_no_recall_and_no_auroc() -> None:
    scored = made()
    found = measure_patches(
        replace(scored, classes=(*scored.classes[:2], "none"), labels=np.minimum(scored.labels, 1)),
        20,
    )
    assert math.isnan(found["recall.none"].value)
    assert math.isnan(found["auroc"].value)
    assert 0 < found["balanced_accuracy"].value < 1


def test_draws_are_averaged_over_the_same_resamples() -> None:
    a, b = made(seed=1), made(seed=2)
    both = measure_draws(a.labels, [a.probabilities, b.probabilities], a.units, 50)
    ones = [measure_draws(s.labels, [s.probabilities], s.units, 50) for s in (a, b)]
    for name in (*DECIDED, "auroc"):
        assert both[name].value == pytest.approx((ones[0][name].value + ones[1][name].value) / 2)
    twice = measure_draws(a.labels, [a.probabilities, a.probabilities], a.units, 50)
    assert twice == ones[0]


def test_metrics_of_gives_a_function_a_draw() -> None:
    scored = made()
    of_rows = metrics_of(scored.labels, [scored.probabilities] * 2)["accuracy"]
    rows = np.flatnonzero(scored.labels == scored.predicted)
    assert [one(rows) for one in of_rows] == [1, 1]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"labels": np.zeros(3, int)}, "3 labels"),
        ({"abstained": np.zeros(2, bool)}, "2 abstained"),
        ({"features": np.zeros((4, 2))}, "4 features"),
        ({"classes": ("a", "b")}, "2 classes"),
        ({"probabilities": np.full((120, 3), np.nan)}, "softmax"),
        ({"labels": np.full(120, 3)}, "labels must lie"),
        ({"samples": (), "labels": np.zeros(0, int), "probabilities": np.ones((0, 3))}, "nothing"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: dict, word: str) -> None:
    with pytest.raises(DataError, match=word):
        replace(made(), **change)


# --- what was added to the statistics ----------------------------------------------------


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (77, 1524)])
def test_clopper_pearson_is_the_beta_quantile(hits: int, n: int) -> None:
    found = clopper_pearson(hits, n, 0.9)
    low = stats.beta.ppf(0.05, hits, n - hits + 1) if hits else 0
    high = stats.beta.ppf(0.95, hits + 1, n - hits) if hits < n else 1
    assert (found.low, found.value, found.high) == pytest.approx((low, hits / n, high))


def test_clopper_pearson_knows_its_limits() -> None:
    assert math.isnan(clopper_pearson(0, 0).low)
    with pytest.raises(DataError, match=r"0\.\.3"):
        clopper_pearson(4, 3)


def test_many_units_take_seconds_and_leave_the_bounds_where_scipy_has_them() -> None:
    values = np.random.default_rng(3).exponential(size=5000)  # skewed: acceleration matters
    start = time.perf_counter()
    found = bootstrap(lambda rows: values[rows].mean(), range(5000), replicates=2000, limits=None)
    assert time.perf_counter() - start < 20
    known = stats.bootstrap((values,), np.mean, n_resamples=2000, rng=1, batch=100)
    width = found.high - found.low
    assert found.low == pytest.approx(known.confidence_interval.low, abs=width / 10)
    assert found.high == pytest.approx(known.confidence_interval.high, abs=width / 10)
