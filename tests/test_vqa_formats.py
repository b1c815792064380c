"""Questions, answers and conversations in the layouts they are published in."""

from __future__ import annotations

import csv
import json
import pickle
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from pictures import png, three_images

from pathcli.data.formats import TALKS, Source, formats, recognise, samples
from pathcli.data.images import read_image
from pathcli.errors import DataError, ResourceError
from pathcli.types import Region, Sample

ASKED = {"from": "human", "value": "<image>\nWhat is shown?"}
TOLD = {"from": "gpt", "value": "A gland. "}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return three_images(tmp_path / "images")


def save(path: Path, rows: object) -> Path:
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))  # type: ignore[call-overload]
    else:
        path.write_text(json.dumps(rows))
    return path


def read(path: Path, root: Path | None = None, form: str = "auto") -> tuple[list[Sample], Source]:
    source = Source(path, root, bare=True)
    return list(samples(source, form, TALKS)), source


def said(found: list[Sample]) -> list[tuple[str, tuple[str, ...], str]]:
    return [(s.name, s.turns, s.answer) for s in found]


# --- conversations -----------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llavas_conversations_become_turns_and_a_last_answer(
    images: Path, tmp_path: Path, suffix: str
) -> None:
    more = [{"from": "Human", "value": "Where?"}, {"from": "GPT", "value": "Left."}]
    rows = [
        {"id": 1, "image": "a.png", "conversations": [ASKED, TOLD]},
        {"id": 2, "image": "sub/b.png", "conversations": [ASKED, TOLD, *more]},
        {"id": 3, "image": "a", "conversations": more},  # no ending, no mark
        {"id": 4, "conversations": more},
        {"id": 5, "image": "gone.png", "conversations": [ASKED, TOLD]},
    ]
    path = save(tmp_path / f"x{suffix}", rows)
    assert recognise(path, TALKS) == "llava"
    found, source = read(path, images)
    assert said(found) == [
        ("a.png", ("<image>\nWhat is shown?",), "A gland."),
        ("sub/b.png", ("<image>\nWhat is shown?", "A gland.", "Where?"), "Left."),
        ("a", ("Where?",), "Left."),
    ]
    assert found[2].images == (str(images / "a.png"),)
    assert source.dropped == {"no image is named": 1, "no such image file": 1}
    assert source.rows == 5


def test_a_conversation_that_is_not_whole_is_counted(images: Path, tmp_path: Path) -> None:
    two = {"from": "human", "value": "<image> <image> Compare."}
    wrong: list[Any] = [
        [],
        None,
        [ASKED],
        [TOLD, ASKED],
        [ASKED, ASKED],
        [ASKED, TOLD, ASKED],
        [ASKED, {"from": "gpt", "value": " "}],
        [{"from": "system", "value": "x"}, TOLD],
        ["text", TOLD],
        [two, TOLD],  # two places for one image
    ]
    rows = [{"image": "a.png", "conversations": talk} for talk in wrong]
    rows.append({"image": ["a.png", "c.png"], "conversations": [two, TOLD]})
    rows.append({"image": ["a.png", "c.png"], "conversations": [ASKED, TOLD]})
    found, source = read(save(tmp_path / "x.json", rows), images, "llava")
    assert [s.images for s in found] == [(str(images / "a.png"), str(images / "c.png"))]
    assert found[0].name == "a.png, c.png"
    why = "no whole conversation (question, answer, question, answer)"
    assert source.dropped == {why: len(wrong) + 1}


def test_images_of_quilt_pmc_and_tcga_are_grouped_by_their_names(tmp_path: Path) -> None:
    names = {
        "WlwzYoKzMOY_image_d3d8b5e1.jpg": "WlwzYoKzMOY",
        "_KJZm1orOvU_roi_7a.jpg": "_KJZm1orOvU",
        "PMC8253797_Fig4_11.jpg": "PMC8253797",
        "TCGA-F7-A50J-01Z-00-DX1_32_64.png": "TCGA-F7-A50J",
        "my_image_1.png": "",
        "a.png": "",
    }
    for name in names:
        (tmp_path / name).touch()
    rows = [{"image": name, "conversations": [ASKED, TOLD]} for name in names]
    rows.append({"image": "a.png", "conversations": [ASKED, TOLD], "patient": "p1"})
    found, _ = read(save(tmp_path / "x.json", rows))
    assert [s.group for s in found] == [*names.values(), "p1"]


