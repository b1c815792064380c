"""What an evaluation may not do: pool unlike runs, overlook what was learnt, round, mislead."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cohorts import lines, planted, put, quick, recipe, split, table, values
from conftest import Run as Cli

from pathcli import registry
from pathcli.errors import DataError
from pathcli.evals.mil import Evaluation, mil_eval
from pathcli.evals.mil_report import Measurements, mil_report, write_evaluation
from pathcli.evals.mil_scores import compare, measure_all
from pathcli.mil.bags import Bags
from pathcli.mil.tables import read_labels
from pathcli.mil.task import load_head, predict_bags
from pathcli.recipe import load_recipe
from pathcli.runs import Run, train
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store

pytestmark = pytest.mark.usefixtures("fake")


def page_of(found: Evaluation, folder: Path) -> str:
    """Return the page of an evaluation, its intervals from few draws."""
    numbers = Measurements(
        {s.name: measure_all(s, 20) for s in found.heads}, compare(found.heads, 20)
    )
    return write_evaluation(folder, found, numbers, mil_report(found, numbers), "").read_text()


def evaluate(labels: Path, runs: Path, store: Store, **more: Any) -> Evaluation:
    return mil_eval(str(labels), runs=runs, store=store, **more)


# --- which runs are one ------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        "tiles={size_px: 32, mpp: 0.5}",
        "head.hidden=16",
        "data.split=k-fold",
    ],
)
def test_runs_of_other_settings_are_another_row(store: Store, tmp_path: Path, other: str) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    for row in read_labels(labels).rows:
        put(store, row.slide, values(9), spec=tile_spec(32, 0.5))
    runs = tmp_path / "runs"
    train(recipe(labels, "train.epochs=1"), out=runs / "a", store=store)
    train(recipe(labels, "train.epochs=1", other), out=runs / "b", store=store)
    found = evaluate(labels, runs, store)
    assert [s.name for s in found.heads] == ["abmil in a/mil-abmil", "abmil in b/mil-abmil"]
    assert [len(s.tested) for s in found.heads] == [1, 1]


def test_seeds_of_other_settings_in_one_folder_are_another_row(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    for seed, hidden in enumerate((8, 16, 8, 16), 1):
        given = [f"train.seed=[{seed}]", f"head.hidden={hidden}", "train.epochs=1"]
        train(recipe(labels, *given), out=tmp_path / "runs", store=store)
    found = evaluate(labels, tmp_path / "runs", store)
    assert len({s.name for s in found.heads}) == 2
    assert all(s.name.startswith("abmil in mil-abmil") for s in found.heads)
    assert [[t.run.seed for t in s.tested] for s in found.heads] == [[1, 3], [2, 4]]


def test_seeds_and_rates_of_the_same_settings_are_one_row(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    for where, rest in (("a", "train.seed=[1,2]"), ("b", "train.seed=[3]")):
        given = recipe(labels, "train.epochs=1", "train.lr=[0.001,0.002]", rest)
        train(given, out=tmp_path / "runs" / where, store=store)
    (scores,) = evaluate(labels, tmp_path / "runs", store).heads
    assert (scores.name, [t.run.seed for t in scores.tested]) == ("abmil", [1, 2, 3])


def test_all_heads_that_have_runs_are_evaluated(store: Store, tmp_path: Path, run: Cli) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    given = [s for s in quick(1) if not s.startswith("head")]
    sets = [part for text in given for part in ("--set", text)]
    common = ("mil-eval", labels, "--runs", tmp_path / "runs", "--store", store.root)
    code, out, err = run(*common, "--train", "--head", "mean", "--head", "max", *sets)
    assert code == 0, err
    trained = sorted(p.parent.parent.name for p in (tmp_path / "runs").rglob("weights*"))
    assert trained == ["labels-max", "labels-mean"]
    found = evaluate(labels, tmp_path / "runs", store)
    assert [s.name for s in found.heads] == ["mean", "max"]
    kinds = [s.tested[0].run.recipe.values["head"]["kind"] for s in found.heads]
    assert kinds == ["mean", "max"]
    (only,) = evaluate(labels, tmp_path / "runs", store, heads=["max"]).heads
    assert only.name == "max"
    assert "max" in out


# --- what was learnt ---------------------------------------------------------------------


@pytest.fixture
def learnt(store: Store, tmp_path: Path) -> Run:
    """A run on patients p0 to p23, one slide each, in `tmp_path / "runs"`."""
    labels = planted(store, tmp_path / "labels.csv")
    (one,) = train(recipe(labels, "train.epochs=1"), out=tmp_path / "runs", store=store)
    return one


def test_a_slide_that_was_learnt_from_is_known_whatever_it_is_called(
    learnt: Run, tmp_path: Path
) -> None:
    slide = learnt.facts["train"][0]
    patient = slide.partition("-")[0]
    other = Store(tmp_path / "elsewhere")
    rows = lines(planted(other, tmp_path / "other.csv", 6, name="q"))
    base = [(row["case_id"], row["slide_id"], row["label"]) for row in rows]
    for name, file in ((slide, "another"), ("more", None), ("renamed", slide)):
        put(other, name, values(9), file=file)
    known_by = {
        "patient": (patient, "more", "tumor"),
        "name": ("new", slide, "tumor"),
        "file": ("new", "renamed", "tumor"),
    }
    for how, row in known_by.items():
        labels = table(tmp_path / "shared.csv", [*base, row])
        with pytest.raises(DataError, match=r"1 slides of .*--allow-leak") as caught:
            evaluate(labels, tmp_path / "runs", other)
        assert (caught.value.exit_code, "\n" in str(caught.value)) == (4, False), how
        found = evaluate(labels, tmp_path / "runs", other, allow_leak=True)
        assert found.heads[0].shared == 1, how
        page = page_of(found, tmp_path / "out")
        assert "External validation" not in page
        assert "1 of the test slides are of patients or files that were learnt from" in page


def test_the_same_store_entries_under_other_ids_are_known(
    learnt: Run, store: Store, tmp_path: Path
) -> None:
    again = [*learnt.facts["train"], *learnt.facts["val"]]
    label = {row.slide: row.label for row in read_labels(tmp_path / "labels.csv").rows}
    rows = [(f"case {i}", f"_{slide}", label[slide]) for i, slide in enumerate(again)]
    labels = table(tmp_path / "renamed.csv", rows)
    with pytest.raises(DataError, match=f"{len(again)} slides of .*has seen"):
        evaluate(labels, tmp_path / "runs", store)


def test_part_of_the_own_test_slides_is_no_external_validation(
    learnt: Run, store: Store, tmp_path: Path
) -> None:
    held = learnt.facts["split"]["test"]
    rows = [row for row in read_labels(tmp_path / "labels.csv").rows if row.slide in held[:-1]]
    for renamed in ("", "_"):
        part = [(f"{renamed}{row.case}", f"{renamed}{row.slide}", row.label) for row in rows]
        labels = table(tmp_path / f"part{renamed}.csv", part)
        found = evaluate(labels, tmp_path / "runs", store)
        assert (found.heads[0].kind, found.heads[0].shared) == ("part", 0)
        page = page_of(found, tmp_path / "out")
        assert "External validation" not in page
        assert "under another table: not an external validation" in page
    found = evaluate(planted(store, tmp_path / "q.csv", 6, name="q"), tmp_path / "runs", store)
    assert found.heads[0].kind == "external"
    assert "External validation" in page_of(found, tmp_path / "out")


def test_of_heads_tested_in_two_ways_each_is_told_its_own(
    learnt: Run, store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "q.csv", 24, name="q")
    given = ["head={kind: mean}", *(s for s in quick(1) if not s.startswith("head"))]
    of_mean = load_recipe("mil-abmil", [f"data.labels={labels}", *given])
    (other,) = train(replace(of_mean, name="mean"), out=tmp_path / "runs", store=store)
    held = set(other.facts["split"]["test"])
    rows = [row for row in read_labels(labels).rows if row.slide in held]
    part = table(tmp_path / "part.csv", [(r.case, r.slide, r.label) for r in rows])
    found = evaluate(part, tmp_path / "runs", store)
    assert {s.name: s.kind for s in found.heads} == {"abmil": "external", "mean": "part"}
    page = page_of(found, tmp_path / "out")
    assert "abmil: External validation" in page
    assert "mean: Slides of the runs" in page
    assert learnt.recipe.values["head"]["kind"] == "abmil"


# --- whose labels ------------------------------------------------------------------------


def test_runs_of_a_clinical_column_are_found_by_its_file_wherever_it_is(
    store: Store, tmp_path: Path
) -> None:
    rows = [(row["case_id"], row["slide_id"], row["label"]) for row in cohort_rows(store, tmp_path)]
    own = tmp_path / "own.csv"
    own.write_text("case_id,slide_id,label,GRADE\n")
    with own.open("a") as file:
        file.writelines(f"{c},{s},same,{'G3' if g == 'tumor' else 'G1'}\n" for c, s, g in rows)
    clinical, slides = tmp_path / "clinical.csv", tmp_path / "slides.csv"
    clinical.write_text(
        "PATIENT,GRADE\n" + "".join(f"{c},{'G3' if g == 'tumor' else 'G1'}\n" for c, _, g in rows)
    )
    slides.write_text("PATIENT,FILENAME\n" + "".join(f"{c},{s}.h5\n" for c, s, _ in rows))
    given = ["data.target=GRADE", "data.classes={G1: low, G3: high}", "train.epochs=1"]
    for path, more in ((own, []), (clinical, [f"data.slide_table={slides}"])):
        runs = tmp_path / f"runs of {path.stem}"
        (one,) = train(recipe(path, *given, *more), out=runs, store=store)
        moved = Path(shutil.copy(path, tmp_path / f"moved-{path.name}"))
        for labels in (path, moved):
            (scores,) = evaluate(labels, runs, store).heads
            assert scores.kind == "own", labels
            assert scores.tested[0].names == tuple(one.facts["split"]["test"])
            assert scores.cohort.table.classes == ("low", "high")
        path.unlink()
        assert evaluate(moved, runs, store).heads[0].kind == "own"


def cohort_rows(store: Store, folder: Path) -> list[dict[str, str]]:
    return lines(planted(store, folder / "labels.csv"))


def stopped(name: str) -> Any:
    """Give a progress that ends training in its third epoch."""

    def report(done: int, total: int) -> None:
        if name.startswith("mil-abmil") and done > total // 2:
            raise KeyboardInterrupt

    return report


def test_labels_that_changed_after_training_are_refused_in_one_line(
    store: Store, tmp_path: Path, run: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.trainer.SAVE_SECONDS", -1.0)
    rows = cohort_rows(store, tmp_path)
    labels, names = tmp_path / "labels.csv", [row["slide_id"] for row in rows]
    drawn = split(tmp_path / "split.csv", names[:12], names[12:18], names[18:])
    sets = [f"data.splits={drawn}", "train.epochs=4"]  # so that the labels alone will differ
    known = recipe(labels, *sets)
    train(known, out=tmp_path / "runs", store=store)
    with pytest.raises(KeyboardInterrupt):
        train(known, out=tmp_path / "cut", store=store, progress=stopped)
    assert list((tmp_path / "cut").rglob("state.pt"))
    changed = [(r["case_id"], r["slide_id"], r["label"]) for r in rows]
    changed[0] = (*changed[0][:2], "tumor")
    table(labels, changed)
    code, _, err = run("mil-eval", labels, "--runs", tmp_path / "runs", "--store", store.root)
    assert (code, len(err.splitlines())) == (4, 1), err
    assert re.search(r"labels\.csv has changed since .*seed-1 was trained; train anew", err)
    given = [part for text in (*quick(), *sets) for part in ("--set", text)]
    again = ("train", "--recipe", "mil-abmil", "--set", f"data.labels={labels}", *given)
    for out, told in (("runs", "trained on other labels"), ("cut", "labels, splits or features")):
        code, _, err = run(*again, "--out", tmp_path / out, "--store", store.root)
        assert code in {2, 4}, err
        assert told in err.splitlines()[-1]
        assert "give another --out" in err
    labels.write_text("case_id,slide_id,grade\np,s,1\n")
    with pytest.raises(DataError, match="no column 'label'"):
        evaluate(labels, tmp_path / "runs", store)


# --- classes and thresholds --------------------------------------------------------------


def test_the_positive_class_is_named_wherever_its_sensitivity_is(
    store: Store, tmp_path: Path, run: Cli
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 28, classes=("healthy", "cancer"))
    for i in (25, 27):
        put(store, f"p{i}-0", values(30, seed=i))  # a cancer that cannot be seen
    names = [f"p{i}-0" for i in range(28)]
    drawn = split(
        tmp_path / "split.csv", names[:14], names[14:20], [*names[20:25], names[25], names[27]]
    )
    order = "data.classes={healthy: healthy, cancer: cancer}"
    for positive, more in (("cancer", [order]), ("healthy", [])):
        runs = tmp_path / positive
        train(recipe(labels, f"data.splits={drawn}", *more), out=runs, store=store)
        code, out, err = run("mil-eval", labels, "--runs", runs, "--store", store.root)
        assert code == 0, err
        assert f"Positive is {positive}." in " ".join((out + err).split())
        folder = tmp_path / "pathcli-out" / "mil-eval-labels"
        report = json.loads((folder / "report.json").read_text())
        assert report["provenance"]["positive_class"] == positive
        assert f"Sensitivity is for class {positive}," in (folder / "report.html").read_text()
        (source,) = report["provenance"]["runs"]["abmil"]
        said = {
            r["name"]: float(r[f"p_{positive}"]) > source["threshold"]
            for r in lines(folder / "predictions.csv")
            if r["label"] == positive
        }
        assert len(said) == {"cancer": 4, "healthy": 3}[positive]
        found = report["metrics"]["abmil.sensitivity"]
        assert found["value"] == round(np.mean(list(said.values())), 4) < 1
        assert found["n"] == len(said)


def test_a_patient_of_two_labels_has_the_highest_of_the_order_that_is_given(
    store: Store, tmp_path: Path
) -> None:
    rows = cohort_rows(store, tmp_path)
    put(store, "p1-1", values(30))
    mixed = [*((r["case_id"], r["slide_id"], r["label"]) for r in rows), ("p1", "p1-1", "normal")]
    labels = table(tmp_path / "labels.csv", mixed)
    given = ["data.bag=patient", "train.epochs=1"]
    with pytest.raises(DataError, match=r"1 \(p1\).*give data\.classes in rising") as caught:
        train(recipe(labels, *given), out=tmp_path / "runs", store=store)
    told = shlex.split(str(caught.value).partition("--set ")[2])[0]
    reverse = "data.classes={tumor: tumor, normal: normal}"
    for highest, order in (("tumor", told), ("normal", reverse)):
        runs = tmp_path / highest
        (one,) = train(recipe(labels, *given, order), out=runs, store=store)
        (scores,) = evaluate(labels, runs, store).heads
        label = Bags(scores.cohort, ["p1-0", "p1-1"], "patient")[0].label
        assert label == 1
        assert one.facts["classes"][label] == highest


def test_the_threshold_is_fixed_on_unrounded_probabilities(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILTIN["head"], "sure", "cohorts:Sure")
    labels = planted(store, tmp_path / "labels.csv", 40)
    given = ["head={kind: sure}", *(s for s in quick(1) if not s.startswith("head"))]
    known = load_recipe("mil-abmil", [f"data.labels={labels}", "data.val=0.3", *given])
    (one,) = train(known, out=tmp_path / "runs", store=store)
    (scores,) = evaluate(labels, tmp_path / "runs", store, specificity=0.8).heads
    bags = Bags(scores.cohort, one.facts["val"])
    said = predict_bags(load_head(one), bags, "cpu")  # type: ignore[arg-type]
    healthy = sorted(p.probabilities[1] for p in said if p.bag.label == 0)
    assert 0 < healthy[0] < healthy[-1] < 1e-6
    (tested,) = scores.tested
    assert tested.threshold == healthy[int(np.ceil(0.8 * len(healthy))) - 1]
    found = measure_all(scores, 20)
    expected = (tested.chances[tested.labels == 0, 1] <= tested.threshold).mean()
    assert found["specificity"].interval.value == expected > 0
    assert found["sensitivity"].interval.value == 1
