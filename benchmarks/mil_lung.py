"""What the heads find in lung mosaics, and what they find where there is nothing to find.

    python benchmarks/lung_mosaics.py DATA MOSAICS
    pathcli embed MOSAICS/slides --encoder lite0 --store STORE
    python benchmarks/mil_lung.py heads MOSAICS STORE OUT
    python benchmarks/mil_lung.py null MOSAICS STORE OUT

`heads`: AUROC of seven heads over five seeds, splits drawn anew by pool of tiles, and how
well attention tells lesion tiles from others. `null`: the same with labels permuted within
each pool; the mean AUROC must be a half and the 95 % intervals must hold it. `auroc` has its
interval from drawing pools of tiles anew; `auroc_given_tiles` and the intervals of `null` draw
mosaics, and are conditional on the tiles: 517 original images, which are not patients.
One JSON line for each head or cohort.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pathcli.evals.mil import Evaluation, mil_eval
from pathcli.evals.mil_report import measure_evaluation
from pathcli.evals.mil_scores import measures
from pathcli.metrics.froc import auc_in_lesion
from pathcli.metrics.statistics import Interval, bootstrap, delong_interval
from pathcli.mil.bags import Bags
from pathcli.mil.lesions import inside
from pathcli.mil.task import load_head, predict_bags
from pathcli.recipe import Recipe, load_recipe
from pathcli.runs import train
from pathcli.slides.annotations import read_lesions
from pathcli.store import Store

HEADS = ("transmil", "mean", "max", "abmil", "acmil", "clam-sb", "dsmil")
SEEDS = [1, 2, 3, 4, 5]
RATES = [2e-4, 1e-3]
EPOCHS = 30
SLOW = {"transmil": {"epochs": 10, "lr": 2e-4}}  # 0.2 s a step on one core; its own rate
COHORTS = 50
NULL_EPOCHS = 15
WORKERS = 2


def recipe(head: str, labels: Path, **settings: Any) -> Recipe:  # noqa: ANN401 - any value
    """Return the recipe of one head, splits by site: 30 % test, 20 % of the rest validation."""
    return load_recipe("mil-abmil").with_values(
        head={"kind": head},
        **{
            "data.labels": str(labels),
            "data.by": "site",
            "data.test": 0.3,
            "data.val": 0.2,
            **{f"train.{name}": value for name, value in settings.items()},
        },
    )


def measure_head(head: str, mosaics: Path, store: Path, out: Path) -> dict[str, Any]:
    """Train five seeds of a head, test them, and look at its attention."""
    start, labels = time.perf_counter(), mosaics / "labels.csv"
    kept = Store(store)
    settings = {"epochs": EPOCHS, "lr": RATES, "seed": SEEDS} | SLOW.get(head, {})
    train(recipe(head, labels, **settings), out=out / head, store=kept)
    seconds = time.perf_counter() - start
    found = mil_eval(str(labels), runs=out / head, heads=[head], store=kept)
    numbers = measure_evaluation(found).heads[head]
    row = {"head": head, "seconds": round(seconds), "seeds": len(SEEDS)}
    row["sites"] = numbers["auroc"].interval.n
    for name in ("auroc", "balanced_accuracy"):
        row[name] = rounded(numbers[name].interval)
        row[f"{name}_sd"] = round(numbers[name].spread, 4)
    by_mosaic = replace(found.heads[0], unit="patient")
    row["auroc_given_tiles"] = rounded(by_mosaic.interval(measures(by_mosaic)["auroc"]))
    return row | attention_in_lesions(found, mosaics / "annotations")


def rounded(m: Interval) -> list[float]:
    """Return value, low and high."""
    return [round(v, 4) for v in (m.value, m.low, m.high)]


def attention_in_lesions(found: Evaluation, annotations: Path) -> dict[str, Any]:
    """Return AUROC of attention against lesion tiles, mean over the tested tumor mosaics."""
    areas, slides = [], []
    (scores,) = found.heads
    for tested in scores.tested:
        bags = Bags(scores.cohort, tested.names)
        head = load_head(tested.run)
        for said in predict_bags(head, bags, torch.device("cpu")):
            if not said.bag.label:
                continue
            store, key = bags.source(said.bag.name)
            tiles = store.tiles[replace(key, encoder=None)]
            lesions = read_lesions(annotations / f"{said.bag.name}.xml")
            areas.append(auc_in_lesion(said.attention, inside(tiles, lesions)))
            slides.append(said.bag.name)
    values = np.array(areas)
    m = bootstrap(lambda rows: float(values[rows].mean()), slides, limits=None)
    return {"attention_in_lesion": rounded(m)}


def permuted(mosaics: Path, out: Path, cohort: int) -> Path:
    """Write a label table whose labels are shuffled within each pool; return its path."""
    with (mosaics / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rng = np.random.default_rng(cohort)
    for site in sorted({row["site"] for row in rows}):
        mine = [row for row in rows if row["site"] == site]
        labels = rng.permutation([row["label"] for row in mine])
        for row, label in zip(mine, labels, strict=True):
            row["label"] = str(label)
    path = out / f"null-{cohort:02d}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def measure_null(cohort: int, mosaics: Path, store: Path, out: Path) -> dict[str, Any]:
    """Train and test the mean and ABMIL heads on one cohort of permuted labels."""
    labels, kept = permuted(mosaics, out, cohort), Store(store)
    row: dict[str, Any] = {"cohort": cohort}
    for head in ("mean", "abmil"):
        runs = out / f"null-{cohort:02d}-{head}"
        plan = recipe(head, labels, epochs=NULL_EPOCHS, lr=5e-4, seed=cohort + 1)
        train(plan, out=runs, store=kept)
        (scores,) = mil_eval(str(labels), runs=runs, heads=[head], store=kept).heads
        m = replace(scores, unit="patient").interval(measures(scores)["auroc"])
        d = delong_interval(scores.labels, scores.chances[:, 1])
        row[head] = {"auroc": m.value, "bca": [m.low, m.high], "delong": [d.low, d.high]}
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean AUROC over the null cohorts and how many intervals hold a half."""
    found: dict[str, Any] = {"cohorts": len(rows)}
    for head in ("mean", "abmil"):
        values = np.array([row[head]["auroc"] for row in rows])
        found[head] = {"auroc": round(float(values.mean()), 4)}
        found[head]["standard_error"] = round(float(values.std(ddof=1) / len(values) ** 0.5), 4)
        for kind in ("bca", "delong"):
            hold = [row[head][kind][0] <= 0.5 <= row[head][kind][1] for row in rows]
            found[head][f"{kind}_coverage"] = float(np.mean(hold))
    return found


def main() -> None:
    """Run one of the two experiments, two processes side by side."""
    what, mosaics, store, out = sys.argv[1], *map(Path, sys.argv[2:5])
    work, items = (measure_head, HEADS) if what == "heads" else (measure_null, range(COHORTS))
    rows = []
    with ProcessPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for job in [pool.submit(work, item, mosaics, store, out) for item in items]:  # type: ignore[arg-type]
            rows.append(job.result())
            print(json.dumps(rows[-1]), flush=True)
    if what == "null":
        print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
