from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pathcli.errors import DataError, UsageError
from pathcli.metrics import statistics as ours
from pathcli.metrics.classification import accuracy, auroc, balanced_accuracy


def two_classes(
    positives: int, negatives: int, shift: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [positives, negatives])
    return labels, rng.normal(size=len(labels)) + shift * labels


def scipys_bca(samples: tuple[np.ndarray, ...], statistic: object, drawn: list[float]) -> tuple:
    """Return scipy's BCa bounds for replicates that are already drawn."""
    done = stats.bootstrap(
        samples,
        statistic,
        n_resamples=0,
        method="BCa",
        vectorized=False,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=np.array(drawn)),
    )
    return done.confidence_interval.low, done.confidence_interval.high


# --- bootstrap ---------------------------------------------------------------------------


def test_bca_bounds_are_scipys_for_the_same_replicates() -> None:
    values = np.random.default_rng(3).exponential(size=40)
    seen: list[float] = []

    def mean(rows: np.ndarray) -> float:
        seen.append(values[rows].mean())
        return seen[-1]

    found = ours.bootstrap(mean, range(40), replicates=999, limits=None)
    assert found.value == pytest.approx(values.mean())
    assert (found.n, found.method, found.dropped) == (40, "BCa", 0)
    known = scipys_bca((values,), np.mean, seen[:999])
    assert (found.low, found.high) == pytest.approx(known, abs=1e-12)


def test_stratified_bca_bounds_are_scipys_for_two_samples() -> None:
    labels, scores = two_classes(25, 40, 1.2, 5)
    seen: list[float] = []

    def of_two(positive: np.ndarray, negative: np.ndarray) -> float:
        return round((positive[:, None] > negative).mean(), 9)  # scipy wants ties to be exact

    def statistic(rows: np.ndarray) -> float:
        chosen = labels[rows] == 1
        seen.append(of_two(scores[rows[chosen]], scores[rows[~chosen]]))
        return seen[-1]

    found = ours.bootstrap(statistic, range(65), replicates=999, strata=labels.tolist())
    known = scipys_bca((scores[:25], scores[25:]), of_two, seen[:999])
    assert (found.low, found.high) == pytest.approx(known, abs=1e-12)


def test_bca_bounds_agree_with_scipys_own_resampling_to_a_twentieth_of_their_width() -> None:
    values = np.random.default_rng(4).exponential(size=40)
    found = ours.bootstrap(lambda r: values[r].mean(), range(40), replicates=9999, limits=None)
    known = stats.bootstrap((values,), np.mean, method="BCa", rng=1).confidence_interval
    width = known.high - known.low
    assert found.low == pytest.approx(known.low, abs=0.05 * width)
    assert found.high == pytest.approx(known.high, abs=0.05 * width)


def test_groups_are_drawn_whole() -> None:
    values = np.random.default_rng(0).normal(size=20)
    alone = ours.bootstrap(lambda r: values[r].mean(), range(20), limits=None)
    thrice = np.repeat(values, 3)
    names = [f"patient {i // 3}" for i in range(60)]
    together = ours.bootstrap(lambda r: thrice[r].mean(), names, limits=None)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert together.n == 20
    # rows of one patient taken for independent make the interval too narrow, by sqrt(3)
    wrong = ours.bootstrap(lambda r: thrice[r].mean(), range(60), limits=None)
    ratio = (together.high - together.low) / (wrong.high - wrong.low)
    assert ratio == pytest.approx(math.sqrt(3), rel=0.1)


def test_every_resample_has_both_classes_when_stratified() -> None:
    # patient c has a slide of either class and counts as positive
    groups, labels = list("aabccd"), np.array([0, 0, 0, 0, 1, 1])
    drawn: list[np.ndarray] = []

    def positives(rows: np.ndarray) -> float:
        drawn.append(rows)
        return float(labels[rows].mean())

    ours.bootstrap(positives, groups, replicates=200, strata=labels.tolist())
    assert all(0 < labels[rows].sum() < len(rows) for rows in drawn[:200])
    for one in (3, 5):  # neither is alone in its stratum
        assert {one in rows for rows in drawn[:200]} == {True, False}


