"""Answers of a trained run: those of the module it was trained as, and one line for what is not."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
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
from pathcli.vlm import memory, own
from pathcli.vlm.generate import GenerateTask, answers
from pathcli.vlm.own import RunResponder
from pathcli.vlm.responders import SHIPPED, Decoding, Load, Unfinished

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
    responder = RunResponder.of(folder, device="cpu")
    samples = asked(images)
    found = list(responder.answer(samples, Decoding(12)))
    assert found == answers(work.module, work.collate, samples, max_new_tokens=12)
    assert found[:4] == [sample.answer for sample in four(images)]
    assert not any(p.grad is not None for p in responder.module.parameters())
    assert not responder.module.training


def test_questions_in_batches_are_answered_as_one_by_one(trained: Trained, images: Path) -> None:
    responder, samples = RunResponder.of(trained[0], device="cpu"), asked(images)
    responder.batch = 5
    together = list(responder.answer(samples, Decoding(12)))
    assert together == [next(responder.answer([one], Decoding(12))) for one in samples]
    assert list(responder.answer([])) == []
    (short,) = responder.answer(samples[2:3], Decoding(2))
    (whole,) = responder.answer(samples[2:3], Decoding(12))
    assert short == "a tumour" != whole
    assert [isinstance(said, Unfinished) for said in (short, whole)] == [True, False]


def test_an_image_is_encoded_once_and_anew_when_it_was_changed(
    trained: Trained, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder, samples = RunResponder.of(trained[0], device="cpu"), four(images)
    seen: list[int] = []
    encode = responder.seen.encoder.encode
    monkeypatch.setattr(
        responder.seen.encoder, "encode", lambda x: seen.append(len(x)) or encode(x)
    )
    first = list(responder.answer(samples, Decoding(12)))
    assert list(responder.answer(samples, Decoding(12))) == first
    assert sum(seen) == len(samples)
    copy = tmp_path / "copy.png"
    answers = []
    for sample in samples[:2]:
        shutil.copyfile(sample.images[0], copy)
        os.utime(copy, ns=(0, len(answers)))
        answers += responder.answer([replace(sample, images=(str(copy),))], Decoding(12))
    assert answers == first[:2]
    monkeypatch.setattr(own, "KEPT", 1)
    assert list(responder.answer(samples, Decoding(12))) == first
    assert len(responder.seen._kept) == 1


def test_a_likelihood_is_the_sum_of_what_the_language_model_gives_each_token(
    trained: Trained, images: Path
) -> None:
    responder = RunResponder.of(trained[0], device="cpu")
    samples, options = asked(images)[6:10], [["a tumour", "red"], ["x"], ["red cells", "a"], []]
    found = responder.likelihoods(samples, options)
    assert [len(row) for row in found] == [2, 1, 2, 0]
    for sample, some, row in zip(samples, options, found, strict=True):
        for option, value in zip(some, row, strict=True):
            one = replace(sample, answer=option)
            batch = responder.examples([one], np.random.default_rng(0))
            logits = responder.module.logits(batch)[0].log_softmax(-1)
            ids = batch["labels"][0].tolist()
            last = max(i for i, label in enumerate(ids) if label == -100)
            wanted = sum(logits[i - 1, ids[i]].item() for i in range(last + 1, len(ids)))
            assert value == pytest.approx(wanted, abs=1e-4)
    sure = responder.likelihoods(four(images), [[s.answer] for s in four(images)])
    assert all(row[0] > -0.2 for row in sure)  # what it was trained to say


@pytest.mark.parametrize("place", ["first", "random"])
def test_of_a_long_talk_options_are_weighed_after_what_the_answer_is_given_to_read(
    trained: Trained, images: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    responder, (sample, *_) = RunResponder.of(trained[0], device="cpu"), four(images)
    monkeypatch.setattr(responder.chat, "place", place)
    sample = replace(sample, turns=(ASKED, "red", ASKED, "red cells", ASKED))
    batch = responder.examples.ask([sample], np.random.default_rng(0))
    if place == "first":
        monkeypatch.setattr(responder.chat, "limit", batch["ids"].shape[1] - 20)
        batch = responder.examples.ask([sample], np.random.default_rng(0))
        assert ASKED not in responder.prompt(sample).partition("red cells")[0]  # nor is it shown
    told = responder.examples([replace(four(images)[0], answer="blue")], np.random.default_rng(0))
    ids = told["ids"][0, told["labels"][0] != -100]
    long = dict(batch)
    for name, value in (("ids", ids), ("mask", ids >= 0), ("image", ids < 0)):
        long[name] = torch.cat([batch[name], value[None]], 1)
    with torch.inference_mode():
        given = long | {"labels": torch.full_like(long["ids"], -100)}
        logits = responder.module.logits(given)[0].log_softmax(-1)
    wanted = sum(logits[i - 1 - len(ids), t].item() for i, t in enumerate(ids))
    for _ in range(3):
        (found,) = responder.likelihoods([sample], [["blue"]])
        assert found[0] == pytest.approx(wanted, abs=1e-3)


def test_the_prompt_is_shown_as_it_is_read(trained: Trained, images: Path) -> None:
    responder = RunResponder.of(trained[0], device="cpu")
    shown = responder.prompt(asked(images)[-1])
    assert shown.count("<image>") == 1
    assert shown.endswith("ASSISTANT:")
    assert "red cells" in shown
    assert "Are you sure of that?" in shown


def test_the_right_answer_is_not_read(trained: Trained, images: Path) -> None:
    responder, samples = RunResponder.of(trained[0], device="cpu"), four(images)
    hidden = [Sample(s.name, s.images, "something else", s.turns) for s in samples]
    assert list(responder.answer(hidden, Decoding(12))) == [s.answer for s in samples]


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
    responder = RunResponder.of(folder, device="cpu")
    samples = asked(images)
    wanted = answers(work.module, work.collate, samples, max_new_tokens=8)
    assert list(responder.answer(samples, Decoding(8))) == wanted
    assert len(set(wanted)) > 1


def test_weights_stored_as_float16_are_read(run: Path, images: Path) -> None:
    state = load((run / WEIGHTS).read_bytes())
    save_file({name: value.half() for name, value in state.items()}, run / WEIGHTS)
    responder = RunResponder.of(run, device="cpu")
    assert {p.dtype for p in responder.module.parameters()} == {torch.float32}
    found = responder.module.state_dict()
    for name, value in state.items():
        assert torch.equal(found[name], value.half().float()), name
    samples = four(images)
    assert list(responder.answer(samples, Decoding(12))) == [s.answer for s in samples]


# --- what is not there -------------------------------------------------------------------


def line(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_run_that_is_not_finished_is_met_with_one_line(run: Path, tmp_path: Path) -> None:
    (run / "report.json").unlink()
    with pytest.raises(ResourceError) as caught:
        RunResponder.of(run, device="cpu")
    assert line(caught).startswith(f"{run} is unfinished; the same train command goes on")
    with pytest.raises(ResourceError) as caught:
        RunResponder.of(tmp_path / "none", device="cpu")
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
        RunResponder.of(folder, device="cpu")
    wanted = "recipe mini-clip: task contrastive learns no answers; name a run of the task generate"
    assert line(caught) == wanted


def test_weights_that_are_damaged_gone_or_anothers_are_met_with_one_line(run: Path) -> None:
    state = load((run / WEIGHTS).read_bytes())
    (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(DataError) as caught:
        RunResponder.of(run, device="cpu")
    assert line(caught).startswith(f"{run / WEIGHTS}: corrupt checkpoint")
    save_file(
        {name: value for name, value in state.items() if "layers.0.w" not in name}, run / WEIGHTS
    )
    with pytest.raises(DataError) as caught:
        RunResponder.of(run, device="cpu")
    assert line(caught).startswith(f"{run / WEIGHTS}: weights of another module")
    (run / WEIGHTS).unlink()
    with pytest.raises(ResourceError) as caught:
        RunResponder.of(run, device="cpu")
    assert str(run / WEIGHTS) in line(caught)


def test_an_image_that_cannot_be_read_is_no_other_image(
    trained: Trained, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "x.png").write_bytes(b"no image")
    bad = Sample("x", (str(tmp_path / "x.png"),), "", (ASKED,))
    responder = RunResponder.of(trained[0], device="cpu")
    with pytest.raises(DataError, match=r"x\.png: not an image") as caught:
        list(responder.answer([*asked(images)[:1], bad]))
    line(caught)
    assert "another" not in caplog.text


# --- the shipped model -------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_model_answers(tmp_path: Path) -> None:
    for name in (SHIPPED, "smollm2-135m", "lite0", "minilm-tokenizer"):
        if name not in weights.CARDS or weights.find(name) is None:
            pytest.skip(f"{name} is not here; run: pathcli models pull {name}")
    Image.new("RGB", (224, 224), (200, 150, 190)).save(tmp_path / "x.png")
    responder = RunResponder.shipped(device="cpu")
    image = (str(tmp_path / "x.png"),)
    (said,) = responder.answer([Sample("x", image, "", ("Is this malignant?",))], Decoding(8))
    assert said


def test_its_temperature_holds_for_the_numbers_it_was_fitted_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bare(self: RunResponder, *_: Any, **__: Any) -> None:
        self.module, self.temperature = SimpleNamespace(encoder=None), None  # type: ignore[assignment]

    monkeypatch.setattr(RunResponder, "__init__", bare)
    found = {load: RunResponder.shipped(load=load).temperature for load in get_args(Load)}
    assert found["auto"]
    assert found["auto"] == found["bfloat16"]  # the recipe's own
    assert {found[load] for load in ("float32", "float16", "8bit", "4bit")} == {None}


# --- memory ------------------------------------------------------------------------------


def test_where_memory_is_full_fewer_are_read_at_a_time_and_one_too_many_is_one_line(
    trained: Trained, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responder, samples = RunResponder.of(trained[0], device="cpu"), asked(images)
    wanted = list(responder.answer(samples, Decoding(12)))
    options = [["red", "a tumour"]] * len(samples)
    weighed = responder.likelihoods(samples, options)
    sizes: list[int] = []

    def upto(most: int, name: str) -> Any:
        real = getattr(type(responder.module), name)

        def tight(batch: Any, **given: Any) -> Any:
            sizes.append(len(batch["ids"]))
            if sizes[-1] > most:
                msg = "CUDA out of memory.\nTried to allocate"
                raise torch.OutOfMemoryError(msg)
            return real(responder.module, batch, **given)

        return tight

    for name in ("generate", "likelihoods"):
        monkeypatch.setattr(responder.module, name, upto(3, name))
    assert list(responder.answer(samples, Decoding(12))) == wanted
    assert sizes == [12, 6, 3, 3, 3, 3]
    for row, before in zip(responder.likelihoods(samples, options), weighed, strict=True):
        assert row == pytest.approx(before, abs=1e-4)
    monkeypatch.setattr(responder.module, "generate", upto(0, "generate"))
    with pytest.raises(ResourceError) as caught:
        list(responder.answer(samples, Decoding(12)))
    assert "the memory of cpu is full; give a smaller --load (bfloat16, 8bit, 4bit)" in line(caught)
    assert "--device cpu" not in line(caught)
    assert "--device cpu" in str(memory.full("x", torch.device("cuda:1")))


def test_an_error_that_is_none_of_memory_stays_what_it_is(trained: Trained, images: Path) -> None:
    responder = RunResponder.of(trained[0], device="cpu")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), memory.memory("x", "cpu"):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert list(responder.answer(four(images), Decoding(12)))


def test_layers_that_do_not_fit_stay_in_main_memory_and_nothing_else_changes(
    trained: Trained, images: Path
) -> None:
    responder, samples = RunResponder.of(trained[0], device="cpu"), asked(images)
    wanted = list(responder.answer(samples, Decoding(12)))
    weighed = responder.likelihoods(samples[:2], [["red", "a"]] * 2)
    network = responder.examples.language.network
    size = sum(p.nbytes for p in network.parameters())
    layers = network.model.layers
    last = sum(p.nbytes for p in layers[-1].parameters())
    memory.place(network, torch.device("cpu"), room=size - last // 2)
    assert {p.is_meta for p in layers[-1].parameters()} == {True}  # until it is needed
    assert not any(p.is_meta for layer in layers[:-1] for p in layer.parameters())
    assert list(responder.answer(samples, Decoding(12))) == wanted
    for row, before in zip(
        responder.likelihoods(samples[:2], [["red", "a"]] * 2), weighed, strict=True
    ):
        assert row == pytest.approx(before, abs=1e-6)
    with pytest.raises(ResourceError, match="memory of cpu is full"):
        memory.place(network, torch.device("cpu"), room=-size)
