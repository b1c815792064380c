"""Training heads on values and survival: what is learnt, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cohorts import assert_resumed_alike, lines, put, values
from outcomes import HAZARDS, planted, recipe, write

from pathcli.errors import DataError, UsageError
from pathcli.metrics.regression import r2
from pathcli.metrics.survival import c_index
from pathcli.mil.bags import Bags, look_up
from pathcli.mil.outcome_task import OutcomeTask, outcome_data, run_outcome, said_of
from pathcli.mil.outcomes import Cox, Regression
from pathcli.mil.targets import OutcomeTable, read_outcome
from pathcli.mil.task import load_head
from pathcli.recipe import build, build_part
from pathcli.runs import Run, train
from pathcli.store import Store
from pathcli.types import TileSpec

CPU = torch.device("cpu")
SURVIVAL, REGRESSION = "mil-survival", "mil-regression"
pytestmark = pytest.mark.usefixtures("fake")


def silent(_: str) -> Any:
    return lambda done, total: None


def on_test(run: Run, store: Store) -> tuple[np.ndarray, np.ndarray]:
    """Return targets and predictions of the run's own test bags."""
    outcome, fit = run_outcome(run)
    table = outcome_data(build_part(run.recipe, "data")(), outcome).table
    assert isinstance(table, OutcomeTable)
    spec = TileSpec.from_json(run.facts["tiles"])
    cohort = look_up(table, store, run.facts["encoder"], spec)
    bags = Bags(cohort, run.facts["split"]["test"], run.facts["bag"])
    return table.of(bags.rows), outcome.predicted(said_of(load_head(run), bags, CPU), fit)


def prepared(known: Any, store: Store) -> OutcomeTask:
    task: OutcomeTask = build(known)
    task.prepare(store, progress=silent)
    return task


# --- what is learnt ----------------------------------------------------------------------


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_planted_value_is_learnt_and_a_shuffled_one_is_not(
    store: Store, tmp_path: Path, shuffled: bool
) -> None:
    labels = planted(store, tmp_path / "t.csv", shuffled=shuffled)
    (run,) = train(recipe(REGRESSION, labels), out=tmp_path / "runs", store=store)
    targets, said = on_test(run, store)
    score = r2(targets[:, 0], said)
    assert score < 0.2 if shuffled else score > 0.6
    assert len(said) == 24
    ages = {row["case_id"]: float(row["age"]) for row in lines(labels)}
    learnt = [ages[patient] for patient in run.facts["train"]]
    fit = run.facts["outcome"]
    assert (fit["mean"], fit["sd"]) == pytest.approx((np.mean(learnt), np.std(learnt)))
    assert 40 < said.mean() < 80, "years, and not deviations"


@pytest.mark.parametrize("settings", [[], [HAZARDS, "train.batch=2", "train.chunk=null"]])
@pytest.mark.parametrize("shuffled", [False, True])
def test_planted_survival_is_learnt_and_shuffled_survival_is_not(
    store: Store, tmp_path: Path, settings: list[str], shuffled: bool
) -> None:
    labels = planted(store, tmp_path / "t.csv", shuffled=shuffled)
    (run,) = train(recipe(SURVIVAL, labels, *settings), out=tmp_path / "runs", store=store)
    targets, risk = on_test(run, store)
    score = c_index(targets[:, 0], targets[:, 1] > 0, risk)
    assert score < 0.75 if shuffled else score > 0.8
    assert run.metrics["c_index"] > 0.8 or shuffled
    fit = run.facts["outcome"]
    dead = {row["slide_id"]: int(row["dead"]) for row in lines(labels)}
    patients = {row["case_id"]: row["slide_id"] for row in lines(labels)}
    assert fit["events"] == sum(dead[patients[case]] for case in run.facts["train"])


