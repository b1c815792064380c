"""Instructions for clover-mini: questions with short answers, built from the labels of patches.

    python benchmarks/mini_clip_data.py DATA mini-data
    python benchmarks/clover_mini_data.py mini-data/labels.csv clover-data

Writes captions.csv (stage 1: image,caption,group) and instructions.json (stage 2: LLaVA's form,
with the kinds of its questions and the image's group) of the training groups; the other groups
are written nowhere. What is asked, and how, is assets/clover-mini/questions.yaml. Labels are of
patches, so descriptions say what is typical of a class, not what one image shows.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathcli.yaml12 import parse_yaml

QUESTIONS = Path(__file__).parents[1] / "assets" / "clover-mini" / "questions.yaml"
LETTERS = "ABCDE"
SHARES = {  # of the questions on one image
    "tissue": 0.22,
    "malignant": 0.2,
    "benign": 0.13,
    "status": 0.05,
    "named": 0.12,
    "organ": 0.03,
    "either": 0.08,
    "choice": 0.08,
    "describe": 0.04,
    "same": 0.05,
}
MORE = 8  # times as many questions on a colon patch, as there are few of them
CASUAL = 0.2  # of the questions are in small letters, without a mark
Row = dict[str, str]


def read_questions() -> dict[str, Any]:
    """Return the questions' file."""
    return dict(parse_yaml(QUESTIONS.read_text(encoding="utf-8"), str(QUESTIONS)))


class Asker:
    """Questions about labelled patches, and their answers; `side` is `train` or `unseen`."""

    def __init__(self, told: Mapping[str, Any], side: str) -> None:
        """Take the questions of a side."""
        self.classes, self.descriptions = told["classes"], told["descriptions"]
        self.words = {kind: lists[side] for kind, lists in told["questions"].items()}

    def name(self, label: str) -> str:
        """Return what a class is called in answers."""
        return str(self.classes[label]["name"])

    def answer(self, kind: str, label: str, rng: np.random.Generator, word: str) -> tuple[str, str]:
        """Return a question of a kind in a wording, and its answer, for a patch of a class."""
        own, name = self.classes[label], self.name(label)
        plain = {
            "tissue": name,
            "malignant": _yes(own["malignant"]),
            "benign": _yes(not own["malignant"]),
            "status": "malignant" if own["malignant"] else "benign",
            "organ": own["organ"],
            "describe": _one(self.descriptions[label], rng),
        }
        if kind in plain:
            return word, plain[kind]
        others = [c for c in self.classes if c != label]
        if kind == "named":
            asked = label if rng.random() < 0.5 else _one(others, rng)
            return word.format(name=self.name(asked)), _yes(asked == label)
        shown = [label, *rng.permutation(others)[: 1 if kind == "either" else 2].tolist()]
        shown = rng.permutation(shown).tolist()
        if kind == "either":
            a, b = (self.name(c) for c in shown)
            return word.format(a=a, b=b), name
        lettered = [f"{x}. {self.name(c)}" for x, c in zip(LETTERS, shown, strict=False)]
        return word.format(options=" ".join(lettered)), lettered[shown.index(label)]

    def ask(self, kind: str, label: str, rng: np.random.Generator) -> tuple[str, str]:
        """Return a question of a kind, its wording drawn, and its answer."""
        return self.answer(kind, label, rng, _one(self.words[kind], rng))


def casual(question: str) -> str:
    """Return a question as people type it: no capital, no mark at the end."""
    return (question[0].lower() + question[1:]).rstrip("?.")


def _yes(right: bool) -> str:
    return "yes" if right else "no"


def _one(choices: Sequence[Any], rng: np.random.Generator) -> Any:  # noqa: ANN401
    return choices[int(rng.integers(len(choices)))]


def instructions(rows: Sequence[Row], asker: Asker, each: int, seed: int) -> Iterator[Any]:
    """Yield conversations on every row's image: `each` questions, one to three to a conversation.

    A comparison of two images stands alone.
    """
    rng = np.random.default_rng([5, seed])
    kinds, shares = list(SHARES), list(SHARES.values())
    for number, row in enumerate(rows):
        more = MORE if row["label"].startswith("colon") else 1
        asked = rng.choice(kinds, each * more, p=shares).tolist()
        alone = [[k] for k in asked if k == "same"]
        for index, turns in enumerate(alone + _cut([k for k in asked if k != "same"], rng)):
            if turns == ["same"]:
                images, said = _compared(rows, row, asker, rng)
            else:
                images, said = [row["image"]], [asker.ask(k, row["label"], rng) for k in turns]
            said = [(casual(q) if rng.random() < CASUAL else q, a) for q, a in said]
            shown = "<image>\n" * len(images)
            yield {
                "id": f"{number}-{index}-{'-'.join(turns)}",
                "image": images if len(images) > 1 else images[0],
                "conversations": [
                    {"from": who, "value": shown * (turn == 0 and who == "human") + words}
                    for turn, pair in enumerate(said)
                    for who, words in zip(("human", "gpt"), pair, strict=True)
                ],
                "kinds": turns,
                "group": row["group"],
            }


def _compared(
    rows: Sequence[Row], row: Row, asker: Asker, rng: np.random.Generator
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return two images, the second of the same class half the time, and what is asked of them."""
    alike = rng.random() < 0.5
    others = [r for r in rows if (r["label"] == row["label"]) == alike and r is not row]
    other = _one(others, rng)
    asked = _one(asker.words["same"], rng), _yes(other["label"] == row["label"])
    return [row["image"], other["image"]], [asked]


def _cut(kinds: Sequence[str], rng: np.random.Generator) -> list[list[str]]:
    """Return the kinds in pieces of one to three, as often each."""
    pieces, at = [], 0
    while at < len(kinds):
        size = int(rng.integers(1, 4))
        pieces.append(list(kinds[at : at + size]))
        at += size
    return pieces


def captions(rows: Sequence[Row], asker: Asker) -> Iterator[Row]:
    """Yield a caption for every row's image: what the class is called, or typical of it."""
    rng = np.random.default_rng([5, 0])
    for row in rows:
        texts = [asker.name(row["label"]), *asker.descriptions[row["label"]]]
        yield {"image": row["image"], "caption": _one(texts, rng), "group": row["group"]}


def read_rows(table: Path, split: str, classes: Mapping[str, Any]) -> list[Row]:
    """Return the rows of a split whose class has a name here, images as absolute paths."""
    with table.open(newline="") as file:
        found = [r for r in csv.DictReader(file) if r["split"] == split and r["label"] in classes]
    return [row | {"image": str((table.parent / row["image"]).absolute())} for row in found]


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=3, help="questions on an image")
    given = parser.parse_args()
    told = read_questions()
    asker, rows = Asker(told, "train"), read_rows(given.table, "train", told["classes"])
    given.out.mkdir(parents=True, exist_ok=True)
    with (given.out / "captions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ["image", "caption", "group"])
        table.writeheader()
        table.writerows(captions(rows, asker))
    asked = list(instructions(rows, asker, given.each, 0))
    (given.out / "instructions.json").write_text(json.dumps(asked, indent=0) + "\n")
    print(f"{len(rows)} images, {len(asked)} questions: {given.out}")


if __name__ == "__main__":
    main()
