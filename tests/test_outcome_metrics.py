"""Metrics of values and of survival against lifelines, sklearn, scipy and hand-worked numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pathcli.errors import DataError
from pathcli.metrics.regression import REGRESSION, ranks
from pathcli.metrics.survival import (
    breslow,
    brier,
    c_index,
    integrated_brier,
    kaplan_meier,
    logrank,
)

Cohort = tuple[np.ndarray, np.ndarray, np.ndarray]


def drawn(seed: int, n: int = 40, *, ties: bool = True) -> Cohort:
    """Return times, events and risks that go together, with ties in both."""
    rng = np.random.default_rng(seed)
    risks = rng.normal(size=n)
    times = rng.exponential(np.exp(-risks)) * 10
    if ties:
        times, risks = np.round(times), np.round(risks, 1)
    return times, rng.random(n) < 0.6, risks


# --- values ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_errors_and_correlations_are_those_of_sklearn_and_scipy(seed: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    truth = np.round(rng.normal(50, 10, 60))  # ties
    said = np.round(0.5 * truth + rng.normal(20, 8, 60))
    found = {name: metric(truth, said) for name, metric in REGRESSION.items()}
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(truth, said))
    assert found["rmse"] == pytest.approx(metrics.mean_squared_error(truth, said) ** 0.5)
    assert found["r2"] == pytest.approx(metrics.r2_score(truth, said))
    assert found["pearson"] == pytest.approx(stats.pearsonr(truth, said).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(truth, said).statistic)
    np.testing.assert_array_equal(ranks(truth), stats.rankdata(truth))


def test_what_no_value_can_define_is_nan_and_what_is_wrong_is_refused() -> None:
    flat, other = np.full(4, 2.0), np.arange(4.0)
    assert all(np.isnan(REGRESSION[name](flat, other)) for name in ("r2", "pearson", "spearman"))
    assert np.isnan(REGRESSION["pearson"](other, flat))
    assert REGRESSION["r2"](other, np.full(4, 1.5)) == 0
    assert all(np.isnan(metric(flat[:0], flat[:0])) for metric in REGRESSION.values())
    with pytest.raises(DataError, match="equal length"):
        REGRESSION["mae"](flat, other[:3])
    with pytest.raises(DataError, match="1 of 4 predictions are nan"):
        REGRESSION["mae"](flat, np.array([1, 2, np.nan, 4]))


# --- concordance -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ties", [True, False])
def test_c_is_that_of_lifelines_with_all_kinds_of_ties(seed: int, ties: bool) -> None:
    utils = pytest.importorskip("lifelines.utils")
    times, events, risks = drawn(seed, ties=ties)
    expected = utils.concordance_index(times, -risks, events)
    assert c_index(times, events, risks) == pytest.approx(expected, abs=1e-12)
    assert not ties or len(set(times)) < len(times)


def test_c_of_three_patients_by_hand() -> None:
    times, events = np.array([1.0, 2, 3]), np.array([True, False, True])
    # pairs: 1 before 2, and 1 before 3; 2 was only followed
    assert c_index(times, events, np.array([3.0, 1, 2])) == 1
    assert c_index(times, events, np.array([2.0, 2, 3])) == 0.25
    assert c_index(times, events, np.zeros(3)) == 0.5
    assert np.isnan(c_index(times, np.zeros(3, bool), times))


def test_c_in_blocks_is_c_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = drawn(1, 200)
    whole = c_index(*cohort)
    monkeypatch.setattr("pathcli.metrics.survival._BLOCK", 700)
    assert c_index(*cohort) == whole


def test_times_that_cannot_be_are_refused() -> None:
    good = np.array([True, False])
    with pytest.raises(DataError, match="1 of 2 times are negative"):
        c_index(np.array([1.0, -1]), good, np.zeros(2))
    with pytest.raises(DataError, match="must be rows of one length, bool"):
        kaplan_meier(np.array([1.0, 2]), np.array([1, 0]))
    with pytest.raises(DataError, match="risks"):
        c_index(np.array([1.0, 2]), good, np.array([1, np.nan]))


# --- curves ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_the_kaplan_meier_curve_and_its_band_are_those_of_lifelines(seed: int) -> None:
    lifelines = pytest.importorskip("lifelines")
    times, events, _ = drawn(seed)
    fit = lifelines.KaplanMeierFitter().fit(times, events)
    curve = kaplan_meier(times, events)
    np.testing.assert_allclose(curve.times, fit.survival_function_.index)
    np.testing.assert_allclose(curve.survival, fit.survival_function_.to_numpy()[:, 0])
    band, inside = fit.confidence_interval_.to_numpy(), curve.survival > 0
    np.testing.assert_allclose(curve.low[inside], band[inside, 0], atol=1e-9)
    np.testing.assert_allclose(curve.high[inside], band[inside, 1], atol=1e-9)
    np.testing.assert_array_equal(curve.at_risk, fit.event_table["at_risk"])
    when = np.array([0.0, 0.5, 3, 7.2, 1e4])
    np.testing.assert_allclose(curve.at(when), fit.predict(when))


@pytest.mark.parametrize("seed", range(4))
def test_logrank_is_that_of_lifelines(seed: int) -> None:
    statistics = pytest.importorskip("lifelines.statistics")
    times, events, risks = drawn(seed)
    high = risks > 0
    expected = statistics.logrank_test(times[high], times[~high], events[high], events[~high])
    assert logrank(times, events, high) == pytest.approx(expected.p_value, rel=1e-9)
    assert np.isnan(logrank(times, events, np.ones(len(times), bool)))


def test_the_baseline_is_that_of_lifelines_at_its_own_coefficients() -> None:
    lifelines = pytest.importorskip("lifelines")
    pandas = pytest.importorskip("pandas")
    times, events, risks = drawn(3)
    frame = pandas.DataFrame({"t": times, "e": events, "x": risks})
    fit = lifelines.CoxPHFitter().fit(frame, "t", "e")
    log_risks = fit.params_["x"] * (risks - risks.mean())
    when, hazard = breslow(times, events, log_risks)
    expected = fit.baseline_cumulative_hazard_.loc[when].to_numpy()[:, 0]
    np.testing.assert_allclose(hazard, expected, rtol=1e-6)


# --- Brier -------------------------------------------------------------------------------


def test_without_censoring_brier_is_the_squared_distance() -> None:
    times = np.array([1.0, 2, 3, 4])
    survival = np.random.default_rng(0).random((4, 3))
    when = np.array([0.5, 2, 3.5])
    expected = ((survival - (times[:, None] > when)) ** 2).mean(0)
    np.testing.assert_allclose(brier(times, np.ones(4, bool), survival, when), expected)


def test_brier_with_censoring_by_hand() -> None:
    times, events = np.array([1.0, 2, 3, 4]), np.array([True, False, True, False])
    # followed: 1 until 2, then 2/3 until 4; at 3 the first two are an event and a lost one
    survival = np.array([[0.5], [0.5], [0.2], [0.9]])
    expected = (0.5**2 / 1 + 0 + 0.2**2 / (2 / 3) + (0.9 - 1) ** 2 / (2 / 3)) / 4
    assert brier(times, events, survival, np.array([3.0]))[0] == pytest.approx(expected)


def test_the_weights_of_brier_are_right_on_average() -> None:
    rng = np.random.default_rng(0)
    lived, lost = rng.exponential(10, 20000), rng.exponential(12, 20000)
    times, events = np.minimum(lived, lost), lived <= lost
    when = np.array([4.0, 8, 12])
    survival = np.tile(np.array([0.9, 0.5, 0.1]), (20000, 1))
    expected = ((survival - (lived[:, None] > when)) ** 2).mean(0)
    np.testing.assert_allclose(brier(times, events, survival, when), expected, atol=0.01)


def test_the_integrated_brier_score_is_the_mean_over_time() -> None:
    times, events, _ = drawn(0)
    when = np.array([1.0, 2, 5])
    survival = np.full((len(times), 3), 0.5)
    scores = brier(times, events, survival, when)
    expected = ((scores[0] + scores[1]) / 2 * 1 + (scores[1] + scores[2]) / 2 * 3) / 4
    assert integrated_brier(times, events, survival, when) == pytest.approx(expected)
    assert np.isnan(integrated_brier(times, events, survival[:, :1], when[:1]))
    with pytest.raises(DataError, match=r"in 0\.\.1"):
        brier(times, events, survival + 1, when)


def test_curves_are_not_judged_where_nobody_is_followed() -> None:
    rng = np.random.default_rng(0)
    lived, lost = rng.exponential(20, 4000), rng.uniform(0, 6, 4000)
    times, events = np.minimum(lived, lost), lived <= lost
    when = np.linspace(0, 32, 51)
    survival = np.tile(np.exp(-when / 20), (4000, 1))
    scores = brier(times, events, survival, when)
    np.testing.assert_array_equal(np.isnan(scores), when >= times.max())
    inside = when < 6
    truth = ((survival - (lived[:, None] > when)) ** 2)[:, inside].mean()
    assert integrated_brier(times, events, survival, when) == pytest.approx(truth, abs=0.01)
    # all have died by then: the rest is known
    ended = brier(np.array([1.0, 2]), np.ones(2, bool), np.ones((2, 2)), np.array([1.0, 9]))
    np.testing.assert_allclose(ended, [0.5, 1])
    nothing = integrated_brier(times, events, survival[:, :2], np.zeros(2))
    assert np.isnan(nothing)