def test_one_seed_gives_one_interval_and_another_seed_another() -> None:
    values = np.random.default_rng(0).normal(size=30)
    first, again, other = (
        ours.bootstrap(lambda r: values[r].mean(), range(30), seed=s, limits=None)
        for s in (1, 1, 2)
    )
    assert first == again != other


def test_a_perfect_auroc_does_not_get_an_interval_of_no_width() -> None:
    labels, scores = np.repeat([1, 0], [10, 30]), np.arange(40.0, 0, -1)
    found = ours.bootstrap(
        lambda r: auroc(labels[r], scores[r]), range(40), replicates=50, strata=labels.tolist()
    )
    exact = stats.binomtest(10, 10).proportion_ci(method="exact")
    assert (found.value, found.high, found.method) == (1, 1, "exact bound")
    assert found.low == pytest.approx(exact.low)
    interval = ours.delong_interval(labels, scores)
    assert (interval.low, interval.high) == pytest.approx((exact.low, 1))


def test_the_exact_bound_covers_an_auroc_that_looks_perfect() -> None:
    # of 8 + 8 cases with an AUROC of 0.9 many data sets are separated perfectly
    shift = math.sqrt(2) * stats.norm.ppf(0.9)
    perfect = 0
    for seed in range(400):
        labels, scores = two_classes(8, 8, shift, seed)
        if auroc(labels, scores) == 1:
            perfect += 1
            assert ours.delong_interval(labels, scores).low < 0.9
    assert perfect > 20


def test_other_constants_are_widened_within_their_limits_or_said_to_be_constant() -> None:
    labels, guess = np.repeat([1, 0], [8, 50]), np.zeros(58, np.int64)

    def statistic(rows: np.ndarray) -> float:
        return balanced_accuracy(labels[rows], guess[rows])

    found = ours.bootstrap(statistic, range(58), replicates=50, strata=labels.tolist())
    expected = (0.5 - ours.unseen(8), 0.5 + ours.unseen(8))
    assert (found.low, found.high) == pytest.approx(expected)
    bare = ours.bootstrap(lambda _: 7.0, range(9), replicates=50, limits=None)
    assert (bare.low, bare.high, bare.method) == (7, 7, "constant")


def test_undefined_resamples_are_counted_and_too_many_are_refused() -> None:
    labels, scores = two_classes(1, 32, 1, 0)

    def statistic(rows: np.ndarray) -> float:
        return auroc(labels[rows], scores[rows])

    some = ours.bootstrap(statistic, range(33), replicates=500)
    assert 150 < some.dropped < 215  # (32 / 33) ** 33 is 36 %
    assert some.low < some.value < some.high
    most = ours.bootstrap(lambda r: math.nan if len(set(r)) < 33 else 1.0, range(33), replicates=50)
    assert (most.value, most.dropped, most.method) == (1, 50, "undefined")
    assert np.isnan([most.low, most.high]).all()


@pytest.mark.parametrize(
    ("groups", "strata"), [("aaaa", None), ("aabb", [0, 0, 1, 1]), ("abcd", [0, 1, 2, 3])]
)
def test_where_nothing_can_vary_there_is_no_interval(groups: str, strata: list[int] | None) -> None:
    found = ours.bootstrap(lambda r: float(r.mean()), groups, replicates=9, strata=strata)
    assert found.value == 1.5
    assert math.isnan(found.low)


def test_a_bootstrap_that_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="2 replicates"):
        ours.bootstrap(len, "abc", replicates=1)
    with pytest.raises(UsageError, match="inside 0"):
        ours.bootstrap(len, "abc", level=95)
    with pytest.raises(DataError, match="once a row"):
        ours.bootstrap(len, "aab", strata=[0, 1])
    with pytest.raises(DataError, match="no rows"):
        ours.bootstrap(len, "")


@pytest.mark.slow
def test_intervals_of_a_skewed_mean_cover_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        values = rng.exponential(size=40)
        found = ours.bootstrap(
            lambda r, v=values: v[r].mean(), range(40), replicates=300, limits=None
        )
        hits += found.low <= 1 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


@pytest.mark.slow
def test_intervals_of_an_auroc_cover_as_often_as_they_say() -> None:
    truth = 0.85
    shift = math.sqrt(2) * stats.norm.ppf(truth)
    hits = np.zeros(2)
    for seed in range(200):
        labels, scores = two_classes(30, 30, shift, seed)
        found = ours.bootstrap(
            lambda r, y=labels, s=scores: auroc(y[r], s[r]),
            range(60),
            replicates=200,
            strata=labels.tolist(),
        )
        analytic = ours.delong_interval(labels, scores)
        hits += [found.low <= truth <= found.high, analytic.low <= truth <= analytic.high]
    assert ((hits >= 0.90 * 200) & (hits <= 0.99 * 200)).all()


