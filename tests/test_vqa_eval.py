"""Questions are asked once and kept, in other orders too, and measured by hand-worked numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pathcli.errors import DataError, UsageError
from pathcli.evals.vqa import evaluate, image_digest, run_vqa
from pathcli.evals.vqa_cards import prompts
from pathcli.evals.vqa_data import QuestionSet, read_questions, with_images
from pathcli.evals.vqa_scores import (
    Answered,
    Prediction,
    Sums,
    by_type,
    compare,
    guessing,
    majority,
    measure_vqa,
    summed,
)
from pathcli.types import Sample
from pathcli.vlm.responders import Decoding

COLOURS = {"red": (200, 0, 0), "blue": (0, 0, 200)}
FEW = 50
OWN = Decoding(max_new_tokens=9)


@dataclass
class Fake:
    """Says what `say` says of the words it is asked in, and remembers what it was asked."""

    say: Any
    stop_after: int = 10**9
    name: str = "fake"
    digest: str = "0" * 64
    scope: str = "colours"
    decoding: Decoding = OWN
    batch: int = 2
    temperature: float | None = None
    asked: list[Sample] = field(default_factory=list)
    decodings: list[Decoding | None] = field(default_factory=list)

    def prompt(self, sample: Sample) -> str:
        return f"<image>USER: {sample.turns[-1]} ASSISTANT:"

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        self.decodings.append(decoding)
        for sample in samples:
            if len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            self.asked.append(sample)
            yield self.say(sample)

    def likelihoods(self, samples: Any, options: Any) -> None:
        return None


def letter_of(text: str) -> Any:
    """Return who finds a text among the options, and says its letter."""

    def say(sample: Sample) -> str:
        lines = sample.turns[-1].splitlines()
        return next((line[0] for line in lines if line.endswith(f": {text}")), "no idea")

    return say


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, each asked a closed, an open and a choice question."""
    rows = []
    for name, colour in COLOURS.items():
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(tmp_path / f"{name}.png")
        image = {"image": f"{name}.png"}
        rows += [
            {"id": f"{name} closed", "question": "Is it red?", "type": "yes/no", **image}
            | {"answer": "yes" if name == "red" else "no"},
            {"id": f"{name} open", "question": "What do you see?", "type": "what", **image}
            | {"answer": f"a {name} square"},
            {"id": f"{name} choice", "question": "Which?", "type": "choice", **image}
            | {"answer": name, "options": ["red", "blue", "green"]},
        ]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    return tmp_path


def asked(folder: Path) -> QuestionSet:
    return with_images(read_questions(str(folder / "q.json")))


def answered(asked: QuestionSet, texts: dict[str, str]) -> Answered:
    return Answered(asked, {k: (Prediction(k, v),) for k, v in texts.items()}, "model")


TEXTS = {
    "red closed": "Yes, a red square",
    "red open": "a red circle",
    "red choice": "A",
    "blue closed": "yes",
    "blue open": "",
    "blue choice": "perhaps",
}


# --- asking ------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_nothing_is_asked_twice(folder: Path) -> None:
    questions, kept = asked(folder), folder / "out" / "responses.jsonl"
    first = Fake(lambda s: s.name, stop_after=4)
    with pytest.raises(KeyboardInterrupt):
        run_vqa(questions, first, kept, prompts()["plain"])
    second = Fake(lambda s: s.name)
    found = run_vqa(questions, second, kept, prompts()["plain"])
    names = [sample.name for sample in (*first.asked, *second.asked)]
    assert sorted(names) == sorted(q.id for q in questions.questions)
    assert len(second.asked) == 2
    assert {k: said[0].text for k, said in found.answers.items()} == {n: n for n in names}
    third = Fake(lambda s: "changed")
    assert run_vqa(questions, third, kept, prompts()["plain"]).answers == found.answers
    assert not third.asked


def test_other_words_weights_pixels_or_decoding_are_asked_anew(folder: Path) -> None:
    questions, kept = asked(folder), folder / "responses.jsonl"
    n = len(questions.questions)

    def times(prompt: str = "plain", **given: Any) -> int:
        fake = Fake(lambda s: "yes", **given)
        run_vqa(asked(folder), fake, kept, prompts()[prompt])
        return len(fake.asked)

    assert times() == n
    assert times() == 0
    assert times(digest="1" * 64) == n
    assert times(decoding=Decoding(max_new_tokens=8)) == n
    assert times("pathmmu") == 2  # its words differ for questions with options alone
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "red.png")
    assert times() == n // 2


def test_a_model_never_sees_the_reference(folder: Path) -> None:
    fake = Fake(lambda s: "yes")
    run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["plain"])
    assert {s.answer for s in fake.asked if "closed" in s.name} == {"yes"}  # whatever is right
    assert {s.answer for s in fake.asked if "closed" not in s.name} == {""}
    assert not any(s.label or s.group for s in fake.asked)


