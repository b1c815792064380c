from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk

from pathcli.errors import DataError, UsageError
from pathcli.metrics import calibration as cal
from pathcli.metrics import classification as cl
from pathcli.metrics.froc import RATES, Detections, auc_in_lesion, froc

NO_CASES = np.empty(0, np.int64)


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def cases(classes: int, n: int = 130, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    logits = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
    return labels, softmax(logits.round(1))  # rounded: there are ties


scores_and_labels = st.lists(
    st.tuples(st.integers(0, 1), st.integers(-50, 50)), min_size=1, max_size=40
).map(lambda rows: tuple(np.array(column) for column in zip(*rows, strict=True)))


# --- ranking -----------------------------------------------------------------------------


def test_auroc_counts_pairs_in_order_and_ties_half() -> None:
    labels, scores = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.4, 0.1])
    assert cl.auroc(labels, scores) == 3.5 / 4


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_macro_auroc_is_scikit_learns(classes: int) -> None:
    labels, p = cases(classes)
    known = sk.roc_auc_score(labels, p[:, 1] if classes == 2 else p, multi_class="ovr")
    assert cl.macro_auroc(labels, p) == pytest.approx(known, abs=1e-12)


@given(scores_and_labels)
def test_auroc_sees_order_alone_and_is_the_area_under_its_curve(
    drawn: tuple[np.ndarray, np.ndarray],
) -> None:
    labels, scores = drawn
    value = cl.auroc(labels, scores.astype(float))
    if labels.min() == labels.max():
        assert math.isnan(value)
        return
    assert cl.auroc(labels, np.exp(scores / 10.0)) == value
    assert cl.auroc(labels, -scores) == pytest.approx(1 - value)
    assert cl.auroc(1 - labels, scores) == pytest.approx(1 - value)
    fpr, tpr, _ = cl.roc_curve(labels, scores.astype(float))
    assert np.trapezoid(tpr, fpr) == pytest.approx(value)


def test_curves_are_scikit_learns() -> None:
    labels, p = cases(2)
    fpr, tpr, thresholds = cl.roc_curve(labels, p[:, 1])
    known = sk.roc_curve(labels, p[:, 1], drop_intermediate=False)
    assert np.allclose(fpr, known[0])
    assert np.allclose(tpr, known[1])
    # "greater than" here, "at least" there: the same points lie one threshold apart
    assert np.array_equal(thresholds[:-1], known[2][1:])
    assert thresholds[-1] == -np.inf
    precision, recall, _ = cl.pr_curve(labels, p[:, 1])
    known = sk.precision_recall_curve(labels, p[:, 1])
    assert np.allclose(precision, known[0][::-1])
    assert np.allclose(recall, known[1][::-1])
    average = sk.average_precision_score(labels, p[:, 1])
    assert cl.average_precision(labels, p[:, 1]) == pytest.approx(average, abs=1e-12)


def test_every_point_of_the_curve_is_what_its_threshold_gives() -> None:
    labels, p = cases(2, n=40)
    for fpr, tpr, threshold in zip(*cl.roc_curve(labels, p[:, 1]), strict=True):
        at = cl.sensitivity_specificity(labels, p[:, 1], threshold)
        assert at == pytest.approx((tpr, 1 - fpr))


def test_what_an_absent_class_leaves_undefined_is_nan() -> None:
    ones, scores = np.ones(3, np.int64), np.array([0.1, 0.2, 0.3])
    zeros = 0 * ones
    assert math.isnan(cl.auroc(ones, scores))
    assert math.isnan(cl.average_precision(zeros, scores))
    assert np.isnan(cl.roc_curve(ones, scores)[0]).all()
    assert np.isnan(cl.pr_curve(zeros, scores)[1]).all()
    assert math.isnan(cl.threshold_at_specificity(ones, scores, 0.9))
    sensitivity, specificity = cl.sensitivity_specificity(ones, scores, 0.15)
    assert sensitivity == pytest.approx(2 / 3)
    assert math.isnan(specificity)
    labels, p = cases(3)
    assert math.isnan(cl.macro_auroc(np.minimum(labels, 1), p))
    for metric in cl.CLASSIFICATION.values():
        assert math.isnan(metric(NO_CASES, np.empty((0, 2))))


# --- operating points --------------------------------------------------------------------


def test_the_threshold_is_the_smallest_that_is_specific_enough() -> None:
    labels = np.array([0] * 10 + [1] * 4)
    scores = np.array([*range(10), 4, 6, 8, 20]) / 20
    # 7 of 10 negatives are to stay at or below it: 0.7 * 10 is 7.000000000000001
    threshold = cl.threshold_at_specificity(labels, scores, 0.7)
    assert threshold == 6 / 20
    assert cl.sensitivity_specificity(labels, scores, threshold) == (0.5, 0.7)
    lower = np.nextafter(threshold, 0)
    assert cl.sensitivity_specificity(labels, scores, lower)[1] == 0.6
    assert cl.threshold_at_specificity(labels, scores, 1) == 9 / 20
    assert cl.threshold_at_specificity(labels, scores, 0) == -math.inf
    with pytest.raises(UsageError, match="between 0 and 1"):
        cl.threshold_at_specificity(labels, scores, 90)


