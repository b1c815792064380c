"""An answer, or none, with what the model knows beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from PIL import Image

from pathcli.errors import DataError, UsageError
from pathcli.vlm.ask import UNKNOWN, ask


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)).save(path)
    return path


def test_the_shipped_model_says_nothing_of_what_it_never_saw(noise: Path) -> None:
    found = ask([noise], "What tissue is this?")
    assert found.abstained
    assert found.text == UNKNOWN
    assert found.evidence == (str(noise),)
    assert "lung" in found.scope


def test_the_command_prints_scope_and_notice_beside_it(run: Run, noise: Path) -> None:
    code, out, err = run("ask", str(noise), "what tissue?")
    assert code == 0
    assert out == f"no answer: {UNKNOWN}\n"
    assert "unfamiliar" in err
    assert "Research use only; not for diagnosis." in err
    code, out, _ = run("ask", str(noise), "what tissue?", "--json")
    assert code == 0
    assert json.loads(out) == {
        "answer": "",
        "confidence": None,
        "abstained": True,
        "scores": {},
        "evidence": [str(noise)],
        "scope": json.loads(out)["scope"],
        "notice": "Research use only; not for diagnosis.",
    }


def test_what_cannot_be_asked_is_one_clear_line(run: Run, noise: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an image and a question"):
        ask([noise], "  ")
    with pytest.raises(UsageError, match=r"slide\.svs is a slide, and ask reads patches"):
        ask(["slide.svs"], "what?")
    with pytest.raises(DataError, match=r"none\.png"):
        ask(["none.png"], "what?")
    code, _, err = run("ask", str(noise), "what?", "--run", str(tmp_path / "none"))
    assert code == 5
    assert "is no run" in err


@pytest.mark.data
@pytest.mark.slow
def test_the_shipped_model_answers_about_lung_patches(data: Path) -> None:
    from pathcli.weights import find

    if not find("smollm2-135m"):
        pytest.skip("needs SmolLM2: pathcli models pull smollm2-135m")
    images = sorted((data / "lc25000-lung" / "images" / "lung_n").glob("*.jpeg"))[:1]
    found = ask(images, "What tissue is this?")
    assert not found.abstained
    assert found.text == "benign lung tissue"