def test_a_prompts_settings_go_before_the_models_own(folder: Path) -> None:
    fake = Fake(lambda s: "yes")
    run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["clover"])
    assert fake.decodings == [Decoding(max_new_tokens=40, min_new_tokens=5, beams=5)]
    run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["plain"])
    assert fake.decodings[1] == OWN


def test_images_are_asked_one_after_the_other(folder: Path) -> None:
    fake = Fake(lambda s: "yes")
    run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["plain"])
    images = [sample.images for sample in fake.asked]
    assert len(set(images[:3])) == len(set(images[3:])) == 1


def test_the_digest_of_an_image_is_of_its_pixels(folder: Path) -> None:
    one = image_digest(str(folder / "red.png"))
    Image.open(folder / "red.png").save(folder / "copy.tiff")
    assert image_digest(str(folder / "copy.tiff")) == one
    assert image_digest(str(folder / "blue.png")) != one


def test_blind_shows_every_question_another_image(folder: Path) -> None:
    fake = Fake(lambda s: "yes")
    found = run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["plain"], blind=True)
    assert all(s.name.split()[0] not in Path(str(s.images[0])).stem for s in fake.asked)
    assert found.model == "fake, blind"
    Image.open(folder / "red.png").save(folder / "blue.png")  # two files, one picture
    with pytest.raises(UsageError, match="has one image"):
        run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["plain"], blind=True)


# --- options in other orders -------------------------------------------------------------


def test_who_finds_the_option_wherever_it_stands_is_right_and_consistent(folder: Path) -> None:
    questions = asked(folder)
    fake = Fake(letter_of("red"))
    found = run_vqa(questions, fake, folder / "r.jsonl", prompts()["plain"], permute=6)
    assert len(found.answers["red choice"]) == 6
    assert len(found.answers["red open"]) == 1
    assert {said.text for said in found.answers["red choice"]} == {"A", "B", "C"}
    assert found.values["choice"][2] == 1
    assert found.values["choice"][5] == 0  # "red" of a blue image, in all orders
    numbers = measure_vqa(found, FEW)
    assert numbers["consistency"].value == numbers["agreement"].value == 1


def test_who_always_says_the_first_letter_is_right_by_chance_and_inconsistent(folder: Path) -> None:
    fake = Fake(lambda s: "A")
    found = run_vqa(asked(folder), fake, folder / "r.jsonl", prompts()["plain"], permute=3)
    np.testing.assert_allclose(found.values["choice"][[2, 5]], 1 / 3)
    numbers = measure_vqa(found, FEW)
    assert numbers["consistency"].value == numbers["agreement"].value == 0


def test_a_set_without_options_cannot_be_permuted(folder: Path) -> None:
    rows = [{"question": "Is it?", "answer": "no", "image": "red.png"}]
    (folder / "open.json").write_text(json.dumps(rows))
    opened: list[int] = []
    whole = read_questions(str(folder / "open.json"))
    with pytest.raises(UsageError, match="--permute: no question of open has options"):
        evaluate(whole, model=lambda: opened.append(1) or Fake(str), permute=2)
    assert not opened  # said before a model is loaded


def test_options_that_are_letters_are_asked_in_their_own_order_alone(folder: Path) -> None:
    rows = [{"question": "Which?", "answer": "B", "image": "red.png", "options": ["B", "A"]}]
    (folder / "ab.json").write_text(json.dumps(rows))
    whole = read_questions(str(folder / "ab.json"))
    opened: list[int] = []
    with pytest.raises(
        UsageError, match="of question 0 'B' is an option and the letter of another"
    ):
        evaluate(whole, model=lambda: opened.append(1) or Fake(str), permute=2)
    assert not opened
    (folder / "xy.json").write_text(json.dumps([rows[0] | {"answer": "X", "options": ["X", "Y"]}]))
    far = with_images(read_questions(str(folder / "xy.json")))  # of two options no letter
    found = run_vqa(far, Fake(lambda _: "X"), folder / "r.jsonl", prompts()["plain"], permute=2)
    assert found.values["choice"].tolist() == [1]


def test_what_is_wrong_with_a_call_is_said_before_a_model_is_opened(folder: Path) -> None:
    opened: list[int] = []
    whole = read_questions(str(folder / "q.json"))
    red = replace(whole, questions=whole.questions[:3])
    closed = replace(whole, questions=whole.questions[:1])
    judge = "http://127.0.0.1:9/v1#m"
    given: dict[str, Any]
    for some, text, given in (
        (whole, "--prompt: none is called 'clove'", {"prompt": "clove"}),
        (red, "--blind: q has one image", {"blind": True}),
        (whole, "not an endpoint's address", {"judged_by": "nonsense"}),
        (closed, "--judge marks open questions", {"judged_by": judge}),
    ):
        with pytest.raises(UsageError, match=text):
            evaluate(some, model=lambda: opened.append(1) or Fake(str), **given)
    assert not opened