def test_pathgen_instruct_asks_of_regions_of_slides(tmp_path: Path) -> None:
    wsi = "TCGA-F7-A50J-01Z-00-DX1"
    (tmp_path / f"{wsi}.D754F90E.svs").touch()
    row = {"id": "1", "wsi_id": wsi, "file_id": "f", "position": ["32", "64"], "type": "CLOSE"}
    rows = [
        row | {"image": "x.png", "conversations": [ASKED, TOLD]},
        row | {"conversations": [ASKED]},
        row | {"conversations": [ASKED, TOLD], "type": "OPEN", "position": [1]},
    ]
    path = save(tmp_path / "x.json", rows)
    assert recognise(path, TALKS) == "pathgen-instruct"
    found, source = read(path)
    region = Region(str(tmp_path / f"{wsi}.D754F90E.svs"), (32, 64), 672)
    turns = ("<image>\nWhat is shown?",)
    assert found == [Sample(f"{wsi}_32_64", (region,), "A gland.", turns, group="TCGA-F7-A50J")]
    assert source.dropped == {"no conversations": 1, "no slide or position": 1}
    with pytest.raises(ResourceError, match=r"1 of 1 slides .*give their folder as --images"):
        read(path, tmp_path / "empty")
    path = save(tmp_path / "y.json", [{"image": "a", "conversations": []}])
    with pytest.raises(DataError, match="records need wsi_id, position and conversations, not"):
        read(path, form="pathgen-instruct")


def test_shards_hold_conversations_questions_or_captions(tmp_path: Path) -> None:
    facts = [{"conversations": [ASKED, TOLD]}, {"question": "Q?", "answer": "A"}, {"caption": "C"}]
    members = {f"{i}.json": json.dumps(fact).encode() for i, fact in enumerate(facts)}
    members |= {f"{i}.png": png(i) for i in range(5)} | {"3.txt": b"T"}
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, BytesIO(data))
    found, source = read(tmp_path)
    assert said(found) == [
        ("0/0.png", ("<image>\nWhat is shown?",), "A gland."),
        ("0/1.png", ("Q?",), "A"),
        ("0/2.png", (), "C"),
        ("0/3.png", (), "T"),
    ]
    assert [read_image(s.images[0])[0, 0, 0] for s in found] == [0, 1, 2, 3]
    assert source.dropped == {"no conversation, question or caption": 1}


# --- questions and answers ---------------------------------------------------------------


def test_clovers_instructions(images: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "What?", "answer": "A gland.", "path": "a.png"},
        {"question": "What?", "answer": "", "path": "a.png"},
    ]
    path = save(tmp_path / "instruction_data.json", rows)
    assert recognise(path, TALKS) == "questions"
    found, source = read(path, images)
    assert said(found) == [("a.png", ("What?",), "A gland.")]
    assert source.dropped == {"no question or no answer": 1}


def test_clovers_generations_are_parsed_and_badly_formed_ones_counted(
    images: Path, tmp_path: Path
) -> None:
    text = (
        'question: "What is shown?"\nanswer: "A gland,\nwell formed."\n\n'
        "2. Question: Where is it?\nAnswer 2: In the “mucosa\n"
        'question: "Why?"\n'
        'question: "How many: two or three?"\nanswer: "Two"\nanswer: "Three"'
    )
    rows = [
        {"QA": text, "path": "a.png", "caption": "Gland"},
        {"QA": "I cannot answer this.", "path": "c.png", "caption": "Gland"},
    ]
    path = save(tmp_path / "x.json", rows)
    assert recognise(path, TALKS) == "clover-generations"
    found, source = read(path, images)
    assert said(found) == [
        ("a.png", ("What is shown?",), "A gland,\nwell formed."),
        ("a.png", ("Where is it?",), "In the “mucosa"),
        ("a.png", ("How many: two or three?",), "Two"),
    ]
    assert source.dropped == {"badly formed: question and answer do not alternate": 3}
    assert source.rows == 6


