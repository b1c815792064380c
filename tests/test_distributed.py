"""Two processes that torchrun starts here, against one process with the joint batch.

Started by torchrun, this file is the program of each process: see `main`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file

from pathcli import processes, registry, trainer
from pathcli.errors import DataError, UsageError
from pathcli.objectives import contrastive
from pathcli.settings import TrainSettings
from pathcli.state import optimizer_state, trainable_state
from pathcli.trainer import Loop, Work

TINY = {"epochs": 3, "batch": 6, "lr": 0.02, "choose": "score", "seed": 3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"clip": 0.3, "accumulate": 2},
    "pieces": {"chunk": 2, "accumulate": 2, "ema": 0.7},  # a share of 3 rows comes as 2 and 1
    "noise": {"chunk": 3, "workers": 1},  # pieces begin where they begin in one process
    "shared out": {"shard": "full", "clip": 0.3, "ema": 0.7, "optimizer": "adam"},
    "shared out, pieces": {"shard": "full", "chunk": 2, "accumulate": 2},
}


class Towers(torch.nn.Module):
    """Two views of a number in, embeddings out; a temperature, and weights nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
        )
        self.two = torch.nn.Linear(4, 3)
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.idle = torch.nn.Linear(2, 2)

    def embed(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(batch[:, :4]), self.two(batch[:, 4:])

    def loss_of(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        return contrastive(one, two, self.scale.exp())

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return self.loss_of(*self.embed(batch))


def work(noise: float) -> Work:
    rows = 18 if noise else 20  # noise is of the row's place: no shorter batch, then
    examples = list(torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)))
    module = Towers()

    def collate(rows: list[torch.Tensor], rng: np.random.Generator) -> torch.Tensor:
        batch = torch.stack(rows)
        return batch + noise * torch.tensor(rng.normal(size=batch.shape)).float()

    def validate() -> dict[str, float]:
        one, two = module.embed(torch.stack(examples[:5]))
        return {"score": float((one * two).sum()), "rank": float(processes.rank())}

    return Work(module, examples, validate, collate, conclude=lambda: {"w": validate()["score"]})


def loop(name: str, folder: Path) -> Loop:
    set_seed(3)
    settings = TrainSettings(**TINY | CASES[name])
    return Loop(work(0.1 * (name == "noise")), settings, folder, "cpu")


def quiet(done: int, total: int) -> None:
    del done, total


def finish(name: str, folder: Path) -> Loop:
    made = loop(name, folder)
    assert made.run(quiet)
    made.save_weights()
    return made


class Told:
    """A task for the command, of which every process prepares after the first."""

    def __init__(self, *, train: TrainSettings) -> None:
        self.train = train

    def prepare(self, store: Any, *, device: str, progress: Any) -> None:
        progress("reading")(1, 1)
        path = Path("prepared")
        assert path.is_file() == bool(processes.rank())
        path.touch()

    def begin(self, seed: int) -> Work:
        return work(0.0)


RECIPE = f"version: 1\ntask: told\ntrain: {json.dumps(TINY)}\n"


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def check_kept(made: Loop) -> None:
    """Of weights that are shared out the first process keeps all when they are saved, alone."""
    apart = made.settings.shard == "full" and processes.rank() > 0
    known = dict(made.work.module.named_parameters())
    names = {"scale"} if apart else set(known)
    weights = trainable_state(made.work.module)
    assert set(weights) == set(made.best_state) == names, (set(weights), set(made.best_state))
    assert {weights[name].shape for name in names} == {known[name].shape for name in names}
    state = optimizer_state(made.optimizer)["state"]
    kept = [value for moments in state.values() for value in moments.values()]
    held = sum(value.numel() for value in kept if value.ndim)
    assert held == 0 if apart else held >= 2 * 82, held  # of 82 in layers that are used
    for value in [*weights.values(), *kept]:
        assert (value.device.type, hasattr(value, "full_tensor")) == ("cpu", False)


