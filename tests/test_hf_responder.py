"""Tiny checkpoints in five formats of transformers, asked as their authors ask them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_hf import LLAVA, MAKERS

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.types import Sample
from pathcli.vlm.hf import HFResponder
from pathcli.vlm.responders import Decoding, Unfinished, open_responder


@dataclass
class Tiny:
    kind: str
    folder: Path
    images: tuple[str, ...]
    model: HFResponder

    def sample(self, question: str, images: int = 1) -> Sample:
        return Sample(question, self.images[:images], turns=(question,), answer="ignored")


_made: dict[str, Path] = {}


def made(kind: str, where: pytest.TempPathFactory) -> Path:
    if kind not in _made:
        folder = where.mktemp(kind)
        MAKERS[kind](folder)
        _made[kind] = folder
    return _made[kind]


@pytest.fixture(scope="module", params=list(MAKERS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    folder = made(request.param, tmp_path_factory)
    where, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = tuple(str(where / f"{i}.png") for i in range(3))
    for number, path in enumerate(paths):
        pixels = rng.integers(0, 255, (60, 56 + 28 * number, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    model = open_responder(str(folder), device="cpu")
    assert isinstance(model, HFResponder)
    return Tiny(request.param, folder, paths, model)


PLAIN = {"instructblip": "?", "blip2": "Question: ? Answer:"}
SHORT, LONG = "Is it?", "Which tissue do you see in this picture, and what is it made of?"
FEW = Decoding(max_new_tokens=6)


@cache
def read(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), processor


def theirs(tiny: Tiny, question: str) -> tuple[Any, Any, Any]:
    """The model, the processor and their inputs, by transformers' own calls."""
    model, processor = read(tiny.folder)
    image = Image.open(tiny.images[0])
    if tiny.kind in PLAIN:
        text = PLAIN[tiny.kind].replace("?", question)
        inputs = processor(images=image, text=text, return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    return model, processor, inputs


def test_answers_are_those_of_transformers_own_generate(tiny: Tiny) -> None:
    for question in (SHORT, LONG):
        model, processor, inputs = theirs(tiny, question)
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        length = 1 if tiny.kind == "blip2" else inputs["input_ids"].shape[1]
        new = ids[0, length:]
        assert 0 < len(new) <= 6
        wanted = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        (said,) = tiny.model.answer([tiny.sample(question)], FEW)
        assert said == wanted
        ends = model.generation_config.eos_token_id
        ended = int(new[-1]) in (ends if isinstance(ends, list) else [ends])
        assert isinstance(said, Unfinished) is not ended
        assert wanted
    beams = model.generate(**inputs, max_new_tokens=6, num_beams=3, length_penalty=0.5)
    wanted = processor.decode(beams[0, length:], skip_special_tokens=True)
    three = Decoding(max_new_tokens=6, beams=3, length_penalty=0.5)
    assert list(tiny.model.answer([tiny.sample(LONG)], three)) == [wanted.strip()]


def test_a_batch_answers_as_one_by_one(tiny: Tiny) -> None:
    samples = [tiny.sample(SHORT), tiny.sample(LONG), tiny.sample("No cells, or many cells?")]
    if tiny.kind not in PLAIN:
        samples += [tiny.sample("And these two?", 2), tiny.sample("No image?", 0)]
        samples += [Sample("talk", tiny.images[1:2], turns=("One?", "Yes.", SHORT))]
    together = list(tiny.model.answer(samples, FEW))
    assert together == [next(tiny.model.answer([sample], FEW)) for sample in samples]
    assert len(set(together)) > 1


def test_likelihoods_are_the_sums_of_log_probabilities(tiny: Tiny) -> None:
    options = ("yes", "no, normal")
    (found,) = tiny.model.likelihoods([tiny.sample(LONG)], [options])
    assert found.dtype == np.float64
    model, processor, inputs = theirs(tiny, LONG)
    asked = inputs["input_ids"]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    if tiny.kind in PLAIN:
        ends = [1 if tiny.kind == "blip2" else 2]
    for option, value in zip(options, found, strict=True):
        # after `ASSISTANT:` and after a question comes a space, after a line's end none
        spaced = option if tiny.kind == "qwen" else f" {option}"
        ids = processor.tokenizer(spaced.strip(), add_special_tokens=False)["input_ids"]
        if tiny.kind == "gemma":
            ids = tiny.model._continued(tiny.model._text(tiny.sample(LONG)), option)
        total = 0.0
        for step, token in enumerate([*ids, None]):
            said = torch.tensor([ids[:step]], dtype=torch.long)
            given = dict(inputs)
            if tiny.kind == "blip2":
                given["decoder_input_ids"] = torch.tensor([[0, *ids[:step]]])
            else:
                given["input_ids"] = torch.cat([asked, said], 1)
                given["attention_mask"] = torch.ones_like(given["input_ids"])
                for name in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
                    given[name] = torch.cat([inputs[name], torch.zeros_like(said)], 1)
            with torch.no_grad():
                odds = model(**given).logits[0, -1].double().softmax(-1)
            total += float((odds[token] if token is not None else odds[ends].sum()).log())
        assert value == pytest.approx(total, abs=1e-4)
    assert len(set(found)) == 2


def test_the_prompt_is_what_it_reads(tiny: Tiny) -> None:
    wanted = {
        "llava": "USER: <image>\nWhy? ASSISTANT:",
        "qwen": "<|im_start|>user\n<|vision_start|><image><|vision_end|>Why?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "gemma": "<bos><start_of_turn>user\n<image>Why?<end_of_turn>\n<start_of_turn>model\n",
        "instructblip": "<image>Why?",
        "blip2": "<image>Question: Why? Answer:",
    }
    assert tiny.model.prompt(tiny.sample("Why?")) == wanted[tiny.kind]
    tokenizer = tiny.model.tokenizer
    told = tiny.model.prompt(tiny.sample(f"Why {tokenizer.eos_token} so?"))
    assert told.count(tokenizer.eos_token) == wanted[tiny.kind].count(tokenizer.eos_token)
    assert f"< {tokenizer.eos_token[1:]}" in told


def test_an_image_that_was_just_seen_is_not_encoded_again(tiny: Tiny) -> None:
    model = tiny.model.network
    tower = next(
        x
        for name, x in model.named_modules()
        if name.endswith(("vision_tower", "vision_model", "visual"))
    )
    layer = next(m for name, m in tower.named_modules() if name.endswith(("layers.0", "blocks.0")))
    passes: list[int] = []
    hook = layer.register_forward_hook(lambda *_: passes.append(1))
    fresh = Sample("x", tiny.images[2:], turns=(SHORT,))
    list(tiny.model.answer([fresh], FEW))
    assert len(passes) == 1
    list(tiny.model.answer([Sample("x", tiny.images[2:], turns=(LONG,))], FEW))
    tiny.model.likelihoods([fresh], [("yes", "no")])
    assert len(passes) == 1
    list(tiny.model.answer([tiny.sample(SHORT)], FEW))
    assert len(passes) == 2
    hook.remove()


def test_what_a_model_says_of_itself(tiny: Tiny) -> None:
    assert tiny.model.name == str(tiny.folder)
    assert tiny.model.temperature is None
    assert "nobody has measured" in tiny.model.scope
    assert tiny.model.decoding == Decoding()
    assert len(tiny.model.digest) == 64


# --- what one format shows for all ---------------------------------------------------------


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made("llava", tmp_path_factory), tmp_path / "copy"))


