"""Losses of outcomes against lifelines, closed forms and hand-worked numbers; every head."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from test_heads import HEADS, every_head
from torch.nn import functional as F  # noqa: N812 - its usual name

from pathcli.mil.outcome_losses import cox_log_likelihood, hazards_nll
from pathcli.mil.outcome_task import Learner
from pathcli.mil.outcomes import Cox, Hazards, Regression
from pathcli.mil.streams import streams_of
from pathcli.types import Bag

DIM = 16


def tied(seed: int, n: int = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    times = np.ceil(rng.exponential(np.exp(-x[:, 0])) * 4)
    return x, times, rng.random(n) < 0.7


def likelihood(risks: np.ndarray, times: np.ndarray, events: np.ndarray, efron: bool) -> float:
    given = (torch.from_numpy(risks), torch.from_numpy(times), torch.from_numpy(events))
    return cox_log_likelihood(*given, efron=efron).item()


@pytest.mark.parametrize("seed", range(4))
def test_the_partial_likelihood_is_that_of_lifelines_cox_model_with_ties(seed: int) -> None:
    lifelines = pytest.importorskip("lifelines")
    pandas = pytest.importorskip("pandas")
    x, times, events = tied(seed)
    frame = pandas.DataFrame({"a": x[:, 0], "b": x[:, 1], "t": times, "e": events})
    fit = lifelines.CoxPHFitter().fit(frame, "t", "e")  # Efron
    found = likelihood(x @ fit.params_.to_numpy(), times, events, efron=True)
    assert found == pytest.approx(fit.log_likelihood_, abs=1e-6)
    assert len(set(times[events])) < events.sum()


@pytest.mark.parametrize("seed", range(3))
def test_both_ways_with_ties_are_their_definitions(seed: int) -> None:
    x, times, events = tied(seed)
    risks, breslow, efron = x[:, 0], 0.0, 0.0
    for when in set(times[events]):
        dead = (times == when) & events
        whole, gone = np.exp(risks[times >= when]).sum(), np.exp(risks[dead]).sum()
        d = dead.sum()
        breslow += risks[dead].sum() - d * math.log(whole)
        efron += risks[dead].sum() - sum(math.log(whole - i / d * gone) for i in range(d))
    assert likelihood(risks, times, events, efron=False) == pytest.approx(breslow)
    assert likelihood(risks, times, events, efron=True) == pytest.approx(efron)
    assert breslow < efron


def test_without_ties_it_is_the_chance_of_the_order_seen() -> None:
    risks = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    events = torch.ones(3, dtype=torch.bool)
    chances = [
        cox_log_likelihood(risks[list(order)], torch.tensor([1.0, 2, 3]), events, efron=efron).exp()
        for order in itertools.permutations(range(3))
        for efron in (True, False)
    ]
    assert sum(chances).item() == pytest.approx(2)  # both ways, over all orders


def test_the_risk_is_free_of_shifts_and_order_and_survives_large_numbers() -> None:
    x, times, events = tied(0)
    risks = x[:, 0]
    order = np.random.default_rng(1).permutation(len(risks))
    for efron in (True, False):
        one = likelihood(risks, times, events, efron)
        assert likelihood(risks + 1000, times, events, efron) == pytest.approx(one, abs=1e-6)
        assert likelihood(risks[order], times[order], events[order], efron) == pytest.approx(one)
    leaf = torch.from_numpy(1e3 * risks).requires_grad_()
    cox_log_likelihood(leaf, *map(torch.from_numpy, (times, events)), efron=True).backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_a_batch_without_events_is_no_loss_and_no_gradient() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    targets = torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]])
    for ties in ("efron", "breslow"):
        loss = Cox(ties=ties).loss(logits, targets, {})  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_hazards_by_hand() -> None:
    hazards = torch.tensor([[0.1, 0.5, 0.2], [0.4, 0.3, 0.6], [0.2, 0.2, 0.2]])
    bins, events = torch.tensor([2, 1, 0]), torch.tensor([True, False, True])
    of_event = [-math.log(0.9 * 0.5 * 0.2), -math.log(0.2)]
    of_censored = -math.log(0.6 * 0.7)
    for alpha in (0.0, 0.4, 1.0):
        found = hazards_nll(torch.logit(hazards), bins, events, alpha=alpha)
        expected = (sum(of_event) + (1 - alpha) * of_censored) / 3
        assert found.item() == pytest.approx(expected, rel=1e-5)
    assert hazards_nll(torch.full((1, 3), 200.0), bins[:1], events[:1], alpha=0).isfinite()


def test_bins_hold_equal_numbers_of_events_and_an_edge_is_the_later_bins() -> None:
    times = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 50, 60])
    events = np.array([1.0] * 8 + [0, 0])
    outcome = Hazards(bins=4)
    fit = outcome.fit(np.stack([times, events], 1))
    np.testing.assert_allclose(fit["edges"], np.quantile(times[:8], [0.25, 0.5, 0.75]))
    assert np.bincount(np.searchsorted(fit["edges"], times[:8], "right")).tolist() == [2, 2, 2, 2]
    at_edge = torch.tensor([[fit["edges"][1], 1.0]], dtype=torch.float64)
    logits = torch.randn(1, 4, dtype=torch.float64)
    expected = hazards_nll(logits, torch.tensor([2]), torch.tensor([True]), alpha=0)
    assert outcome.loss(logits, at_edge, fit).item() == pytest.approx(expected.item())


def test_curves_of_hazards_fall_from_one_and_their_median_is_on_them() -> None:
    outcome, fit = Hazards(bins=3), {"edges": [2.0, 4.0], "last": 10.0}
    logits = torch.logit(torch.tensor([[0.2, 0.5, 0.5], [0.1, 0.1, 0.1]])).double().numpy()
    times, survival = outcome.knots(logits, fit)
    assert times.tolist() == [0, 2, 4, 10]
    np.testing.assert_allclose(survival, [[1, 0.8, 0.4, 0.2], [1, 0.9, 0.81, 0.729]], rtol=1e-6)
    np.testing.assert_allclose(outcome.curves(logits, fit, np.array([1.0, 3]))[0], [0.9, 0.6])
    median = outcome.median(logits, fit)
    assert median[0] == pytest.approx(3.5)
    assert median[1] is None
    assert np.argmax(outcome.risk(logits)) == 0


def test_curves_of_cox_are_those_of_lifelines() -> None:
    lifelines = pytest.importorskip("lifelines")
    pandas = pytest.importorskip("pandas")
    x, times, events = tied(2)
    frame = pandas.DataFrame({"a": x[:, 0], "b": x[:, 1], "t": times, "e": events})
    model = lifelines.CoxPHFitter().fit(frame, "t", "e")
    logits = (x @ model.params_.to_numpy())[:, None] + 3.0  # a constant means nothing
    targets = np.stack([times, events], 1)
    outcome = Cox()
    fit = outcome.fit(targets)
    fit |= outcome.conclude(targets, logits, fit)
    when = np.unique(times[events])  # between them lifelines draws lines
    expected = model.predict_survival_function(frame, times=when).to_numpy().T
    np.testing.assert_allclose(outcome.curves(logits, fit, when), expected, atol=1e-6)
    medians = model.predict_median(frame).to_numpy()
    for mine, theirs in zip(outcome.median(logits, fit), medians, strict=True):
        assert (mine is None and math.isinf(theirs)) or mine == theirs


# --- heads -------------------------------------------------------------------------------


def bag(i: int, features: torch.Tensor) -> Bag:
    n = len(features)
    blank = np.zeros(n, np.int32)
    return Bag(f"s{i}", f"s{i}", None, (f"s{i}",), features.numpy(), np.zeros((n, 2), "i4"), blank)


OUTCOMES = {
    "regression": (Regression(column="x"), lambda t: np.array([[t, 1.0]])[:, :1]),
    "cox": (Cox(), lambda t: np.array([[math.exp(-t), 1.0]])),
    "hazards": (Hazards(bins=3), lambda t: np.array([[math.exp(-t), 1.0]])),
}


@pytest.mark.parametrize("kind", OUTCOMES)
@every_head
def test_every_head_learns_every_outcome_and_the_loss_falls(name: str, kind: str) -> None:
    torch.manual_seed(0)
    outcome, target = OUTCOMES[kind]
    values = np.linspace(-1, 1, 8)
    targets = {f"s{i}": tuple(target(v)[0].tolist()) for i, v in enumerate(values)}
    features = [torch.randn(6, DIM) * 0.3 + float(v) for v in values]
    bags = [bag(i, x) for i, x in enumerate(features)]
    fit = outcome.fit(np.array(list(targets.values())))
    head = HEADS[name](outcome.logits)
    module = Learner(head, outcome, fit, targets)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(module.parameters(), 5e-3)
    losses = []
    for _ in range(12 if name == "transmil" else 25):
        optimizer.zero_grad()
        loss = module.loss(bags)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(map(math.isfinite, losses))
    head.eval()
    with torch.no_grad():
        logits = torch.stack([head(x).logits for x in features]).double().numpy()
    said = outcome.predicted(logits, fit)
    assert np.corrcoef(said, values)[0, 1] > 0.8
    assert losses[-1] < losses[0]


def test_acmils_loss_of_classes_is_the_sum_of_its_streams() -> None:
    for name in ("acmil", "acmil multi-head", "acmil one branch", "dsmil"):
        head = HEADS[name](3).eval()
        features, label = torch.randn(9, DIM), torch.tensor(1)
        found = streams_of(head, features)
        losses = [
            s * F.cross_entropy(x, label) for s, x in zip(found.shares, found.logits, strict=True)
        ]
        expected = torch.stack(losses).sum() + found.penalty
        torch.testing.assert_close(head.loss(features, label), expected)  # type: ignore[operator]


def test_the_loss_is_weighted_over_streams_and_in_standard_deviations() -> None:
    torch.manual_seed(0)
    outcome = Regression(column="x")
    fit = {"mean": 10.0, "sd": 2.0}
    head = HEADS["acmil"](1).eval()
    bags = [bag(i, torch.randn(7, DIM)) for i in range(2)]
    module = Learner(head, outcome, fit, {"s0": (12.0,), "s1": (9.0,)})  # type: ignore[arg-type]
    expected = torch.zeros(())
    for each, wanted in zip(bags, (1.0, -0.5), strict=True):
        found = streams_of(head, torch.from_numpy(each.features))
        squares = (found.logits[:, 0] - wanted) ** 2
        expected = expected + (squares @ torch.tensor(found.shares) + found.penalty) / 2
    torch.testing.assert_close(module.loss(bags), expected)
