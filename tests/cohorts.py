"""Cohorts that train in a second: features in a store, label tables, slides with lesions."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import fakes
import numpy as np
import synthetic
import torch
from accelerate.utils import set_seed

from pathcli.mil.pooling import MaxPooling
from pathcli.mil.splits import official
from pathcli.mil.tables import LabelTable
from pathcli.recipe import Recipe, load_recipe
from pathcli.store import Store
from pathcli.store.store import item_name
from pathcli.trainer import Loop
from pathcli.types import HeadOutput, Key, Tiles, TileSpec, TileStatus, digest

torch.set_num_threads(1)  # of matrices this small threads only wait for each other

D = 3
LESION = (70, 40, 120)
SLIDE, TISSUE = (1024, 768), (128, 128, 768, 512)
RING = ((320, 256), (768, 256), (768, 576), (320, 576))
"""A lesion of 7 x 5 tiles of 64 px, level-0 px: 224 um wide, more than isolated tumour cells."""

Ring = Sequence[tuple[float, float]]
Slides = Iterable[str]


class Contrast(fakes.MeanColour):
    """The fake encoder on a scale that a head learns from in a few steps."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return super().encode(images) / 32 - 4


# --- features without slides -------------------------------------------------------------


def values(n: int, *, planted: int = 0, seed: int = 0) -> np.ndarray:
    """Return noise, float16 [n, D], of which the first `planted` rows are a lesion."""
    rows = np.random.default_rng(seed).normal(size=(n, D))
    rows[:planted, 0] += 6
    return rows.astype(np.float16)