# --- paired ------------------------------------------------------------------------------


def test_a_paired_mean_difference_agrees_with_the_t_test() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(0.25, 1, size=(2, 80)) - [[0], [0.25]]
    found, p = ours.paired_bootstrap(
        lambda r: a[r].mean(), lambda r: b[r].mean(), range(80), limits=None
    )
    t = stats.ttest_rel(a, b)
    assert found.value == pytest.approx(a.mean() - b.mean())
    assert p == pytest.approx(t.pvalue, abs=0.03)
    known = t.confidence_interval()
    assert (found.low, found.high) == pytest.approx((known.low, known.high), abs=0.05)


def test_a_paired_auroc_test_agrees_with_delong() -> None:
    labels, a = two_classes(40, 60, 1.5, 1)
    b = a + np.random.default_rng(9).normal(size=100)
    interval, p = ours.paired_bootstrap(
        lambda r: auroc(labels[r], a[r]),
        lambda r: auroc(labels[r], b[r]),
        range(100),
        strata=labels.tolist(),
    )
    assert interval.value == pytest.approx(auroc(labels, a) - auroc(labels, b))
    assert p == pytest.approx(ours.delong_test(labels, a, b), abs=0.03)
    assert (p < 0.05) == (interval.low > 0)


def test_the_same_predictions_differ_by_nothing() -> None:
    labels, a = two_classes(20, 20, 1, 1)

    def statistic(rows: np.ndarray) -> float:
        return auroc(labels[rows], a[rows])

    found, p = ours.paired_bootstrap(statistic, statistic, range(40), replicates=99)
    assert (found.value, found.low, found.high, p) == (0, 0, 0, 1)


def test_two_perfect_heads_may_still_differ() -> None:
    labels = np.repeat([1, 0], [10, 10])

    def perfect(rows: np.ndarray) -> float:
        return accuracy(labels[rows], labels[rows])

    found, p = ours.paired_bootstrap(
        perfect, perfect, range(20), replicates=99, strata=labels.tolist()
    )
    assert p == 1
    assert (found.low, found.high) == pytest.approx((-2 * ours.unseen(10), 2 * ours.unseen(10)))


def test_p_is_never_smaller_than_the_replicates_or_the_groups_allow() -> None:
    far = np.random.default_rng(0).normal(100, 1, size=30)
    zero = np.zeros(30)

    def test(n: int, replicates: int) -> float:
        return ours.paired_bootstrap(
            lambda r: far[r].mean(),
            lambda r: zero[r].mean(),
            range(n),
            replicates=replicates,
            limits=None,
        )[1]

    assert test(30, 99) == 1 / 100
    assert test(4, 999) == 1 / 8


# --- DeLong ------------------------------------------------------------------------------


def test_delongs_variance_is_the_one_worked_by_hand() -> None:
    labels, scores = np.array([1, 1, 1, 0, 0]), np.array([3.0, 5, 6, 1, 4])
    # placements of positives 1/2, 1, 1 and of negatives 1, 2/3: variances 1/12 and 1/18
    aucs, covariance = ours.delong(labels, scores[None])
    assert aucs[0] == pytest.approx(5 / 6)
    assert covariance[0, 0] == pytest.approx(1 / 12 / 3 + 1 / 18 / 2)


def test_delong_is_the_sum_over_all_pairs() -> None:
    rng = np.random.default_rng(7)
    labels = rng.permutation(np.repeat([0, 1], [23, 31]))
    scores = (rng.normal(size=(3, 54)) + labels).round(1)  # rounded: there are ties
    aucs, covariance = ours.delong(labels, scores)
    positive, negative = scores[:, labels == 1], scores[:, labels == 0]
    above = positive[:, :, None] > negative[:, None, :]
    kernel = above + 0.5 * (positive[:, :, None] == negative[:, None, :])
    assert aucs == pytest.approx(kernel.mean((1, 2)))
    expected = np.empty((3, 3))
    for r in range(3):
        for s in range(3):
            by_positive = np.cov(kernel[r].mean(1), kernel[s].mean(1))[0, 1] / 31
            by_negative = np.cov(kernel[r].mean(0), kernel[s].mean(0))[0, 1] / 23
            expected[r, s] = by_positive + by_negative
    assert covariance == pytest.approx(expected)
    contrast = np.array([1, -1, 0])
    z = contrast @ aucs / math.sqrt(contrast @ expected @ contrast)
    assert ours.delong_test(labels, scores[0], scores[1]) == pytest.approx(
        2 * stats.norm.sf(abs(z))
    )


