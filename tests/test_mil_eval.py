"""Evaluation of MIL heads: from slides of a miniature CAMELYON16 to the report, and its errors."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cohorts
import numpy as np
import pytest
from cohorts import lines, planted, quick, recipe, table
from conftest import Run
from sklearn.metrics import f1_score, roc_auc_score

from pathcli import registry
from pathcli.errors import DataError, UsageError
from pathcli.evals import mil_scores
from pathcli.evals.mil import mil_eval
from pathcli.evals.mil_report import measure_evaluation, mil_report
from pathcli.evals.mil_scores import Scores, compare, measure_all
from pathcli.metrics.classification import macro_auroc
from pathcli.metrics.statistics import bootstrap, delong_test
from pathcli.mil.benchmarks import benchmark
from pathcli.runs import find_runs, train
from pathcli.store import Store
from pathcli.types import NOTICE

pytestmark = pytest.mark.usefixtures("fake")


def settings(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


def report_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


# --- CAMELYON16, in miniature ------------------------------------------------------------


@pytest.fixture
def mini(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixteen painted slides of CAMELYON16's table, four of them of its test set."""
    monkeypatch.setitem(registry.BUILTIN["encoder"], "fake", "cohorts:Contrast")
    monkeypatch.setattr(cohorts.Contrast, "passes", 0)
    cohorts.camelyon16(tmp_path, benchmark("camelyon16").need_table(), (1, 2))
    return tmp_path


def test_camelyon16_goes_from_slides_to_a_report_and_heatmaps(mini: Path, run: Run) -> None:
    slides, store, runs = mini / "slides", ("--store", mini / "store"), mini / "runs"
    given = settings(*quick(epochs=2), "train.seed=[1,2]")
    slides_set = settings(f"data.slides={slides}")
    trained = ("train", "--recipe", "camelyon16-abmil", *slides_set, *given, "--out", runs)
    code, out, err = run(*trained, *store)
    assert code == 0, err
    assert "pathcli mil-eval" in out + err
    passes = cohorts.Contrast.passes

    evaluate = ("mil-eval", "camelyon16", "--runs", runs, *store, "--out", mini / "out")
    code, _, err = run(*evaluate, "--head", "abmil", "--head", "acmil")
    assert code == 5
    assert len(err.splitlines()) == 1
    assert "pathcli train --recipe camelyon16-acmil" in err
    both = ("--head", "abmil", "--head", "acmil", "--train")
    code, out, err = run(*evaluate, *both, "--slides", slides, *given, "--encoder", "fake")
    assert code == 0, err
    assert {"abmil", "acmil"} <= set(out.split())
    assert "383 of 399 slides have no features" in err
    assert cohorts.Contrast.passes == passes
    check_report(mini / "out" / "mil-eval-camelyon16", mini)

    tumors = sorted((mini / "lesions").glob("*.xml"))
    picked = [slides / f"{path.stem}.tif" for path in tumors[:2]] + [slides / "normal_001.tif"]
    lesions = ("--lesions", mini / "lesions", "--out", mini / "shown", "--json")
    code, out, err = run("predict", runs / "camelyon16-abmil" / "seed-1", *picked, *lesions, *store)
    assert code == 0, err
    said = json.loads(out)
    assert [slide["encoded"] for slide in said["slides"]] == [0, 0, 0]
    assert [slide["attention_in_lesion"] is None for slide in said["slides"]] == [False] * 2 + [
        True
    ]
    assert set(said["metrics"]) == {"attention_in_lesion_auroc", "froc"}
    assert said["metrics"]["froc"]["n"] == 3
    assert cohorts.Contrast.passes == passes