def test_yes_and_no_as_options_may_be_answered_by_letter(folder: Path) -> None:
    rows = [{"question": "Is it?", "answer": "no", "image": "red.png", "options": ["yes", "no"]}]
    (folder / "yn.json").write_text(json.dumps(rows))
    questions = read_questions(str(folder / "yn.json"))
    assert answered(questions, {"0": "B"}).values["closed-first-word"].tolist() == [1]
    assert answered(questions, {"0": "A: yes"}).values["closed-first-word"].tolist() == [0]
    first = answered(questions, {"0": "No. A yes would need mitoses."})
    assert first.values["closed-first-word"].tolist() == [1]  # the first, not the last
    published = answered(questions, {"0": "B"}).values
    assert published["closed-llava-med"].tolist() == published["exact"].tolist() == [0]


# --- numbers -----------------------------------------------------------------------------


def test_the_numbers_are_those_worked_out_by_hand(folder: Path) -> None:
    found = answered(asked(folder), TEXTS)
    numbers = {name: each.value for name, each in measure_vqa(found, FEW).items()}
    # closed: right, wrong; open: "red" of "red square" (articles go), nothing; choice: A, none
    assert numbers["closed-first-word"] == 0.5
    assert numbers["open-recall"] == (0.5 + 0) / 2
    assert numbers["choice"] == 0.5
    assert numbers["overall"] == pytest.approx((1 + 0 + 0.5 + 0 + 1 + 0) / 6)
    assert numbers["overall.macro"] == pytest.approx((0.5 + 0.25 + 0.5) / 3)
    assert numbers["exact"] == 0
    assert numbers["closed-exact"] == 0
    assert found.counts() == {
        "questions": 6,
        "answers": 6,
        "empty": 1,
        "closed, neither yes nor no": 0,
        "choice, none of the options": 1,
    }


def test_options_that_are_alike_everywhere_are_classes_too(folder: Path) -> None:
    rows = json.loads((folder / "q.json").read_text())
    rows = [row | {"id": f"{row['id']} {k}"} for row in rows[2::3] for k in range(2)]
    (folder / "c.json").write_text(json.dumps(rows))
    texts = dict(zip((row["id"] for row in rows), ("red", "A", "red", "hm"), strict=True))
    numbers = measure_vqa(answered(read_questions(str(folder / "c.json")), texts), FEW)
    # red: both found; blue: none found, one called red, one nothing
    assert numbers["macro_recall"].value == 0.5
    assert numbers["macro_precision"].value == pytest.approx((2 / 3 + 0) / 2)
    assert numbers["choice"].value == 0.5


def test_units_are_groups_and_images_never_single_questions(folder: Path) -> None:
    rng = np.random.default_rng(0)
    row = rng.random(40)
    row[3] = np.nan
    units, types = [f"u{i % 7}" for i in range(40)], [f"t{i % 3}" for i in range(40)]
    micro, macro = summed(row, units), summed(row, units, types)
    every = np.arange(7)
    assert micro(every) == pytest.approx(np.nanmean(row))
    by_hand = [np.nanmean(row[[i for i in range(40) if i % 3 == t]]) for t in range(3)]
    assert macro(every) == pytest.approx(np.mean(by_hand))
    assert micro(np.array([2, 2])) == pytest.approx(row[2::7].mean())
    assert measure_vqa(answered(asked(folder), TEXTS), FEW)["overall"].n == 2
    assert np.isnan(Sums(np.zeros((1, 1)), np.zeros((1, 1)))(np.array([0])))


def test_the_majority_answer_is_the_commonest_of_a_type(folder: Path) -> None:
    rows = json.loads((folder / "q.json").read_text())
    more = [rows[0] | {"id": "more"}, rows[2] | {"id": "more choice"}]
    (folder / "m.json").write_text(json.dumps([*rows, *more]))
    questions = read_questions(str(folder / "m.json"))
    found = majority(questions)
    assert [found.answers[q.id][0].text for q in questions.questions[:3]] == [
        *("yes", "a red square", "A")
    ]
    assert {name: means for name, *_, means in by_type(found, [found], FEW)} == {
        "yes/no": [pytest.approx(2 / 3)],
        "what": [pytest.approx(0.75)],  # "square" of "blue square" is recalled
        "choice": [pytest.approx(2 / 3)],
    }
    assert guessing(questions) == pytest.approx(1 / 3)


def test_two_models_are_compared_on_the_same_questions(folder: Path) -> None:
    questions = asked(folder)
    ours = answered(questions, {q.id: q.answer for q in questions.questions})
    found = {row.rule: row for row in compare(ours, answered(questions, TEXTS), FEW)}
    assert found["overall"].ours == 1
    assert found["overall"].difference.value == pytest.approx(1 - 2.5 / 6)
    assert found["choice"].theirs == 0.5
    one = ours.of(questions.first(1))  # of one kind: its rule once, its p not adjusted for two
    assert [row.rule for row in compare(one, one, FEW)] == ["closed-first-word"]
    with pytest.raises(DataError, match="answered other questions"):
        compare(ours, ours.of(questions.first(2)))