def test_pa_llavas_captions_and_test_questions(images: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "x.json", [{"image": "a.png", "caption": "Gland."}])
    assert recognise(path, TALKS) == "manifest"
    assert said(read(path, images)[0]) == [("a.png", (), "Gland.")]
    asked = {"question": "Q?", "image": "a.png", "answer": "yes", "answer_type": "yes/no"}
    path = save(tmp_path / "test.json", {"17": asked})
    assert said(read(path, images)[0]) == [("a.png", ("Q?",), "yes")]


# --- PathVQA -----------------------------------------------------------------------------


def official(number: int, label: dict[str, float], **more: object) -> dict[str, object]:
    row: dict[str, object] = {"img_id": f"train_{number:04}", "sent": "Where?", "label": label}
    return row | more


@pytest.fixture
def pathvqa(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "train"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"train_{number:04}.jpg").write_bytes(png(number))
    return tmp_path / "images"


def test_pathvqas_pickles_name_images_without_folder_and_ending(
    pathvqa: Path, tmp_path: Path
) -> None:
    rows = [
        official(0, {"in the liver": 1}, question_type="where", answer_type="other"),
        official(1, {"no": 0.3, "yes": 1, "both": 1}),
        official(1, {}),
        official(9, {"no": 1}),
    ]
    del rows[1]["sent"]
    rows[1]["question"] = "Is it?"
    path = save(tmp_path / "train_vqa.pkl", rows)
    assert recognise(path, TALKS) == "pathvqa"
    found, source = read(path, pathvqa)
    assert said(found) == [
        ("train_0000", ("Where?",), "in the liver"),
        ("train_0001", ("Is it?",), "yes"),
    ]
    assert found[0].images == (str(pathvqa / "train" / "train_0000.jpg"),)
    assert source.dropped == {"no question or no answer": 1, "no such image file": 1}


def test_lxmerts_form_has_lists_of_questions_by_image(pathvqa: Path, tmp_path: Path) -> None:
    rows = [
        {
            "img_id": "train_0000",
            "sentf": {"pvqa": ["Q1?", "Q2?", "Q3?"]},
            "labelf": {"pvqa": [{"yes": 1}, {"a": 0.2, "b": 0.8}]},
        },
        {"img_id": "train_0001", "sentf": {"pvqa": []}, "labelf": {"pvqa": []}},
    ]
    path = save(tmp_path / "x.json", rows)
    assert recognise(path, TALKS) == "lxmert"
    found, source = read(path, pathvqa)
    assert said(found) == [("train_0000", ("Q1?",), "yes"), ("train_0000", ("Q2?",), "b")]
    assert source.dropped == {"no question or no answer": 2}
    assert source.rows == 4


@pytest.mark.data
def test_pathvqas_published_test_split_has_6761_questions_of_858_images(
    data: Path, tmp_path: Path
) -> None:
    path = data / "vqa" / "pathvqa-test-text.json"
    for row in json.loads(path.read_text()):
        (tmp_path / f"{row['img_id']}.jpg").touch()
    found, source = read(path, tmp_path)
    assert (len(found), len({s.name for s in found}), source.rows) == (6761, 858, 6894)
    assert source.dropped == {"no question or no answer": 133}
    assert sum(s.answer in {"yes", "no"} for s in found) == 3391
    assert found[2].turns[0].startswith("Is low magnification composed of nests")
    assert found[2].answer == "no"