def check_report(folder: Path, mini: Path) -> None:
    """Check the three files of the miniature's evaluation."""
    report = report_of(folder)
    assert report["notice"] == NOTICE
    assert [row["head"] for row in report["rows"]] == ["abmil", "acmil"]
    assert all((row["seeds"], row["bags a seed"]) == (2, 4) for row in report["rows"])
    assert all(set(m) == {"value", "low", "high", "n"} for m in report["metrics"].values())
    for head in ("abmil", "acmil"):
        for name in ("auroc", "macro_f1", "accuracy", "balanced_accuracy", "brier", "ece"):
            assert 0 <= report["metrics"][f"{head}.{name}"]["value"] <= 1
            assert report["metrics"][f"{head}.{name}"]["n"] == 4
        for name in ("sensitivity", "specificity"):
            assert report["metrics"][f"{head}.{name}"]["n"] == 2
    known = report["provenance"]
    assert known["classes"] == ["normal", "tumor"]
    assert known["kind"] == {"abmil": "own", "acmil": "own"}
    assert known["test_slides_read_times"] == 1
    assert [row["head"] for row in known["flow"]] == ["abmil", "acmil"]
    for row in known["flow"]:
        assert row["seeds"] == "1, 2"
        assert (row["slides in the table"], row["with features"]) == (399, 16)
        assert (row["test slides"], row["tested bags"]) == (129, 4)
        assert row["of class"] == "normal 78, tumor 47"
    (pair,) = known["comparisons"]
    assert pair["test"].startswith("DeLong")
    assert sum(map(sum, known["confusion"]["abmil"])) == 4
    assert [source["seed"] for source in known["runs"]["acmil"]] == [1, 2]

    page = (folder / "report.html").read_text()
    assert NOTICE in page
    targets = re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"' >]*)", page)
    assert not [target for target in targets if not target.startswith(("data:", "#"))]
    assert not re.findall(r"@import|url\((?![\"']?(?:data:|#))", page)
    for number in benchmark("camelyon16").published:
        assert f"{number.value}" in page
        assert number.source in page.replace("&#x27;", "'").replace("&amp;", "&")
    assert "no file of this name" in page
    assert known["labels"]["digest"] in page

    rows = lines(folder / "predictions.csv")
    assert Counter((row["head"], row["seed"]) for row in rows) == dict.fromkeys(
        [(head, seed) for head in ("abmil", "acmil") for seed in "12"], 4
    )
    assert {row["note"] for row in rows} == {NOTICE}
    assert {row["name"] for row in rows} <= {p.stem for p in (mini / "slides").glob("test_*")}
    truth = benchmark("camelyon16").need_table().by_slide
    for row in rows:
        assert row["label"] == truth[row["name"]].label
        assert float(row["p_normal"]) + float(row["p_tumor"]) == pytest.approx(1, abs=1e-5)


def test_without_runs_one_line_names_the_command(run: Run, tmp_path: Path) -> None:
    for more in ((), ("--head", "clam-sb"), ("--slides", tmp_path), ("--encoder", "lite0")):
        code, out, err = run("mil-eval", "camelyon16", *more)
        assert (code, out, len(err.splitlines())) == (5, "", 1)
        assert "pathcli train --recipe camelyon16-abmil --set data.slides=" in err
        assert err.count("pathcli") == 1
    assert "lite0" in err


def test_the_command_that_an_error_names_is_a_good_one(run: Run, tmp_path: Path) -> None:
    labels = planted(Store(tmp_path / "store"), tmp_path / "labels.csv", 4)
    code, _, err = run("mil-eval", labels, "--head", "clam-sb", "--encoder", "fake")
    assert code == 5
    (command,) = re.findall(r"pathcli (train .*? --out \S+)", err)
    code, _, err = run(*shlex.split(command), "--store", tmp_path / "store", *settings(*quick(1)))
    assert "no such key" not in err
    assert code == 4, err  # the recipe stands; four patients are too few to split
    assert "class" in err


def test_a_benchmark_misspelt_is_told_the_right_name(run: Run) -> None:
    code, _, err = run("mil-eval", "camelyon_16")
    assert code == 2
    assert "did you mean 'camelyon16'?" in err
    code, _, err = run("mil-eval", "camelyon16", "--head", "abmill")
    assert code == 2
    assert "did you mean 'abmil'?" in err


# --- one's own labels --------------------------------------------------------------------