@given(scores_and_labels, st.floats(0, 1))
def test_the_specificity_asked_for_is_reached_despite_ties(
    drawn: tuple[np.ndarray, np.ndarray], wanted: float
) -> None:
    labels, scores = drawn
    if (labels == 0).any():
        threshold = cl.threshold_at_specificity(labels, scores, wanted)
        assert cl.sensitivity_specificity(labels, scores, threshold)[1] >= wanted


# --- decisions ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_decisions_are_scikit_learns(classes: int) -> None:
    labels, p = cases(classes)
    guess = p.argmax(1)
    assert np.array_equal(
        cl.confusion(labels, guess, classes),
        sk.confusion_matrix(labels, guess, labels=range(classes)),
    )
    known = {
        "accuracy": sk.accuracy_score(labels, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, guess),
        "macro_f1": sk.f1_score(labels, guess, average="macro", zero_division=0),
        "auroc": cl.macro_auroc(labels, p),
    }
    found = {name: metric(labels, p) for name, metric in cl.CLASSIFICATION.items()}
    assert found == pytest.approx(known, abs=1e-12)


def test_a_class_never_predicted_has_an_f1_of_0_and_one_never_seen_none() -> None:
    labels, guess = np.array([0, 0, 2, 4]), np.array([0, 0, 0, 3])
    # F1 of class 0 is 4/5; 2, 3 and 4 have 0; 1 does not occur
    assert cl.macro_f1(labels, guess) == pytest.approx(0.8 / 4)
    assert cl.macro_f1(labels, guess) == pytest.approx(
        sk.f1_score(labels, guess, average="macro", zero_division=0)
    )
    assert cl.balanced_accuracy(labels, guess) == pytest.approx(1 / 3)  # classes 0, 2, 4


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4))))
def test_confusion_counts_every_case_once(pairs: list[tuple[int, int]]) -> None:
    labels, guess = np.array(pairs, np.int64).reshape(-1, 2).T
    table = cl.confusion(labels, guess, 5)
    assert table.sum() == len(pairs)
    assert table.sum(1).tolist() == [(labels == k).sum() for k in range(5)]
    assert table.T.tolist() == cl.confusion(guess, labels, 5).tolist()


@pytest.mark.parametrize(
    ("labels", "scores", "said"),
    [
        ([0, 1], [0.1], "equal length"),
        ([0, 2], [0.1, 0.2], "0 or 1"),
        ([0, 1], [0.1, np.nan], "1 of 2 scores are nan"),
    ],
)
def test_scores_that_cannot_be_right_are_refused(
    labels: list[int], scores: list[float], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        cl.auroc(np.array(labels), np.array(scores))


@pytest.mark.parametrize(
    ("labels", "p", "said"),
    [
        ([0, 1], [[0.5, 0.5]], "do not fit"),
        ([0, 1], [[0.5], [0.5]], "two at least"),
        ([0, 2], [[0.5, 0.5]] * 2, r"0\.\.1, the columns"),
        ([0, 1], [[3.5, -0.5]] * 2, "softmax"),
        ([0, 1], [[np.nan, 0.5]] * 2, "softmax"),
    ],
)
def test_probabilities_that_cannot_be_right_are_refused(
    labels: list[int], p: list[list[float]], said: str
) -> None:
    for metric in (*cl.CLASSIFICATION.values(), cal.brier, cal.ece):
        with pytest.raises(DataError, match=said):
            metric(np.array(labels), np.array(p))


def test_classes_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="equal length"):
        cl.confusion(np.array([0]), np.array([0, 1]), 2)
    with pytest.raises(DataError, match=r"0\.\.1, got 0\.\.2"):
        cl.confusion(np.array([0, 1]), np.array([0, 2]), 2)
    with pytest.raises(DataError, match="got -1"):
        cl.macro_f1(np.array([-1, 1]), np.array([0, 1]))


# --- calibration -------------------------------------------------------------------------


def test_brier_is_the_usual_one_for_two_classes_and_the_sum_for_more() -> None:
    labels, p = cases(2)
    assert cal.brier(labels, p) == pytest.approx(sk.brier_score_loss(labels, p[:, 1]))
    three = np.array([[0.7, 0.2, 0.1], [0.0, 1.0, 0.0]])
    assert cal.brier(np.array([0, 2]), three) == pytest.approx((0.14 + 2.0) / 2)


