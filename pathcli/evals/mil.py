"""A benchmark or a label table and trained runs in, an honest evaluation out.

Runs whose labels are these are tested on their own test split; runs of other labels are
validated externally, on all slides, once no patient and no slide is found to be shared.
"""

from __future__ import annotations

import json
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.evals.mil_outcome_train import plain_name
from pathcli.evals.mil_runs import count_reading, find_features, score_head, table_for
from pathcli.mil.benchmarks import BENCHMARKS, Benchmark, benchmark
from pathcli.mil.tables import read_labels
from pathcli.recipe import Recipe, load_recipe
from pathcli.registry import did_you_mean, names
from pathcli.runs import Run, find_runs, train
from pathcli.store import Store
from pathcli.types import digest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.evals.mil_scores import Scores
    from pathcli.mil.bags import Started
    from pathcli.mil.tables import LabelTable

HEADS = ("abmil", "acmil")
SPECIFICITY = 0.9


@dataclass(frozen=True)
class Evaluation:
    """What was tested: heads with their scores, and how often these test slides have been read.

    `times` counts in this store, this time included; None if it could not be counted.
    """

    name: str
    benchmark: Benchmark | None
    heads: tuple[Scores, ...]
    times: int | None
    specificity: float

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the same for all heads."""
        return self.heads[0].cohort.table.classes

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the report should say of splits, labels and counts."""
        return tuple(dict.fromkeys(text for scores in self.heads for text in scores.warnings))


@dataclass(frozen=True)
class _Plan:
    """What was asked for."""

    name: str
    benchmark: Benchmark | None
    labels: Path | None
    slides: Path | None
    encoder: str | None
    settings: tuple[str, ...]
    runs: Path

    @property
    def target(self) -> str | None:
        """The column that the settings name, None where they name none."""
        return target_of(self.settings)


def target_of(settings: Sequence[str]) -> str | None:
    """Return the column of classes that settings of a recipe name, None where they name none."""
    own = [text for text in settings if text.startswith(("data.target=", "data="))]
    data = load_recipe(f"mil-{HEADS[0]}", ["data.target=null", *own]).values["data"]
    target = data.get("target") if isinstance(data, dict) else None
    return None if target is None else str(target)


