"""A table and runs that learnt an outcome in; how near they come on test slides out.

What is a test is decided as for classes (see `pathcli.evals.mil_runs`): the runs' own test
split where the table is theirs, else an external validation that shares nobody with them.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pathcli.device import pick_device
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.evals.mil import HEADS, experiment, head_of
from pathcli.evals.mil_outcome_train import columns_of, recipe_for, refuse_unclear
from pathcli.evals.mil_runs import count_reading, find_features, score_runs
from pathcli.evals.mil_scores import Scores, Tested
from pathcli.mil.bags import Bags
from pathcli.mil.benchmarks import BENCHMARKS
from pathcli.mil.outcome_task import TASK, outcome_data, run_outcome, said_of
from pathcli.mil.sheets import read_sheet
from pathcli.mil.targets import OutcomeTable, has_columns, has_slides, read_outcome
from pathcli.mil.task import load_head
from pathcli.recipe import build_part
from pathcli.runs import Run, find_runs, train
from pathcli.store import Store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.mil.bags import Cohort, Started

    Floats = NDArray[np.float64]

FEW, FEW_EVENTS = 20, 20
"""Test patients, and events among them, below which the report warns."""


@dataclass(frozen=True)
class OutcomeTested(Tested):
    """One run on its test bags: `labels` are strata, `chances` the head's numbers [n, k].

    `targets` [n, m] is what the table says, `predicted` [n] the value or risk, `curves` [n, t]
    the survival at the run's own grid of times, [n, 0] for a regression.
    """

    targets: Floats
    predicted: Floats
    curves: Floats


@dataclass(frozen=True)
class OutcomeEvaluation:
    """What was tested: heads with their scores, and how often these test slides have been read.

    `times` counts in this store, this time included; None if it could not be counted.
    """

    name: str
    heads: tuple[Scores, ...]
    times: int | None

    @property
    def survival(self) -> bool:
        """Tell whether times and events were learnt, and not values."""
        return run_outcome(self.heads[0].tested[0].run)[0].survival

    @property
    def unit(self) -> str:
        """The unit of values, or of times."""
        return run_outcome(self.heads[0].tested[0].run)[0].unit

    @property
    def what(self) -> str:
        """The columns, as one text."""
        return "/".join(self.columns)

    @property
    def columns(self) -> Sequence[str]:
        """The columns, one by one."""
        return run_outcome(self.heads[0].tested[0].run)[0].columns

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the report should say of splits, labels and counts."""
        return tuple(dict.fromkeys(text for scores in self.heads for text in scores.warnings))


def runs_of(scores: Scores) -> Sequence[OutcomeTested]:
    """Return the tested runs of a head that learnt an outcome."""
    found = [t for t in scores.tested if isinstance(t, OutcomeTested)]
    assert len(found) == len(scores.tested)  # noqa: S101 - `outcome_eval` makes no other
    return found


def asks_for_outcome(
    name: str, runs: Path, heads: Sequence[str] | None = None, encoder: str | None = None
) -> bool:
    """Tell whether a table is to be tested with runs of an outcome: those have learnt from it.

    Where no run has, the runs decide whose columns the table has.

    Raises:
        UsageError: runs of classes and of an outcome fit alike.
    """
    path = Path(name).expanduser().absolute()
    if name in BENCHMARKS or not path.is_file() or not runs.is_dir():
        return False
    there = [r for r in find_runs(runs) if r.recipe.task in {"mil", TASK}]
    there = [r for r in there if _wanted(r, heads, encoder)] or there
    own = [r for r in there if r.recipe.values["data"]["labels"] == str(path)]
    kinds = {r.recipe.task for r in own or there if r.recipe.task == "mil" or _reads(r, path)}
    if len(kinds) > 1 and own:
        msg = f"{runs} holds runs of classes and of an outcome for {name}; narrow it by --runs"
        raise UsageError(msg)
    return kinds == {TASK} or (len(kinds) > 1 and not _has_labels(path))


def _wanted(run: Run, heads: Sequence[str] | None, encoder: str | None) -> bool:
    kind = run.recipe.values["encoder"]["kind"]
    return (not heads or head_of(run) in heads) and encoder in {None, kind}


def _reads(run: Run, path: Path) -> bool:
    return has_columns(path, build_part(run.recipe, "outcome")())


