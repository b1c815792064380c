"""The questions of clover-mini: wordings kept apart, right answers, no test image."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import clover_mini as measured  # noqa: E402 - the scripts are no package
import clover_mini_data as made  # noqa: E402

TOLD = made.read_questions()
NAMES = {label: own["name"] for label, own in TOLD["classes"].items()}
LABELS = [*NAMES]
ROWS = [
    {"image": f"/images/{i}.jpg", "label": LABELS[i % 5], "group": f"g{i // 10}"}
    for i in range(100)
]


@pytest.fixture(params=["train", "unseen"])
def asker(request: pytest.FixtureRequest) -> made.Asker:
    return made.Asker(TOLD, request.param)


def bare(wording: str) -> str:
    """A wording as it is compared: lower case, letters and places alone."""
    return " ".join(re.findall(r"[a-z{}]+", wording.lower()))


def asked(asker: made.Asker, kind: str, label: str, n: int = 1000) -> list[tuple[str, str]]:
    rng = np.random.default_rng(0)
    return [asker.ask(kind, label, rng) for _ in range(n)]


# --- wordings ----------------------------------------------------------------------------


def test_no_unseen_wording_was_shown_in_training() -> None:
    sides: dict[str, list[str]] = {"train": [], "unseen": []}
    for lists in TOLD["questions"].values():
        for side, found in sides.items():
            found.extend(map(bare, lists[side]))
    assert not {*sides["train"]} & {*sides["unseen"]}
    for found in sides.values():
        assert len(set(found)) == len(found)


def test_every_kind_has_wordings_on_both_sides_and_its_places_in_each() -> None:
    assert set(TOLD["questions"]) == set(made.SHARES) >= {*measured.MAIN, *measured.KINDS}
    places = {"named": ["name"], "either": ["a", "b"], "choice": ["options"]}
    for kind, lists in TOLD["questions"].items():
        assert lists["train"]
        assert len(lists["unseen"]) >= 5
        for wording in chain(lists["train"], lists["unseen"]):
            assert re.findall(r"{(\w+)}", wording) == places.get(kind, []), wording
    assert len(TOLD["questions"]["tissue"]["train"]) > 10
    assert len(TOLD["questions"]["malignant"]["train"]) > 10


def test_shares_sum_to_one_and_every_class_is_described() -> None:
    assert sum(made.SHARES.values()) == pytest.approx(1, abs=1e-12)
    assert set(TOLD["descriptions"]) == set(TOLD["classes"])
    for label, texts in TOLD["descriptions"].items():
        benign = [bool(re.search(r"no (sign of )?malignan|without tumor", t)) for t in texts]
        assert all(benign) is any(benign) is not TOLD["classes"][label]["malignant"], label
        organ = TOLD["classes"][label]["organ"]
        others = {own["organ"] for own in TOLD["classes"].values()} - {organ}
        for text in texts:
            assert organ in text.lower()
            assert not any(other in text.lower() for other in others)


# --- answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "plain"),
    [
        ("lung_n", ("benign lung tissue", "no", "yes", "lung")),
        ("lung_aca", ("lung adenocarcinoma", "yes", "no", "lung")),
        ("lung_scc", ("lung squamous cell carcinoma", "yes", "no", "lung")),
        ("colon_n", ("benign colon tissue", "no", "yes", "colon")),
        ("colon_aca", ("colon adenocarcinoma", "yes", "no", "colon")),
    ],
)
def test_plain_questions_have_the_answer_of_the_class(
    asker: made.Asker, label: str, plain: tuple[str, ...]
) -> None:
    for kind, answer in zip(("tissue", "malignant", "benign", "organ"), plain, strict=True):
        found = asked(asker, kind, label)
        assert {said for _, said in found} == {answer}
        assert {question for question, _ in found} == set(asker.words[kind])
    assert {said for _, said in asked(asker, "describe", label)} == {*TOLD["descriptions"][label]}


@pytest.mark.parametrize("label", LABELS)
def test_a_named_class_is_the_images_own_half_the_time(asker: made.Asker, label: str) -> None:
    found = asked(asker, "named", label, 400)
    shown = Counter(answer for _, answer in found)
    assert 160 < shown["yes"] < 240
    named = set()
    for question, answer in found:
        (name,) = {n for n in NAMES.values() if f"{n}" in question}
        assert answer == ("yes" if name == NAMES[label] else "no")
        named.add(name)
    assert named == {*NAMES.values()}


@pytest.mark.parametrize("label", LABELS)
def test_of_two_classes_one_is_right_in_either_place(asker: made.Asker, label: str) -> None:
    first = 0
    found = asked(asker, "either", label, 200)
    for question, answer in found:
        places = sorted((question.index(n), n) for n in NAMES.values() if n in question)
        assert len(places) == 2
        assert answer == NAMES[label]
        assert answer in {n for _, n in places}
        first += places[0][1] == answer
    assert 70 < first < 130


@pytest.mark.parametrize("label", LABELS)
def test_the_letter_of_a_choice_is_that_of_the_class(asker: made.Asker, label: str) -> None:
    letters: Counter[str] = Counter()
    for question, answer in asked(asker, "choice", label, 300):
        options = re.search(r"A\. (.+) B\. (.+) C\. (.+?)\??$", question)
        assert options, question
        assert len(set(options.groups())) == 3
        assert {*options.groups()} <= {*NAMES.values()}
        letter, _, name = answer.partition(". ")
        assert options["ABC".index(letter) + 1] == name == NAMES[label]
        letters[letter] += 1
    assert set(letters) == {*"ABC"}
    assert min(letters.values()) > 60


# --- what is written ---------------------------------------------------------------------


def records(each: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    return list(made.instructions(ROWS, made.Asker(TOLD, "train"), each, seed))


def test_whether_two_images_are_the_same_is_yes_half_the_time() -> None:
    of = {row["image"]: row["label"] for row in ROWS}
    found = [r for r in records(80) if r["kinds"] == ["same"]]
    answers = []
    for record in found:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert question.count("<image>") == len(record["image"]) == 2
        one, other = record["image"]
        assert answer == ("yes" if of[one] == of[other] else "no")
        answers.append(answer)
    assert len(answers) > 500
    assert np.mean([a == "yes" for a in answers]) == pytest.approx(0.5, abs=0.06)


def test_kinds_have_their_shares_and_colon_is_asked_more() -> None:
    found = records()
    counts = Counter(kind for record in found for kind in record["kinds"])
    for kind, share in made.SHARES.items():
        assert counts[kind] / counts.total() == pytest.approx(share, abs=0.015)
    assert counts.total() == 40 * (60 + 40 * made.MORE)
    for number, record in enumerate(found[:40]):
        assert record["group"] == ROWS[0]["group"], number
        assert "<image>\n" in record["conversations"][0]["value"]


def test_conversations_have_one_to_three_questions_and_show_the_image_once() -> None:
    found = records()
    lengths = Counter(len(r["kinds"]) for r in found if r["kinds"] != ["same"])
    assert set(lengths) == {1, 2, 3}
    assert min(lengths.values()) > 0.25 * lengths.total()
    for record in found:
        asked = [turn["value"] for turn in record["conversations"][::2]]
        assert {turn["from"] for turn in record["conversations"][::2]} == {"human"}
        assert len(asked) == len(record["kinds"])
        assert asked[0].startswith("<image>\n")
        assert not any("<image>" in later for later in asked[1:])
        assert "same" not in record["kinds"] or len(asked) == 1


def test_a_fifth_of_the_questions_is_typed_as_people_do() -> None:
    asked = [
        turn["value"].rpartition("\n")[2]
        for record in records(20)
        for kind, turn in zip(record["kinds"], record["conversations"][::2], strict=True)
        if kind in measured.MAIN
    ]
    small = [q for q in asked if q[0].islower()]
    assert 0.18 < len(small) / len(asked) < 0.22
    assert not any(q.endswith(("?", ".")) for q in small)
    assert made.casual("Is it benign?") == "is it benign"


def test_questions_follow_from_the_seed() -> None:
    assert records(4) == records(4)
    assert records(4) != records(4, seed=1)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the script writes of three splits of ten groups, and rows it has no class for."""
    splits = ["train", "val", "test", "report"]
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "label", "group", "split"])
        for i in range(80):
            split = splits[i % 4]
            table.writerow([f"{split}-{i}.jpg", LABELS[i % 5], f"{split}-{i // 20}", split])
        table.writerow(["other.jpg", "other", "train-9", "train"])
    command = ["clover_mini_data.py", str(tmp_path / "labels.csv"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    made.main()
    return tmp_path / "out"


def test_images_of_other_splits_are_written_nowhere(written: Path) -> None:
    told = json.loads((written / "instructions.json").read_text())
    with (written / "captions.csv").open(newline="") as file:
        captions = list(csv.DictReader(file))
    folder = str(written.parent)
    shown = [r["image"] if isinstance(r["image"], list) else [r["image"]] for r in told]
    names = {*chain(*shown), *(row["image"] for row in captions)}
    assert names == {f"{folder}/train-{i}.jpg" for i in range(0, 80, 4)}
    groups = {row["group"] for row in captions} | {r["group"] for r in told}
    assert groups == {f"train-{i}" for i in range(4)}
    assert len(captions) == 20
    assert sum(len(r["kinds"]) for r in told) == 3 * (12 + 8 * made.MORE)
    unseen = {bare(w) for lists in TOLD["questions"].values() for w in lists["unseen"]}
    turns = chain(*(r["conversations"][::2] for r in told))
    said = {bare(turn["value"].replace("<image>", "")) for turn in turns}
    assert not said & unseen


def test_captions_say_what_the_image_is_of(written: Path) -> None:
    with (written / "captions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            number = int(re.findall(r"-(\d+)\.jpg", row["image"])[0])
            label = LABELS[number % 5]
            assert row["caption"] in {NAMES[label], *TOLD["descriptions"][label]}


def test_what_is_written_is_read_as_instructions(written: Path) -> None:
    from PIL import Image

    from pathcli.data.instructions import InstructionData

    for i in range(0, 80, 4):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(written.parent / f"train-{i}.jpg")
    corpus = InstructionData(source=written / "instructions.json", val=0).corpus()
    told = json.loads((written / "instructions.json").read_text())
    distinct = {(str(r["image"]), *(t["value"] for t in r["conversations"])) for r in told}
    assert len(corpus.train) == len(distinct)
    assert {s.group for s in corpus.train} == {f"train-{i}" for i in range(4)}
    assert {len(s.images) for s in corpus.train} == {1, 2}


# --- what is measured --------------------------------------------------------------------


LUNG = [row for row in ROWS if row["label"].startswith("lung")]


def test_images_are_asked_in_unseen_wordings_and_last_in_two_of_training() -> None:
    words = TOLD["questions"]
    found = measured.questions(LUNG)
    assert [(a.kind, a.wording) for a in found[:5]] == [
        ("tissue", f"unseen wording {n}") for n in range(1, 6)
    ]
    assert len(found) == 5 + 5 + len(measured.KINDS) + 2 + 2
    assert [(a.kind, a.wording) for a in found[-2:]] == [
        (kind, "a wording of training") for kind in measured.MAIN
    ]
    for one in found:
        assert len(one.samples) == len(LUNG)
        side = "train" if one in found[-2:] else "unseen"
        forms = [re.sub(r"\\{\w+\\}", ".+", re.escape(w)) for w in words[one.kind][side]]
        for row, sample in zip(LUNG, one.samples, strict=True):
            assert sample.group == row["group"]
            assert sample.images[0] == row["image"]
            assert any(re.fullmatch(form, sample.turns[-1]) for form in forms), sample.turns
    assert all(s.turns[1] == "lung" for one in found[-4:-2] for s in one.samples)
    for number in range(5):
        assert {s.turns for s in found[number].samples} == {(words["tissue"]["unseen"][number],)}
        answers = [s.answer for s in found[number].samples]
        assert answers == [NAMES[row["label"]] for row in LUNG]


def test_scores_by_hand() -> None:
    truth = ["yes"] * 6 + ["no"] * 2
    said = ["Yes.", " yes", "YES", "no", "no", "", "no", "yes"]
    samples = [
        measured.sample({"image": "x", "group": f"g{i}"}, "Is it?", answer)
        for i, answer in enumerate(truth)
    ]
    found = measured.Asked("malignant", "w", samples).scores(said)
    assert found["exact_match"]["value"] == 4 / 8
    assert found["balanced_accuracy"]["value"] == (3 / 6 + 1 / 2) / 2
    assert found["majority"] == 6 / 8
    assert found["images"] == 8


def test_blind_questions_keep_question_and_answer_and_change_the_image() -> None:
    asked = measured.questions(LUNG)[0]
    hidden = measured.blind(asked)
    pairs = list(zip(asked.samples, hidden.samples, strict=True))
    assert all((a.turns, a.answer, a.group) == (b.turns, b.answer, b.group) for a, b in pairs)
    assert sorted(b.images for _, b in pairs) == sorted(a.images for a, _ in pairs)
    assert sum(a.images == b.images for a, b in pairs) < 5


def test_few_rows_of_each_group_are_evenly_spaced() -> None:
    assert measured.few(ROWS, None) == ROWS
    found = measured.few(ROWS, 3)
    assert [ROWS.index(row) for row in found[:4]] == [0, 3, 6, 10]
    assert len(found) == 30
    assert measured.few(ROWS[:2], 3) == ROWS[:2]