def mil_eval(
    name: str,
    *,
    runs: Path = Path("runs"),
    heads: Sequence[str] | None = None,
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
        heads: which heads, by registered name (default: all that have runs, else `HEADS`).
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
    path = labels.expanduser().absolute() if labels else None
    known = benchmark(name, path) if name in BENCHMARKS else None
    path = path if known else _own_table(name)
    plan = _Plan(name, known, path, slides, encoder, tuple(settings), runs)
    kept = store or Store()
    groups = _groups(plan, heads)
    if absent := _absent(plan, groups, heads, may_train=train_missing):
        for head in absent:
            train(_recipe(plan, head), out=runs, store=kept, device=device, progress=progress)
        groups = _groups(plan, heads)
    judged: dict[str, Any] = {"specificity": specificity, "allow_leak": allow_leak}
    tested = []
    for label, group in groups.items():
        own = _own(group[0], plan)
        table = table_for(group[0], plan.labels, own=own)
        cohort = find_features(group[0], table, kept, slides, device=device, progress=progress)
        tested.append(score_head(label, group, cohort, own=own, device=device, **judged))
    _refuse_mixed(tested)
    return Evaluation(name, known, tuple(tested), count_reading(kept, tested), specificity)


def _refuse_mixed(tested: Sequence[Scores]) -> None:
    if len({scores.cohort.table.classes for scores in tested}) > 1:
        msg = "these runs have different classes; give a folder of one kind as --runs"
        raise DataError(msg)


def _absent(
    plan: _Plan,
    groups: Mapping[str, list[Run]],
    heads: Sequence[str] | None,
    *,
    may_train: bool,
) -> list[str]:
    """Return the heads asked for that have no run.

    Raises:
        ResourceError: there are some, and they may not be trained, or their labels are not here.
    """
    there = {head_of(group[0]) for group in groups.values()}
    absent = [head for head in heads or ([] if there else HEADS) if head not in there]
    if absent and plan.benchmark:
        plan.benchmark.need_table()
    if absent and not may_train:
        raise ResourceError(_how_to_train(plan, absent))
    return absent


def head_of(run: Run) -> str:
    """Return the registered name of a run's head."""
    return str(run.recipe.values["head"]["kind"])


def _own_table(name: str) -> Path:
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        hint = did_you_mean(name, list(BENCHMARKS))
        msg = f"{name!r} is neither a benchmark nor a file with labels: {hint}"
        raise UsageError(msg)
    return path


def _own(run: Run, plan: _Plan) -> bool:
    """Tell whether a run was trained on these labels: the same benchmark, file or table."""
    data = run.recipe.values["data"]
    if plan.benchmark:
        return bool(data["benchmark"] == plan.name)
    if data["labels"] and Path(data["labels"]) == plan.labels:
        return True
    table = read_labels(
        plan.labels or "",
        slides=data["slide_table"],
        classes=data["classes"],
        target=data["target"],
    )
    return bool(table.digest == run.facts["labels"]["digest"])


def _groups(plan: _Plan, heads: Sequence[str] | None) -> dict[str, list[Run]]:
    """Return the runs that fit by name of head; different settings are never pooled.

    Raises:
        DataError: there are runs, but of other classes than the table's labels.
    """
    fit = [
        run
        for run in (find_runs(plan.runs) if plan.runs.is_dir() else [])
        if run.recipe.task == "mil"
        and (heads is None or head_of(run) in heads)
        and plan.encoder in {None, run.recipe.values["encoder"]["kind"]}
        and plan.target in {None, run.recipe.values["data"]["target"]}
    ]
    # runs of these very labels are not mixed with those of others, and a benchmark has its own
    own = [run for run in fit if _fits(run, plan) and _own(run, plan)]
    others = [] if own or plan.benchmark else fit
    if others and not any(_fits(run, plan) for run in others):
        known = set(others[0].recipe.values["data"]["classes"] or others[0].facts["classes"])
        strange = ", ".join(sorted(set(_labels(others[0], plan).classes) - known))
        theirs = ", ".join(sorted(known))
        msg = f"{plan.name}: label {strange} is no class of the runs in {plan.runs}: {theirs}"
        raise DataError(msg)
    groups: dict[str, list[Run]] = {}
    for run in own or [run for run in others if _fits(run, plan)]:
        groups.setdefault(experiment(run), []).append(run)
    alike = [head_of(group[0]) for group in groups.values()]
    named = {}
    for group in groups.values():
        head = head_of(group[0])
        where = os.path.relpath(os.path.commonpath([r.folder.parent for r in group]), plan.runs)
        name = head if alike.count(head) == 1 else f"{head} in {where}"
        named[f"{name} ({experiment(group[0])[:6]})" if name in named else name] = group
    wanted = list(heads or names("head"))
    return dict(sorted(named.items(), key=lambda item: wanted.index(head_of(item[1][0]))))


def _fits(run: Run, plan: _Plan) -> bool:
    """Tell whether a table of labels can be read with a run's classes."""
    if plan.benchmark:
        return True
    data = run.recipe.values["data"]
    known = set(data["classes"] or run.facts["classes"])
    try:
        return set(_labels(run, plan).classes) <= known
    except DataError:
        return False


def _labels(run: Run, plan: _Plan) -> LabelTable:
    """Return the table as the run's recipe reads one, its labels as they stand there."""
    data = run.recipe.values["data"]
    return read_labels(plan.labels or "", slides=data["slide_table"], target=data["target"])


def experiment(run: Run) -> str:
    """Return what names a run but for its seed and learning rate."""
    values = json.loads(json.dumps(dict(run.recipe.values)))
    for name in ("seed", "lr"):
        values["train"].pop(name)
    return digest({"recipe": values, "name": run.recipe.name, "encoder": run.facts["encoder"]})


def _recipe(plan: _Plan, head: str) -> Recipe:
    """Return the recipe that trains a head for this evaluation, named after both."""
    name, given = _settings(plan, head)
    stem = plan.name if plan.benchmark else Path(plan.name).stem
    words = [stem, *([plain_name(plan.target)] if plan.target else []), head]
    return replace(load_recipe(name, given), name="-".join(words))


def _settings(plan: _Plan, head: str) -> tuple[str, list[str]]:
    shipped = head if head in HEADS else HEADS[0]
    given: Mapping[str, Any] = {
        "data.slides": None if plan.slides is None else str(plan.slides.absolute()),
        **({"data.labels": str(plan.labels)} if plan.labels else {}),
        **({"head": {"kind": head}} if head != shipped else {}),
        **({"encoder": {"kind": plan.encoder}} if plan.encoder else {}),
    }
    name = f"{plan.name if plan.benchmark else 'mil'}-{shipped}"
    return name, [*(f"{k}={json.dumps(v)}" for k, v in given.items()), *plan.settings]


def _how_to_train(plan: _Plan, heads: Sequence[str]) -> str:
    name, given = _settings(plan, heads[0])
    slides = str(plan.slides or ("DIR" if plan.benchmark else "null"))
    sets = [f"data.slides={slides}", *given[1:]]
    shown = " ".join(f"--set {shlex.quote(text)}" for text in sets)
    note = " (slides: a folder, or null where features are in the store)" if not plan.slides else ""
    where = plan.runs if plan.runs.is_dir() else f"{plan.runs}, which is no folder"
    return (
        f"no finished run of {', '.join(heads)} for {plan.name} in {where}; train with: "
        f"pathcli train --recipe {name} {shown} --out {plan.runs}{note}, or add --train"
    )