def main() -> None:
    """Train every case, whole and with a stop; then a recipe by the command."""
    from pathcli.cli import main as command

    registry.BUILTIN["task"]["told"] = f"{__name__}:Told"
    processes.BLOCK = 1
    trainer.LOG_EVERY = 4
    if sys.argv[1:] == ["fail"]:
        made = loop("plain", Path("failing"))

        def report(done: int, total: int) -> None:
            if processes.rank() == 1 and done == 2:
                msg = "one process fails"
                raise DataError(msg)

        made.run(report)
    for name in CASES:
        made = finish(name, Path("whole") / name)
        held = sum(value.numel() for value in map(local, made.inside.parameters()))
        halves = (52, 38)[processes.rank()]  # of 88, rows of a weight together, and the scalar
        assert held == (halves if name.startswith("shared") else 89), held
        check_kept(made)
        concluded = made.conclude()
        if not processes.rank():
            (made.folder / "concluded.json").write_text(json.dumps(concluded))
        stop = made.updates - (name != "plain")  # within an epoch, or at its last step
        for state in ("stopped", "unfinished"):
            assert not loop(name, Path(state) / name).run(quiet, stop_after=stop)
        torch.rand(3)
        check_kept(finish(name, Path("stopped") / name))
    Path("mine.yaml").write_text(RECIPE)
    command(["train", "--recipe", "mine.yaml", "--device", "cpu", "--json"])


def launch(folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*run, __file__, *given],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("launched")
    done = launch(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def assert_close(found: Path, expected: Path, within: float) -> None:
    mine, reference = weights(found), weights(expected)
    assert mine.keys() == reference.keys()
    for key, value in reference.items():
        torch.testing.assert_close(mine[key], value, rtol=0, atol=within, msg=lambda m: key + m)  # noqa: B023


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one_with_the_joint_batch(
    name: str, launched: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "LOG_EVERY", 4)
    found = launched[0] / "whole" / name
    made = finish(name, tmp_path)
    assert made.step == made.steps > 0
    assert_close(found, tmp_path, 1e-6)
    lines = [json.loads(x) for x in (found / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == len(made.lines)
    for line, reference in zip(lines, made.lines, strict=True):
        assert line == pytest.approx(reference, abs=1e-5)
    concluded = json.loads((found / "concluded.json").read_text())
    assert concluded == pytest.approx(made.conclude(), abs=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_two_stopped_processes_end_as_two_that_were_never_stopped(
    name: str, launched: tuple[Path, str]
) -> None:
    stopped, whole = (launched[0] / state / name for state in ("stopped", "whole"))
    assert_close(stopped, whole, 0)
    assert (stopped / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on_where_two_stopped(name: str, launched: tuple[Path, str]) -> None:
    folder = launched[0] / "unfinished" / name
    assert finish(name, folder).step == loop(name, folder).steps
    assert_close(folder, launched[0] / "whole" / name, 1e-6)


def test_the_command_trains_in_two_processes(launched: tuple[Path, str], tmp_path: Path) -> None:
    folder = launched[0] / "runs" / "mine" / "seed-3"
    known = json.loads((folder / "provenance.json").read_text())
    assert known["processes"] == 2
    made = TrainSettings(**TINY)
    set_seed(3)
    alone = Loop(work(0.0), made, tmp_path, "cpu")
    alone.run(quiet)
    alone.save_weights()
    assert_close(folder, tmp_path, 1e-6)
    assert not list(folder.rglob("*.part"))


def test_a_process_that_fails_takes_the_others_along(tmp_path: Path) -> None:
    begun = time.monotonic()
    done = launch(tmp_path, "fail")
    assert done.returncode != 0
    assert "one process fails" in done.stderr
    assert time.monotonic() - begun < 120


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    from pathcli.batches import Batches, as_list

    with pytest.raises(UsageError, match=r"train.batch=3 is shared out over 2 .* multiple of 2"):
        Batches(range(9), as_list, TrainSettings(batch=3), ranks=2)
    with pytest.raises(DataError, match="no example to train on for each of 2 processes"):
        Batches([1], as_list, TrainSettings(batch=2), ranks=2)


def test_shares_are_contiguous_and_the_rest_of_an_epoch_is_left_out() -> None:
    from pathcli.batches import Batches, as_list

    settings = TrainSettings(batch=6, chunk=2, epochs=2)
    shares = [Batches(range(11), as_list, settings, rank=r, ranks=3) for r in range(3)]
    (alone,) = [Batches(range(11), as_list, TrainSettings(batch=6))]
    assert [share.count for share in shares] == [2, 2, 2]
    joint = [sum((share[0, k] for share in shares), []) for k in (0, 1)]  # noqa: RUF017
    assert [len(piece) for piece in joint[1]] == [1, 1, 1]
    rows = [sum(pieces, []) for pieces in joint]  # noqa: RUF017
    assert rows == [alone[0, 0][0], alone[0, 1][0][:3]]


if __name__ == "__main__":
    main()
