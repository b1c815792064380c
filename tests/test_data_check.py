"""Each fault of a file is found where it is, and a file without faults has none."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from pictures import write
from PIL import Image

from pathcli.curation.check import (
    ABSURD,
    DAMAGED,
    NEAR,
    Finding,
    check_files,
    gives_away,
    write_findings,
)
from pathcli.data.writers import write_samples
from pathcli.errors import ResourceError
from pathcli.types import Region, Sample

TORN, GROUP = "an image in several splits", "a group in several splits"


def picture(seed: int, side: int = 64) -> Image.Image:
    """Return an image of smooth blobs, unlike those of other seeds."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def found(folder: Path, *tables: str, fast: bool = False) -> list[tuple[str, str]]:
    """Return the fault and name of each finding."""
    done = check_files([folder / name for name in tables], fast=fast)
    return sorted((f.what, f.name) for f in done.findings)


def rows(*images: str, **more: str) -> list[dict[str, str]]:
    return [{"image": image, "caption": f"What {image} shows"} | more for image in images]


def test_a_file_without_faults_has_no_findings(folder: Path, run: Run) -> None:
    write(folder / "t.csv", rows("0.png", "1.png"))
    done = check_files([folder / "t.csv"])
    assert (done.findings, done.counts(), done.splits) == ([], [], ["t.csv"])
    assert [(each["rows"], each["samples"]) for each in done.files] == [(2, 2)]
    code, _, err = run("data", "check", folder / "t.csv")
    assert code == 0
    assert "no fault was found" in err


def test_rows_that_cannot_be_read_are_named(folder: Path) -> None:
    table = [*rows("gone.png", "0.png"), {"image": "1.png", "caption": "  "}]
    write(folder / "t.jsonl", table)
    done = check_files([folder / "t.jsonl"])
    assert [(f.row, f.name, f.what) for f in done.findings] == [
        (1, "gone.png", "no such image file"),
        (3, "1.png", "no caption"),
    ]


def test_broken_images_and_absurd_sizes_are_told(folder: Path) -> None:
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.png").write_text("no image")
    picture(20, 16).save(folder / "small.png")
    Image.new("RGB", (900, 40)).save(folder / "long.png")
    names = ("1.png", "cut.png", "words.png", "small.png", "long.png")
    write(folder / "t.csv", rows(*names))
    assert found(folder, "t.csv") == [
        ("a broken image", "cut.png"),
        ("a broken image", "words.png"),
        (ABSURD, "long.png"),
        (ABSURD, "small.png"),
    ]
    quick = found(folder, "t.csv", fast=True)
    assert quick == [("a broken image", "words.png"), (ABSURD, "long.png"), (ABSURD, "small.png")]


def test_a_broken_image_of_many_rows_is_told_once(folder: Path) -> None:
    (folder / "words.png").write_text("no image")
    table = [{"path": "words.png", "question": f"Q{n}?", "answer": "A"} for n in range(3)]
    write(folder / "t.json", table)
    assert found(folder, "t.json") == [("a broken image", "words.png")]


def test_blank_texts_and_double_rows_are_told(folder: Path) -> None:
    picture(0).save(folder / "copy.bmp")  # the pixels of 0.png
    table = [*rows("0.png"), {"image": "1.png", "caption": "\u200b\u00a0"}]
    table += [{"image": "copy.bmp", "caption": table[0]["caption"]}, *rows("2.png")]
    write(folder / "t.jsonl", table)
    done = check_files([folder / "t.jsonl"])
    assert [(f.row, f.what, f.detail) for f in done.findings] == [
        (2, "a text of blanks", ""),
        (3, "a row that stands twice", "as row 1 of t.jsonl"),
    ]


def test_an_image_in_two_splits_is_told_by_its_pixels_or_its_looks(folder: Path) -> None:
    picture(0).save(folder / "same.bmp")
    picture(1).save(folder / "alike.jpg", quality=60)
    write(folder / "train.csv", rows("0.png", "1.png", "2.png"))
    write(folder / "val.csv", rows("3.png", "same.bmp", "alike.jpg", "2.png"))
    assert found(folder, "train.csv", "val.csv") == sorted(
        [(TORN, "same.bmp"), (TORN, "2.png"), (NEAR, "alike.jpg")]
    )
    assert found(folder, "train.csv", "val.csv", fast=True) == [(TORN, "2.png")]
    torn = check_files([folder / "train.csv", folder / "val.csv"]).findings[0]
    assert torn.detail == "val.csv; train.csv: row 1 of train.csv"
    both = [*rows("0.png", split="train"), *rows("4.png", "same.bmp", split="Validation")]
    write(folder / "one.csv", both)
    done = check_files([folder / "one.csv"])
    assert done.splits == ["train", "val"]
    assert [(f.what, f.name) for f in done.findings] == [(TORN, "same.bmp")]


