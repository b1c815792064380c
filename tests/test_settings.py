"""What follows from a recipe's section `train` alone: rates, orders and refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pathcli.errors import UsageError
from pathcli.settings import TrainSettings, learning_rate, order


def test_a_cosine_rises_linearly_and_falls_to_the_floor() -> None:
    made = TrainSettings(warmup=0.15, min_lr=0.1)  # ceil(0.15 * 10) = 2 of 10 steps
    rates = [learning_rate(made, 1.0, step, 10) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * k / 8)) / 2 for k in range(9)]
    assert rates[2:] == pytest.approx(fall)
    assert rates[6] == pytest.approx(0.55)  # half way
    assert rates[10] == pytest.approx(0.1)


def test_a_cosine_without_warm_up_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7, eta_min=0.01)
    for step in range(7):
        ours = learning_rate(TrainSettings(min_lr=0.01), 0.3, step, 7)
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_line_falls_evenly_and_a_constant_stays() -> None:
    line = [learning_rate(TrainSettings(schedule="linear"), 2.0, k, 4) for k in range(5)]
    assert line == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])
    flat = TrainSettings(schedule="constant", min_lr=0.5, warmup=0.5)
    assert [learning_rate(flat, 2.0, k, 4) for k in range(4)] == [1.0, 2.0, 2.0, 2.0]
    assert learning_rate(TrainSettings(), 2.0, 0, 1) == 2.0  # a run of one step


def test_steps_fall_every_so_many_epochs_of_the_run_to_the_floor() -> None:
    made = TrainSettings(epochs=8, schedule="step", step_epochs=2, gamma=0.5, min_lr=0.3)
    rates = [learning_rate(made, 2.0, k, 24) for k in range(24)]  # three steps an epoch
    assert rates == [2.0] * 6 + [1.0] * 6 + [0.5] * 6 + [0.3] * 6


def test_a_warm_up_of_so_many_steps_rises_from_its_own_rate() -> None:
    made = TrainSettings(schedule="constant", warmup_steps=4, warmup_lr=1.0)
    assert [learning_rate(made, 3.0, k, 6) for k in range(6)] == [1.5, 2.0, 2.5, 3.0, 3.0, 3.0]
    share = TrainSettings(schedule="constant", warmup=0.5, warmup_lr=1.0)
    assert [learning_rate(share, 3.0, k, 8) for k in range(4)] == [1.5, 2.0, 2.5, 3.0]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 300))
def test_an_order_is_a_permutation_and_always_the_same(seed: int, epoch: int, n: int) -> None:
    found = order(seed, epoch, n)
    assert sorted(found) == list(range(n))
    assert found == order(seed, epoch, n)


def test_every_seed_and_epoch_has_an_order_of_its_own() -> None:
    orders = {tuple(order(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 0, "batch": 0}, "epochs must be at least 1, batch must be at least 1"),
        ({"patience": 0, "choose": "x"}, "patience must be at least 1"),
        ({"patience": 3}, "patience needs `choose`"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": []}, "lr must be positive"),
        ({"lr": [0.1, 0.2]}, "several lr need `choose`"),
        ({"seed": []}, "seed must name different seeds"),
        ({"seed": [1, 1]}, "seed must name different seeds"),
        ({"seed": -1}, "seed must name different seeds of at least 0"),
        ({"warmup": 1.0}, "warmup is a share"),
        ({"betas": (0.9, 1.0)}, "betas must be"),
        ({"clip": 0.0}, "clip must be positive, or null"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"workers": -1}, "workers must be at least 0"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"step_epochs": 0}, "step_epochs must be at least 1"),
        ({"gamma": 0.0}, "gamma must be above 0"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"ema": 1.0}, "ema is a decay"),
        ({"warmup_lr": -1.0}, "warmup_lr must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"warmup": 0.1, "warmup_steps": 3}, "warmup and warmup_steps say the same"),
        ({"shard": "full", "precision": "float16"}, "shard=full trains in float32"),
    ],
)
def test_what_no_run_could_do_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainSettings(**given)
    assert str(caught.value).startswith(said)
