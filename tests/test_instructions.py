"""Instructions from one source or several, split so that an image is on one side."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from pathcli.data.instructions import InstructionData
from pathcli.data.pairs import PairData
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.recipe import Recipe, _Check
from pathcli.registry import resolve
from pathcli.types import Sample


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(40):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def table(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def rows(images: int = 40, questions: int = 3) -> list[dict[str, object]]:
    return [
        {"path": f"{i}.png", "question": f"Question {q}?", "answer": f"Answer {i % 4}"}
        for q in range(questions)
        for i in range(images)
    ]


def names(samples: object) -> list[str]:
    return [sample.name for sample in samples]  # type: ignore[attr-defined]


def test_all_questions_of_an_image_are_on_one_side(images: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "t.json", rows())
    corpus = InstructionData(source=path, images=images, val=0.25).corpus()
    assert (len(corpus.train), len(corpus.val)) == (90, 30)
    assert not {*names(corpus.train)} & {*names(corpus.val)}
    assert {s.turns for s in corpus.val} == {(f"Question {q}?",) for q in range(3)}
    assert corpus.warnings[0].startswith("no instruction has a group (patient, slide)")
    table(path, rows()[::-1])
    again = InstructionData(source=path, images=images, val=0.25).corpus()
    assert again.digest == corpus.digest
    assert list(again.train) == list(corpus.train)
    changed = rows()
    changed[0]["question"] = "Another?"
    table(path, changed)
    assert InstructionData(source=path, images=images).corpus().digest != corpus.digest


def test_an_image_shown_beside_others_is_not_on_both_sides(images: Path, tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Compare."}, {"from": "gpt", "value": "Alike."}]
    pairs = [(f"{2 * i}.png", f"{2 * i + 1}.png") for i in range(20)]
    shown: list[object] = [list(pair) for pair in pairs] + [second for _, second in pairs]
    path = table(tmp_path / "t.json", [{"image": i, "conversations": talk} for i in shown])
    corpus = InstructionData(source=path, images=images, val=0.3).corpus()
    sides = [
        {name for s in part for name in s.name.split(", ")} for part in (corpus.train, corpus.val)
    ]
    assert sides[1]
    assert not sides[0] & sides[1]
    torn = corpus.dropped["the image is in train under another group"]
    assert torn == 40 - len(corpus.train) - len(corpus.val) > 0


def test_words_are_asked_for_of_captions_alone(images: Path, tmp_path: Path) -> None:
    path = table(
        tmp_path / "t.json",
        [{"path": "0.png", "question": "Is it?", "answer": "yes"}],
    )
    assert len(InstructionData(source=path, images=images, min_words=20).corpus().train) == 1
    captions = [{"image": "1.png", "caption": "word " * n} for n in (19, 20)]
    path = table(tmp_path / "c.json", captions)
    corpus = InstructionData(source=path, images=images, min_words=20).corpus()
    assert [len(s.answer.split()) for s in corpus.train] == [20]
    assert corpus.dropped == {"fewer than 20 words": 1}


def test_captions_are_the_same_corpus_as_pairs(images: Path, tmp_path: Path) -> None:
    captions = [{"image": f"{i}.png", "caption": f"Caption {i}"} for i in range(40)]
    path = table(tmp_path / "c.json", captions)
    one = PairData(source=path, images=images, val=0.2).corpus()
    other = InstructionData(source=path, images=images, val=0.2).corpus()
    assert one.digest == other.digest
    assert list(one.val) == list(other.val)


# --- several sources ---------------------------------------------------------------------


@pytest.fixture
def mixture(tmp_path: Path) -> dict[str, list[Path]]:
    """PathVQA's pickle and PMC-VQA's table, whose images share a name."""
    for folder in ("pathvqa", "pmc"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (2, 2)).save(tmp_path / folder / "x_1.png")
    asked = {"img_id": "x_1", "sent": "What?", "label": {"A: yes": 1}}
    (tmp_path / "vqa.pkl").write_bytes(pickle.dumps([asked]))
    lines = ["Figure_path,Question,Choice A,Choice B,Answer"]
    lines += ["x_1.png,Which?,yes,no,A", "gone.png,Which?,yes,no,A", "x_1.png,Why?,a,b,F"]
    (tmp_path / "pmc.csv").write_text("\n".join(lines))
    return {
        "source": [tmp_path / "vqa.pkl", tmp_path / "pmc.csv"],
        "images": [tmp_path / "pathvqa", tmp_path / "pmc"],
    }


def test_sources_are_mixed_each_with_its_images_and_layout(
    mixture: dict[str, list[Path]],
) -> None:
    corpus = InstructionData(**mixture, val=0).corpus()  # type: ignore[arg-type]
    found = sorted((Path(str(s.images[0])).parent.name, s.turns[0], s.answer) for s in corpus.train)
    assert found == [("pathvqa", "What?", "A: yes"), ("pmc", "Which?\nA: yes\nB: no", "A: yes")]
    assert corpus.dropped == {"no such image file": 1, "the answer is none of the choices": 1}
    assert corpus.warnings[0].startswith("2 of 4 rows left out: ")
    with pytest.raises(UsageError, match=r"one folder, or one for each of 2 in data\.source"):
        InstructionData(source=mixture["source"], images=[*mixture["images"], Path("x")])


def test_images_of_one_name_in_two_folders_are_two_images(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
        table(tmp_path / folder / "t.json", [{"path": "a.png", "question": "Q", "answer": "A"}])
    paths = [tmp_path / "one" / "t.json", tmp_path / "two" / "t.json"]
    corpus = InstructionData(source=paths, val=0.5).corpus()
    assert (len(corpus.train), len(corpus.val)) == (1, 1)
    same = InstructionData(source=paths, images=tmp_path / "one").corpus()
    assert same.dropped == {"the same instruction again": 1}


def test_a_star_stands_for_several_files(images: Path, tmp_path: Path) -> None:
    for number in range(3):
        table(tmp_path / f"part-{number}.json", rows()[number::3])
    data = InstructionData(source=tmp_path / "part-*.json", images=images, val=0)
    assert len(data.corpus().train) == 120
    with pytest.raises(ResourceError, match=r"other-\*\.json: no such file"):
        InstructionData(source=tmp_path / "other-*.json").corpus()


def test_rows_are_kept_by_their_columns(images: Path, tmp_path: Path) -> None:
    typed = [row | {"answer_type": "yes/no" if i % 2 else "other"} for i, row in enumerate(rows())]
    path = table(tmp_path / "t.json", typed)
    data = InstructionData(source=path, images=images, val=0, keep={"answer_type": ["yes/no"]})
    assert len(data.corpus().train) == 60


# --- recipes and messages ----------------------------------------------------------------


def test_a_recipe_can_set_every_argument(images: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "t.json", rows())
    given = {
        "kind": "instructions",
        "source": [str(path)],
        "images": str(images),
        "format": "questions",
        "keep": {"answer": ["*"]},
        "val": 0.5,
        "limit": 4,
        "min_words": 1,
        "max_broken": 0.1,
        "max_pixels": 16777216,
    }
    check = _Check(Recipe("x", {"version": 1, "task": "mil"}))
    check.faults.clear()
    data = check._section("data", "CorpusData", given, None)
    assert check.faults == []
    assert resolve("data", "instructions") is InstructionData
    assert len(data.corpus().train) + len(data.corpus().val) == 4
    wrong = given | {"format": "lava", "source": 3}
    check._section("data", "CorpusData", wrong, None)
    assert [fault.split(":")[0] for fault in check.faults] == ["data.source", "data.format"]


def test_nothing_left_says_why_and_where_was_looked(tmp_path: Path) -> None:
    path = table(tmp_path / "t.json", rows(2, 1))
    text = (
        f"{path}: no instruction is left: 2 of 2 rows left out: no such image file 2 "
        f"(e.g. 0.png); images were looked for below {tmp_path}: give data.images if they lie "
        "elsewhere"
    )
    with pytest.raises(DataError) as told:
        InstructionData(source=path).corpus()
    assert str(told.value) == text
    with pytest.raises(UsageError, match=r"data\.max_pixels: a positive number, not 0"):
        InstructionData(source=path, max_pixels=0)


# --- pixels ------------------------------------------------------------------------------


def test_all_images_of_a_sample_are_read(images: Path) -> None:
    sample = Sample("2, 5", (str(images / "2.png"), str(images / "5.png")), "a", ("q",))
    read = InstructionData(source=images).pictures([sample])
    found, *pixels = read(sample)
    assert found == sample
    assert [image[0, 0, 0] for image in pixels] == [2, 5]
    assert (read.read, read.broken, read.skipped) == (2, 0, 0)


def test_images_too_large_are_skipped_and_counted_apart(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(10):
        Image.new("RGB", (5, 2 if number else 3)).save(images / f"{number}.png")
    path = table(tmp_path / "t.json", rows(20, 1))
    data = InstructionData(source=path, images=images, val=0, max_pixels=10, max_broken=0)
    train = data.corpus().train
    read = data.pictures(train)
    with caplog.at_level(logging.INFO, "pathcli"):
        seen = [read(sample)[0].name for sample in train]
    assert (read.skipped, read.broken) == (1, 0)
    assert [a for a, b in zip(names(train), seen, strict=True) if a != b] == ["0.png"]
    assert "0.png: more than 10 px, another is used" in caplog.text
    strict = InstructionData(source=path, images=images, max_pixels=3).pictures(train)
    with pytest.raises(DataError, match="too large, and no other image can be used"):
        strict(train[0])
    (images / "3.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"more than data\.max_broken=0"):
        list(map(read, train))


def test_a_substitute_depends_on_the_question_as_well(images: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "t.json", rows())
    data = InstructionData(source=path, images=images, val=0, max_broken=0.9)
    train = data.corpus().train
    (images / "7.png").write_bytes(b"")
    of_seven = [s for s in train if s.name == "7.png"]
    read = data.pictures(train)
    first = [read(sample)[0] for sample in of_seven]
    assert [read(sample)[0] for sample in of_seven] == first
    assert len({(s.name, s.turns) for s in first}) == len(of_seven) == 3
    for sample in first:
        _, *pixels = read(sample)
        assert pixels[0][0, 0].tolist() == [int(sample.name[:-4]), 0, 0]
