"""Answers of a trained run: those of the module it was trained as, and one line for what is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file
from test_align import TINY, Patches, bert
from test_generate import ASKED, four
from test_generate import folder as images
from test_generate_more import instructions
from test_language import llama

from pathcli import registry, weights
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.recipe import Recipe
from pathcli.runs import train
from pathcli.store import Store
from pathcli.trainer import Work
from pathcli.types import Sample
from pathcli.vlm.generate import GenerateTask, answers
from pathcli.vlm.responder import SHIPPED, Responder

__all__ = ["bert", "images", "llama"]  # fixtures

WEIGHTS = "weights.safetensors"
Trained = tuple[Path, Work]


def recipe(model: str, images: Path, place: Path, **given: Any) -> Recipe:
    place.mkdir()
    data = instructions(images, place)
    (source, _), *_ = data.sources
    values = {
        "version": 1,
        "task": "generate",
        "encoder": {"kind": "patches"},
        "connector": {"kind": "mlp", "frame": "centre"},
        "language": {"kind": "hf", "model": model, "tune": "full"},
        "chat": {"template": "vicuna-v1", "system": ""},
        "data": {
            "kind": "instructions",
            "source": str(source),
            "images": str(images),
            "val": 0,
        },
        "train": {"epochs": 50, "batch": 4, "lr": 5e-3, "schedule": "constant"},
    }
    return Recipe("tiny", values | given)


def run_of(recipe: Recipe, place: Path) -> Trained:
    """Train a recipe; return its folder, and the work with the module as it was trained."""
    kept: list[Work] = []
    begin = GenerateTask.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            GenerateTask, "begin", lambda self, seed: kept.append(begin(self, seed)) or kept[-1]
        )
        (run,) = train(recipe, out=place / "runs", store=Store(place / "store"), device="cpu")
    return run.folder, kept[-1]


@pytest.fixture(autouse=True, scope="module")
def _patches() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        place = f"{Patches.__module__}:{Patches.__name__}"
        patch.setitem(registry.BUILTIN["encoder"], "patches", place)
        yield


@pytest.fixture(scope="module")
def trained(
    llama: str, images: Path, tmp_path_factory: pytest.TempPathFactory, _patches: None
) -> Trained:
    place = tmp_path_factory.mktemp("trained")
    return run_of(recipe(llama, images, place / "data"), place)


@pytest.fixture
def run(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the run that may be spoilt."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def asked(images: Path) -> list[Sample]:
    """Questions of several lengths on four images, answers unknown."""
    turns = [(ASKED,), ("Is there a tumour here?",), (ASKED, "red cells", "Are you sure of that?")]
    return [Sample(s.name, s.images, "", turn) for turn in turns for s in four(images)]


def test_a_run_answers_as_the_module_that_was_trained(trained: Trained, images: Path) -> None:
    folder, work = trained
    responder = Responder.of(folder, "cpu")
    samples = asked(images)
    found = list(responder(samples, max_new_tokens=12))
    assert found == answers(work.module, work.collate, samples, max_new_tokens=12)
    assert found[:4] == [sample.answer for sample in four(images)]
    assert not any(p.grad is not None for p in responder.module.parameters())
    assert not responder.module.training


def test_questions_in_batches_are_answered_as_one_by_one(trained: Trained, images: Path) -> None:
    responder, samples = Responder.of(trained[0], "cpu"), asked(images)
    together = list(responder(samples, batch=5, max_new_tokens=12))
    assert together == [next(responder([one], max_new_tokens=12)) for one in samples]
    assert list(responder([])) == []
    short = list(responder(samples[2:3], max_new_tokens=2))
    assert short == ["a tumour"]


def test_the_right_answer_is_not_read(trained: Trained, images: Path) -> None:
    responder, samples = Responder.of(trained[0], "cpu"), four(images)
    hidden = [Sample(s.name, s.images, "something else", s.turns) for s in samples]
    assert list(responder(hidden, max_new_tokens=12)) == [s.answer for s in samples]


def test_a_connector_that_reads_and_adapters_are_put_together_again(
    llama: str, bert: Path, images: Path, tmp_path: Path
) -> None:
    connector = TINY | {"kind": "qformer", "text": str(bert), "init": "random", "instruct": True}
    language = {"kind": "hf", "model": llama, "tune": "lora", "lora": {"r": 4}}
    numbers = {"epochs": 3, "batch": 2, "lr": 2e-2}
    given = recipe(
        llama, images, tmp_path / "data", connector=connector, language=language, train=numbers
    )
    folder, work = run_of(given, tmp_path)
    torch.manual_seed(99)  # what the responder draws before it is filled is of no account
    responder = Responder.of(folder, "cpu")
    samples = asked(images)
    wanted = answers(work.module, work.collate, samples, max_new_tokens=8)
    assert list(responder(samples, max_new_tokens=8)) == wanted
    assert len(set(wanted)) > 1


def test_weights_stored_as_float16_are_read(run: Path, images: Path) -> None:
    state = load((run / WEIGHTS).read_bytes())
    save_file({name: value.half() for name, value in state.items()}, run / WEIGHTS)
    responder = Responder.of(run, "cpu")
    assert {p.dtype for p in responder.module.parameters()} == {torch.float32}
    found = responder.module.state_dict()
    for name, value in state.items():
        assert torch.equal(found[name], value.half().float()), name
    samples = four(images)
    assert list(responder(samples, max_new_tokens=12)) == [s.answer for s in samples]


# --- what is not there -------------------------------------------------------------------


def line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_run_that_is_not_finished_is_met_with_one_line(run: Path, tmp_path: Path) -> None:
    (run / "report.json").unlink()
    with pytest.raises(ResourceError) as caught:
        Responder.of(run, "cpu")
    assert line(caught).startswith(f"{run} is unfinished; the same train command goes on")
    with pytest.raises(ResourceError) as caught:
        Responder.of(tmp_path / "none", "cpu")
    assert line(caught).startswith(f"{tmp_path / 'none'} is no run")


def test_a_run_of_another_task_is_met_with_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        "version: 1\ntask: contrastive\nmodel: {kind: mini-clip}\ntrain: {seed: 1}\n"
    )
    report = {"metrics": {}, "provenance": {"recipe": "mini-clip", "facts": {}}}
    (folder / "report.json").write_text(json.dumps(report))
    with pytest.raises(UsageError) as caught:
        Responder.of(folder, "cpu")
    wanted = "recipe mini-clip: task contrastive learns no answers; name a run of the task generate"
    assert line(caught) == wanted


def test_weights_that_are_damaged_gone_or_anothers_are_met_with_one_line(run: Path) -> None:
    state = load((run / WEIGHTS).read_bytes())
    (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(DataError) as caught:
        Responder.of(run, "cpu")
    assert line(caught).startswith(f"{run / WEIGHTS}: corrupt checkpoint")
    save_file(
        {name: value for name, value in state.items() if "layers.0.w" not in name}, run / WEIGHTS
    )
    with pytest.raises(DataError) as caught:
        Responder.of(run, "cpu")
    assert line(caught).startswith(f"{run / WEIGHTS}: weights of another module")
    (run / WEIGHTS).unlink()
    with pytest.raises(ResourceError) as caught:
        Responder.of(run, "cpu")
    assert str(run / WEIGHTS) in line(caught)


def test_an_image_that_cannot_be_read_is_no_other_image(
    trained: Trained, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    bad = Sample("x", (str(tmp_path / "x.png"),), "", (ASKED,))
    responder = Responder.of(trained[0], "cpu")
    with pytest.raises(DataError, match=r"x\.png: not an image") as caught:
        list(responder([*asked(images)[:1], bad]))
    line(caught)
    assert "another" not in caplog.text


# --- the shipped model -------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_model_answers(tmp_path: Path) -> None:
    for name in (SHIPPED, "smollm2-135m", "lite0", "minilm-tokenizer"):
        if name not in weights.CARDS or weights.find(name) is None:
            pytest.skip(f"{name} is not here; run: pathcli models pull {name}")
    Image.new("RGB", (224, 224), (200, 150, 190)).save(tmp_path / "x.png")
    responder = Responder.of(device="cpu")
    image = (str(tmp_path / "x.png"),)
    (said,) = responder([Sample("x", image, "", ("Is this malignant?",))], max_new_tokens=8)
    assert said