def test_several_slides_of_a_patient_are_one_case(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "t.csv", 30, slides=2)
    (run,) = train(recipe(SURVIVAL, labels, epochs=1), out=tmp_path / "runs", store=store)
    assert len(run.facts["train"]) + len(run.facts["val"]) == 18
    split = run.facts["split"]
    parts = [{s.split("-")[0] for s in split[part]} for part in ("train", "val", "test")]
    assert not parts[0] & parts[1]
    assert not parts[2] & (parts[0] | parts[1])
    with pytest.raises(DataError, match=r"patients have several slides: 30 .* set data\.bag=pat"):
        train(recipe(SURVIVAL, labels, "data.bag=slide"), out=tmp_path / "no", store=store)
    (own,) = train(
        recipe(REGRESSION, labels, "data.bag=slide", epochs=1), out=tmp_path / "each", store=store
    )
    assert len(own.facts["train"]) + len(own.facts["val"]) == 36


def test_a_batch_in_pieces_has_the_gradient_of_the_batch(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "t.csv", 30)
    found = []
    for chunk in ("null", "1", "5"):
        known = recipe(SURVIVAL, labels, f"train.chunk={chunk}", epochs=2)
        (run,) = train(known, out=tmp_path / chunk, store=store)
        lines_ = (run.folder / "metrics.jsonl").read_text().splitlines()
        found.append([json.loads(x)["loss"] for x in lines_ if '"loss"' in x])
    assert len(found[0]) == 2
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert found[2] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("name", [REGRESSION, SURVIVAL])
def test_a_run_stopped_after_two_steps_ends_with_equal_weights(
    name: str, store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "t.csv", 30)
    task = prepared(recipe(name, labels, "head.dropout=0.2", epochs=3), store)
    assert_resumed_alike(task, tmp_path)


# --- splits ------------------------------------------------------------------------------


def test_splits_hold_the_share_of_events_and_of_quarters(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "t.csv", 80)
    rows = {row["slide_id"]: row for row in lines(labels)}
    for name in (SURVIVAL, REGRESSION):
        task = prepared(recipe(name, labels), store)
        share = np.mean([int(row["dead"]) for row in rows.values()])
        ages = np.array([float(row["age"]) for row in rows.values()])
        for seed in range(3):
            for part, slides in task.data.partition(seed).parts().items():
                if name == SURVIVAL:
                    events = sum(int(rows[s]["dead"]) for s in slides)
                    assert abs(events - share * len(slides)) <= 1, part
                else:
                    at = np.searchsorted(
                        np.quantile(ages, [0.25, 0.5, 0.75]),
                        [float(rows[s]["age"]) for s in slides],
                    )
                    assert np.ptp(np.bincount(at, minlength=4)) <= 2, part


def test_a_part_without_an_event_is_refused(store: Store, tmp_path: Path) -> None:
    rows = [(f"p{i}", f"s{i}", i + 1, int(i < 2)) for i in range(20)]
    labels = write(tmp_path / "t.csv", ("case_id", "slide_id", "months", "dead"), rows)
    for i in range(20):
        put(store, f"s{i}", values(4))
    with pytest.raises(DataError) as caught:
        train(recipe(SURVIVAL, labels), out=tmp_path / "runs", store=store)
    assert "no patient of stratum 'event' in" in str(caught.value)
    assert "there are 2 in all" in str(caught.value)


def test_few_events_are_a_warning_of_the_run(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "t.csv", 24)
    (run,) = train(recipe(SURVIVAL, labels, epochs=1), out=tmp_path / "runs", store=store)
    assert any("have an event: the risk is uncertain" in w for w in run.facts["warnings"])


# --- tables ------------------------------------------------------------------------------


def test_stamps_tables_are_read_and_patients_without_an_outcome_are_counted(tmp_path: Path) -> None:
    clini = [("p0", 3.5, 1), ("p1", 7, 0), ("p2", "NA", 1), ("p3", 2, ""), ("p4", 9, 1)]
    write(tmp_path / "clini.csv", ("PATIENT", "OS", "dead"), clini)
    slides = [(f"p{i}", f"s{i}{j}.svs") for i in range(5) for j in range(2)]
    write(tmp_path / "slides.csv", ("PATIENT", "FILENAME"), slides)
    outcome = Cox(time="OS", event="dead")
    table = read_outcome(tmp_path / "clini.csv", outcome, slides=tmp_path / "slides.csv")
    assert {row.case for row in table.rows} == {"p0", "p1", "p4"}
    assert table.targets["s01"] == (3.5, 1)
    assert table.by_slide["s10"].label == "censored"
    assert any("'OS/dead' is empty: 2 (p2, p3)" in text for text in table.warnings)


