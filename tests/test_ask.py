"""An answer, or none, with what the model knows beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from numpy.typing import NDArray
from PIL import Image

from pathcli.cli.ask import sure
from pathcli.errors import DataError, UsageError
from pathcli.types import ImageRef, Sample
from pathcli.vlm.ask import UNKNOWN, Talk, answers, ask
from pathcli.vlm.responders import Decoding
from pathcli.weights import find


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def shipped() -> None:
    for name in ("smollm2-135m", "minilm-tokenizer", "lite0"):
        if not find(name):
            pytest.skip(f"needs {name}: pathcli models pull {name}")


@pytest.mark.usefixtures("shipped")
def test_the_shipped_model_says_nothing_of_what_it_never_saw(noise: Path) -> None:
    found = ask([noise], "What tissue is this?")
    assert found.abstained
    assert found.text == UNKNOWN
    assert found.evidence == (str(noise),)
    assert "lung" in found.scope


@pytest.mark.usefixtures("shipped")
def test_the_command_prints_scope_and_notice_beside_it(run: Run, noise: Path) -> None:
    code, out, err = run("ask", str(noise), "what tissue?")
    assert code == 0
    assert out == f"no answer: {UNKNOWN}\n"
    assert "unfamiliar" in err
    assert "Research use only; not for diagnosis." in err
    code, out, _ = run("ask", str(noise), "what tissue?", "--json")
    assert code == 0
    assert json.loads(out) == {
        "images": [str(noise)],
        "question": "what tissue?",
        "answer": "",
        "confidence": None,
        "abstained": True,
        "why": UNKNOWN,
        "scores": {},
        "evidence": [str(noise)],
        "scope": json.loads(out)["scope"],
        "notice": "Research use only; not for diagnosis.",
    }


def test_what_cannot_be_asked_is_one_clear_line(run: Run, noise: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="an image and a question"):
        ask([noise], "  ")
    with pytest.raises(DataError, match=r"none\.png"):
        ask(["none.png"], "what?")
    code, _, err = run("ask", str(noise), "what?", "--model", str(tmp_path / "none"))
    assert code == 5
    assert "is not here; name a run's folder" in err
    code, _, err = run("ask", str(noise), "what?", "--model", "cloverr-mini")
    assert code == 2
    assert "no model is called 'cloverr-mini'" in err
    code, _, err = run("ask", str(noise), "what?", "--load", "4bits")
    assert code == 2
    assert "did you mean '4bit'?" in err
    code, _, err = run("ask", str(noise))
    assert code == 2
    assert "an image and a question" in err
    code, _, err = run("ask", str(noise), str(noise))
    assert code == 2
    assert "is a file, not a question" in err
    code, _, err = run("ask", "a.svs", "what?", "--max-tokens", "5")
    assert code == 2
    assert "--max-tokens is for images" in err
    (tmp_path / "empty").mkdir()
    code, _, err = run("ask", str(tmp_path / "empty"), "what?")
    assert code == 4
    assert "a folder without images" in err
    none = str(tmp_path / "none.png")
    code, _, err = run("ask", str(noise), none, "what?", "--model", "nonsense")
    assert code == 4  # before any model is opened
    assert f"{none}: no such file or folder; the question comes last" in err
    code, _, err = run("ask", str(noise), "what?", "--slide-mpp", "0.5")
    assert (code, err) == (2, "error: --slide-mpp is for slides, not for images\n")
    for data, why in ((b" \n", "no question in it"), (b"\xff\xfe", "not UTF-8 text")):
        (tmp_path / "q.txt").write_bytes(data)
        code, _, err = run("ask", str(noise), "--question-file", str(tmp_path / "q.txt"))
        assert code == 4
        assert why in err
    for name, why in ((none, "no such file"), ("a.svs", "is a slide")):
        _, _, err = run("chat", name, "--model", "nonsense")
        assert why in err


class Parrot:
    """Says what it was asked and how many images it saw; knows what it was told before."""

    name, digest, scope, batch = "parrot", "0" * 64, "nothing", 2
    decoding = Decoding()
    taught: Sequence[Sequence[str]] = (("one", "two"),)

    def __init__(self, temperature: float | None = 1.0) -> None:
        self.temperature = temperature

    def prompt(self, sample: Sample) -> str:
        return "<image>" * len(sample.images) + " ".join(sample.turns)

    def unfamiliar(self, images: Sequence[ImageRef]) -> list[ImageRef]:
        return [image for image in images if "odd" in str(image)]

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        self.asked = [*getattr(self, "asked", []), *samples]
        if any("broken.png" in image for sample in samples for image in sample.images):
            msg = "broken.png: not an image"
            raise DataError(msg)
        for sample in samples:
            said = "yes" if "?" in sample.turns[-1] else "one" if len(sample.turns) == 1 else "two"
            yield "" if "..." in sample.turns[-1] else said

    def likelihoods(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        return [np.log([0.6, 0.2]) for _ in samples]


def test_answers_carry_the_probabilities_of_what_a_question_allows() -> None:
    samples = [
        Sample("a", (image,), turns=(question,))
        for image in ("a.png", "odd.png")
        for question in ("Is it?", "Count them", "What?")
    ]
    found = answers(samples, Parrot())
    assert [a.abstained for a in found] == [False] * 3 + [True] * 3
    assert found[0].scores == {"yes": pytest.approx(0.75), "no": pytest.approx(0.25)}
    assert found[0].confidence == pytest.approx(0.75)
    assert found[1].scores["one"] == pytest.approx(0.75)  # an answer it was taught
    assert found[2].scores == {}
    assert found[2].confidence is None
    assert found[3].evidence == ("odd.png",)
    unsure = answers(samples[:1], Parrot(None))[0]
    assert unsure.confidence is None  # nobody calibrated it
    assert unsure.scores["yes"] == pytest.approx(0.75)


def test_a_calibrated_model_says_what_is_most_probable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Parrot, "likelihoods", lambda *_: [np.log([0.2, 0.6])])
    once = Sample("a", ("a.png",), turns=("Is it?",))
    (found,) = answers([once], Parrot())
    assert (found.text, found.confidence) == ("no", pytest.approx(0.75))
    (plain,) = answers([once], Parrot(None))
    assert (plain.text, plain.confidence) == ("yes", None)
    for other in (
        replace(once, images=("a.png", "b.png")),
        replace(once, turns=("Is it?", "yes", "Is it?")),
    ):  # calibrated on neither
        (found,) = answers([other], Parrot())
        assert (found.text, found.confidence) == ("yes", None)


def test_a_talk_remembers_what_was_said_and_not_what_was_not() -> None:
    talk = Talk(["a.png"], Parrot(), 5)
    assert talk.decoding.max_new_tokens == 5
    assert (talk("Count").text, talk("Again").text) == ("one", "two")
    assert talk.turns == ("Count", "one", "Again", "two")
    assert talk("...").text == ""
    assert talk.turns == ("Count", "one", "Again", "two")
    odd = Talk(["odd.png"], Parrot())
    assert odd("Count").abstained
    assert odd.turns == ()


def test_a_folder_of_images_and_a_file_of_questions_are_asked_one_by_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.vlm.responders.open_responder", lambda *_, **__: Parrot())
    for name in ("b.png", "a.png", "odd.png", "notes.txt"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    (tmp_path / "q.txt").write_text("Is it?\n\nCount them\n")
    folder, questions = str(tmp_path / "images"), str(tmp_path / "q.txt")
    code, out, err = run("ask", folder, "--question-file", questions)
    assert code == 0
    lines = [line.removeprefix(folder + "/") for line in out.splitlines()]
    assert lines == [
        "a.png: Is it? yes (confidence 0.75)",
        "a.png: Count them one (confidence 0.75)",
        "b.png: Is it? yes (confidence 0.75)",
        "b.png: Count them one (confidence 0.75)",
        f"odd.png: Is it? no answer: {UNKNOWN}",
        f"odd.png: Count them no answer: {UNKNOWN}",
    ]
    assert err.count("Research use only") == 1
    code, out, _ = run("ask", folder, "Is it?", "--json")
    assert [row["confidence"] for row in json.loads(out)] == [pytest.approx(0.75)] * 2 + [None]
    code, out, _ = run("ask", folder, "Is it?", "--together", "--show-prompt")
    assert out == "<image><image><image>Is it?\n"
    code, out, _ = run("ask", folder + "/a.png", "Is it?", "--show-prompt", "--json")
    wanted = {"images": [folder + "/a.png"], "question": "Is it?", "prompt": "<image>Is it?"}
    assert json.loads(out) == wanted


def test_a_broken_image_stops_no_other_and_is_told(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.vlm.responders.open_responder", lambda *_, **__: Parrot(None))
    for name in ("a.png", "broken.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    code, out, err = run("ask", str(tmp_path), "Is it?")
    assert code == 3
    assert out.splitlines() == [f"{tmp_path / name}: yes" for name in ("a.png", "c.png")]
    assert "not an image" in err
    assert "1 of 3 questions could not be asked" in err
    assert err.count("uncalibrated") == 1
    code, out, _ = run("ask", str(tmp_path), "Is it?", "--json")
    assert code == 3
    assert [row.get("error") for row in json.loads(out)] == [None, "broken.png: not an image", None]
    code, _, err = run("ask", str(tmp_path / "broken.png"), "Is it?")
    assert code == 4
    assert err.startswith("error: broken.png: not an image")


def test_that_a_question_is_closed_is_told_and_free_words_are_uncalibrated(
    run: Run, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parrot = Parrot()
    monkeypatch.setattr("pathcli.vlm.responders.open_responder", lambda *_, **__: parrot)
    for question in ("Is it?", "What?"):
        code, _, err = run("ask", str(noise), question)
        assert code == 0
        assert ("uncalibrated for answers in free words (1 of 1)" in err) == (question == "What?")
    assert [sample.answer for sample in parrot.asked] == ["yes", ""]


def test_a_talk_is_read_from_the_input_line_by_line(
    run: Run, noise: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.vlm.responders.open_responder", lambda *_, **__: Parrot())
    monkeypatch.setattr("sys.stdin", io.StringIO("Count\nAgain\n\nCount\n"))
    code, out, err = run("chat", str(noise))
    assert code == 0
    said = ["one (confidence 0.75)", "two", "one (confidence 0.75)"]  # nobody calibrated the second
    assert out.splitlines() == said
    assert "Research use only" in err


def test_no_confidence_is_shown_as_certain() -> None:
    assert [sure(c) for c in (None, 0.994, 0.9951)] == [
        "",
        " (confidence 0.99)",
        " (confidence > 0.99)",
    ]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
def test_the_shipped_model_answers_about_lung_patches(data: Path) -> None:
    images = sorted((data / "lc25000-lung" / "images" / "lung_n").glob("*.jpeg"))[:1]
    found = ask(images, "What tissue is this?")
    assert not found.abstained
    assert found.text == "benign lung tissue"
