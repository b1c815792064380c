"""Heads of values and survival on test slides: numbers, intervals, pictures, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import Contrast, lines, paint
from cohorts import recipe as of_classes
from conftest import Run as Cli
from outcomes import HAZARDS, planted, recipe, write

from pathcli import registry
from pathcli.errors import DataError, UsageError
from pathcli.evals.mil_outcome import asks_for_outcome, outcome_eval, runs_of
from pathcli.evals.mil_outcome_report import outcome_report, outcome_rows, write_outcomes
from pathcli.evals.mil_outcome_scores import measure_outcomes, risk_groups
from pathcli.metrics.regression import mae
from pathcli.metrics.survival import c_index, integrated_brier, logrank
from pathcli.mil.outcome_task import run_outcome
from pathcli.mil.predict import Predictor
from pathcli.runs import read_run, train
from pathcli.store import Store
from pathcli.types import NOTICE

SURVIVAL, REGRESSION = "mil-survival", "mil-regression"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of a value (two seeds), of Cox and of hazards, on one planted cohort."""
    home = tmp_path_factory.mktemp("outcomes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILTIN["encoder"], "fake", "fakes:MeanColour")
        store = Store(home / "store")
        labels = planted(store, home / "t.csv", 50)
        planted(store, home / "external.csv", 30, name="x", seed=7)
        for name, folder, given in (
            (REGRESSION, "value", ["train.seed=[1,2]"]),
            (SURVIVAL, "survival/cox", ["train.batch=4", "train.chunk=null"]),
            (
                SURVIVAL,
                "survival/hazards",
                [HAZARDS, "train.batch=2", "train.chunk=null", "train.choose=null"],
            ),
        ):
            train(recipe(name, labels, *given, epochs=15), out=home / folder, store=store)
    return home


@pytest.fixture(autouse=True)
def _fake(fake: type) -> None:
    """Every test has the fake encoder."""


def evaluate(home: Path, folder: str, table: str = "t.csv", **more: Any) -> Any:
    return outcome_eval(str(home / table), runs=home / folder, store=Store(home / "store"), **more)


# --- numbers -----------------------------------------------------------------------------


def test_values_are_measured_over_seeds_beside_the_train_mean(home: Path) -> None:
    found = evaluate(home, "value")
    numbers = measure_outcomes(found, 100)
    (scores,) = found.heads
    tested = runs_of(scores)
    mine = numbers.heads["abmil"]
    errors = [mae(t.targets[:, 0], t.predicted) for t in tested]
    assert mine["mae"].seeds == tuple(errors)
    assert mine["mae"].interval.value == pytest.approx(np.mean(errors))
    assert mine["mae"].interval.low < mine["mae"].interval.value < mine["mae"].interval.high
    assert mine["mae"].interval.n == len({p for t in tested for p in t.patients})
    assert mine["r2"].interval.low > 0.3
    means = [run_outcome(t.run)[1]["mean"] for t in tested]
    flat = [mae(t.targets[:, 0], 0 * t.predicted + m) for t, m in zip(tested, means, strict=True)]
    assert numbers.blind["abmil"]["mae"] == pytest.approx(np.mean(flat))
    assert numbers.blind["abmil"]["r2"] <= 0
    assert scores.kind == "own"


def test_survival_is_measured_and_two_ways_to_learn_it_are_compared(home: Path) -> None:
    found = evaluate(home, "survival")
    assert [s.name for s in found.heads] == ["abmil cox", "abmil hazards"]
    numbers = measure_outcomes(found, 100)
    for scores in found.heads:
        (t,) = runs_of(scores)
        times, events = t.targets[:, 0], t.targets[:, 1] > 0
        mine = numbers.heads[scores.name]
        assert mine["c_index"].interval.value == c_index(times, events, t.predicted)
        assert mine["c_index"].interval.low > 0.6
        blind = numbers.blind[scores.name]
        assert blind["c_index"] == 0.5
        assert mine["integrated_brier"].interval.value < blind["integrated_brier"] < 0.3
        (row,) = risk_groups(scores)
        high = t.predicted > run_outcome(t.run)[1]["cut"]
        assert row["logrank p"] == pytest.approx(logrank(times, events, high), rel=1e-2)
        assert (row["high"], row["low"]) == (high.sum(), (~high).sum())
        assert row["logrank p"] < 0.05
    (pair,) = numbers.pairs
    assert pair["heads"] == "abmil cox - abmil hazards"
    assert 0 < pair["p"] <= 1
    assert any("test patients have an event" in text for text in found.warnings)


def test_what_a_run_knows_of_survival_is_of_its_train_part_alone(home: Path) -> None:
    for scores in evaluate(home, "survival").heads:
        known = scores.tested[0].run
        part, fit = known.facts["split"]["train"], known.facts["outcome"]
        rows = [row for row in lines(home / "t.csv") if row["slide_id"] in part]
        died = sorted({float(row["months"]) for row in rows if row["dead"] == "1"})
        assert fit["events"] == len([row for row in rows if row["dead"] == "1"])
        assert fit["last"] == max(float(row["months"]) for row in rows)
        assert fit["grid"][-1] == pytest.approx(np.quantile(died, 0.8))
        if "baseline" in fit:
            assert fit["baseline"]["times"] == died
        else:
            assert fit["edges"] == pytest.approx(np.quantile(died, [0.25, 0.5, 0.75]))


def test_curves_are_judged_as_long_as_patients_are_followed(home: Path, tmp_path: Path) -> None:
    rows = lines(home / "external.csv")
    for row in rows:
        dead = row["dead"] == "1" and float(row["months"]) < 12
        row |= {"months": str(min(float(row["months"]), 12)), "dead": str(int(dead))}
    table = write(tmp_path / "short.csv", rows[0], (row.values() for row in rows))
    found = evaluate(home, "survival", str(table))
    told = "test patients are followed up to 12 months: integrated_brier ends there"
    assert found.warnings.count(told) == 1
    for scores in found.heads:
        (t,) = runs_of(scores)
        grid = np.array(run_outcome(t.run)[1]["grid"])
        inside = grid < 12
        assert not inside.all()
        times, events = t.targets[:, 0], t.targets[:, 1] > 0
        wanted = integrated_brier(times, events, t.curves[:, inside], grid[inside])
        numbers = measure_outcomes(found, 20).heads[scores.name]["integrated_brier"]
        assert numbers.interval.value == pytest.approx(wanted)
    assert not any("ends there" in text for text in evaluate(home, "survival").warnings)


def test_patients_and_not_slides_are_drawn_anew(home: Path, store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "t.csv", 24, slides=2)
    known = recipe(REGRESSION, labels, "data.bag=slide", epochs=2)
    train(known, out=tmp_path / "runs", store=store)
    found = outcome_eval(str(labels), runs=tmp_path / "runs", store=store)
    (t,) = runs_of(found.heads[0])
    assert len(t.names) == 2 * len(set(t.patients))
    interval = measure_outcomes(found, 20).heads["abmil"]["mae"].interval
    assert interval.n == len(set(t.patients))


# --- what is a test ----------------------------------------------------------------------


def test_other_patients_are_an_external_validation_and_known_ones_are_refused(
    home: Path, tmp_path: Path
) -> None:
    found = evaluate(home, "survival", "external.csv", heads=["abmil"])
    assert {s.kind for s in found.heads} == {"external"}
    assert len(runs_of(found.heads[0])[0].names) == 30
    rows = lines(home / "t.csv")
    rows[0]["age"], rows[1]["months"] = "1", "1"
    write(tmp_path / "mixed.csv", rows[0], (row.values() for row in rows))
    with pytest.raises(DataError, match=r"are of patients .* has seen"):
        evaluate(home, "survival", str(tmp_path / "mixed.csv"))


def test_a_table_that_changed_is_refused_and_unlike_runs_are_not_mixed(
    home: Path, store: Store, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="learnt age and months/dead; give a folder of one"):
        evaluate(home, ".")
    labels = planted(store, tmp_path / "t.csv", 24)
    train(recipe(REGRESSION, labels, epochs=1), out=tmp_path / "runs", store=store)
    labels.write_text(labels.read_text().replace("p0-0,", "p0-0,1"))
    with pytest.raises(DataError, match="has changed since"):
        outcome_eval(str(labels), runs=tmp_path / "runs", store=store)


def test_the_table_decides_whether_classes_or_an_outcome_are_tested(
    home: Path, store: Store, tmp_path: Path
) -> None:
    assert asks_for_outcome(str(home / "t.csv"), home / "value")
    assert not asks_for_outcome("camelyon16", home / "value")
    assert not asks_for_outcome(str(home / "t.csv"), tmp_path / "none")
    labels = planted(store, tmp_path / "t.csv", 24)
    rows = [(*row.values(), i % 2) for i, row in enumerate(lines(labels))]
    write(labels, ("case_id", "slide_id", "age", "months", "dead", "label"), rows)
    runs = tmp_path / "runs"
    train(of_classes(labels, "train.epochs=1"), out=runs, store=store)
    assert not asks_for_outcome(str(labels), runs)
    train(recipe(REGRESSION, labels, epochs=1), out=runs, store=store)
    with pytest.raises(UsageError, match="runs of classes and of an outcome"):
        asks_for_outcome(str(labels), runs)
    assert asks_for_outcome(str(labels), runs / REGRESSION)


# --- the command line, and what is written -----------------------------------------------


@pytest.mark.parametrize("folder", ["value", "survival"])
def test_the_report_has_numbers_pictures_and_the_notice(
    folder: str, home: Path, tmp_path: Path
) -> None:
    found = evaluate(home, folder)
    numbers = measure_outcomes(found, 20)
    report = outcome_report(found, numbers)
    page = write_outcomes(tmp_path, found, numbers, report, "pathcli mil-eval").read_text()
    assert NOTICE in page
    assert page.count("<svg") == (1 if folder == "value" else 2)
    assert ("logrank p" in page) == (folder == "survival")
    assert ("true age (years)" in page) == (folder == "value")
    known = json.loads((tmp_path / "report.json").read_text())
    assert known["provenance"]["unit"] == ("years" if folder == "value" else "months")
    for name, value in known["metrics"].items():
        assert value["low"] <= value["value"] <= value["high"], name
    rows = lines(tmp_path / "predictions.csv")
    assert len(rows) == sum(len(t.names) for s in found.heads for t in s.tested)
    assert {row["note"] for row in rows} == {NOTICE}
    wanted = "predicted" if folder == "value" else "risk"
    t = runs_of(found.heads[0])[0]
    assert float(rows[0][wanted]) == pytest.approx(t.predicted[0], abs=1e-5)
    shown = outcome_rows(found, numbers)
    assert any(
        row["metric"] == ("mae (years)" if folder == "value" else "c_index") for row in shown
    )


def test_the_command_line_tests_an_outcome_and_refuses_what_only_classes_have(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    given = ["mil-eval", home / "t.csv", "--runs", home / "value", "--store", home / "store"]
    code, out, err = run(*given, "--out", tmp_path, "--json")
    assert code == 0, err
    assert "abmil.mae" in json.loads(out)["metrics"]
    assert (tmp_path / "mil-eval-t" / "report.html").is_file()
    code, _, err = run(*given, "--out", tmp_path, "--labels", home / "t.csv")
    assert code == 2
    assert "--labels: not for runs of a value" in err


# --- one slide ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Painted slides with runs that learnt a value and survival from them."""
    home = tmp_path_factory.mktemp("painted")
    (home / "slides").mkdir()
    rows = []
    for i in range(10):
        paint(home / "slides" / f"s{i}.tif", seed=i)
        rows.append((f"p{i}", f"s{i}", 50 + i, 10 + 3 * i, 1))
    labels = write(home / "t.csv", ("case_id", "slide_id", "age", "months", "dead"), rows)
    paint(home / "new.tif", seed=50)
    given = [f"data.slides={home / 'slides'}", "data.test=0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILTIN["encoder"], "fake", "cohorts:Contrast")
        for name in (REGRESSION, SURVIVAL):
            known = recipe(name, labels, *given, epochs=2)
            train(known, out=home / "runs", store=Store(home / "store"))
    return home


def test_predict_says_a_value_in_its_unit_or_a_risk_with_its_curve(
    painted: Path, run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILTIN["encoder"], "fake", "cohorts:Contrast")
    monkeypatch.setattr(Contrast, "passes", 0)
    for name in (REGRESSION, SURVIVAL):
        folder = painted / "runs" / name / "seed-1"
        given = ["predict", folder, painted / "new.tif", "--store", painted / "store"]
        code, out, err = run(*given, "--out", tmp_path / name, "--json")
        assert code == 0, err
        (said,) = json.loads(out)["slides"]
        (row,) = lines(tmp_path / name / "predictions.csv")
        assert said["notice"] == row["note"] == NOTICE
        known = read_run(folder)
        shown = Predictor(known, Store(painted / "store"), out=tmp_path)(painted / "new.tif")
        assert shown.said is not None
        assert not any("trained on patients" in text for text in said["warnings"])
        if name == REGRESSION:
            assert said["prediction"] == f"{shown.said.value:.4g} years"
            assert float(row["value"]) == pytest.approx(shown.said.value, abs=1e-5)
            assert row["unit"] == "years"
            assert "learnt from" in said["scope"]
            assert "survival" not in said
            continue
        assert said["group"] in {"high", "low"}
        assert said["prediction"].startswith(f"{said['group']} risk")
        assert said["survival"][0][1] <= 1
        assert [s for _, s in said["survival"]] == sorted(
            (s for _, s in said["survival"]), reverse=True
        )
        assert "is no probability" in said["scope"]
        assert "<svg" in Path(said["files"]["survival"]).read_text()
        assert NOTICE in Path(said["files"]["survival"]).read_text()
