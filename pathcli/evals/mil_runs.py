"""The runs of one head in, their predictions on test slides out; and what makes them a test.

`own`: the labels the runs were trained on, their test split. `part`: another table, of
slides of that test split. `external`: slides and patients the runs have never seen.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pathcli.device import pick_device
from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError
from pathcli.evals.mil_scores import Scores, Tested
from pathcli.metrics.classification import threshold_at_specificity
from pathcli.mil.bags import BagData, Bags, Cohort, look_up, make
from pathcli.mil.tables import LabelTable, listed, read_labels
from pathcli.mil.task import fingerprint, load_head, predict_bags, run_encoder
from pathcli.recipe import build_part
from pathcli.runs import chosen
from pathcli.slides.discovery import discover
from pathcli.types import TileSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pathcli.mil.bags import Started
    from pathcli.runs import Run
    from pathcli.store import Store

log = logging.getLogger("pathcli")

Kind = Literal["own", "part", "external"]
FEW_NEGATIVE, FEW_SITES = 20, 10  # below which thresholds and intervals are called coarse
FEW = 5  # test patients of a class below which the report warns


def table_for(run: Run, labels: Path | None, *, own: bool) -> LabelTable:
    """Return the table to test a run on, its classes in the run's order.

    Raises:
        DataError: the run's own table has changed, or another one has other labels.
    """
    data: dict[str, Any] = dict(run.recipe.values["data"])
    if own:
        given = {"labels": labels} if labels else {}
        built: BagData = build_part(run.recipe, "data")(**given)
        if built.table.digest != run.facts["labels"]["digest"]:
            source = built.table.source
            msg = (
                f"{source} has changed since {run.folder} was trained; train anew, in another --out"
            )
            raise DataError(msg)
        return built.table
    same = {name: name for name in run.facts["classes"]}
    return read_labels(
        labels or data["labels"], classes=data["classes"] or same, target=data["target"]
    )


def find_features(
    run: Run,
    table: LabelTable,
    store: Store,
    slides: Path | None,
    *,
    device: str = "auto",
    progress: Started | None = None,
) -> Cohort:
    """Return the table's slides with features as the run wants them, made where slides are given.

    Raises:
        DataError: the encoder here is not the run's.
        ResourceError: no slide has features.
    """
    spec = TileSpec.from_json(run.facts["tiles"])
    if slides is None:
        return look_up(table, store, run.facts["encoder"], spec)
    embedder = Embedder(run_encoder(run), store, device=device)
    return make(table, discover([str(slides)]), embedder, spec, progress)


def score_head(
    name: str,
    group: Sequence[Run],
    cohort: Cohort,
    *,
    own: bool,
    specificity: float,
    allow_leak: bool = False,
    device: str = "auto",
) -> Scores:
    """Test the runs of one head that were chosen on validation, one a seed.

    Raises:
        DataError: a slide or patient was trained on, or a class has no test slide.
    """
    here = pick_device(device)

    def score(run: Run, slides: Sequence[str]) -> Tested:
        return _score_run(run, cohort, slides, specificity, here)

    scores = score_runs(name, group, cohort, score, own=own, allow_leak=allow_leak)
    warnings = (*scores.warnings, *_few(cohort, scores.tested))
    return replace(scores, warnings=tuple(dict.fromkeys(warnings)))


def score_runs(
    name: str,
    group: Sequence[Run],
    cohort: Cohort,
    score: Callable[[Run, Sequence[str]], Tested],
    *,
    own: bool,
    allow_leak: bool = False,
) -> Scores:
    """Test the runs that were chosen on validation, one a seed, by what `score` finds on slides.

    Raises:
        DataError: a slide or patient was trained on.
    """
    best = chosen(group)
    kind: Kind = "own" if own else "external"
    warnings = [text for run in best for text in run.facts["warnings"]] if own else []
    tested, shared = [], 0
    for run in best:
        slides = run.facts["split"]["test"] if own else [row.slide for row in cohort.table.rows]
        seen, known = _overlap(run, cohort, slides)
        shared = max(shared, seen)
        if seen and not own:
            msg = f"{seen} slides of {cohort.table.source} are of patients {run.folder} has seen"
            if not allow_leak:
                raise DataError(msg + "; leave them out, or give --allow-leak")
            warnings.append(msg)
        kind = "part" if known and not own else kind
        tested.append(score(run, slides))
    unit = "site" if own and group[0].recipe.values["data"]["by"] == "site" else "patient"
    if unit == "site" and len(sites := {site for t in tested for site in t.sites}) < FEW_SITES:
        warnings.append(f"only {len(sites)} test sites to draw anew: the intervals are coarse")
    return Scores(name, tuple(tested), cohort, kind, unit, shared, tuple(dict.fromkeys(warnings)))


def _overlap(run: Run, cohort: Cohort, slides: Sequence[str]) -> tuple[int, int]:
    """Return how many slides the run has learnt from, and how many are of its test split.

    A slide is known by its patient, its name, or the fingerprint of its file.
    """
    split, items = run.facts["split"], run.facts["store"]
    learnt = {*split["train"], *split["val"]}
    files = {fingerprint(items[slide]) for slide in learnt if slide in items}
    held = {fingerprint(items[slide]) for slide in split["test"] if slide in items}
    patients, rows = set(run.facts["patients"]), cohort.table.by_slide
    mine = {s: fingerprint(cohort.keys[s].stem) if s in cohort.keys else "" for s in slides}
    seen = [s for s in slides if s in learnt or rows[s].case in patients or mine[s] in files]
    known = [s for s in slides if s in split["test"] or mine[s] in held]
    return len(seen), len(known)


def _score_run(
    run: Run, cohort: Cohort, slides: Sequence[str], specificity: float, device: str
) -> Tested:
    bags = Bags(cohort, slides, run.facts["bag"])
    classes, rows = cohort.table.classes, cohort.table.by_slide
    absent = [name for i, name in enumerate(classes) if i not in bags.labels.tolist()]
    if absent:
        msg = f"{cohort.table.source}: no test slide of class {listed(absent)} has features"
        raise DataError(msg)
    said = predict_bags(load_head(run, device), bags, torch.device(device))
    lost = Counter(rows[slide].label or "" for slide in slides if slide not in cohort.keys)
    return Tested(
        run=run,
        names=tuple(bags.names),
        patients=tuple(bags.patients),
        sites=tuple(bags.sites),
        labels=bags.labels,
        chances=np.stack([p.probabilities for p in said]),
        threshold=_threshold(run, specificity),
        listed=len(slides),
        lost=lost,
    )


def _threshold(run: Run, specificity: float) -> float | None:
    """Return the threshold that has the specificity asked for on the run's validation bags."""
    if len(run.facts["classes"]) != 2:  # noqa: PLR2004 - a threshold parts two classes
        return None
    said = run.facts["validation"]
    labels, chances = np.array(said["labels"]), np.array(said["probabilities"])
    return threshold_at_specificity(labels, chances[:, 1], specificity)