def _has_labels(path: Path) -> bool:
    return read_sheet(path).find(("label",)) is not None


def outcome_eval(
    name: str,
    *,
    runs: Path = Path("runs"),
    heads: Sequence[str] | None = None,
    encoder: str | None = None,
    slides: Path | None = None,
    train_missing: bool = False,
    settings: Sequence[str] = (),
    allow_leak: bool = False,
    store: Store | None = None,
    device: str = "auto",
    progress: Started | None = None,
) -> OutcomeEvaluation:
    """Test all seeds of the named heads that learnt an outcome.

    Args:
        name: a table with the runs' columns; of STAMP's form, where theirs was.
        runs: folder of finished runs.
        heads: which heads, by registered name (default: all that have runs).
        encoder: only runs on features of this encoder.
        slides: folder or list of slides; without it features are looked up in the store.
        train_missing: train what is not there, by `mil-regression` or `mil-survival`.
        settings: `section.key=value` for the recipes of `train_missing`; those of the section
            `outcome` say which it is, and which runs are tested.
        allow_leak: only warn of patients the runs have seen.
        store: where features are found or put (default: the user's store).
        device: auto, cpu, cuda, cuda:1 or mps.
        progress: called with a name, gives the callback of one part of the work.

    Raises:
        UsageError: the runs learnt different things, nothing says what is to be learnt, or the
            name is a benchmark's.
        DataError: the table is wrong, or a patient of it was trained on.
        ResourceError: no runs or no features.
    """
    if name in BENCHMARKS:
        msg = f"{name}: a benchmark of classes; a value or survival is learnt from a table of yours"
        raise UsageError(msg)
    refuse_unclear(name, settings)
    path, kept = Path(name).expanduser().absolute(), store or Store()
    columns, tested = columns_of(settings), []
    if train_missing:
        there = {head_of(run) for run in _fit(path, runs, heads, encoder, columns)[0]}
        for head in [h for h in heads or ([] if there else HEADS) if h not in there]:
            recipe = recipe_for(path, head, encoder, slides, settings)
            train(recipe, out=runs, store=kept, device=device, progress=progress)
    for label, (group, own) in _groups(path, runs, heads, encoder, columns).items():
        table = _table(group[0], path, own=own)
        cohort = find_features(group[0], table, kept, slides, device=device, progress=progress)
        score = _Scorer(cohort, table, pick_device(device))
        scores = score_runs(label, group, cohort, score, own=own, allow_leak=allow_leak)
        tested.append(_warned(scores))
    return OutcomeEvaluation(name, tuple(tested), count_reading(kept, tested))


def _fit(
    path: Path,
    runs: Path,
    heads: Sequence[str] | None,
    encoder: str | None,
    columns: tuple[str, ...] | None,
) -> tuple[list[Run], bool]:
    """Return the runs that a table can test, and whether it is theirs: of those only, if any."""
    fit = [
        run
        for run in (find_runs(runs) if runs.is_dir() else [])
        if run.recipe.task == TASK
        and _wanted(run, heads, encoder)
        and columns in {None, tuple(run.facts["outcome"]["columns"])}
        and _reads(run, path)
    ]
    own = [run for run in fit if _own(run, path)]
    return own or fit, bool(own)


def _groups(
    path: Path,
    runs: Path,
    heads: Sequence[str] | None,
    encoder: str | None,
    asked: tuple[str, ...] | None,
) -> Mapping[str, tuple[list[Run], bool]]:
    """Return the runs by name of head, with whether the table is theirs; never pooled unlike.

    Raises:
        ResourceError: there is none of a head that was asked for.
        UsageError: they learnt different columns.
    """
    fit, own = _fit(path, runs, heads, encoder, asked)
    columns = {tuple(r.facts["outcome"]["columns"]) for r in fit}
    if len(columns) > 1:
        told = " and ".join(sorted("/".join(each) for each in columns))
        msg = f"the runs in {runs} learnt {told}; give a folder of one of them as --runs"
        raise UsageError(msg)
    if absent := [head for head in heads or () if head not in {head_of(r) for r in fit}]:
        msg = f"no finished run of {', '.join(absent)} for {path.name} in {runs}; train with: "
        raise ResourceError(msg + f"pathcli train --recipe ... --set head.kind={absent[0]}")
    groups: dict[str, list[Run]] = {}
    for run in fit:
        groups.setdefault(experiment(run), []).append(run)
    plain = [head_of(group[0]) for group in groups.values()]
    named: dict[str, tuple[list[Run], bool]] = {}
    for group in groups.values():
        head, kind = head_of(group[0]), group[0].recipe.values["outcome"]["kind"]
        where = os.path.relpath(os.path.commonpath([r.folder.parent for r in group]), runs)
        label = head if plain.count(head) == 1 else f"{head} {kind}"
        label = f"{label} in {where}" if label in named else label
        label = f"{label} ({experiment(group[0])[:6]})" if label in named else label
        named[label] = group, own
    return named