def _settings(folder: Path, **given: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2} | given))


def test_published_settings_are_kept_and_draws_depend_on_the_question_alone(
    folder: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (30, 30), "pink").save(tmp_path / "a.png")
    samples = [Sample(q, (str(tmp_path / "a.png"),), turns=(q,)) for q in (SHORT, LONG)]
    greedy = HFResponder(str(folder), device="cpu")
    plain = list(greedy.answer(samples, FEW))
    _settings(folder, do_sample=True, temperature=5.0, top_k=0, max_new_tokens=6)
    drawing = HFResponder(str(folder), device="cpu")
    assert (drawing.draws, drawing.decoding.max_new_tokens) == (True, 6)
    state = torch.random.get_rng_state()
    drawn = list(drawing.answer(samples))
    assert torch.equal(state, torch.random.get_rng_state())
    assert drawn != plain
    torch.rand(1)  # another state to begin with
    assert drawn[::-1] == list(drawing.answer(samples[::-1]))
    _settings(folder, do_sample=True, top_k=1, num_beams=2, length_penalty=0.3)
    beams = HFResponder(str(folder), device="cpu")
    assert not beams.draws
    assert beams.decoding == Decoding(beams=2, length_penalty=0.3)


def test_weights_and_words_change_the_digest(folder: Path) -> None:
    digests = {HFResponder(str(folder), device="cpu").digest}
    digests.add(HFResponder(str(folder), device="cpu", load="bfloat16").digest)
    (folder / "chat_template.jinja").write_text(LLAVA.replace("ASSISTANT", "MODEL"))
    digests.add(HFResponder(str(folder), device="cpu").digest)
    _settings(folder, repetition_penalty=2.0)
    digests.add(HFResponder(str(folder), device="cpu").digest)
    assert len(digests) == 4