def test_own_runs_are_tested_on_their_own_test_split_and_that_is_counted(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    runs = train(recipe(labels, "train.seed=[1,2]"), out=tmp_path / "runs", store=store)
    for times in (1, 2):
        found = mil_eval(str(labels), runs=tmp_path / "runs", heads=("abmil",), store=store)
        assert (found.heads[0].kind, found.times) == ("own", times)
    (scores,) = found.heads
    for one, tested in zip(runs, scores.tested, strict=True):
        assert set(tested.names) == set(one.facts["split"]["test"])
        assert not {*one.facts["train"], *one.facts["val"]} & set(tested.names)
    report = mil_report(found, measure_evaluation(found))
    assert report.metrics["abmil.auroc"]["value"] == 1
    assert report.metrics["abmil.auroc"]["low"] < 1
    assert report.provenance["test_slides_read_times"] == 2


def test_other_labels_are_an_external_validation_on_all_their_slides(
    store: Store, tmp_path: Path, run: Run
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    (one,) = train(recipe(labels), out=tmp_path / "runs", store=store)
    other = planted(store, tmp_path / "other.csv", 10, name="q")
    rows = [line.split(",") for line in other.read_text().splitlines()[1:]]
    table(other, [*rows, ("q99", "absent", "tumor")])
    common = ("--runs", tmp_path / "runs", "--head", "abmil", "--store", store.root)
    code, _, err = run("mil-eval", other, *common)
    assert code == 0, err
    folder = tmp_path / "pathcli-out" / "mil-eval-other"
    report = report_of(folder)
    assert report["provenance"]["kind"] == {"abmil": "external"}
    assert "External validation" in (folder / "report.html").read_text()
    (flow,) = report["provenance"]["flow"]
    assert (flow["test slides"], flow["tested bags"], flow["of class"]) == (11, 10, "tumor 1")
    assert report["metrics"]["abmil.auroc"]["value"] == 1

    slide = one.facts["train"][0]
    shared = slide.partition("-")[0]
    label = ("normal", "tumor")[int(shared[1:]) % 2]
    table(other, [*rows, (shared, slide, label)])
    code, _, err = run("mil-eval", other, *common)
    assert code == 4
    assert len(err.splitlines()) == 1
    assert "1 slides of" in err
    assert "--allow-leak" in err
    code, _, err = run("mil-eval", other, *common, "--allow-leak")
    assert code == 0
    assert report_of(folder)["provenance"]["test_slides_of_patients_learnt_from"] == {"abmil": 1}
    assert (
        "1 of the test slides are of patients or files that were learnt from"
        in (folder / "report.html").read_text()
    )


def test_train_trains_what_is_missing_on_ones_own_labels(
    store: Store, tmp_path: Path, run: Run
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    given = settings(*quick(2), "head.hidden=8")
    code, _, err = run(
        *("mil-eval", labels, "--train", "--encoder", "fake", "--head", "abmil", *given),
        *("--store", store.root, "--runs", tmp_path / "runs"),
    )
    assert code == 0, err
    (one,) = find_runs(tmp_path / "runs")
    assert one.recipe.values["head"]["hidden"] == 8


def test_a_class_without_a_test_slide_in_the_store_is_an_error(
    store: Store, tmp_path: Path
) -> None:
    labels = planted(store, tmp_path / "labels.csv")
    (one,) = train(recipe(labels, "train.epochs=1"), out=tmp_path / "runs", store=store)
    for slide in one.facts["split"]["test"]:
        if int(slide[1:].partition("-")[0]) % 2:
            (entry,) = store.root.rglob(f"features/**/{one.facts['store'][slide]}.h5")
            entry.unlink()
    with pytest.raises(DataError, match="no test slide of class tumor has features"):
        mil_eval(str(labels), runs=tmp_path / "runs", heads=("abmil",), store=store)


def test_a_published_split_that_shares_a_patient_is_counted_in_the_report(
    store: Store, tmp_path: Path, run: Run
) -> None:
    labels = planted(store, tmp_path / "labels.csv", 12, slides=2)
    parts = {"train": range(6), "val": (8, 9), "test": (10, 11)}
    names = {part: [f"p{i}-{j}" for i in of for j in (0, 1)] for part, of in parts.items()}
    names["val"].append("p6-0")
    names["train"].append("p6-1")
    rows = [",".join(n[i] if i < len(n) else "" for n in names.values()) for i in range(13)]
    (tmp_path / "split.csv").write_text("\n".join(["train,val,test", *rows]) + "\n")
    given = recipe(labels, f"data.splits={tmp_path / 'split.csv'}", "train.epochs=1")
    train(given, out=tmp_path / "runs", store=store)
    common = ("--runs", tmp_path / "runs", "--head", "abmil", "--store", store.root)
    code, _, err = run("mil-eval", labels, *common)
    assert code == 0, err
    told = "patients in both train and val: 1 (p6)"
    assert told in err
    folder = tmp_path / "pathcli-out" / "mil-eval-labels"
    assert any(told in text for text in report_of(folder)["provenance"]["warnings"])
    assert told in (folder / "report.html").read_text()


def test_a_table_that_is_no_table_is_a_wrong_call(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a benchmark nor a file"):
        mil_eval(str(tmp_path / "nothing.csv"))


def test_patient_bags_are_evaluated_as_patients(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "labels.csv", slides=2)
    (one,) = train(recipe(labels, "data.bag=patient"), out=tmp_path / "runs", store=store)
    found = mil_eval(str(labels), runs=tmp_path / "runs", heads=("abmil",), store=store)
    (tested,) = found.heads[0].tested
    assert tested.names == tested.patients
    assert len(tested.names) == len(one.facts["split"]["test"]) / 2
    assert np.allclose(tested.chances.sum(1), 1)


# --- scores ------------------------------------------------------------------------------


def drawn(
    rng: np.random.Generator, n: int = 40, seeds: int = 1, *, signal: float = 1.0, each: int = 1
) -> Scores:
    """Return made-up scores of `seeds` runs on one test set, `each` slides a patient."""
    labels = np.repeat(np.arange(n // each) % 2, each)
    names = tuple(f"s{i}" for i in range(n))
    patients = tuple(f"p{i // each}" for i in range(n))
    tested = []
    for seed in range(1, seeds + 1):
        logit = rng.normal(size=n // each).repeat(each) + rng.normal(size=n) / 2 + signal * labels
        chance = 1 / (1 + np.exp(-logit))
        run = SimpleNamespace(seed=seed)
        rows = (names, patients, (None,) * n, labels, np.stack([1 - chance, chance], 1))
        tested.append(mil_scores.Tested(run, *rows, threshold=0.5, listed=n, lost={}))  # type: ignore[arg-type]
    return Scores("drawn", tuple(tested), cohort=None)  # type: ignore[arg-type]


def auroc(labels: np.ndarray, chances: np.ndarray, _: int) -> float:
    return macro_auroc(labels, chances)


def test_over_one_seed_every_metric_is_the_plain_one(rng: np.random.Generator) -> None:
    scores = drawn(rng)
    (one,) = scores.tested
    found = measure_all(scores, 20)
    said = one.chances.argmax(1)
    assert found["auroc"].interval.value == pytest.approx(
        roc_auc_score(one.labels, one.chances[:, 1])
    )
    assert found["accuracy"].interval.value == (said == one.labels).mean()
    f1 = f1_score(one.labels, said, average="macro")
    assert found["macro_f1"].interval.value == pytest.approx(f1)
    assert found["sensitivity"].interval.value == said[one.labels == 1].mean()
    assert found["specificity"].interval.value == 1 - said[one.labels == 0].mean()
    squared = ((one.chances[:, 1] - one.labels) ** 2).mean()
    assert found["brier"].interval.value == pytest.approx(squared)
    assert np.isnan(found["auroc"].spread)


def test_over_seeds_metrics_are_means_and_the_spread_is_their_sd(rng: np.random.Generator) -> None:
    scores = drawn(rng, seeds=3)
    each = [roc_auc_score(t.labels, t.chances[:, 1]) for t in scores.tested]
    found = measure_all(scores, 20)["auroc"]
    assert found.interval.value == pytest.approx(np.mean(each))
    assert found.spread == pytest.approx(np.std(each, ddof=1))
    assert found.interval.n == 40


def test_the_interval_of_one_seed_is_the_bootstrap_over_patients(rng: np.random.Generator) -> None:
    scores = drawn(rng, each=2)
    (one,) = scores.tested
    plain = bootstrap(
        lambda rows: macro_auroc(one.labels[rows], one.chances[rows]),
        one.patients,
        strata=one.labels.tolist(),
        replicates=200,
    )
    assert scores.interval(auroc, 200) == plain
    assert plain.n == 20


def test_five_copies_of_a_seed_are_no_more_certain_than_one(rng: np.random.Generator) -> None:
    one = drawn(rng)
    (tested,) = one.tested
    copies = [replace(tested, run=SimpleNamespace(seed=s)) for s in range(5)]
    five = replace(one, tested=tuple(copies))
    a, b = one.interval(auroc, 300), five.interval(auroc, 300)
    assert (a.low, a.high) == pytest.approx((b.low, b.high))


def test_delong_compares_heads_where_a_patient_has_one_row_and_the_bootstrap_elsewhere(
    rng: np.random.Generator,
) -> None:
    a, b = (replace(drawn(rng, seeds=2, signal=s), name=f"{s:g}") for s in (3, 0))
    (row,) = compare([a, b], 50)
    assert row["test"].startswith("DeLong")
    mean = [np.mean([t.chances[:, 1] for t in s.tested], axis=0) for s in (a, b)]
    assert row["p"] == delong_test(a.tested[0].labels, *mean)
    assert row["p_holm"] == row["p"] < 0.05
    difference = roc_auc_score(a.tested[0].labels, mean[0]) - roc_auc_score(
        b.tested[0].labels, mean[1]
    )
    assert row["auroc_difference"] == pytest.approx(difference)
    (row,) = compare([drawn(rng, each=2), drawn(rng, each=2)], 50)
    assert row["test"].startswith("paired bootstrap over patients")
    assert 0 < row["p"] <= 1


def test_heads_tested_on_different_rows_are_not_compared(rng: np.random.Generator) -> None:
    a, b, c = drawn(rng), drawn(rng, n=38), drawn(rng, seeds=2)
    assert compare([a, b, c], 20) == []
    assert len(compare([a, b, drawn(rng)], 20)) == 1


def test_of_a_null_the_interval_covers_one_half(rng: np.random.Generator) -> None:
    intervals = [
        drawn(rng, n=48, seeds=2, signal=0, each=2).interval(auroc, 150) for _ in range(40)
    ]
    covered = sum(i.low <= 0.5 <= i.high for i in intervals)
    assert covered >= 33  # of 40; at a coverage of 0.9 fewer are seen once in 100 times
    assert abs(np.mean([i.value for i in intervals]) - 0.5) < 0.06
