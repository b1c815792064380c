"""How often clover-mini is right in each wording of yes and no it was trained on.

    python benchmarks/clover_mini_wordings.py mini-data/labels.csv

One image of each validation group; the answer is the more probable of yes and no. Writes
assets/clover-mini/wordings.csv, the worst first.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from clover_mini import OUT, few, sample
from clover_mini_data import Asker, read_questions, read_rows

from pathcli.vlm.own import RunResponder

KINDS = ("malignant", "benign")
YES_NO = ("yes", "no")


def main() -> None:
    """Ask, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    given = parser.parse_args()
    told = read_questions()
    lung = {k: v for k, v in told["classes"].items() if v["organ"] == "lung"}
    rows = few(read_rows(given.table, "val", lung), 1)
    responder, asker, rng = RunResponder.shipped(), Asker(told, "train"), np.random.default_rng(0)
    responder.batch = 32
    found = []
    for kind in KINDS:
        for word in asker.words[kind]:
            samples = [sample(row, *asker.answer(kind, row["label"], rng, word)) for row in rows]
            values = np.stack(responder.likelihoods(samples, [YES_NO] * len(samples)))
            yes = np.array([s.answer == "yes" for s in samples])
            said = values[:, 0] > values[:, 1]
            score = (np.mean(said[yes]) + np.mean(~said[~yes])) / 2
            found.append((round(float(score), 4), kind, word, len(samples)))
            print(*found[-1], flush=True)
    with (OUT / "wordings.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["balanced_accuracy", "kind", "wording", "images"])
        writer.writerows(sorted(found))


if __name__ == "__main__":
    main()
