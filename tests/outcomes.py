"""Cohorts whose outcome is planted in a few tiles, and recipes that learn it in seconds."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from cohorts import put, values

from pathcli.recipe import Recipe, load_recipe
from pathcli.store import Store

UNITS = {"mil-regression": ["outcome.column=age", "outcome.unit=years"]}
UNITS["mil-survival"] = ["outcome.time=months", "outcome.event=dead", "outcome.unit=months"]
HAZARDS = "outcome={kind: hazards, time: months, event: dead, unit: months}"


def write(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> Path:
    """Write a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(header), *rows])
    return path


def planted(
    store: Store,
    path: Path,
    patients: int = 60,
    *,
    slides: int = 1,
    name: str = "p",
    shuffled: bool = False,
    seed: int = 0,
) -> Path:
    """Write features and a table of age, months and dead, all of which follow from some tiles."""
    rng = np.random.default_rng(seed)
    drive = rng.uniform(-1, 1, patients)
    said = rng.permutation(drive) if shuffled else drive
    lived, lost = 20 * np.exp(-2.5 * said) * rng.weibull(3, patients), rng.uniform(5, 200, patients)
    rows = []
    for i in range(patients):
        for j in range(slides):
            tiles = values(16, seed=1000 * seed + 10 * i + j)
            tiles[:6, 0] = (4 * drive[i] + rng.normal(size=6) / 4).astype(np.float16)
            put(store, f"{name}{i}-{j}", tiles)
            months, dead = min(lived[i], lost[i]), int(lived[i] <= lost[i])
            age = round(60 + 20 * said[i], 2)
            rows.append((f"{name}{i}", f"{name}{i}-{j}", age, round(months, 3), dead))
    return write(path, ("case_id", "slide_id", "age", "months", "dead"), rows)


def recipe(name: str, labels: Path, *settings: str, epochs: int = 20) -> Recipe:
    """Return a shipped recipe of an outcome on one's own labels, quick to train."""
    given = [
        f"data.labels={labels}",
        "encoder={kind: fake}",
        "tiles={size_px: 64, mpp: 0.5}",
        f"train.epochs={epochs}",
        "head.hidden=16",
        "train.lr=0.01",
        "train.seed=[1]",
        "data.val=0.2",
        "data.test=0.4",
    ]
    quick = (
        ["train.accumulate=1", "train.batch=4"] if name == "mil-regression" else ["train.batch=8"]
    )
    return load_recipe(name, [*given, *quick, *UNITS[name], *settings])