def test_ece_is_the_gap_worked_by_hand() -> None:
    first = np.array([0.95, 0.91, 0.7, 0.65, 0.4])
    p = np.stack([first, 1 - first], 1)
    labels = np.array([0, 1, 0, 0, 1])
    # (0.9, 1]: sure 0.93, right 1/2; (0.6, 0.7]: 0.675 and 1; (0.5, 0.6]: 0.6 and 1
    assert cal.ece(labels, p) == pytest.approx((2 * 0.43 + 2 * 0.325 + 0.4) / 5)
    rows = cal.reliability(labels, p, 10)
    assert [row.n for row in rows] == [0, 0, 0, 0, 0, 1, 2, 0, 0, 2]
    assert rows[9][:3] == (0.9, 1.0, 2)
    assert rows[6].accuracy == 1
    assert math.isnan(rows[0].confidence)
    assert cal.ece(labels, p, bins=1) == pytest.approx(abs(0.762 - 0.8))


def test_a_calibrated_model_has_a_small_ece_and_an_overconfident_one_has_not() -> None:
    rng = np.random.default_rng(0)
    p = softmax(rng.normal(size=(20_000, 3)))
    labels = (rng.uniform(size=(20_000, 1)) > p.cumsum(1)).sum(1)
    assert cal.ece(labels, p) < 0.015
    sharp = p**3 / (p**3).sum(1, keepdims=True)
    assert cal.ece(labels, sharp) > 0.1


def test_calibration_of_nothing_is_nan_and_of_no_bins_is_refused() -> None:
    assert math.isnan(cal.brier(NO_CASES, np.empty((0, 2))))
    assert math.isnan(cal.ece(NO_CASES, np.empty((0, 2))))
    with pytest.raises(UsageError, match="at least 1"):
        cal.ece(*cases(2), bins=0)


# --- lesions -----------------------------------------------------------------------------


def detections(
    pairs: list[tuple[float, int]], lesions: int, ignored: frozenset[int] = frozenset()
) -> Detections:
    scores = np.array([s for s, _ in pairs], float)
    return Detections(scores, np.array([h for _, h in pairs], np.int64), lesions, ignored)


SLIDES = [
    # lesion 0 is hit twice and counts by 0.9; lesion 2 is ignored, lesion 1 never found
    detections([(0.9, 0), (0.5, 0), (0.8, -1), (0.95, 2)], 3, frozenset({2})),
    detections([(0.6, 0), (0.3, 1)], 2),
    detections([(0.7, -1), (0.4, -1), (0.35, -1)], 0),
    detections([], 0),
]


def test_froc_is_the_curve_worked_by_hand() -> None:
    found = froc(SLIDES)
    assert (found.lesions, found.slides) == (4, 4)
    # falling scores: 0.9 hit, 0.8 false, 0.7 false, 0.6 hit, 0.4 false, 0.35 false, 0.3 hit
    assert found.fps.tolist() == [0, 0, 0.25, 0.5, 0.5, 0.75, 1, 1]
    assert found.sensitivity.tolist() == [0, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.75]
    assert found.at == (0.25, 0.5, 0.75, 0.75, 0.75, 0.75)
    assert found.score == pytest.approx((0.25 + 0.5 + 4 * 0.75) / len(RATES))


def test_froc_takes_no_sensitivity_that_costs_more_than_the_rate() -> None:
    one = [detections([(0.9, -1), (0.8, -1), (0.7, -1), (0.6, 0)], 1)]
    assert froc(one).at == (0, 0, 0, 0, 1, 1)  # three false positives on one slide


def test_froc_of_perfect_and_of_silent_detectors() -> None:
    assert froc([detections([(0.2, 0)], 1), detections([], 0)]).score == 1
    assert froc([detections([], 1), detections([(0.9, -1)], 0)]).score == 0
    assert math.isnan(froc([detections([(0.9, -1)], 0)]).score)
    assert math.isnan(froc([]).score)


@given(st.permutations(range(len(SLIDES))), st.floats(0.1, 5))
def test_froc_knows_neither_the_order_of_slides_nor_the_scale_of_scores(
    order: list[int], scale: float
) -> None:
    moved = [
        Detections(SLIDES[i].scores * scale, SLIDES[i].hits, SLIDES[i].lesions, SLIDES[i].ignored)
        for i in order
    ]
    assert froc(moved).at == froc(SLIDES).at


def test_detections_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(DataError, match="equal length"):
        Detections(np.array([0.5]), np.array([], np.int64), 1)
    with pytest.raises(DataError, match="nan"):
        detections([(np.nan, 0)], 1)
    with pytest.raises(DataError, match=r"0\.\.0, got 1\.\.1"):
        detections([(0.5, 1)], 1)
    with pytest.raises(DataError, match="got -2"):
        detections([(0.5, -2)], 1)


def test_attention_inside_lesions_is_compared_with_that_outside() -> None:
    attention = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
    assert auc_in_lesion(attention, np.array([True, False, True, False])) == 0.75
    assert math.isnan(auc_in_lesion(attention, np.zeros(4, bool)))
