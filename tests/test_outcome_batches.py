"""A batch of patients that are compared: shared out over processes, and tried by a check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import put, values
from outcomes import recipe, write
from two import in_two_processes

from pathcli.mil.outcome_task import Learner
from pathcli.mil.outcomes import Cox
from pathcli.runs import try_batch
from pathcli.store import Store
from pathcli.types import Bag, HeadOutput

TIMES = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]
EVENTS = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0]  # of the first two only one compares alone


class Mean(torch.nn.Module):
    """The smallest head: the mean of the tiles, and one logit."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(3, 1)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[0.5, -1.0, 0.25]]))
            self.last.bias.zero_()

    def forward(self, features: torch.Tensor) -> HeadOutput:
        return HeadOutput(self.last(features).mean(0), torch.ones(len(features)))


def bags() -> list[Bag]:
    places = np.zeros((5, 2), np.int32)
    return [
        Bag(f"s{i}", f"p{i}", None, (f"s{i}",), values(5, seed=i), places, places[:, 0])
        for i in range(len(TIMES))
    ]


def learner() -> Learner:
    targets = {f"s{i}": found for i, found in enumerate(zip(TIMES, EVENTS, strict=True))}
    return Learner(Mean(), Cox(), {}, targets)


def gradient(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def process(rank: int, place: str) -> None:
    """Take one step on this process's half of the batch, as the trainer does."""
    folder = Path(place)
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    made = learner()
    loss = made.loss(bags()[4 * rank : 4 * rank + 4])
    loss.backward()
    mean = gradient(made)  # of both processes, as DistributedDataParallel has it
    torch.distributed.all_reduce(mean)
    torch.save({"loss": loss.detach(), "gradient": mean / 2}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_cox_loss_and_gradient_of_one_with_the_joint_batch(
    tmp_path: Path,
) -> None:
    in_two_processes("test_outcome_batches", tmp_path)
    alone = learner()
    loss = alone.loss(bags())
    loss.backward()
    assert loss.item() > 0.1
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["loss"], loss.detach())
        torch.testing.assert_close(found["gradient"], gradient(alone))
    half = learner()  # what each would have learnt from its own patients
    halves = [half.loss(bags()[:4]), half.loss(bags()[4:])]
    assert abs(sum(halves).item() / 2 - loss.item()) > 0.01  # type: ignore[union-attr]


# --- a check with a batch ----------------------------------------------------------------


def cohort(store: Store, path: Path, times: list[float], dead: list[int]) -> Path:
    rows = []
    for i, (time, event) in enumerate(zip(times, dead, strict=True)):
        put(store, f"p{i}", values(6, seed=i))
        rows.append((f"p{i}", f"p{i}", time, event))
    return write(path, ("case_id", "slide_id", "months", "dead"), rows)


def test_a_check_takes_a_batch_in_which_patients_compare(
    store: Store, fake: type, tmp_path: Path
) -> None:
    del fake
    dead = [int(i % 8 == 0) for i in range(80)]
    labels = cohort(store, tmp_path / "t.csv", [float(i + 1) for i in range(80)], dead)
    for seed in (1, 2, 3):
        seen = try_batch(recipe("mil-survival", labels, f"train.seed=[{seed}]"), store=store)
        assert seen["loss"] > 0
        assert "the loss is 0" not in seen["warnings"]


def test_a_check_says_why_a_loss_says_nothing(store: Store, fake: type, tmp_path: Path) -> None:
    del fake
    # an event is always the last that is followed: none is at risk beside it
    labels = cohort(store, tmp_path / "t.csv", [1.0] * 20 + [9.0, 10.0, 11.0], [0] * 20 + [1] * 3)
    given = ["data.split=monte-carlo", "data.test=0.3", "data.val=0.3"]
    seen = try_batch(recipe("mil-survival", labels, *given), store=store)
    assert seen["loss"] == 0
    assert "no event has another patient still at risk" in seen["warnings"]


@pytest.mark.parametrize(("rows", "said"), [([0], True), ([0, 1], False), ([1, 3], False)])
def test_a_lone_patient_teaches_nothing(rows: list[int], said: bool) -> None:
    assert bool(learner().idle([bags()[i] for i in rows])) == said
