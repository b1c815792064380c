"""A set of questions for `pathcli vqa-eval`, from the labels of patches, one JSON record a line.

    python benchmarks/mini_clip_data.py DATA mini-data
    python benchmarks/lung_vqa.py mini-data/labels.csv lung-vqa.jsonl
    pathcli vqa-eval lung-vqa.jsonl --model clover-mini --permute 3 --blind

One image of each test group of the lung patches, and of each image one question of every kind,
in wordings that clover-mini was not trained on (assets/clover-mini/questions.yaml).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from clover_mini import few
from clover_mini_data import Asker, Row, read_questions, read_rows

PLAIN = ("tissue", "malignant", "benign", "organ")


def records(rows: list[Row], asker: Asker) -> Iterator[dict[str, Any]]:
    """Yield the questions on each row's image; `either` and `choice` list their options."""
    rng = np.random.default_rng(8)
    for number, row in enumerate(rows):
        known = {"image": row["image"], "group": row["group"]}
        for kind in PLAIN:
            question, answer = asker.ask(kind, row["label"], rng)
            asked = {"question": question, "answer": answer, "type": kind}
            yield {"id": f"{number}-{kind}", **known, **asked}
        word = asker.words["choice"][int(rng.integers(len(asker.words["choice"])))]
        others = [c for c in asker.classes if c != row["label"]]
        shown = rng.permutation([row["label"], *rng.permutation(others)[:2]]).tolist()
        asked = {
            "question": word.replace("{options}", "").strip(),
            "answer": asker.name(row["label"]),
            "options": [asker.name(label) for label in shown],
            "type": "choice",
        }
        yield {"id": f"{number}-choice", **known, **asked}


def main() -> None:
    """Write the set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", default="test", choices=["val", "test"])
    parser.add_argument("--most", type=int, default=1, help="images of a group, at most")
    given = parser.parse_args()
    told = read_questions()
    lung = {k: v for k, v in told["classes"].items() if v["organ"] == "lung"}
    rows = few(read_rows(given.table, given.split, lung), given.most)
    lines = [json.dumps(one) + "\n" for one in records(rows, Asker(told, "unseen"))]
    given.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(rows)} images, {len(lines)} questions: {given.out}")


if __name__ == "__main__":
    main()