def test_a_group_in_two_splits_is_told_and_a_barcode_is_its_patient(folder: Path) -> None:
    for number, name in enumerate(("TCGA-AA-0001-01Z-00-DX1_1", "TCGA-AA-0001-01Z-00-DX2_9")):
        picture(30 + number).save(folder / f"{name}.png")
    first = rows("0.png", "1.png", group="p1") + rows("TCGA-AA-0001-01Z-00-DX1_1.png", group="")
    then = rows("2.png", group="p1") + rows("TCGA-AA-0001-01Z-00-DX2_9.png", group="")
    write(folder / "train.csv", first)
    write(folder / "val.csv", [*then, *rows("3.png", group="p2")])
    done = check_files([folder / "train.csv", folder / "val.csv"])
    assert [(f.what, f.name, f.detail) for f in done.findings] == [
        (GROUP, "p1", "train.csv 2, val.csv 1"),
        (GROUP, "TCGA-AA-0001", "train.csv 1, val.csv 1"),
    ]


@pytest.mark.parametrize(
    ("question", "answer", "told"),
    [
        ("Is the invasive ductal carcinoma high grade?", "Invasive ductal carcinoma", True),
        ("What does the gland, shown here, show?", "gland", True),
        ("Which glands are these?", "gland", False),  # a part of a word
        ("Is it benign or malignant?", "benign", False),
        ("Which is it?\nA: gland\nB: nerve", "B: nerve", False),
        ("Is there no tumour?", "no", False),
        ("What is shown?", "A gland", False),
    ],
)
def test_an_answer_that_stands_in_its_question_is_told(
    question: str, answer: str, told: bool
) -> None:
    assert gives_away(question, answer) is told


def test_a_file_that_breaks_off_is_checked_up_to_there(folder: Path) -> None:
    text = "\n".join(json.dumps(row) for row in rows("0.png", "gone.png"))
    (folder / "t.jsonl").write_text(text + '\n{"image": ')
    write(folder / "other.csv", [{"a": "1", "b": "2"}])
    done = check_files([folder / "t.jsonl", folder / "other.csv"])
    assert [(f.row, f.what) for f in done.findings] == [
        (2, DAMAGED),
        (2, "no such image file"),
        (0, DAMAGED),
    ]
    assert "line 3 is not JSON" in done.findings[0].detail
    with pytest.raises(ResourceError, match="no such file"):
        check_files([folder / "absent.csv"])


def test_shards_and_regions_are_checked_as_well(tmp_path: Path, slide_path: Path) -> None:
    def sample(x: int, side: int = 672) -> Sample:
        return Sample(f"painted_{x}_0", (Region(str(slide_path), (x, 0), side),), f"Text {x}")

    write_samples([sample(0), sample(9000)], tmp_path / "x.json", "pathgen")
    done = check_files([tmp_path / "x.json"])
    assert [(f.row, f.what) for f in done.findings] == [(2, "a broken image")]
    assert "lies beside the slide" in done.findings[0].detail
    write_samples([sample(0), sample(100, 20)], tmp_path / "x.tar", "webdataset")
    done = check_files([tmp_path / "x.tar"])
    assert [(f.row, f.what, f.detail[-10:]) for f in done.findings] == [(2, ABSURD, "20 x 20 px")]


def test_findings_are_a_table_and_end_with_4(folder: Path, run: Run, tmp_path: Path) -> None:
    write(folder / "train.csv", [*rows("0.png", "gone.png"), *rows("0.png")])
    write(folder / "val.csv", rows("0.png"))
    out = tmp_path / "out"
    code, stdout, _ = run("data", "check", folder / "train.csv", folder / "val.csv", "--out", out)
    assert code == 4
    assert "no such image file" in stdout
    with (out / "findings.csv").open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert sorted(row["what"] for row in listed) == sorted(
        ["no such image file", "a row that stands twice", TORN]
    )
    code, stdout, _ = run(
        *("data", "check", folder / "train.csv", "--out", out, "--json", "--fast")
    )
    told = json.loads(stdout)
    assert code == 4
    assert told["findings"] == 2
    assert {fault["fault"]: fault["count"] for fault in told["faults"]} == {
        "no such image file": 1,
        "a row that stands twice": 1,
    }


def test_a_finding_may_hold_any_text(tmp_path: Path) -> None:
    odd = Finding("a.csv", 1, 'n"a,me\n\udc80', "what", "x")
    write_findings([odd], tmp_path / "f.csv")
    with (tmp_path / "f.csv").open(newline="") as file:
        assert list(csv.reader(file))[1] == ["a.csv", "1", 'n"a,me\n\\udc80', "what", "x"]
