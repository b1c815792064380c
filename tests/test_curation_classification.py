"""Labelled images as questions with choices."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pathcli.curation.classification import choices
from pathcli.errors import ResourceError, UsageError


def folders(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / name / f"{name}.png")
    return root


def test_colonpath_is_asked_in_its_published_words(tmp_path: Path) -> None:
    found = {s.label: s for s in choices("colonpath", folders(tmp_path, "normal", "tumor"))}
    asked = "What choice best describes this colon tissue? Just give your choice: "
    assert found["normal"].turns == (f"{asked}A:Normal tissue B:Tumor tissue",)
    assert found["normal"].answer == "A:Normal tissue"
    assert found["tumor"].answer == "B:Tumor tissue"


def test_bach_has_its_published_spaces_and_options(tmp_path: Path) -> None:
    found = choices("bach", folders(tmp_path, "Normal", "Benign", "InSitu", "Invasive"))
    by_label = {s.label: s for s in found}
    assert by_label["InSitu"].answer == "C: In situ cancer"
    assert (
        by_label["InSitu"]
        .turns[0]
        .endswith("A:Normal tissue B: Benign tumors C: In situ cancer D: Invasive cancer")
    )


def test_a_set_of_ones_own_is_asked_with_its_classes(tmp_path: Path) -> None:
    found = {s.label: s for s in choices(str(folders(tmp_path, "clear_cell", "papillary")))}
    assert found["papillary"].answer == "B. papillary"
    assert found["papillary"].turns[0].endswith("A. clear cell\nB. papillary")


def test_a_published_set_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="where is it"):
        list(choices("oscc"))
    with pytest.raises(ResourceError):
        list(choices("bach", tmp_path / "gone"))
