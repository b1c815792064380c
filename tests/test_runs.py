"""The folder of a run: what is in it, what it is rebuilt from, and how it goes on."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from cohorts import assert_resumed_alike, put
from conftest import Run as Call
from safetensors.torch import load_file

from pathcli import registry, trainer
from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.recipe import Recipe, build, list_recipes, load_recipe, resolve_recipe
from pathcli.runs import Run, find_runs, read_run, train, try_batch
from pathcli.settings import TrainSettings
from pathcli.store import Store
from pathcli.trainer import Loop, Work
from pathcli.types import Progress

FILES = {
    "recipe.yaml",
    "provenance.json",
    "metrics.jsonl",
    "weights.safetensors",
    "report.json",
    "report.html",
}


class Slope(torch.nn.Module):
    """A line through the origin, fitted to y = 2 x under dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(width, 1))
        self.drop = torch.nn.Dropout(0.3)

    def loss(self, batch: list[float]) -> torch.Tensor:
        x = torch.tensor(batch)[:, None].expand(-1, len(self.w))
        return (self.drop(x) @ self.w - 2 * x[:, :1]).square().mean()


class Tiny:
    """A task that trains in a moment and counts how often it begins."""

    begun: ClassVar[list[int]] = []
    identity: ClassVar[str] = "these labels"

    def __init__(self, *, train: TrainSettings, line: TinyLine) -> None:
        self.train, self.line = train, line

    def prepare(self, store: Store, *, device: str, progress: Callable[[str], Progress]) -> None:
        progress("reading")(1, 1)

    def begin(self, seed: int) -> Work:
        self.begun.append(seed)
        module = Slope(self.line.width)

        def validate() -> dict[str, float]:
            loss = float(module.loss([1.0, 2.0]))
            return {"score": -loss, "loss": loss, "undefined": float("nan")}

        facts = {"seed": seed, "warnings": ["a slide is missing"], "train": ["a", "b"]}
        examples = [0.5, 1.0, 1.5, 2.0]
        return Work(
            module,
            examples,
            validate,
            identity=self.identity,
            facts=facts,
            conclude=lambda: {"w": 1},
        )


class TinyLine:
    """A section without a kind."""

    def __init__(self, *, width: int = 2) -> None:
        self.width = width


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["task"], "tiny", f"{__name__}:Tiny")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Tiny.__module__])
    Tiny.begun.clear()


def recipe(**given: Any) -> Recipe:
    made = {"epochs": 3, "lr": 0.05, "choose": "score"} | given
    return Recipe("tiny", {"version": 1, "task": "tiny", "line": {}, "train": made})


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def weights(run: Run) -> torch.Tensor:
    return load_file(run.folder / "weights.safetensors")["w"]


# --- what is in a run --------------------------------------------------------------------


def test_every_seed_and_rate_is_a_run_in_a_folder_of_its_own(tmp_path: Path) -> None:
    names: list[str] = []

    def started(name: str) -> Progress:
        names.append(name)
        return lambda done, total: None

    made = recipe(seed=[1, 2], lr=[0.05, 1e-4])
    runs = train(made, out=tmp_path, device="cpu", progress=started)
    folders = [f"tiny/seed-{s}/lr-{lr}" for s in (1, 2) for lr in ("0.05", "0.0001")]
    assert [run.folder for run in runs] == [tmp_path / folder for folder in folders]
    assert [(r.seed, r.recipe.values["train"]["lr"]) for r in runs] == [
        (1, 0.05),
        (1, 1e-4),
        (2, 0.05),
        (2, 1e-4),
    ]
    assert names == ["reading", *(f.replace("tiny/", "tiny ") for f in folders)]
    assert find_runs(tmp_path) == sorted(runs, key=lambda r: r.folder)
    assert len({weights(run).sum().item() for run in runs}) == 4


def test_a_run_of_one_rate_has_no_folder_of_its_rate(tmp_path: Path) -> None:
    (run,) = train(recipe(lr=[0.05]), out=tmp_path)
    assert run.folder == tmp_path / "tiny" / "seed-1"


def test_a_run_holds_what_it_is_rebuilt_from_and_nothing_else(tmp_path: Path) -> None:
    (run,) = train(recipe(), out=tmp_path / "runs", device="cpu")
    assert contents(run.folder) == FILES
    moved = read_run(run.folder.rename(tmp_path / "elsewhere"))
    assert moved.recipe.values == resolve_recipe(recipe(seed=1)).values
    assert build(moved.recipe).line.width == 2
    assert moved.recipe.name == "tiny"
    assert moved.metrics == run.metrics
    assert set(moved.metrics) == {"score", "loss"}  # what was undefined is left out
    lines = [json.loads(x) for x in (moved.folder / "metrics.jsonl").read_text().splitlines()]
    best = lines[2 * moved.provenance["chosen_epoch"] - 1]
    assert best["val_score"] == pytest.approx(moved.metrics["score"])
    highest = max(line.get("val_score", -9) for line in lines)
    assert highest == best["val_score"] == moved.standing[0]


