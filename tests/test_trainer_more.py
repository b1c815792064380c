"""What a step of the trainer is made of: batches, pieces, averaged weights, curves elsewhere."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file
from test_trainer import examples, quiet, regression, settings, trained

from pathcli.batches import Batches
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.settings import order
from pathcli.state import trainable_state
from pathcli.trainer import SAVING_SECONDS, Loop, Work


class Pair(torch.nn.Module):
    """Two encoders with dropout, and a loss of all rows at once with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (
            torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Dropout(0.5)) for _ in range(2)
        )
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def embed(self, batch: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, ...]:
        x = torch.stack([x for x, _ in batch])
        return self.one(x), self.two(x), torch.tensor([label for _, label in batch])

    def loss_of(self, one: torch.Tensor, two: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        positive = (labels[:, None] == labels).float()
        logits = torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(two).T
        said = (logits * self.scale.exp()).log_softmax(1)
        return -(positive / positive.sum(1, keepdim=True) * said).sum(1).mean()

    def loss(self, batch: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
        pieces = [self.embed(batch[at : at + 3]) for at in range(0, len(batch), 3)]
        return self.loss_of(*map(torch.cat, zip(*pieces, strict=True)))


def pairs() -> list[tuple[torch.Tensor, int]]:
    return [(x, k % 4) for k, x in enumerate(torch.randn(15, 4, generator=torch.Generator()))]


def test_a_batch_embedded_in_pieces_has_the_gradient_of_the_whole() -> None:
    found = []
    for chunk in (3, None):  # without, the module itself draws dropout in pieces of three
        set_seed(3)
        module = Pair()
        made = settings(batch=8, chunk=chunk, accumulate=2, epochs=1)
        loop = Loop(Work(module, pairs()), made, Path("run"), "cpu")
        zero, seen = loop.optimizer.zero_grad, list[list[torch.Tensor]]()
        loop.optimizer.zero_grad = lambda module=module, seen=seen, zero=zero: (
            seen.append([p.grad.clone() for p in module.parameters()]),
            zero(),
        )
        loop.run(quiet)
        found.append((seen, [line["loss"] for line in loop.lines], torch.rand(1)))
    (ours, our_loss, ours_next), (theirs, their_loss, theirs_next) = found
    assert len(ours) == len(theirs) == 1
    for mine, reference in zip(ours[0], theirs[0], strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(mine, reference, rtol=0, atol=1e-6)
    assert our_loss == pytest.approx(their_loss, abs=1e-6)
    assert torch.equal(ours_next, theirs_next)  # as many random numbers were drawn


def test_the_mean_of_the_weights_is_validated_and_saved_and_the_weights_go_on() -> None:
    module, seen = regression(), []

    def validate() -> dict[str, float]:
        seen.append(trainable_state(module))
        return {}

    steps = [trainable_state(module)]
    loop = Loop(Work(module, examples(), validate), settings(batch=5, ema=0.6), Path("run"), "cpu")
    loop.run(lambda *_: steps.append(trainable_state(module)))
    plain = trained(regression(), settings(batch=5))
    mean, means = steps[0], []
    for step in steps[1:]:
        mean = {name: 0.6 * mean[name] + 0.4 * value for name, value in step.items()}
        means.append(mean)
    loop.save_weights()
    saved = load_file("run/weights.safetensors")
    for name in mean:
        assert torch.equal(steps[-1][name], plain[-1][name])
        for epoch in range(3):
            torch.testing.assert_close(seen[epoch][name], means[2 * epoch + 1][name])
        assert torch.equal(saved[name], seen[-1][name])
    assert not torch.equal(saved["last.weight"], plain[-1]["last.weight"])


def test_a_batch_is_made_with_numbers_that_follow_from_its_place_alone() -> None:
    drawn = []

    def collate(rows: list[int], rng: np.random.Generator) -> list[int]:
        drawn.append((rows, rng.random()))
        return rows

    made = settings(batch=4, epochs=2, seed=5)
    feed = Batches(range(10), collate, made)
    list(feed.stream(0, 0))
    expected = [
        (order(5, epoch, 10)[at : at + 4], np.random.default_rng([5, epoch, 1 + at // 4]).random())
        for epoch in range(2)
        for at in (0, 4, 8)
    ]
    assert drawn == expected
    drawn.clear()
    list(feed.stream(0, 2))
    assert drawn == expected[2:]


def test_an_error_in_a_worker_is_the_error_it_was() -> None:
    def collate(rows: list[Any], rng: np.random.Generator) -> list[Any]:
        msg = "x.png: not an image"
        raise DataError(msg)

    loop = Loop(Work(regression(), examples(), collate=collate), settings(workers=1), Path("run"))
    with pytest.raises(DataError, match=r"^x.png: not an image$"):
        loop.run(quiet)


def test_tensorboard_is_an_extra_and_gets_every_line(monkeypatch: pytest.MonkeyPatch) -> None:
    made = settings(tensorboard=True, batch=5)
    monkeypatch.setattr("pathcli.board.find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="pip install tensorboard"):
        Loop(Work(regression(), examples()), made, Path("run"), "cpu")
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None: ...

        def close(self) -> None:
            written.append("closed")

    board = ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr("pathcli.board.find_spec", lambda name: name)
    work = Work(regression(), examples(), lambda: {"score": 0.5, "none": math.nan})
    loop = Loop(work, replace(made, epochs=1), Path("run"), "cpu")
    loop.run(quiet)
    loss = loop.lines[0]["loss"]
    assert written == [
        ("run", 1),
        ("lr", 0.05, 2),
        ("loss", loss, 2),
        ("val_score", 0.5, 2),
        "closed",
    ]


def test_a_state_that_takes_long_to_save_is_saved_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, saved = [0.0], []
    monkeypatch.setattr("pathcli.trainer.time", SimpleNamespace(monotonic=lambda: clock[0]))
    loop = Loop(Work(regression(), examples(60)), settings(batch=1, epochs=1), Path("run"), "cpu")

    def save() -> None:
        saved.append(loop.step)
        clock[0] += 30

    def step(done: int, total: int) -> None:
        clock[0] += 10

    monkeypatch.setattr(loop, "save_state", save)
    loop.run(step)
    assert saved == [7, 60]  # after a minute; again after ten of them; at the end of the epoch
    assert 60 * (30 / SAVING_SECONDS) == 600


def test_what_is_chosen_by_validation_needs_some() -> None:
    with pytest.raises(UsageError, match="'score' is measured in validation, and nothing is"):
        Loop(Work(regression(), examples()), settings(choose="score"), Path("run"), "cpu")


def test_tensorboard_itself_writes_a_file_of_events() -> None:
    pytest.importorskip("tensorboard")
    Loop(Work(regression(), examples()), settings(tensorboard=True), Path("run"), "cpu").run(quiet)
    assert list(Path("run").glob("events.out.tfevents.*"))