def _own(run: Run, path: Path) -> bool:
    """Tell whether a run was trained on this table: the same file, or the same rows."""
    if run.recipe.values["data"]["labels"] == str(path):
        return True
    try:
        return bool(_table(run, path, own=False).digest == run.facts["labels"]["digest"])
    except DataError:
        return False


def _table(run: Run, path: Path, *, own: bool) -> OutcomeTable:
    """Return the table to test a run on.

    Raises:
        DataError: the run's own table has changed, or this one is not what it should be.
    """
    outcome, data = run_outcome(run)[0], run.recipe.values["data"]
    if not own:
        slides = None if has_slides(path) else data["slide_table"]
        return read_outcome(path, outcome, slides=slides, bag=run.facts["bag"])
    table = outcome_data(build_part(run.recipe, "data")(labels=path), outcome).table
    assert isinstance(table, OutcomeTable)  # noqa: S101 - `outcome_data` reads no other
    if table.digest != run.facts["labels"]["digest"]:
        msg = f"{path} has changed since {run.folder} was trained; train anew, in another --out"
        raise DataError(msg)
    return table


@dataclass(frozen=True)
class _Scorer:
    """Tests one run on slides of a cohort."""

    cohort: Cohort
    table: OutcomeTable
    device: str

    def __call__(self, run: Run, slides: Sequence[str]) -> OutcomeTested:
        bags = Bags(self.cohort, slides, run.facts["bag"])
        outcome, fit = run_outcome(run)
        if not len(bags):
            msg = f"{self.table.source}: no test slide has features"
            raise DataError(msg)
        targets = self.table.of(bags.rows)
        if outcome.survival and not targets[:, 1].any():
            msg = f"{self.table.source}: no test patient with features has an event"
            raise DataError(msg)
        said = said_of(load_head(run, self.device), bags, torch.device(self.device))
        known: Any = outcome
        grid = np.array(fit.get("grid", []))
        rows = self.table.by_slide
        return OutcomeTested(
            run=run,
            names=tuple(bags.names),
            patients=tuple(bags.patients),
            sites=tuple(bags.sites),
            labels=bags.labels,
            chances=said,
            threshold=None,
            listed=len(slides),
            lost=Counter(rows[s].label or "" for s in slides if s not in self.cohort.keys),
            targets=targets,
            predicted=outcome.predicted(said, fit),
            curves=known.curves(said, fit, grid) if outcome.survival else np.empty((len(said), 0)),
        )


def _warned(scores: Scores) -> Scores:
    """Return a head's scores with warnings of few test patients and events."""
    tested, warnings = runs_of(scores), []
    patients = min(len(set(t.patients)) for t in tested)
    if patients < FEW:
        warnings.append(f"only {patients} test patients: the numbers say little")
    if run_outcome(tested[0].run)[0].survival:
        events = min(int(t.targets[:, 1].sum()) for t in tested)
        if events < FEW_EVENTS:
            warnings.append(f"only {events} test patients have an event: C is coarse")
        warnings += dict.fromkeys(filter(None, map(_shorter, tested)))
    return replace(scores, warnings=(*scores.warnings, *warnings))


def _shorter(t: OutcomeTested) -> str:
    """Return what to say where test patients are not followed as long as curves are judged."""
    outcome, fit = run_outcome(t.run)
    times, lost = t.targets[:, 0], t.targets[:, 1] == 0
    followed = times.max()
    if followed > fit["grid"][-1] or not lost[times == followed].any():
        return ""
    unit = f" {outcome.unit}" * bool(outcome.unit)
    return f"test patients are followed up to {followed:g}{unit}: integrated_brier ends there"