def test_provenance_says_where_a_run_came_from(tmp_path: Path) -> None:
    (run,) = train(recipe(), out=tmp_path, device="cpu")
    known = json.loads((run.folder / "provenance.json").read_text())
    assert known == run.provenance
    assert {"recipe", "versions", "git", "seconds", "device"} <= set(known)
    assert (known["epochs"], known["steps"], known["examples"]) == (3, 12, 4)
    assert known["device"] == "cpu"
    assert "torch" in known["versions"]
    assert run.facts == {"seed": 1, "warnings": ["a slide is missing"], "train": ["a", "b"], "w": 1}


def test_the_report_shows_curves_and_recipe_and_loads_nothing(tmp_path: Path) -> None:
    (run,) = train(recipe(), out=tmp_path)
    page = (run.folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "chosen_epoch" in page
    assert "weight_decay: 1.0e-05" in page
    assert "no example of a test split was read" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_a_run_that_validates_nothing_has_a_report_too(tmp_path: Path) -> None:
    assert train(recipe(choose=None, epochs=1), out=tmp_path)[0].standing[0] == 0.0


# --- what is trained again, and what is not ----------------------------------------------


def test_finished_runs_are_not_trained_again(tmp_path: Path) -> None:
    first = train(recipe(seed=[1, 2]), out=tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = train(recipe(seed=[1, 2, 3]), out=tmp_path)
    assert Tiny.begun == [1, 2, 1, 2, 3]  # begun again only to see that the data are the same
    assert again[:2] == first
    assert {p: p.stat().st_mtime_ns for p in before if p.is_file()}.items() <= before.items()


def test_a_stopped_run_goes_on_with_the_same_data_only(tmp_path: Path) -> None:
    settings = TrainSettings(epochs=1)
    stopped = Loop(Work(Slope(2), [1.0, 2.0], identity="a"), settings, tmp_path, "cpu")
    assert not stopped.run(lambda *_: None, stop_after=1)
    other = Loop(Work(Slope(2), [1.0, 2.0], identity="b"), settings, tmp_path, "cpu")
    with pytest.raises(DataError, match="labels, splits or features have changed since"):
        other.run(lambda *_: None)


def test_a_finished_run_on_other_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(recipe(), out=tmp_path)
    monkeypatch.setattr(Tiny, "identity", "other labels")
    with pytest.raises(UsageError, match="seed-1 was trained on other labels"):
        train(recipe(), out=tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train.epochs": 4}, "train.epochs: 3 there, 4 here"),
        ({"train.betas": [0.8, 0.9]}, r"train.betas: \[0.9, 0.999\] there, \[0.8, 0.9\] here"),
        ({"line.width": 3}, "line.width: 2 there, 3 here"),
    ],
)
def test_a_run_of_another_recipe_is_refused_and_left_alone(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    (run,) = train(recipe(), out=tmp_path)
    before = (run.folder / "recipe.yaml").read_bytes()
    one_line = rf"\A.*seed-1 holds .*another recipe \({said}\).*another --out.*\Z"
    with pytest.raises(UsageError, match=one_line):
        train(recipe().with_values(**change), out=tmp_path)
    assert (run.folder / "recipe.yaml").read_bytes() == before


def test_a_run_of_a_version_that_knew_fewer_settings_is_the_same_recipes(tmp_path: Path) -> None:
    (run,) = train(recipe(), out=tmp_path)
    path = run.folder / "recipe.yaml"
    path.write_text(path.read_text().replace("  ema: null\n", ""))
    assert train(recipe(), out=tmp_path)[0].metrics == run.metrics
    with pytest.raises(UsageError, match=r"another recipe \(train.ema: None there, 0.5 here"):
        train(recipe(ema=0.5), out=tmp_path)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(name: str) -> Progress:
        def report(done: int, total: int) -> None:
            if name != "reading" and done == 7:
                raise KeyboardInterrupt

        return report

    (whole,) = train(recipe(), out=tmp_path / "whole")
    monkeypatch.setattr(trainer, "SAVE_SECONDS", -1.0)  # a state after every step
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), out=tmp_path / "cut", progress=interrupt)
    folder = tmp_path / "cut" / "tiny" / "seed-1"
    assert (folder / "state" / "state.pt").is_file()
    with pytest.raises(ResourceError, match="unfinished; the same train command goes on"):
        read_run(folder)
    assert find_runs(tmp_path / "cut") == []
    (run,) = train(recipe(), out=tmp_path / "cut")
    assert torch.equal(weights(run), weights(whole))
    assert run.metrics == whole.metrics
    for name in ("metrics.jsonl", "recipe.yaml"):
        assert (run.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert contents(run.folder) == FILES


def test_a_run_that_failed_at_once_keeps_nobody_from_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'score'"):
        train(recipe(choose="scor"), out=tmp_path)
    (run,) = train(recipe(), out=tmp_path)
    assert run.recipe.values["train"]["choose"] == "score"


def test_the_state_of_training_does_not_depend_on_what_was_drawn_before(tmp_path: Path) -> None:
    (one,) = train(recipe(), out=tmp_path / "one")
    torch.rand(7)
    (other,) = train(recipe(seed=[1, 2]), out=tmp_path / "other")[:1]
    assert torch.equal(weights(one), weights(other))


# --- damaged and missing -----------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"metrics": [], "provenance": {"recipe": "x"}}', "\x00\xff"]
)
def test_a_damaged_report_is_one_clear_error_and_stops_no_search(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, other = train(recipe(epochs=1, seed=[1, 2]), out=tmp_path)
    (run.folder / "report.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="damaged run") as caught:
        read_run(run.folder)
    assert str(run.folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert find_runs(tmp_path) == [other]
    assert str(caught.value) in caplog.text


def test_a_damaged_recipe_is_one_clear_error(tmp_path: Path) -> None:
    (run,) = train(recipe(epochs=1), out=tmp_path)
    for text in ("a: [1", "just words", ""):
        (run.folder / "recipe.yaml").write_text(text)
        with pytest.raises(DataError) as caught:
            read_run(run.folder)
        assert str(run.folder) in str(caught.value)


def test_what_is_no_run_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("none", "file"):
        with pytest.raises(ResourceError, match="is no run"):
            read_run(tmp_path / name)
    assert find_runs(tmp_path / "none") == []


# --- the command, and shipped recipes ----------------------------------------------------


def test_the_command_trains_a_file_and_warns_of_what_the_data_lack(
    run: Call, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(recipe(seed=[1, 2]).to_yaml())
    command = ("train", "--recipe", "mine.yaml", "--set", "train.epochs=2", "--device", "cpu")
    code, out, err = run(*command, "--json")
    assert code == 0, err
    rows = json.loads(out)["runs"]
    assert [(row["seed"], row["lr"]) for row in rows] == [(1, 0.05), (2, 0.05)]
    assert {"run", "epoch", "score", "loss", "seconds"} <= set(rows[0])
    assert err.count("a slide is missing") == 1
    assert contents(tmp_path / "runs" / "mine" / "seed-1") == FILES
    code, _, err = run(*command[:-2], "--set", "train.lr=1e-4")
    assert code == 2
    assert "train.lr: 0.05 there, 0.0001 here" in err


def test_check_with_batch_takes_one_loss_and_shows_what_was_seen(run: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(recipe().to_yaml())
    code, out, err = run("recipes", "check", "mine.yaml", "--batch", "--json")
    assert code == 0, err
    seen = json.loads(out)["batch"]
    assert (seen["examples"], seen["trainable weights"], seen["train"]) == (4, 2, 2)
    assert seen["warnings"] == "a slide is missing"
    assert seen["loss"] == try_batch(recipe())["loss"]


def miniature(name: str, path: Path) -> list[str]:
    """Write a label table that fits any shipped recipe; return its slides."""
    benchmark = str(load_recipe(name).values["data"].get("benchmark"))
    labels = {"camelyon17": ["negative", "itc", "micro", "macro"], "bracs": [0, 3, 6]}
    lines = ["case_id,slide_id,label,center,split_info"]
    for i in range(24):
        part = ("train", "train", "val", "test")[i // 6]
        classes = labels.get(benchmark, [0, 1])
        slide = f"{'test' if part == 'test' else 'normal'}_{i:03}"
        center = 3 if part == "test" else i % 3
        lines.append(f"patient_{i},{slide},{classes[i % len(classes)]},{center},{part}")
    path.write_text("\n".join(lines) + "\n")
    return [line.split(",")[1] for line in lines[1:]]


@pytest.mark.parametrize("name", [r.name for r in list_recipes() if r.values["task"] == "mil"])
def test_a_shipped_recipe_stopped_after_two_steps_ends_with_equal_weights(
    name: str, fake: type, store: Store, tmp_path: Path
) -> None:
    slides = miniature(name, tmp_path / "labels.csv")
    given = ["encoder={kind: fake}", "data.slides=null", "data.labels=labels.csv", "data.val=0.3"]
    task = build(load_recipe(name, [*given, "train.epochs=1", "train.lr=1e-3", "train.seed=1"]))
    rng = np.random.default_rng(0)
    for slide in slides:
        put(store, slide, rng.normal(size=(12, 8)).astype(np.float16), spec=task.spec)
    task.prepare(store, device="cpu", progress=lambda _: lambda done, total: None)
    assert_resumed_alike(task, tmp_path)


def test_every_error_of_training_is_one_of_ours(run: Call, tmp_path: Path) -> None:
    for given, word in (
        (["--recipe", "mil-abmil"], "asks for data.labels: give --set data.labels=..."),
        (["--recipe", "mil-abml"], "did you mean 'mil-abmil'"),
        (["--recipe", "mil-abmil", "--set", "data.labels=none.csv"], "none.csv"),
        (["--recipe", "mil-abmil", "--device", "cuda:9"], ""),
    ):
        code, _, err = run("train", *given)
        assert code in {2, 4, 5}
        assert word in err
        assert "internal error" not in err
    assert issubclass(UsageError, PathcliError)
