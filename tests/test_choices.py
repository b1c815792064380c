"""Labelled images as questions with choices, and the command that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run
from PIL import Image

from pathcli.data.formats import TALKS, Source, samples
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.evals.choices import choices


def folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{name}.png")
    return root


def test_colonpath_is_asked_in_its_published_words(tmp_path: Path) -> None:
    found = {s.label: s for s in choices("colonpath", folders(tmp_path, "normal", "tumor")).samples}
    asked = "What choice best describes this colon tissue? Just give your choice: "
    assert found["normal"].turns == (f"{asked}A:Normal tissue B:Tumor tissue",)
    assert found["normal"].answer == "A:Normal tissue"
    assert found["tumor"].answer == "B:Tumor tissue"


def test_colonpaths_own_table_is_read_and_what_is_not_there_is_counted(tmp_path: Path) -> None:
    folders(tmp_path, "a", "b")
    rows = ["study_id,img_id,tumor", "s1,a/a.png,0", "s2,b/b.png,1", "s3,gone.png,1"]
    (tmp_path / "colon_val.csv").write_text("\n".join(rows))
    made = choices("colonpath", tmp_path)
    told = [(s.label, s.group, s.answer) for s in made.samples]
    assert told == [("normal", "s1", "A:Normal tissue"), ("tumor", "s2", "B:Tumor tissue")]
    assert dict(made.dropped) == {"no such image file": 1}


def test_oscc_and_bach_have_their_published_words_and_spaces(tmp_path: Path) -> None:
    oscc = choices("oscc", folders(tmp_path / "oscc", "normal", "oscc")).samples[0]
    assert oscc.turns[0] == (
        "What choice best describes this oral epithelium tissue? Just give your choice: "
        "A:Normal oral epithelium B:Oral squamous cell carcinoma"
    )
    bach = folders(tmp_path / "bach", "Normal", "Benign", "InSitu", "Invasive")
    by_label = {s.label: s for s in choices("bach", bach).samples}
    assert by_label["InSitu"].answer == "C: In situ cancer"
    assert by_label["InSitu"].turns[0] == (
        "What choice best describes this breast tissue? Just give your choice: "
        "A:Normal tissue B: Benign tumors C: In situ cancer D: Invasive cancer"
    )


def test_a_set_of_ones_own_is_asked_with_its_classes_and_read_again(
    tmp_path: Path, run: Run
) -> None:
    made, out = folders(tmp_path / "in", "clear_cell", "papillary"), tmp_path / "out.json"
    given = ("data", "convert", str(made), str(out), "--to", "llava")
    code, told, _ = run(*given, "--choices", "own", "--json")
    assert (code, json.loads(told)["rows"]) == (0, 2)
    found = {s.label: s for s in samples(Source(out), "auto", TALKS)}
    assert found["papillary"].answer == "B: papillary"
    assert found["papillary"].turns[0].endswith("A: clear cell\nB: papillary")
    assert Path(str(found["papillary"].images[0])).samefile(made / "papillary" / "papillary.png")
    code, _, err = run(*given, "--choices", "own", "--question", "What?")
    assert (code, "leave out" in err) == (2, True)


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--choices: .*colonpath"):
        choices("colonpth", tmp_path)
    with pytest.raises(ResourceError):
        choices("bach", tmp_path / "gone")
    with pytest.raises(DataError):
        choices("own", folders(tmp_path, "one"))