def test_a_spreadsheet_gives_what_its_text_gives(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    rows = [("case_id", "slide_id", "age"), *((f"p{i}", f"s{i}", i + 0.5) for i in range(4))]
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    write(tmp_path / "t.csv", rows[0], rows[1:])
    one, other = (
        read_outcome(tmp_path / f"t.{s}", Regression(column="AGE")) for s in ("xlsx", "csv")
    )
    assert one.digest == other.digest
    assert one.targets == {f"s{i}": (i + 0.5,) for i in range(4)}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [("p", "a", -1, 1), ("q", "b", 2, 0)],
            "column 'months': a negative time in line 2 ('-1')",
        ),
        (
            [("p", "a", "x", 1), ("q", "b", "nan", 1), ("r", "c", 1, 2), ("s", "d", "", 0)],
            (
                "column 'months': no number in line 2 ('x'); column 'months': no finite number in "
                "line 3 ('nan'); column 'dead': neither 1 (event) nor 0 (censored) in line 4 "
                "('2'); column 'months': empty in line 5"
            ),
        ),
        (
            [("p", "a", 1, "True"), ("q", "b", 2, "")],
            "neither 1 (event) nor 0 (censored) in line 2 ('True'); column 'dead': empty in line 3",
        ),
        ([("p", "a", 1, 0), ("q", "b", 2, 0)], "column 'dead' has no event (1)"),
        (
            [("p", "a", 1, 1), ("p", "b", 2, 1)],
            "patients whose slides differ in months/dead: 1 (p)",
        ),
        ([("p", "a", "inf", 1)] * 2, "no finite number in line 2 ('inf'), line 3 ('inf')"),
    ],
)
def test_what_no_survival_can_be_is_one_line_with_its_rows(
    rows: list[tuple[object, ...]], said: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.csv", ("case_id", "slide_id", "months", "dead"), rows)
    with pytest.raises(DataError) as caught:
        read_outcome(path, Cox(time="months", event="dead"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_or_constant_column_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ("case_id", "slide_id", "age"), [("p", "a", 5), ("q", "b", 5)])
    with pytest.raises(DataError, match="no column 'ages'; did you mean 'age'"):
        read_outcome(path, Regression(column="ages"))
    with pytest.raises(DataError, match="age/AGE are one column; name two"):
        read_outcome(path, Cox(time="age", event="AGE"))
    with pytest.raises(DataError, match="column 'age' is 5 in every row"):
        read_outcome(path, Regression(column="age"))


# --- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.batch=1", "train.chunk=null"], "this loss compares the patients of a batch"),
        (["head={kind: clam-sb}"], "set head.bag_weight=1"),
        (["data.classes={a: b, c: d}"], "data.classes is of classes"),
        (["data.target=x"], "data.target is of classes"),
        (["train.choose=auroc"], "no validation metric: .*c_index"),
        ([HAZARDS.replace("}", ", bins: 1}")], "bins must be at least 2"),
    ],
)
def test_a_recipe_that_could_not_learn_is_refused_before_data_is_read(
    settings: list[str], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        build(recipe(SURVIVAL, Path("nowhere.csv"), *settings))


def test_clam_learns_from_the_bag_alone_where_it_is_told_to(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "t.csv", 24)
    head = "head={kind: clam-sb, hidden: 16, attention_width: 8, bag_weight: 1}"
    (run,) = train(recipe(REGRESSION, labels, head, epochs=1), out=tmp_path / "runs", store=store)
    assert np.isfinite(on_test(run, store)[1]).all()


def test_more_bins_than_times_of_events_are_refused(store: Store, tmp_path: Path) -> None:
    rows = [(f"p{i}", f"s{i}", 1 + i % 2, 1) for i in range(24)]
    labels = write(tmp_path / "t.csv", ("case_id", "slide_id", "months", "dead"), rows)
    for i in range(24):
        put(store, f"s{i}", values(4, seed=i))
    with pytest.raises(DataError, match=r"too few for 4 bins; set outcome\.bins lower"):
        train(recipe(SURVIVAL, labels, HAZARDS), out=tmp_path / "runs", store=store)