def test_delongs_interval_is_symmetric_in_the_logit() -> None:
    labels, scores = two_classes(30, 40, 1, 0)
    found = ours.delong_interval(labels, scores)
    variance = ours.delong(labels, scores[None])[1][0, 0]
    logits = np.array([math.log(x / (1 - x)) for x in (found.low, found.value, found.high)])
    half = 1.959964 * math.sqrt(variance) / (found.value * (1 - found.value))
    assert np.diff(logits) == pytest.approx([half, half], rel=1e-6)
    assert (found.n, found.method) == (70, "DeLong, logit")


def test_delong_where_nothing_varies() -> None:
    labels, a = two_classes(20, 20, 1, 0)
    assert ours.delong_test(labels, a, a) == 1
    assert ours.delong_test(labels, a, np.exp(a)) == 1
    assert ours.delong_test(labels, labels + 0.0, labels * 5.0) == 1
    # ever right against ever wrong: swapping all or none of 4 cases has a chance of 1 in 8
    few = np.array([0, 0, 1, 1])
    assert ours.delong_test(few, few + 0.0, -few + 0.0) == 1 / 8
    tied, reach = ours.delong_interval(labels, np.zeros(40)), ours.unseen(20)
    assert (tied.low, tied.high) == pytest.approx((0.5 - reach, 0.5 + reach))


def test_delong_of_absent_or_single_cases_is_nan() -> None:
    scores = np.array([[0.1, 0.2, 0.3]])
    assert all(np.isnan(x).all() for x in ours.delong(np.ones(3, np.int64), scores))
    one = np.array([0, 0, 1])
    assert ours.delong(one, scores)[0].tolist() == [1]
    assert np.isnan(ours.delong(one, scores)[1]).all()
    assert math.isnan(ours.delong_interval(one, scores[0]).low)
    assert math.isnan(ours.delong_test(one, scores[0], scores[0]))


# --- small ones --------------------------------------------------------------------------


def test_holm_is_the_correction_worked_by_hand() -> None:
    assert ours.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    with_nan = ours.holm([0.02, math.nan, 0.9, 0.6])
    assert with_nan == pytest.approx((0.06, math.nan, 1, 1), nan_ok=True)
    assert ours.holm([]) == ()
    with pytest.raises(DataError, match="0\\.\\.1"):
        ours.holm([1.2])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_lies_between_no_correction_and_bonferronis(p: list[float]) -> None:
    adjusted = ours.holm(p)
    assert min(adjusted) == pytest.approx(min(1, len(p) * min(p)))
    for raw, corrected in zip(p, adjusted, strict=True):
        assert raw <= corrected <= min(1, len(p) * raw) + 1e-12


def test_mean_and_sample_deviation() -> None:
    assert ours.mean_sd([2, 4, 4, 4, 5, 5, 7, 9]) == pytest.approx((5, math.sqrt(32 / 7)))
    assert ours.mean_sd([3]) == pytest.approx((3, math.nan), nan_ok=True)
    assert np.isnan(ours.mean_sd([])).all()


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (81, 263)])
def test_wilson_is_scipys(successes: int, n: int) -> None:
    found = ours.wilson(successes, n)
    known = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((known.low, known.high))
    assert found.value == successes / n
    assert math.isnan(ours.wilson(0, 0).low)
    with pytest.raises(DataError, match="got 264"):
        ours.wilson(264, 263)


@pytest.mark.parametrize("trials", [1, 10, 130])
def test_unseen_is_clopper_and_pearsons_bound(trials: int) -> None:
    known = stats.binomtest(0, trials).proportion_ci(method="exact").high
    assert ours.unseen(trials) == pytest.approx(known)
    assert ours.unseen(0) == 1
