"""Learning from words alone: no images, no encoder, no connector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_generate import folder as images
from test_generate import four, task, trained
from test_language import llama

from pathcli.data.corpus import Corpus
from pathcli.data.instructions import InstructionData, TextData
from pathcli.errors import DataError, UsageError
from pathcli.recipe import Recipe, build, check_recipe, load_recipe
from pathcli.runs import train
from pathcli.store import Store
from pathcli.types import Sample, silent
from pathcli.vlm.blind import NoConnector, NoEncoder
from pathcli.vlm.own import RunResponder
from pathcli.vlm.plan import plan

__all__ = ["images", "llama"]  # fixtures

ROWS = [
    {"question": "Which colour has blood?", "answer": "red cells"},
    {"question": "Is it benign?", "answer": "no"},
]


def written(folder: Path, rows: list[dict[str, Any]], name: str = "words.jsonl") -> Path:
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    return folder / name


def recipe(model: str, source: Path, **given: Any) -> Recipe:
    values = {
        "version": 1,
        "task": "generate",
        "language": {"kind": "hf", "model": model, "tune": "full"},
        "chat": {"template": "vicuna-v1", "system": ""},
        "data": {"kind": "texts", "source": str(source), "val": 0},
        "train": {"epochs": 60, "batch": 2, "lr": 5e-3, "schedule": "constant"},
    }
    return Recipe("words", values | given)


# --- data --------------------------------------------------------------------------------


def test_questions_and_conversations_are_read_without_images(tmp_path: Path) -> None:
    table = written(tmp_path, ROWS)
    found = TextData(source=table, val=0).corpus().train
    assert {(s.turns, s.answer, s.images) for s in found} == {
        ((row["question"],), row["answer"], ()) for row in ROWS
    }
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    marked = [{"from": "human", "value": "<image>\na"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": turns}, {"image": "gone.png", "conversations": turns}]
    rows.append({"image": "gone.png", "conversations": marked})
    corpus = TextData(source=written(tmp_path, rows, "talks.jsonl"), val=0).corpus()
    assert [(s.turns, s.answer, s.images) for s in corpus.train] == [(("a",), "b", ())] * 2
    assert sum(corpus.dropped.values()) == 1  # of an image it cannot see


def test_rows_without_image_are_still_left_out_where_there_should_be_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        InstructionData(source=written(tmp_path, ROWS)).corpus()


def test_each_row_is_split_for_itself(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": "a"} for i in range(10)]
    corpus = TextData(source=written(tmp_path, rows), val=0.2).corpus()
    assert (len(corpus.train), len(corpus.val)) == (8, 2)


# --- training ----------------------------------------------------------------------------


def test_words_are_learnt_and_answered_by_the_run(llama: str, tmp_path: Path, store: Store) -> None:
    made = recipe(llama, written(tmp_path, ROWS))
    (run,) = train(made, out=tmp_path / "runs", store=store, device="cpu")
    assert run.facts["visual tokens of an image"] == 0
    responder = RunResponder.of(run.folder, device="cpu")
    asked = [Sample(str(i), (), "", (row["question"],)) for i, row in enumerate(ROWS)]
    assert list(responder.answer(asked)) == [row["answer"] for row in ROWS]
    assert "<image>" not in responder.prompt(asked[0])
    right, wrong = responder.likelihoods(asked[:1], [["red cells", "no"]])[0]
    assert right > wrong


def test_validation_and_a_view_of_a_sample_need_no_images(
    llama: str, tmp_path: Path, store: Store
) -> None:
    rows = [*ROWS, {"question": "Is it red?", "answer": "yes"}]
    data = {"kind": "texts", "source": str(written(tmp_path, rows)), "val": 0.3}
    made = build(
        recipe(llama, tmp_path, data=data, train={"epochs": 1, "batch": 1, "choose": "exact_match"})
    )
    shown = dict(made.sample_view(1))
    assert shown["counts"].startswith(f"{shown['counts'].split()[0]} tokens: 0 of images")
    made.prepare(store, device="cpu", progress=lambda _: silent)
    work = made.begin(1)
    assert work.validate is not None
    assert {"loss", "exact_match"} <= work.validate().keys()
    batch = work.collate(list(work.examples), np.random.default_rng(0))
    assert not {"views", "tokens", "of"} & batch.keys()


def test_images_and_an_encoder_go_together(llama: str, images: Path, store: Store) -> None:
    blind = {"encoder": NoEncoder(), "connector": NoConnector}
    seen = NoEncoder().encode(torch.ones(3, 4, 4, 3, dtype=torch.uint8))
    assert (seen.shape, seen.dtype) == ((3, 0, 0), torch.float32)
    with pytest.raises(UsageError, match="the samples have images: give encoder and connector"):
        task(llama, Corpus(four(images), [], "abc"), store, **blind)
    words = Corpus([Sample("a", (), "no", ("Is it?",))], [], "abc")
    with pytest.raises(UsageError, match="no images: leave out encoder and connector"):
        task(llama, words, store)
    with pytest.raises(UsageError, match="encoder and connector go together"):
        task(llama, words, store, encoder=NoEncoder())


def test_words_beside_images_leave_what_is_seen_as_it_is(
    llama: str, images: Path, store: Store, tmp_path: Path
) -> None:
    made = task(llama, Corpus(four(images), [], "abc"), store, tune="full", train={"epochs": 1})
    work, _ = trained(made, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    mask, labels = torch.ones_like(ids).bool(), ids.clone()
    batch = {"ids": ids, "mask": mask, "image": ~mask, "labels": labels}
    assert torch.equal(work.module.embeds(batch), work.module.language.embed(ids))


def test_the_shipped_recipe_is_planned_without_a_tower() -> None:
    made = load_recipe("pathgen-summarise")
    assert check_recipe(made).asked == ("data.source",)
    assert "encoder" not in made.values
    assert "connector" not in made.values
    found = plan(made, gpu="4xa100-80g")
    assert "encoder" not in {part.name for part in found.parts}
