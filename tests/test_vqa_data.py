"""Every layout of questions becomes the same rows, and what cannot be asked is counted."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.evals.vqa_cards import SetCard, cards, prompt_of, prompts, published
from pathcli.evals.vqa_data import Question, read_questions, with_images
from pathcli.evals.vqa_scores import MADE_OF
from pathcli.metrics.vqa import RULES


def table(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return path


def test_a_table_of_ones_own_keeps_ids_types_groups_and_options(tmp_path: Path) -> None:
    rows = [
        {"question": "Is it?", "answer": "Yes.", "image": "a.png", "id": 7, "group": "p1"},
        {"question": "Which?", "answer": "B", "image": "a.png", "options": ["A) x", "B) y"]},
        {"question": "Where is it?", "answer": "there", "image": ["a.png", "b.png"], "type": "t"},
    ]
    one, two, three = read_questions(str(table(tmp_path / "q.json", rows))).questions
    assert one == Question("7", ("a.png",), "Is it?", "Yes.", (), "yes/no", "p1")
    assert two == Question("1", ("a.png",), "Which?", "y", ("x", "y"), "choice", "")
    assert (three.images, three.type, three.kind) == (("a.png", "b.png"), "t", "open")
    assert [one.kind, two.kind, one.unit, two.unit] == ["closed", "choice", "p1", "a.png"]


def test_options_of_a_csv_are_json_or_parted_by_bars(tmp_path: Path) -> None:
    with (tmp_path / "q.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "image", "options"])
        writer.writerow(["Which?", "y", "a.png", "x | y"])
        writer.writerow(["Which?", "y", "a.png", '["x", "y"]'])
        writer.writerow(["Open?", "y", "a.png", ""])
    found = read_questions(str(tmp_path / "q.csv")).questions
    assert [q.options for q in found] == [("x", "y"), ("x", "y"), ()]


def test_an_answer_that_is_none_of_the_options_is_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "Which?", "answer": "z", "image": "a.png", "options": ["x", "y"]},
        {"question": "", "answer": "z", "image": "a.png"},
        {"question": "Which?", "answer": "x", "image": "a.png", "options": ["x", "y"]},
    ]
    found = read_questions(str(table(tmp_path / "q.json", rows)))
    assert [q.id for q in found.questions] == ["2"]  # ids are rows of the file, whatever is left
    assert dict(found.dropped) == {
        "the answer is none of the options": 1,
        "no question or no answer": 1,
    }


def test_true_and_false_are_yes_and_no(tmp_path: Path) -> None:
    rows = [{"question": "Is it?", "answer": answer, "image": "a"} for answer in (True, False)]
    found = read_questions(str(table(tmp_path / "q.json", rows))).questions
    assert [(q.answer, q.kind) for q in found] == [("yes", "closed"), ("no", "closed")]


def test_an_empty_set_and_an_id_told_twice_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no question is left"):
        read_questions(str(table(tmp_path / "q.json", [])))
    rows = [{"id": "1", "question": "a?", "answer": "b", "image": "c"}] * 2
    with pytest.raises(DataError, match="id '1' stands for two questions"):
        read_questions(str(table(tmp_path / "q.json", rows)))


def test_an_unknown_name_and_a_known_one_without_a_folder_say_what_to_do() -> None:
    with pytest.raises(UsageError, match="did you mean 'pathvqa'"):
        read_questions("pathvq")
    with pytest.raises(UsageError, match="pathvqa: where is it\\? give --data DIR"):
        read_questions("pathvqa")


def test_pathvqas_pickle_and_its_json_of_images_are_the_same_questions(tmp_path: Path) -> None:
    official = [
        {"img_id": "test_1", "sent": "What is it?", "label": {"a gland": 1, "no": 0.3}},
        {"img_id": "test_1", "sent": "Is it?", "label": {"no": 1}, "question_type": "is"},
    ]
    (tmp_path / "qas").mkdir()
    (tmp_path / "qas" / "test_vqa.pkl").write_bytes(pickle.dumps(official))
    picture(tmp_path / "images" / "test" / "test_1.jpg")
    asked = read_questions("pathvqa", data=tmp_path)
    found = with_images(asked).questions
    assert [(q.question, q.answer, q.type) for q in found] == [
        ("What is it?", "a gland", "what"),
        ("Is it?", "no", "is"),
    ]
    assert found[0].images == (str(tmp_path / "images" / "test" / "test_1.jpg"),)
    by_image = [
        {"img_id": "test_0", "sentf": {"pvqa": []}, "labelf": {"pvqa": []}},
        {
            "img_id": "test_1",
            "sentf": {"pvqa": ["What is it?", "Is it?"]},
            "labelf": {"pvqa": [{"a gland": 1}, {"no": 1}]},
        },
    ]
    same = read_questions("pathvqa", data=table(tmp_path / "lxmert.json", by_image))
    assert [q.id for q in same.questions] == ["test_1-0", "test_1-1"]
    assert [q.answer for q in same.questions] == ["a gland", "no"]


def test_every_answer_of_a_conversation_is_a_question_by_itself(tmp_path: Path) -> None:
    says = ["<image>\nWhat is it?", "A gland.", "Is it?", "yes"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(says)]
    domain = {"histology": True, "mri": False}
    rows = [{"id": "9", "image": "a.png", "domain": domain, "conversations": turns}]
    found = read_questions(str(table(tmp_path / "q.json", rows))).questions
    assert [(q.id, q.question, q.answer, q.type) for q in found] == [
        ("9-0", "What is it?", "A gland.", "histology"),
        ("9-1", "Is it?", "yes", "histology"),
    ]


def test_quilt_vqas_closed_questions_are_right_by_their_word_not_their_sentence(
    tmp_path: Path,
) -> None:
    rows = [
        {"question": "Is it?", "answer": "Yes, it is.", "yes_no_answer": "Yes", "image": "a"},
        {"question": "What?", "answer": "A gland.", "yes_no_answer": "", "image": "a"},
    ]
    found = read_questions(str(table(tmp_path / "q.json", rows))).questions
    assert [(q.kind, q.answer) for q in found] == [("closed", "Yes"), ("open", "A gland.")]


def test_pmc_vqas_choices_become_options_by_letter_and_by_words(tmp_path: Path) -> None:
    head = ["Figure_path", "Question", *(f"Choice {x}" for x in "ABCD"), "Answer", "Answer_label"]
    options = ["A:stroma", " B: gland", "C:nerve", "D:fat"]
    with (tmp_path / "test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerow(["PMC12_f.jpg", "What?", *options, "gland", ""])
        writer.writerow(["PMC12_f.jpg", "What?", *options, "nonsense", "D"])
    found = read_questions("pmc-vqa", data=tmp_path).questions
    assert [q.answer for q in found] == ["gland", "fat"]
    assert found[0].options == ("stroma", "gland", "nerve", "fat")
    assert found[0].group == "PMC12"


def test_pathmmus_test_is_test_and_tiny_and_types_are_its_parts(tmp_path: Path) -> None:
    item = {"img": "a.png", "question": "What?", "options": ["A) x", "B) y"], "answer": "B) y"}
    parts = {split: [item | {"No": 1}] for split in ("val", "test", "test_tiny")}
    table(tmp_path / "data.json", {"PubMed": parts, "Atlas": parts})
    found = read_questions("pathmmu", data=tmp_path).questions
    assert [q.id for q in found] == [
        *("PubMed-test-1", "PubMed-test_tiny-1", "Atlas-test-1", "Atlas-test_tiny-1")
    ]
    assert {(q.type, q.answer) for q in found} == {("PubMed", "y"), ("Atlas", "y")}
    assert len(read_questions("pathmmu", data=tmp_path, split="val").questions) == 2
    rows = {s: [r["metric"] for r in published("pathmmu", s)] for s in ("test", "test_tiny", "val")}
    assert rows["test_tiny"] == ["accuracy, test_tiny"]
    assert rows["test"] == ["accuracy, all of test", "accuracy, overall"]
    assert rows["val"] == []  # nobody published any
    splits = (None, "test_tiny")
    sets = [read_questions("pathmmu", data=tmp_path, split=split) for split in splits]
    assert [found.split for found in sets] == ["test", "test_tiny"]
    with pytest.raises(UsageError, match="no part is called 'tiny'"):
        read_questions("pathmmu", data=tmp_path, split="tiny")


def test_pa_llavas_three_sets_are_asked_in_its_literal_words(tmp_path: Path) -> None:
    for name in ("b001.tif", "iv002.tif"):
        picture(tmp_path / "bach" / name)
    for label in ("normal", "oscc"):
        picture(tmp_path / "oscc" / label / "1.png")
    asked = read_questions("bach", data=tmp_path / "bach")
    assert [q.answer for q in asked.questions] == ["Benign tumors", "Invasive cancer"]
    assert prompt_of(None, asked.card).words(asked.questions[0]) == (
        "What choice best describes this breast tissue? Just give your choice: A:Normal tissue "
        "B: Benign tumors C: In situ cancer D: Invasive cancer"
    )
    oscc = read_questions("oscc", data=tmp_path / "oscc")
    assert [q.answer for q in oscc.questions] == [
        "Normal oral epithelium",
        "Oral squamous cell carcinoma",
    ]
    assert prompt_of(None, oscc.card).words(oscc.questions[0]) == (
        "What choice best describes this oral epithelium tissue? Just give your choice: "
        "A:Normal oral epithelium B:Oral squamous cell carcinoma"
    )
    colon = cards()["colonpath"]
    question = Question("1", (), colon.question, "Tumor tissue", tuple(colon.options))
    assert prompt_of(None, colon).words(question) == (
        "What choice best describes this colon tissue? Just give your choice: A:Normal tissue "
        "B:Tumor tissue"
    )


def test_colonpaths_own_table_is_read_with_its_patients(tmp_path: Path) -> None:
    folder = tmp_path / "MedFMC_val" / "colon"
    for name in ("a 1.png", "b.png"):
        picture(folder / "images" / name)
    rows = ["study_id,img_id,tumor", "p1,a 1.png,1", "p2,b.png,0", "p3,,1", "p3,c.png,2"]
    (folder / "colon_val.csv").write_text("\n".join(rows))
    for data in (tmp_path, folder, folder / "colon_val.csv"):
        found = with_images(read_questions("colonpath", data=data))
        assert [(q.answer, q.group) for q in found.questions] == [
            ("Tumor tissue", "p1"),
            ("Normal tissue", "p2"),
        ]
        assert found.questions[0].images == (str(folder / "images" / "a 1.png"),)
        assert dict(found.dropped) == {
            "no image is named": 1,
            "label '2' is no class of colonpath": 1,
        }
    picture(tmp_path / "own" / "tumor" / "1.png")
    picture(tmp_path / "own" / "normal" / "1.png")
    own = read_questions("colonpath", data=tmp_path / "own").questions
    assert {q.answer for q in own} == {"Tumor tissue", "Normal tissue"}


def test_prompts_are_those_of_the_model_then_of_the_set_unless_one_is_named() -> None:
    closed = Question("1", (), "Is it?", "yes")
    choice = Question("2", (), "Which?", "x", ("x", "y"))
    quilt = prompt_of(None, SetCard(), "Quilt-LLaVA-v1.5-7b")
    assert quilt.words(closed) == "Is it? Please choose from the following two options: [yes, no]"
    assert prompt_of(None, cards()["pathmmu"], "m").words(choice, (1, 0)) == (
        "Which?\n(A) y\n(B) x\n\nAnswer with the option's letter from the given choices directly."
    )
    assert prompt_of(None, SetCard(), "m").words(choice) == "Which?\nA: x\nB: y"
    clover = prompt_of("clover", SetCard(), "m")
    assert clover.words(closed) == (
        "Now that you are a pathologist, please answer the following questions based on the "
        "images. Is it? please only answer yes or no."
    )
    assert dict(clover.decoding) == {"beams": 5, "min_new_tokens": 5, "max_new_tokens": 40}
    with pytest.raises(UsageError, match="--prompt: none is called 'clove'"):
        prompt_of("clove", SetCard())


def test_words_with_braces_are_asked_as_they_are() -> None:
    question = Question("1", (), "What is {question} and {options}?", "{x}", ("{x}", "{letter}"))
    assert prompts()["plain"].words(question) == (
        "What is {question} and {options}?\nA: {x}\nB: {letter}"
    )


def test_every_published_number_names_a_number_of_ours_and_every_set_a_prompt() -> None:
    for name, card in cards().items():
        assert card.prompt in prompts()
        for row in published(name):
            assert row["rule"].partition(".")[0] in {*RULES, *MADE_OF}
            assert all(0 < value < 1 for value in row["values"].values())
            assert row["source"]


def test_missing_images_are_counted_named_and_limited(tmp_path: Path) -> None:
    rows = [
        {"question": "Is it?", "answer": "no", "image": name} for name in ("a.png", "b.png", "")
    ]
    picture(tmp_path / "a.png")
    asked = read_questions(str(table(tmp_path / "q.json", rows)))
    with pytest.raises(ResourceError, match=r"2 of 3 questions have no image .*\(the first: b.png"):
        with_images(asked)
    found = with_images(asked, missing=0.7)
    assert [q.images for q in found.questions] == [(str(tmp_path / "a.png"),)]
    assert dict(found.dropped) == {"no such image file": 1, "no image is named": 1}
    with pytest.raises(ResourceError, match="3 of 3 questions"):
        with_images(read_questions(str(tmp_path / "q.json"), images=tmp_path / "none"), missing=1)
