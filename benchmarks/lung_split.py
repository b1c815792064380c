"""The lung patches of LC25000, split by group into train, val and test.

A group is one original tile that was augmented many times, so all its images are on one side.
Groups are not patients: nobody published which tiles share a patient, and a figure from this
split says nothing about new patients. Choices (epochs, prompts, thresholds) are made on val;
the stated figure is taken on test, once.

    python benchmarks/lung_split.py DATA [--out assets/benchmarks/lung-split.csv]

DATA is the folder with labels.csv (image,label,group); the table adds the column split.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from pathlib import Path

SHARES = {"test": 0.25, "val": 0.15}  # of the groups of each class; the rest is train
SEED = 0
OUT = Path(__file__).parents[1] / "assets" / "benchmarks" / "lung-split.csv"


def read_labels(data: Path) -> list[dict[str, str]]:
    """Return the rows of labels.csv (image, label, group) in their order."""
    with (data / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def shuffled_groups(rows: list[dict[str, str]], salt: str) -> dict[str, list[str]]:
    """Return the groups of each class in an order that depends on names and `salt` alone.

    The order is that of SHA-256, so no generator's version can change it.
    """
    classes: dict[str, set[str]] = {}
    for row in rows:
        classes.setdefault(row["label"], set()).add(row["group"])

    def place(group: str) -> bytes:
        return hashlib.sha256(f"{salt}/{group}".encode()).digest()

    return {label: sorted(classes[label], key=place) for label in sorted(classes)}


def split_groups(rows: list[dict[str, str]], seed: int = SEED) -> dict[str, str]:
    """Return the split of each group: train, val or test, in the same shares in each class."""
    split: dict[str, str] = {}
    for groups in shuffled_groups(rows, f"split/{seed}").values():
        rest = list(groups)
        for name, share in SHARES.items():
            count = round(share * len(groups))
            split |= dict.fromkeys(rest[:count], name)
            rest = rest[count:]
        split |= dict.fromkeys(rest, "train")
    return split


def write_split(data: Path, out: Path = OUT) -> Path:
    """Write the table image,label,group,split to `out` and return its path."""
    rows = read_labels(data)
    split = split_groups(rows)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "label", "group", "split"])
        table.writerows([r["image"], r["label"], r["group"], split[r["group"]]] for r in rows)
    return out


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    print(write_split(given.data, given.out))


if __name__ == "__main__":
    main()
