"""`mil-eval --train` where a value or survival is learnt, and what it says where nothing is."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cohorts
import pytest
from cohorts import lines
from conftest import Run as Cli
from outcomes import planted, write

from pathcli.evals.mil_outcome_train import columns_of, outcome_recipe
from pathcli.store import Store

QUICK = (
    *("encoder={kind: fake}", "tiles={size_px: 64, mpp: 0.5}", "train.epochs=4"),
    *("head.hidden=16", "train.lr=0.01", "train.seed=[1]", "data.val=0.2", "data.test=0.4"),
)
VALUE = "outcome.column=age"
SURVIVAL = ("outcome.time=months", "outcome.event=dead")


@pytest.fixture
def labels(store: Store, fake: type, tmp_path: Path) -> Path:
    del fake
    return planted(store, tmp_path / "clini.csv", 40)


def evaluate(run: Cli, labels: Path, store: Store, *more: str) -> tuple[int, str, str]:
    given = ("mil-eval", labels, "--store", store.root, "--runs", labels.parent / "runs", "--train")
    sets = [word for text in more for word in (("--set", text) if "=" in text else (text,))]
    return run(*given, *sets, "--out", labels.parent / "out", "--device", "cpu", "--json")


def test_a_value_and_survival_of_one_table_are_trained_and_tested_each_by_its_columns(
    labels: Path, store: Store, run: Cli
) -> None:
    code, out, err = evaluate(run, labels, store, *QUICK, VALUE, "--head", "abmil")
    assert code == 0, err
    assert "abmil.mae" in json.loads(out)["metrics"]
    code, out, err = evaluate(run, labels, store, *QUICK, *SURVIVAL, "--head", "abmil")
    assert code == 0, err
    assert "abmil.c_index" in json.loads(out)["metrics"]
    folders = {path.name for path in (labels.parent / "runs").iterdir()}
    assert folders == {"clini-age-abmil", "clini-months-dead-abmil"}
    weights = labels.parent / "runs" / "clini-age-abmil" / "seed-1" / "weights.safetensors"
    written = weights.stat().st_mtime_ns
    code, out, err = evaluate(run, labels, store, *QUICK, VALUE)  # what is there is not trained
    assert code == 0, err
    assert list(json.loads(out)["provenance"]["runs"]) == ["abmil"]
    assert weights.stat().st_mtime_ns == written


def test_another_head_is_trained_beside_the_one_that_is_there(
    labels: Path, store: Store, run: Cli
) -> None:
    heads = ("--head", "abmil", "--head", "mean")
    quick = [text for text in QUICK if not text.startswith("head.")]
    code, out, err = evaluate(run, labels, store, *quick, VALUE, *heads)
    assert code == 0, err
    assert list(json.loads(out)["provenance"]["runs"]) == ["abmil", "mean"]


def test_a_table_without_labels_asks_what_is_to_be_learnt(
    labels: Path, store: Store, run: Cli
) -> None:
    code, _, err = evaluate(run, labels, store, *QUICK)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--set outcome.column=COLUMN" in err
    assert "--set outcome.time=COLUMN --set outcome.event=COLUMN" in err
    code, _, err = evaluate(run, labels, store, *QUICK, "outcome.time=months")
    assert code != 0
    assert "outcome.event" in err
    code, _, err = evaluate(run, labels, store, *QUICK, VALUE, "outcome.colum=age")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "outcome.colum: no such key" in err


def test_settings_without_training_are_refused(labels: Path, store: Store, run: Cli) -> None:
    code, _, err = evaluate(run, labels, store, *QUICK, VALUE, "--head", "abmil")
    assert code == 0, err
    given = ("mil-eval", labels, "--store", store.root, "--runs", labels.parent / "runs")
    code, _, err = run(*given, "--set", VALUE)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--set changes what --train trains" in err
    code, _, err = run(*given, "--head", "dsmil")  # of a head that has no run, too
    assert (code, len(err.splitlines())) == (5, 1)
    assert "no finished run of dsmil for clini.csv" in err


def test_settings_of_classes_or_of_nothing_are_not_answered_by_runs_of_an_outcome(
    labels: Path, store: Store, run: Cli
) -> None:
    code, _, err = evaluate(run, labels, store, *QUICK, VALUE, "--head", "abmil")
    assert code == 0, err
    code, out, err = evaluate(run, labels, store, *QUICK, "data.target=dead", "--head", "abmil")
    assert code == 0, err
    assert "abmil.auroc" in json.loads(out)["metrics"]
    for wrong in ("outcome.colum=age", "outcome.kind=[cox]"):
        code, _, err = evaluate(run, labels, store, *QUICK, wrong)
        assert (code, len(err.splitlines())) == (2, 1)
        assert f"clini.csv: --set {wrong} does not say what is learnt; --train learns" in err
    code, _, err = evaluate(run, labels, store, *QUICK, "--set", "outcome")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--set takes section.key=value, not 'outcome'" in err
    code, _, err = evaluate(run, Path("bracs"), store, *QUICK, VALUE)
    assert (code, len(err.splitlines())) == (2, 1)
    assert "bracs: a benchmark of classes" in err


def test_each_outcome_has_a_report_of_its_own_with_the_numbers_of_the_table(
    labels: Path, store: Store, run: Cli
) -> None:
    rows = [
        (row["case_id"], row["slide_id"], row["months"], row["dead"], f"{12345678 + i}")
        for i, row in enumerate(lines(labels))
    ]
    write(labels, ("case_id", "slide_id", "months", "dead", "cells/ml"), rows)
    for columns in (("outcome.column=cells/ml",), SURVIVAL):
        code, _, err = evaluate(run, labels, store, *QUICK, *columns, "--head", "abmil")
        assert code == 0, err
    out = labels.parent / "out"
    assert (out / "mil-eval-clini-months-dead" / "report.html").is_file()
    said = lines(out / "mil-eval-clini-cells_ml" / "predictions.csv")
    truth = {row[0]: row[4] for row in rows}
    assert all(row["cells/ml"] == truth[row["patient"]] for row in said)
    assert all(float(row["predicted"]) > 1e7 and row["unit"] == "" for row in said)


@pytest.mark.parametrize(
    ("settings", "name", "columns"),
    [
        (["train.epochs=1"], "", None),
        ([VALUE], "mil-regression", ("age",)),
        ([*SURVIVAL], "mil-survival", ("months", "dead")),
        (["outcome={kind: hazards, time: t, event: e}"], "mil-survival", ("t", "e")),
        (["outcome=3"], "", None),
        (["outcome.kind=[cox]"], "", None),
    ],
)
def test_the_settings_say_which_recipe(
    settings: list[str], name: str, columns: tuple[str, ...] | None
) -> None:
    assert (outcome_recipe(settings), columns_of(settings)) == (name, columns)


def test_two_columns_of_classes_of_one_table_are_trained_and_told_apart(
    store: Store, fake: type, tmp_path: Path, run: Cli
) -> None:
    del fake
    plain = cohorts.planted(store, tmp_path / "plain.csv")
    with plain.open(newline="") as file:
        rows = [(r["case_id"], r["slide_id"], r["label"]) for r in csv.DictReader(file)]
    stages = {"normal": "I", "tumor": "II"}
    both = [(*row[:2], stages[row[2]], "ab"[i // 2 % 2]) for i, row in enumerate(rows)]
    labels = write(tmp_path / "t.csv", ("case_id", "slide_id", "stage", "grp"), both)
    for target in ("stage", "grp"):
        quick = [*QUICK, f"data.target={target}", "--head", "abmil"]
        code, out, err = evaluate(run, labels, store, *quick)
        assert code == 0, err
        positive = json.loads(out)["provenance"]["positive_class"]
        assert positive == {"stage": "II", "grp": "b"}[target]
    folders = {path.name for path in (tmp_path / "runs").iterdir()}
    assert folders == {"t-stage-abmil", "t-grp-abmil"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"mil-eval-t-stage", "mil-eval-t-grp"}
