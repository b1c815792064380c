"""A benchmark or a label table and trained runs in, an honest evaluation out.

Runs whose labels are this very table are tested on their own test split; runs of other
labels are validated externally, on all slides, after a check that no patient is shared.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pathcli.device import pick_device
from pathcli.encoders.embedding import Embedder
from pathcli.evals.mil_scores import Scores, Tested
from pathcli.metrics.classification import threshold_at_specificity
from pathcli.mil.bags import Bags, Cohort, look_up, make
from pathcli.mil.benchmarks import BENCHMARKS, Benchmark, benchmark
from pathcli.mil.tables import read_labels
from pathcli.mil.task import chosen, load_head, predict_bags
from pathcli.recipe import build_part, load_recipe
from pathcli.registry import did_you_mean
from pathcli.runs import Run, find_runs, train
from pathcli.slides.discovery import discover
from pathcli.store import Store
from pathcli.types import DataError, ResourceError, TileSpec, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.mil.bags import Started
    from pathcli.mil.tables import LabelTable

log = logging.getLogger("pathcli")

HEADS = ("abmil", "acmil")
SPECIFICITY = 0.9
_TWO = 2


@dataclass(frozen=True)
class Evaluation:
    """What was tested: heads with their scores, the slides used and missing, and warnings.

    `external` says that the runs were trained on other labels; `times` is how often the test
    slides have been read with these runs, this time included.
    """

    name: str
    table: LabelTable
    benchmark: Benchmark | None
    heads: tuple[Scores, ...]
    cohorts: tuple[Cohort, ...]
    external: bool
    times: int
    specificity: float
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    name: str
    table: LabelTable
    benchmark: Benchmark | None
    labels: Path | None
    slides: Path | None
    encoder: str | None
    settings: tuple[str, ...]
    runs: Path


@dataclass(frozen=True)
class _Means:
    """What it is done with."""

    store: Store
    device: str
    progress: Started | None


def mil_eval(
    name: str,
    *,
    runs: Path = Path("runs"),
    heads: Sequence[str] = HEADS,
    encoder: str | None = None,
    labels: Path | None = None,
    slides: Path | None = None,
    train_missing: bool = False,
    settings: Sequence[str] = (),
    specificity: float = SPECIFICITY,
    allow_leak: bool = False,
    store: Store | None = None,
    device: str = "auto",
    progress: Started | None = None,
) -> Evaluation:
    """Test all seeds of the named heads.

    Args:
        name: a benchmark, or a label table (see `read_labels`).
        runs: folder of finished runs.
        heads: which heads, by registered name.
        encoder: only runs on features of this encoder; what `train_missing` trains on.
        labels: the benchmark's label table, where pathcli does not ship it.
        slides: folder or list of slides; without it features are looked up in the store.
        train_missing: train what is not there, by `<benchmark>-<head>` or `mil-<head>`.
        settings: `section.key=value` for the recipes of `train_missing`.
        specificity: at which sensitivity is stated; the threshold is fixed on validation.
        allow_leak: only warn of patients the runs have seen.
        store: where features are found or put (default: the user's store).
        device: auto, cpu, cuda, cuda:1 or mps.
        progress: called with a name, gives the callback of one part of the work.

    Raises:
        UsageError: an unknown benchmark, and no such file.
        DataError: the table is wrong, or a patient of it was trained on.
        ResourceError: no runs or no features; the message has the command that makes them.
    """
    known = benchmark(name, labels) if name in BENCHMARKS else None
    table = known.need_table() if known else _own_table(name)
    plan = _Plan(name, table, known, labels, slides, encoder, tuple(settings), runs)
    means = _Means(store or Store(), device, progress)
    groups = _trained(plan, means, heads, train_missing=train_missing)
    found = [
        _Test(plan, group, means, specificity, allow_leak=allow_leak) for group in groups.values()
    ]
    return Evaluation(
        name=name,
        table=table,
        benchmark=known,
        heads=tuple(Scores(label, test.tested) for label, test in zip(groups, found, strict=True)),
        cohorts=tuple(test.cohort for test in found),
        external=any(test.external for test in found),
        times=max(test.times for test in found),
        specificity=specificity,
        warnings=tuple(dict.fromkeys(w for test in found for w in test.warnings)),
    )


def _trained(
    plan: _Plan, means: _Means, heads: Sequence[str], *, train_missing: bool
) -> dict[str, list[Run]]:
    """Return the runs of every head, trained now where they are not there and may be."""
    groups = _groups(plan, heads)
    absent = [head for head in heads if not any(run_head(g[0]) == head for g in groups.values())]
    if not absent:
        return groups
    if not train_missing:
        raise ResourceError(_how_to_train(plan, absent))
    for head in absent:
        recipe = load_recipe(*_recipe(plan, head))
        train(
            recipe,
            out=plan.runs,
            store=means.store,
            device=means.device,
            progress=means.progress,
        )
    return _groups(plan, heads)


def run_head(run: Run) -> str:
    """Return the registered name of a run's head."""
    return str(run.recipe.values["head"]["kind"])


def _own_table(name: str) -> LabelTable:
    path = Path(name).expanduser()
    if not path.is_file():
        hint = did_you_mean(name, list(BENCHMARKS))
        msg = f"{name!r} is neither a benchmark nor a file with labels: {hint}"
        raise UsageError(msg)
    return read_labels(path)


def _groups(plan: _Plan, heads: Sequence[str]) -> dict[str, list[Run]]:
    """Return the runs that fit, for each head (recipe and encoder, where there are several)."""
    fit = [
        run
        for run in (find_runs(plan.runs) if plan.runs.is_dir() else [])
        if run.recipe.task == "mil"
        and run_head(run) in heads
        and plan.encoder in {None, run.recipe.values["encoder"]["kind"]}
        and tuple(run.facts["classes"]) == plan.table.classes
    ]
    own = [run for run in fit if run.facts["labels"]["digest"] == plan.table.digest]
    groups: dict[tuple[str, str, str], list[Run]] = {}
    # runs of these very labels are not mixed with those of others, and a benchmark has its own
    for run in own if own or plan.benchmark else fit:
        key = (run_head(run), run.recipe.name, run.facts["encoder"])
        groups.setdefault(key, []).append(run)
    ordered = sorted(groups, key=lambda key: (list(heads).index(key[0]), key))
    labels = {}
    for key in ordered:
        alike = [other for other in ordered if other[0] == key[0]]
        labels[key[0] if len(alike) == 1 else f"{key[0]} ({key[1]}, {key[2]})"] = groups[key]
    return labels


def _recipe(plan: _Plan, head: str) -> tuple[str, list[str]]:
    """Return the recipe that trains a head for this evaluation, and its settings."""
    shipped = head if head in HEADS else HEADS[0]
    given = [f"data.slides={'null' if plan.slides is None else json.dumps(str(plan.slides))}"]
    if plan.labels or not plan.benchmark:
        given.append(f"data.labels={json.dumps(str(plan.labels or plan.name))}")
    given += [f"head={{kind: {head}}}"] if head != shipped else []
    given += [f"encoder={{kind: {plan.encoder}}}"] if plan.encoder else []
    return f"{plan.name if plan.benchmark else 'mil'}-{shipped}", [*given, *plan.settings]


def _how_to_train(plan: _Plan, heads: Sequence[str]) -> str:
    recipe, (_, *given) = _recipe(plan, heads[0])
    sets = " ".join(f"--set '{text}'" for text in [f"data.slides={plan.slides or 'DIR'}", *given])
    return (
        f"no finished run of {', '.join(heads)} for {plan.name} in {plan.runs}; train with: "
        f"pathcli train --recipe {recipe} {sets} --out {plan.runs} (likewise for each head), or "
        "add --train"
    )


class _Test:
    """One head's runs on their test slides."""

    def __init__(
        self,
        plan: _Plan,
        group: Sequence[Run],
        means: _Means,
        specificity: float,
        *,
        allow_leak: bool,
    ) -> None:
        self.table, self.specificity, self.allow_leak = plan.table, specificity, allow_leak
        self.device = pick_device(means.device)
        first, table = group[0], plan.table
        spec = TileSpec.from_json(first.facts["tiles"])
        if plan.slides is None:
            self.cohort = look_up(table, means.store, first.facts["encoder"], spec)
        else:
            encoder = build_part(first.recipe, "encoder")()
            if encoder.id != first.facts["encoder"]:
                msg = f"{first.folder} wants features of {first.facts['encoder']}, not {encoder.id}"
                raise DataError(msg)
            embedder = Embedder(encoder, means.store, device=means.device)
            slides = discover([str(plan.slides)])
            self.cohort = make(table, slides, embedder, spec, means.progress)
        self.external = first.facts["labels"]["digest"] != table.digest
        best = chosen(group)
        self.warnings = list(dict.fromkeys(w for run in best for w in run.facts["warnings"]))
        self.tested = tuple(self._one(run) for run in best)
        self.times = max(_touched(run, table.digest) for run in best)

    def _one(self, run: Run) -> Tested:
        slides = self._external(run) if self.external else run.facts["split"]["test"]
        bags = Bags(self.cohort, slides, run.facts["bag"])
        absent = set(range(len(self.table.classes))) - set(bags.labels.tolist())
        if absent:
            names = ", ".join(self.table.classes[i] for i in sorted(absent))
            msg = f"{self.table.source}: no test slide of class {names} has features"
            raise DataError(msg)
        head, device = load_head(run, self.device), torch.device(self.device)
        said = [p.probabilities for p in predict_bags(head, bags, device)]
        return Tested(
            run=run,
            names=tuple(bags.names),
            patients=tuple(bags.patients),
            labels=bags.labels,
            chances=np.stack(said),
            threshold=self._threshold(run),
        )

    def _external(self, run: Run) -> Sequence[str]:
        seen = set(run.facts["patients"])
        shared = sorted({row.case for row in self.table.rows} & seen)
        if shared:
            some = ", ".join(shared[:3])
            msg = f"{len(shared)} patients of {self.table.source} were trained on ({some}, ...)"
            if not self.allow_leak:
                raise DataError(msg + "; leave them out, or give --allow-leak")
            self.warnings.append(msg)
        return [row.slide for row in self.table.rows if row.label is not None]

    def _threshold(self, run: Run) -> float | None:
        """Return the threshold that has the specificity asked for on the run's validation bags."""
        if len(self.table.classes) != _TWO:
            return None
        said = run.facts["validation"]
        labels, chances = np.array(said["labels"]), np.array(said["probabilities"])
        return threshold_at_specificity(labels, chances[:, 1], self.specificity)


def _touched(run: Run, table: str) -> int:
    """Note that the test slides were read with this run; return how often they have been."""
    path = run.folder / "tested.jsonl"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(
                json.dumps({"when": time.strftime("%Y-%m-%d %H:%M"), "labels": table}) + "\n"
            )
        lines = path.read_text(encoding="utf-8").splitlines()
        return sum(json.loads(line)["labels"] == table for line in lines)
    except (OSError, ValueError) as error:
        log.warning("%s: cannot count how often the test slides were read (%s)", path, error)
        return 1