def put(
    store: Store,
    slide: str,
    rows: np.ndarray,
    *,
    bad: Sequence[int] = (),
    encoder: str = fakes.MeanColour.id,
    spec: TileSpec = fakes.MeanColour.native,
    mpp: float = 0.5,
    file: str | None = None,
) -> Key:
    """Write the features of one slide, a row of tiles of 64 px after another, ten a row.

    `file` is the name of the slide whose file this is, if it was renamed since.
    """
    number = np.arange(len(rows))
    xy = np.stack([number % 10 * 64, number // 10 * 64], 1).astype(np.int32)
    item = item_name(slide, digest([file or slide, mpp]))
    tiles = Tiles(item, xy, np.zeros(len(rows), np.uint8), spec, mpp, 640, 6400, 0.5)
    status = np.zeros(len(rows), np.uint8)
    status[list(bad)] = TileStatus.UNREADABLE
    kept = rows.copy()
    kept[list(bad)] = np.nan
    key = Key(item, mpp, spec.digest, encoder)
    with store.features.writer(tiles, encoder, rows.shape[1:]) as writer:
        writer.begin(0)
        writer.write(kept, status)
    return key


def table(path: Path, rows: Iterable[tuple[str, str, object]]) -> Path:
    """Write a label table of (case, slide, label)."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label"), *rows])
    return path


def planted(
    store: Store,
    path: Path,
    patients: int = 24,
    *,
    name: str = "p",
    slides: int = 1,
    classes: tuple[str, str] = ("normal", "tumor"),
) -> Path:
    """Write features and labels of patients, every second of whom has a lesion in each slide."""
    rows = []
    for i in range(patients):
        for j in range(slides):
            slide = f"{name}{i}-{j}"
            put(store, slide, values(30, planted=i % 2 * 5, seed=100 * i + j))
            rows.append((f"{name}{i}", slide, classes[i % 2]))
    return table(path, rows)


def recipe(labels: Path, *settings: str, name: str = "mil-abmil") -> Recipe:
    """Return a shipped recipe on one's own labels with the fake encoder, quick to train."""
    return load_recipe(name, [f"data.labels={labels}", *quick(), *settings])


def quick(epochs: int = 12) -> list[str]:
    """Return settings under which a head learns what is planted in a moment."""
    return [
        "encoder={kind: fake}",
        "tiles={size_px: 64, mpp: 0.5}",
        f"train.epochs={epochs}",
        "head.hidden=32",
        "train.lr=0.003",
        "train.seed=[1]",
    ]


def assert_resumed_alike(task: Any, folder: Path) -> None:
    """Train a prepared task whole, and stopped after two steps: both end with equal weights."""

    def loop(name: str) -> Loop:
        set_seed(1)
        return Loop(task.begin(1), task.train, folder / name, "cpu")

    whole = loop("whole")
    assert whole.run(lambda *_: None)
    assert loop("cut").run(lambda *_: None, stop_after=2) is False
    cut = loop("cut")
    torch.rand(5)
    assert cut.run(lambda *_: None)
    assert cut.lines == whole.lines
    assert cut.best_state.keys() == whole.best_state.keys()
    assert all(torch.equal(cut.best_state[k], v) for k, v in whole.best_state.items())


def split(path: Path, train: Slides, val: Slides, test: Slides) -> Path:
    """Write a split file of CLAM's form."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["train", "val", "test"])
        writer.writerows(zip_longest(train, val, test, fillvalue=""))
    return path


class Sure(MaxPooling):
    """A head that finds a lesion of `values` unlikely at best, and elsewhere all but impossible."""

    def forward(self, features: torch.Tensor) -> HeadOutput:
        score = 4 * features[:, 0].max() - 32 + 0 * self.classifier.bias.sum()
        return HeadOutput(torch.stack([0 * score, score]), torch.full((len(features),), 1 / 30))


def lines(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# --- slides ------------------------------------------------------------------------------


def paint(path: Path, ring: Ring | None = None, *, seed: int = 0) -> Path:
    """Write a slide of 96 tiles of 64 px at 0.5 um per pixel, its lesion within `ring`."""
    pixels = synthetic.picture(*SLIDE, TISSUE, seed=seed)
    if ring is not None:
        mask = np.zeros(pixels.shape[:2], np.uint8)
        cv2.fillPoly(mask, [np.rint(ring).astype(np.int32)], 1)
        grain = np.random.default_rng(seed).integers(-15, 15, pixels.shape)
        pixels[mask > 0] = np.clip(np.array(LESION) + grain, 0, 255)[mask > 0]
    return synthetic.slide(path, pixels)


def asap(path: Path, ring: Ring) -> Path:
    """Write one lesion as CAMELYON16's XML has it."""
    points = "".join(
        f'<Coordinate Order="{i}" X="{x:.6f}" Y="{y:.6f}" />' for i, (x, y) in enumerate(ring)
    )
    path.write_text(
        '<?xml version="1.0"?><ASAP_Annotations><Annotations><Annotation Name="_0" '
        f'Type="Polygon" PartOfGroup="_0" Color="#F4FA58"><Coordinates>{points}</Coordinates>'
        "</Annotation></Annotations></ASAP_Annotations>"
    )
    return path


def fitted(ring: np.ndarray, into: Ring = RING) -> np.ndarray:
    """Return a ring [k, 2] moved and scaled to fill the box of another."""
    low, high = np.min(into, 0), np.max(into, 0)
    return (ring - ring.min(0)) * ((high - low) / np.ptp(ring, 0)).min() + low


# --- CAMELYON16 --------------------------------------------------------------------------


def some(known: LabelTable, seeds: Sequence[int], each: int = 2) -> list[str]:
    """Return a few slides of the table: of each class some in every part of these seeds."""
    chosen: dict[str, None] = {}
    for seed in seeds:
        for slides in official(known, seed=seed).parts().values():
            for label in known.classes:
                of_class = [s for s in slides if known.by_slide[s].label == label]
                chosen |= dict.fromkeys(of_class[:each])
    return list(chosen)


def camelyon16(folder: Path, known: LabelTable, seeds: Sequence[int]) -> list[str]:
    """Paint some slides of the table into `folder/slides`, their lesions in `folder/lesions`."""
    for name in ("slides", "lesions"):
        (folder / name).mkdir()
    names = some(known, seeds)
    for i, name in enumerate(names):
        tumor = known.by_slide[name].label == known.classes[1]
        paint(folder / "slides" / f"{name}.tif", RING if tumor else None, seed=i)
        if tumor:
            asap(folder / "lesions" / f"{name}.xml", RING)
    return names