def test_what_is_missing_or_wrong_is_said_in_one_line(folder: Path) -> None:
    with pytest.raises(ResourceError, match=r"hf download llava-hf/llava-1.5-7b-hf"):
        open_responder("hf:llava-hf/llava-1.5-7b-hf")
    with pytest.raises(ResourceError, match="no such checkpoint"):
        open_responder("hf:./nowhere")
    with pytest.raises(ResourceError, match=r"--load 4bit needs the package bitsandbytes.*pip"):
        HFResponder(str(folder), device="cpu", load="4bit")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="no chat template"):
        HFResponder(str(folder), device="cpu")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(DataError, match="weights cannot be read"):
        HFResponder(str(folder), device="cpu")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config["text_config"]))
    with pytest.raises(DataError, match="llama is no model that answers"):
        HFResponder(str(folder), device="cpu")
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(DataError, match="not a model of this transformers"):
        HFResponder(str(folder), device="cpu")


def test_a_folders_own_code_is_never_run_whatever_is_typed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    config = json.loads((folder / "config.json").read_text())
    strange = config | {"model_type": "theirs", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(strange))
    with pytest.raises(DataError, match="not a model of this transformers"):
        HFResponder(str(folder), device="cpu")
    (folder / "config.json").write_text(json.dumps(config))
    told = {"processor_class": "Theirs", "auto_map": {"AutoProcessor": "code.Theirs"}}
    (folder / "processor_config.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="no processor of images and words"):
        HFResponder(str(folder), device="cpu")


def test_instructblip_is_asked_one_question_about_one_image(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model = HFResponder(str(made("instructblip", tmp_path_factory)), device="cpu")
    for sample in (Sample("s", (), turns=("a",)), Sample("s", ("i",), turns=("a", "b", "c"))):
        with pytest.raises(DataError, match="one question about one image"):
            model.prompt(sample)


@pytest.mark.parametrize("kind", ["instructblip", "llava"])
def test_a_question_longer_than_the_model_reads_is_refused_with_the_limit(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, kind: str
) -> None:
    model = HFResponder(str(made(kind, tmp_path_factory)), device="cpu")
    Image.new("RGB", (28, 28), "pink").save(tmp_path / "a.png")
    short, long = (
        Sample(name, (str(tmp_path / "a.png"),), turns=("Is it tissue? " * n,))
        for name, n in (("short", 1), ("long", 400))
    )
    reads = {"instructblip": 64, "llava": 512}[kind]
    for ask in (
        lambda: list(model.answer([short, long], FEW)),
        lambda: model.likelihoods([long], [("yes", "no")]),
    ):
        with pytest.raises(UsageError, match=rf"^long: \d+ tokens .* reads at most {reads}; ask"):
            ask()
    tokens = len(model._inputs([short], [model._text(short)])["input_ids"][0])
    model._limits = {"attention_mask": tokens + 2}
    assert list(model.answer([short], FEW)) == list(model.answer([short], Decoding(2)))


def test_a_full_memory_is_said_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        msg = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(msg)

    model = HFResponder(str(made("llava", tmp_path_factory)), device="cpu")
    Image.new("RGB", (28, 28), "pink").save(tmp_path / "a.png")
    monkeypatch.setattr(model.network, "generate", full)
    with pytest.raises(ResourceError, match=r"the memory of cpu is full; give a smaller --load"):
        list(model.answer([Sample("s", (str(tmp_path / "a.png"),), turns=("Is it?",))], FEW))
