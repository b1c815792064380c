"""The one training loop against loops written by hand, and a stopped run against a whole one."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file

from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.settings import TrainSettings, order
from pathcli.state import load_trainable, trainable_state
from pathcli.trainer import Loop, Work

Weights = dict[str, torch.Tensor]


class Regression(torch.nn.Module):
    """Least squares on batches of (x [3], y); dropout so that random numbers matter."""

    def __init__(self, dropout: float = 0.0, width: int = 4) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, width), torch.nn.Linear(width, 1)
        self.dropout = torch.nn.Dropout(dropout)
        self.kind: torch.dtype | None = None

    def loss(self, batch: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        x, y = (torch.stack(part) for part in zip(*batch, strict=True))
        said = self.last(self.dropout(torch.tanh(self.first(x))))[:, 0]
        self.kind = said.dtype
        return (said.float() - y).square().mean()


def examples(n: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(5)
    x = torch.randn(n, 3, generator=rng)
    return list(zip(x, x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3, strict=True))


def regression(dropout: float = 0.0) -> Regression:
    set_seed(3)
    return Regression(dropout)


def quiet(done: int, total: int) -> None:
    del done, total


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "lr": 0.05, "schedule": "constant"} | given)


def trained(module: torch.nn.Module, made: TrainSettings, n: int = 10) -> list[Weights]:
    """Return the weights after every step, in a folder that is not used twice."""
    steps: list[Weights] = []
    loop = Loop(Work(module, examples(n)), made, Path(f"run-{random.random()}"), "cpu")  # noqa: S311
    assert loop.run(lambda *_: steps.append(trainable_state(module)))
    assert len(steps) == loop.steps
    return steps


def by_hand(module: Regression, made: TrainSettings, rates: list[float]) -> Iterator[Weights]:
    """Yield the weights after every step of a loop in plain torch: batches of 4, clipped."""
    decays = [p for name, p in module.named_parameters() if name.endswith("weight")]
    rest = [p for name, p in module.named_parameters() if name.endswith("bias")]
    groups = [{"params": decays, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), foreach=False)
    data, step = examples(), 0
    for epoch in range(made.epochs):
        rows = order(7, epoch, len(data))
        for batch in (rows[:4], rows[4:8], rows[8:]):
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
            optimizer.zero_grad()
            module.loss([data[i] for i in batch]).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            step += 1
            yield trainable_state(module)


# --- the loop ----------------------------------------------------------------------------


def test_the_loop_is_adamw_written_by_hand_at_every_step() -> None:
    made = settings(
        batch=4,
        clip=0.5,
        weight_decay=0.3,
        betas=(0.8, 0.95),
        seed=7,
        schedule="cosine",
        warmup=0.2,
    )
    rates = [0.025, 0.05] + [0.05 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)]
    ours = trained(regression(), made)
    theirs = list(by_hand(regression(), made, rates))
    assert len(ours) == len(theirs) == 9
    for mine, reference in zip(ours, theirs, strict=True):
        for name, value in reference.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)


def test_accumulated_batches_are_one_large_batch_the_last_of_an_epoch_too() -> None:
    large = trained(regression(), settings(batch=4))  # 4, 4 and 2 of 10 examples
    small = trained(regression(), settings(batch=1, accumulate=4))
    assert len(large) == len(small) == 9
    for mine, reference in zip(small, large, strict=True):
        for name, value in reference.items():
            torch.testing.assert_close(mine[name], value, rtol=0, atol=1e-6)


def test_a_gradient_is_clipped_to_its_norm() -> None:
    class Slope(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(2))

        def loss(self, batch: list[Any]) -> torch.Tensor:
            return self.w @ torch.tensor([30.0, 40.0])

    module = Slope()
    loop = Loop(Work(module, [0]), settings(epochs=1, clip=5.0), Path("run"), "cpu")
    zero, seen = loop.optimizer.zero_grad, []
    loop.optimizer.zero_grad = lambda: (seen.append(module.w.grad.clone()), zero())
    loop.run(quiet)
    torch.testing.assert_close(seen[0], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize(("decay_all", "bias"), [(False, 1.0), (True, 0.9)])
def test_biases_decay_only_when_told_to(decay_all: bool, bias: float) -> None:
    module = Regression()
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1.0)
    module.loss = lambda batch: sum(p.sum() for p in module.parameters()) * 0.0  # type: ignore[method-assign]
    made = settings(epochs=1, lr=0.1, weight_decay=1.0, decay_all=decay_all)
    after = trained(module, made, n=1)[0]  # one step of p * (1 - lr * decay)
    assert after["first.weight"].flatten().tolist() == pytest.approx([0.9] * 12)
    assert after["first.bias"].tolist() == pytest.approx([bias] * 4)


def test_frozen_parameters_are_neither_trained_nor_saved() -> None:
    module = regression()
    module.first.requires_grad_(requires_grad=False)
    module.norm = torch.nn.BatchNorm1d(2)  # trained, so its buffers are saved
    module.still = torch.nn.BatchNorm1d(2).requires_grad_(requires_grad=False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loop = Loop(Work(module, examples()), settings(), Path("run"), "cpu")
    loop.run(quiet)
    loop.save_weights()
    assert torch.equal(module.first.weight, before["first.weight"])
    assert not torch.equal(module.last.weight, before["last.weight"])
    saved = load_file("run/weights.safetensors")
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(saved) == {"last.weight", "last.bias", *(f"norm.{name}" for name in norm)}


def test_saved_weights_go_back_into_a_module_of_their_kind_only() -> None:
    module = regression()
    module.first.weight = torch.nn.Parameter(torch.ones(3, 4).t())  # not contiguous
    loop = Loop(Work(module, examples()), settings(), Path("run"), "cpu")
    loop.run(quiet)
    loop.save_weights()
    other, path = Regression(), Path("run/weights.safetensors")
    load_trainable(other, path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters()))  # noqa: B905
    with pytest.raises(DataError, match=r"of another module .*first.bias"):
        load_trainable(Regression(width=5), path)
    with pytest.raises(ResourceError, match="is the run finished"):
        load_trainable(other, Path("none.safetensors"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match="damaged weights"):
        load_trainable(other, path)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int) -> None:
    found = trained(regression(), settings(batch=3, workers=workers))[-1]
    expected = trained(regression(), settings(batch=3))[-1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_precisions_take_turns_in_one_process() -> None:
    made = {name: settings(precision=name, epochs=2) for name in ("float32", "bfloat16")}
    alone = {name: trained(regression(), chosen)[-1] for name, chosen in made.items()}
    modules = {name: regression() for name in made}
    loops = {
        name: Loop(Work(modules[name], examples()), chosen, Path(name), "cpu")
        for name, chosen in made.items()
    }
    for name, loop in loops.items():  # both were made before either runs
        loop.run(quiet)
        assert modules[name].kind == getattr(torch, name)
        found = trainable_state(modules[name])
        assert all(torch.equal(found[key], value) for key, value in alone[name].items())
        assert {value.dtype for value in found.values()} == {torch.float32}
    assert not torch.equal(alone["float32"]["last.weight"], alone["bfloat16"]["last.weight"])
    near = alone["float32"]["last.weight"] - alone["bfloat16"]["last.weight"]
    assert near.abs().max() < 0.05


def test_a_loss_that_is_not_a_number_stops_the_run_in_one_line() -> None:
    module = regression()
    module.loss = lambda batch: module.last.bias.sum() * math.nan  # type: ignore[method-assign]
    with pytest.raises(DataError, match="the loss is nan at step 10; try a lower") as e:
        Loop(Work(module, examples()), settings(), Path("run"), "cpu").run(quiet)
    assert "\n" not in str(e.value)


def test_progress_counts_every_step_once() -> None:
    seen: list[tuple[int, int]] = []
    loop = Loop(Work(regression(), examples()), settings(batch=4), Path("run"), "cpu")
    loop.run(lambda done, total: seen.append((done, total)))
    assert seen == [(k, 9) for k in range(1, 10)]


def test_nothing_to_train_on_and_two_seeds_are_refused() -> None:
    with pytest.raises(DataError, match="no example"):
        Loop(Work(Regression(), []), settings(), Path("run"), "cpu")
    with pytest.raises(UsageError, match="one seed and one lr"):
        Loop(Work(Regression(), examples()), settings(seed=[1, 2]), Path("run"), "cpu")


# --- the choice of an epoch --------------------------------------------------------------


def chosen(values: list[dict[str, float]], **given: Any) -> tuple[Loop, list[Weights]]:
    """Return a loop run over validations that say `values`, and the weights each one saw."""
    module, said, seen = regression(), iter(values), list[Weights]()

    def validate() -> dict[str, float]:
        assert not module.training
        assert not torch.is_grad_enabled()
        seen.append(trainable_state(module))
        return next(said)

    made = settings(epochs=len(values), **given)
    loop = Loop(Work(module, examples(4), validate), made, Path(f"run-{len(values)}"), "cpu")
    assert loop.run(quiet)
    loop.save_weights()
    return loop, seen


def scores(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"auroc": value, "loss": loss} for value, loss in pairs]


@pytest.mark.parametrize(
    ("values", "choose", "best"),
    [
        (scores((0.5, 1), (0.7, 2), (0.7, 1), (0.6, 0)), "auroc", 3),  # a tie: the lower loss
        (scores((0.7, 1), (0.7, 1), (0.6, 0)), "auroc", 1),  # a full tie: the first
        (scores((math.nan, 0), (0.1, 9), (math.nan, 0)), "auroc", 2),  # undefined is worst
        (scores((0.9, 0), (0.1, 1)), None, 2),  # nothing is chosen by: the last
    ],
)
def test_the_best_epoch_is_kept(
    values: list[dict[str, float]], choose: str | None, best: int
) -> None:
    loop, seen = chosen(values, choose=choose)
    assert loop.best_epoch == best
    assert loop.best == pytest.approx(values[best - 1], nan_ok=True)
    saved = load_file(loop.folder / "weights.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in seen[best - 1].items())
    assert torch.equal(loop.work.module.last.weight, saved["last.weight"])  # put back


def test_patience_stops_the_run_after_so_many_epochs_without_a_better_one() -> None:
    values = scores((0.5, 1), (0.6, 1), (0.4, 1), (0.6, 1), (0.9, 1), (0.9, 1))
    loop, seen = chosen(values, choose="auroc", patience=2)
    assert (loop.epochs_done, loop.best_epoch, len(seen)) == (4, 2, 4)
    loop, _ = chosen(values[:5], choose="auroc", patience=3)
    assert (loop.epochs_done, loop.best_epoch) == (5, 5)


def test_an_unknown_metric_has_a_did_you_mean() -> None:
    with pytest.raises(UsageError, match=r"train.choose: .* 'auc': did you mean 'auroc'"):
        chosen(scores((0.5, 1)), choose="auc")
    with pytest.raises(UsageError, match="nothing is validated here"):
        chosen([{}], choose="auroc")


def test_the_lines_tell_steps_rates_losses_and_validations() -> None:
    loop, _ = chosen(scores((0.5, 1), (0.6, 2)), schedule="linear")
    lines = [json.loads(line) for line in (loop.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 4, 8, 8]
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2]
    assert lines[0]["lr"] == pytest.approx(0.05 * 5 / 8)  # of the step just made
    assert lines[3] == {"step": 8, "epoch": 2, "val_auroc": 0.6, "val_loss": 2}


# --- stopping and going on ---------------------------------------------------------------

HOW = {
    "plain": {},
    "accumulating": {"accumulate": 3, "batch": 2, "clip": 0.5},
    "bfloat16": {"precision": "bfloat16", "batch": 4},
    "chosen, patient": {"choose": "score", "patience": 2, "epochs": 6},
    "averaged": {"ema": 0.8, "choose": "score", "schedule": "step", "warmup": 0.0},
    "workers": {"workers": 2, "batch": 3, "epochs": 2},
}


def work() -> Work:
    """Return a run in which torch's random numbers and the batch's own matter."""
    module = Regression(dropout=0.5)

    def collate(rows: list[Any], rng: np.random.Generator) -> list[Any]:
        return [(x + 0.1 * torch.tensor(rng.normal(size=3)).float(), y) for x, y in rows]

    def validate() -> dict[str, float]:
        value = float(module.loss(examples()))
        return {"score": round(-value, 1), "loss": value}

    return Work(module, examples(11), validate, collate)


def whole(folder: str, made: TrainSettings, stops: list[int]) -> tuple[bytes, bytes, int]:
    """Train with stops, each time in a new loop that knows nothing but the folder."""
    for number, stop in enumerate([*stops, None]):
        set_seed(1 if number == 0 else 100 + number)
        loop = Loop(work(), made, Path(folder), "cpu")
        assert loop.run(quiet, stop_after=stop) is (stop is None)
        assert stop is None or loop.step == stop
    loop.save_weights()
    files = [Path(folder) / name for name in ("weights.safetensors", "metrics.jsonl")]
    return files[0].read_bytes(), files[1].read_bytes(), loop.best_epoch


@pytest.mark.parametrize("how", HOW)
def test_a_stopped_run_ends_as_one_that_was_never_stopped(how: str) -> None:
    made = settings(**{"epochs": 4, "schedule": "cosine", "warmup": 0.1, "lr": 0.02} | HOW[how])
    steps = Loop(work(), made, Path("none"), "cpu").updates
    expected = whole("whole", made, [])
    assert expected == whole("again", made, [])  # the comparison means something
    assert expected != whole("other", replace(made, seed=2), [])
    once = {1, steps - 1, steps, steps + 1}  # within an epoch, and at its last step
    for stops in (*([stop] for stop in once), sorted({*once, 2 * steps})):
        assert whole(f"stopped-{stops}", made, stops) == expected, stops


def test_patience_counts_across_a_stop() -> None:
    said = iter([0.6, 0.5, 0.4, 0.9])
    work = Work(regression(), examples(4), lambda: {"score": next(said)})
    for stop in (9, None):  # in the third epoch of four steps
        loop = Loop(work, settings(epochs=4, choose="score", patience=2), Path("run"), "cpu")
        loop.run(quiet, stop_after=stop)
    assert (loop.epochs_done, loop.best_epoch) == (3, 1)


def test_the_generators_go_on_where_they_were() -> None:
    from pathcli.state import random_state, set_random_state

    def draw() -> list[float]:
        return [float(torch.rand(())), np.random.random(), random.gauss(0, 1), np.random.normal()]  # noqa: NPY002

    draw()
    state = random_state()
    expected = [draw(), draw()]
    set_random_state(state)
    assert [draw(), draw()] == expected


def other_module(path: Path) -> None:
    state = torch.load(path)
    state["module"]["last.weight"] = torch.zeros(1, 7)
    torch.save(state, path)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "damaged"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\x00" * 999), "damaged"),
        (lambda path: torch.save({"step": 3}, path), "damaged"),
        (lambda path: torch.save([1, 2], path), "damaged"),
        (other_module, "weights of another module .*last.weight"),
    ],
)
def test_a_damaged_state_is_told_in_one_line(harm: Callable[[Path], Any], said: str) -> None:
    Loop(work(), settings(), Path("run"), "cpu").run(quiet, stop_after=3)
    path = Path("run/state/state.pt")
    harm(path)
    with pytest.raises(DataError, match=said) as caught:
        Loop(work(), settings(), Path("run"), "cpu").run(quiet)
    assert isinstance(caught.value, PathcliError)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