def test_the_hubs_pathvqa_knows_an_image_by_its_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    rows = [
        {"image": {"bytes": png(i // 3), "path": None}, "question": f"Q{i}?", "answer": "yes"}
        for i in range(7)
    ]
    for number, part in enumerate((rows[:4], rows[4:])):
        name = f"train-0000{number}-of-00002.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / name, row_group_size=2)
    assert recognise(tmp_path, TALKS) == "questions"
    found, _ = read(tmp_path)
    assert [s.turns[0] for s in found] == [f"Q{i}?" for i in range(7)]
    assert [int(read_image(s.images[0])[0, 0, 0]) for s in found] == [0, 0, 0, 1, 1, 1, 2]
    names = [s.name for s in found]
    assert len({*names}) == 3
    assert [names.index(name) for name in names] == [0, 0, 0, 3, 3, 3, 6]
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"several splits \(test, train\); name one"):
        read(tmp_path)


# --- PMC-VQA -----------------------------------------------------------------------------

HEADER = ["Figure_path", "Caption", "Question", "Choice A", "Choice B", "Choice C", "Choice D"]
LINES = "What?\nA: Stroma\nB: Gland\nC: C. albicans\nD: Fat"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"Answer": " Gland", "Answer_label": "B"}, "B: Gland"),
        ({"Answer": "B"}, "B: Gland"),
        ({"Answer": "B:Gland "}, "B: Gland"),
        ({"Answer": "gland"}, "B: Gland"),
        ({"Answer": "C. albicans"}, "C: C. albicans"),
        ({"Answer": "Nerve"}, ""),
        ({"Answer": "E"}, ""),
        ({"Answer": ""}, ""),
    ],
)
def test_pmc_vqas_choices_are_lines_and_the_answer_is_letter_and_words(
    tmp_path: Path, answer: dict[str, str], expected: str
) -> None:
    (tmp_path / "PMC12_Fig1_1.jpg").write_bytes(png(1))
    cells = ["PMC12_Fig1_1.jpg", "Cap, tion", "What?", " A:Stroma ", "B: Gland", "C. albicans"]
    row = dict(zip(HEADER, [*cells, " D:Fat"], strict=True)) | answer
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, [*row])
        table.writeheader()
        table.writerow(row)
    assert recognise(path, TALKS) == "pmc-vqa"
    found, source = read(path)
    if expected:
        assert said(found) == [("PMC12_Fig1_1.jpg", (LINES,), expected)]
        assert found[0].group == "PMC12"
    else:
        assert source.dropped == {"the answer is none of the choices": 1}


# --- what is wrong -----------------------------------------------------------------------


def test_an_unknown_layout_names_what_was_seen_and_what_is_known(tmp_path: Path) -> None:
    path = save(tmp_path / "x.json", [{"foo": 1, "bar": 2}])
    with pytest.raises(DataError, match="no known layout, the first row has foo, bar;") as told:
        read(path)
    for known in (
        "llava (conversations)",
        "questions (answer, question)",
        "pathvqa (img_id, label)",
    ):
        assert known in str(told.value)
    with pytest.raises(DataError, match="has nothing"):
        read(save(tmp_path / "y.json", []))
    with pytest.raises(ResourceError, match="no such file"):
        read(tmp_path / "z.json")


def test_a_layout_named_wrongly_names_the_columns_it_misses(images: Path, tmp_path: Path) -> None:
    path = save(tmp_path / "x.json", [{"image": "a.png", "text": "b"}])
    needs = {
        "questions": "no answer, no question",
        "clover-generations": "no qa",
        "pathvqa": "no img_id, no label",
        "lxmert": "no img_id, no labelf, no sentf",
        "pmc-vqa": "no answer, no choice a, no figure_path, no question",
    }
    for form, lacks in needs.items():
        with pytest.raises(DataError, match=f"{lacks}: the first record has image, text"):
            read(path, images, form)
    path = save(tmp_path / "y.json", [{"question": "Q?", "answer": "a"}])
    with pytest.raises(
        DataError, match=r"no image \(image, image_path, .*first record has question, answer"
    ):
        read(path)


def test_every_format_a_recipe_may_name_is_told_of() -> None:
    from typing import get_args

    from pathcli.data.formats import CAPTIONS, Format, TalkFormat

    assert {name for name, _ in formats()} == {*get_args(TalkFormat)} - {"auto"}
    assert {name for name, _ in formats(CAPTIONS)} == {*get_args(Format)} - {"auto"}
    assert all(record and "\n" not in record for _, record in formats())
