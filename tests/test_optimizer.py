"""Which weights learn at which rate, and which of them decay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from pathcli.batches import Batches
from pathcli.errors import UsageError
from pathcli.optimizer import make_optimizer, parameter_groups, set_rate
from pathcli.settings import TrainSettings, by_length


def module() -> nn.ModuleDict:
    return nn.ModuleDict({"connector": nn.Linear(3, 2), "language": nn.Linear(2, 2)})


def test_a_scaled_part_learns_at_its_share_of_the_rate() -> None:
    settings = TrainSettings(scale={"connector": 0.5}, weight_decay=0.1)
    parts = module()
    optimizer = make_optimizer(parts, settings, 1.0, torch.device("cpu"))
    set_rate(optimizer, 1e-3)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)] for p in parts["connector"].parameters()} == {5e-4}
    assert {rates[id(p)] for p in parts["language"].parameters()} == {1e-3}
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(parts["connector"].bias)] == 0.0
    assert decays[id(parts["connector"].weight)] == 0.1


def test_a_scale_of_no_part_is_refused_with_the_parts_there_are() -> None:
    settings = TrainSettings(scale={"conector": 0.5})
    with pytest.raises(UsageError, match=r"did you mean 'connector'"):
        parameter_groups(module(), settings)


def test_a_scale_means_whole_names() -> None:
    parts = nn.ModuleDict({"language": nn.Linear(1, 1), "language2": nn.Linear(1, 1)})
    groups = parameter_groups(parts, TrainSettings(scale={"language": 2.0}, decay_all=True))
    assert {g["scale"]: len(g["params"]) for g in groups} == {1.0: 2, 2.0: 2}


def test_batches_by_length_hold_every_example_once_and_hardly_any_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 1003).tolist()
    shuffled = np.random.default_rng(1).permutation(1003).tolist()
    found = by_length(shuffled, lengths, 10, np.random.default_rng(2))
    assert sorted(found) == list(range(1003))
    assert found[1000:] == shuffled[1000:]  # the small batch stays last

    def padding(rows: list[int]) -> int:
        batches = [rows[i : i + 10] for i in range(0, 1000, 10)]
        return sum(10 * max(lengths[r] for r in b) - sum(lengths[r] for r in b) for b in batches)

    assert padding(found) < padding(shuffled) / 20


def test_epochs_by_length_differ_and_are_functions_of_the_seed_alone() -> None:
    def batches() -> Batches:
        settings = TrainSettings(batch=4, by_length=True, epochs=2)
        lengths = [i % 7 for i in range(24)]
        return Batches(list(range(24)), lambda rows, _: rows, settings, lengths=lengths)

    epochs = [[batches()[epoch, n][0] for n in range(6)] for epoch in (0, 1)]
    again = batches()
    assert epochs[0] != epochs[1]
    assert [again[0, n][0] for n in range(6)] == epochs[0]
    assert all(len({i % 7 for i in rows}) <= 3 for rows in epochs[0])