def _few(cohort: Cohort, tested: Sequence[Tested]) -> list[str]:
    """Return warnings of classes with few test patients, and of thresholds on few bags."""
    warnings = []
    for i, name in enumerate(cohort.table.classes):
        pairs = [set(zip(t.patients, t.labels.tolist(), strict=True)) for t in tested]
        count = min(sum(label == i for _, label in pair) for pair in pairs)
        if count < FEW:
            warnings.append(f"only {count} test patients of class {name}: the numbers say little")
    negative = [t.run.facts["validation"]["labels"].count(0) for t in tested]
    if len(cohort.table.classes) == 2 and min(negative) < FEW_NEGATIVE:  # noqa: PLR2004
        warnings.append(
            f"thresholds rest on {min(negative)} validation bags of {cohort.table.classes[0]}: "
            "the specificity on test may be far from the one asked for"
        )
    return warnings


def count_reading(store: Store, heads: Sequence[Scores]) -> int | None:
    """Note in the store that these test slides were read; return how often one of them has been.

    None if it cannot be counted. Another store knows nothing of it.
    """
    slides = sorted({name for scores in heads for t in scores.tested for name in t.names})
    path = store.local / "evaluations.jsonl"
    line = {"when": time.strftime("%Y-%m-%d %H:%M"), "test": slides}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        lines = path.read_text(encoding="utf-8").splitlines()
        return max(Counter(name for text in lines for name in json.loads(text)["test"]).values())
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: cannot count how often the test slides were read (%s)", path, error)
        return None
