"""Training MIL heads: what is learned, what is never opened, and what decides the result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cohorts import D, planted, put, quick, recipe, table, values
from safetensors.numpy import load_file

from pathcli.errors import DataError, UsageError
from pathcli.metrics.classification import macro_auroc
from pathcli.mil.bags import Bags, look_up
from pathcli.mil.benchmarks import benchmark
from pathcli.mil.tables import read_labels
from pathcli.mil.task import load_head, predict_bags, validate
from pathcli.recipe import Recipe, build, load_recipe
from pathcli.runs import Run, chosen, read_run, train
from pathcli.store import Store
from pathcli.types import TileSpec

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("fake")


@pytest.fixture
def labels(store: Store, tmp_path: Path) -> Path:
    return planted(store, tmp_path / "labels.csv")


def on_test(run: Run, store: Store, labels: Path) -> tuple[Bags, np.ndarray]:
    """Return the run's test bags and what its head says of them."""
    spec = TileSpec.from_json(run.facts["tiles"])
    cohort = look_up(read_labels(labels), store, run.facts["encoder"], spec)
    bags = Bags(cohort, run.facts["split"]["test"], run.facts["bag"])
    said = predict_bags(load_head(run), bags, CPU)
    return bags, np.stack([p.probabilities for p in said])


def weights(run: Run) -> dict[str, np.ndarray]:
    return load_file(run.folder / "weights.safetensors")


def same(one: Run, other: Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- what is learned ---------------------------------------------------------------------


def test_abmil_finds_what_is_planted_and_its_attention_says_where(
    store: Store, labels: Path, tmp_path: Path
) -> None:
    (run,) = train(recipe(labels, "train.epochs=20"), out=tmp_path / "runs", store=store)
    bags, chances = on_test(run, store, labels)
    assert set(bags.names) == {row.slide for row in read_labels(labels).rows} - {
        *run.facts["train"],
        *run.facts["val"],
    }
    assert macro_auroc(bags.labels, chances) == 1
    np.testing.assert_allclose(chances.sum(1), 1)
    for said in predict_bags(load_head(run), bags, CPU):
        assert len(said.attention) == 30
        assert said.attention.sum() == pytest.approx(1, abs=1e-5)
        if said.bag.label:
            assert said.attention[:5].min() > said.attention[5:].max()


def test_a_patients_bag_of_several_slides_trains(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "labels.csv", slides=2)
    (run,) = train(recipe(labels, "data.bag=patient"), out=tmp_path / "runs", store=store)
    bags, chances = on_test(run, store, labels)
    assert all(len(bag.slides) == 2 for bag in bags)
    assert len(bags) == len(run.facts["split"]["test"]) / 2
    assert macro_auroc(bags.labels, chances) == 1
    assert set(run.facts["patients"]) == {*run.facts["train"], *run.facts["val"]}


def test_validation_measures_are_those_of_sklearn(store: Store, labels: Path) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    task = build(recipe(labels))
    task.prepare(store, progress=lambda _: lambda *_: None)
    torch.manual_seed(0)
    work = task.begin(1)
    bags = Bags(task.cohort, [row.slide for row in task.cohort.table.rows])
    found = validate(work.module, bags)
    chances = np.stack([p.probabilities for p in predict_bags(work.module.head, bags, CPU)])
    said = chances.argmax(1)
    assert found["auroc"] == pytest.approx(metrics.roc_auc_score(bags.labels, chances[:, 1]))
    assert found["accuracy"] == pytest.approx(metrics.accuracy_score(bags.labels, said))
    f1 = metrics.f1_score(bags.labels, said, average="macro", zero_division=0)
    assert found["macro_f1"] == pytest.approx(f1)
    assert found["loss"] == pytest.approx(metrics.log_loss(bags.labels, chances))
    assert found["auroc+f1"] == found["auroc"] + found["macro_f1"]


# --- what decides the result -------------------------------------------------------------


def test_test_slides_are_never_opened_in_training(
    store: Store, labels: Path, tmp_path: Path
) -> None:
    known = recipe(labels, "train.epochs=2")
    (run,) = train(known, out=tmp_path / "whole", store=store)
    stems = run.facts["store"]
    ruined = run.facts["split"]["test"]
    head, *rows = labels.read_text().splitlines()
    rows.sort(key=lambda row: row.split(",")[1] not in ruined)
    labels.write_text("\n".join([head, *rows]) + "\n")  # they are the first in the table
    for slide in ruined:
        (entry,) = store.root.rglob(f"features/**/{stems[slide]}.h5")
        entry.write_bytes(b"ruined")
    (other,) = train(known, out=tmp_path / "ruined", store=store)
    assert same(run, other)
    (entry,) = store.root.rglob(f"features/**/{stems[run.facts['train'][0]]}.h5")
    entry.write_bytes(b"ruined")
    with pytest.raises(DataError, match="damaged"):
        train(known, out=tmp_path / "no", store=store)


def test_the_seed_decides_everything_and_nothing_else_does(
    store: Store, labels: Path, tmp_path: Path
) -> None:
    known = recipe(labels, "train.epochs=2", "train.seed=[3,4]")
    runs = train(known, out=tmp_path / "a", store=store)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002 - the global state is what is tested
    one = recipe(labels, "train.epochs=2", "train.seed=[4]")
    (alone,) = train(one, out=tmp_path / "b", store=store)
    assert [run.seed for run in runs] == [3, 4]
    assert not same(*runs)
    assert same(runs[1], alone)
    assert runs[1].metrics == alone.metrics
    assert runs[0].facts["split"] != runs[1].facts["split"]
    rows = labels.read_text().splitlines()
    labels.write_text("\n".join([rows[0], *reversed(rows[1:])]) + "\n")
    (shuffled,) = train(one, out=tmp_path / "c", store=store)
    assert shuffled.facts["split"] == alone.facts["split"]
    assert same(shuffled, alone)


def test_finished_runs_are_kept_and_another_recipe_is_refused(
    store: Store, labels: Path, tmp_path: Path
) -> None:
    known = recipe(labels, "train.epochs=1")
    (run,) = train(known, out=tmp_path / "runs", store=store)
    when = (run.folder / "weights.safetensors").stat().st_mtime_ns
    (again,) = train(known, out=tmp_path / "runs", store=store)
    assert (again.folder / "weights.safetensors").stat().st_mtime_ns == when
    assert read_run(run.folder).facts == run.facts
    with pytest.raises(UsageError, match="holds a run of another recipe"):
        train(recipe(labels, "train.epochs=2"), out=tmp_path / "runs", store=store)


def test_facts_say_what_was_used_and_what_was_missing(
    store: Store, labels: Path, tmp_path: Path
) -> None:
    rows = [line.split(",") for line in labels.read_text().splitlines()[1:]]
    table(labels, [*rows, ("p0", "lost", "normal"), ("p1", "gone", "tumor")])
    (run,) = train(recipe(labels, "train.epochs=1"), out=tmp_path / "runs", store=store)
    facts = run.facts
    assert facts["missing"] == dict.fromkeys(("lost", "gone"), "no features in the store")
    assert facts["classes"] == ["normal", "tumor"]
    assert facts["dim"] == D
    assert facts["labels"]["digest"] == read_labels(labels).digest
    split = facts["split"]
    assert len(split["train"]) + len(split["val"]) + len(split["test"]) == 26
    cases = {name: case for case, name, _ in rows}
    assert facts["patients"] == sorted({cases[s] for s in (*facts["train"], *facts["val"])})
    assert not {"lost", "gone"} & {*facts["train"], *facts["val"]}
    said = facts["validation"]
    assert len(said["labels"]) == len(facts["val"])
    np.testing.assert_allclose(np.sum(said["probabilities"], 1), 1, atol=1e-5)


def test_a_class_without_a_usable_slide_is_one_clear_error(store: Store, tmp_path: Path) -> None:
    rows = [(f"p{i}", f"s{i}", ("normal", "tumor")[i % 2]) for i in range(20)]
    for _, slide, label in rows:
        if label == "normal":
            put(store, slide, values(5))
    labels = table(tmp_path / "labels.csv", rows)
    with pytest.raises(DataError) as caught:
        train(recipe(labels), out=tmp_path / "runs", store=store)
    assert str(caught.value) == (
        "seed 1: no train slide of class tumor can be used; of 20 slides 10 are missing, "
        "s1: no features in the store"
    )
    assert not (tmp_path / "runs").exists()


def test_a_bag_whose_tiles_are_all_unreadable_is_named(store: Store, tmp_path: Path) -> None:
    labels = planted(store, tmp_path / "labels.csv", 12)
    rows = [line.split(",") for line in labels.read_text().splitlines()[1:]]
    put(store, "black", values(3), bad=[0, 1, 2])
    table(labels, [*rows, ("q", "black", "tumor")])
    task = build(recipe(labels))
    task.prepare(store, progress=lambda _: lambda *_: None)
    bags = Bags(task.cohort, ["black"])
    with pytest.raises(DataError, match="black: a bag without tiles"):
        list(predict_bags(task.head(D, 2), bags, CPU))


# --- which run stands for a seed ---------------------------------------------------------


def run_of(seed: int, lr: float, **metrics: float) -> Run:
    values_ = {"train": {"seed": seed, "lr": lr, "choose": "auroc"}}
    return Run(Path(f"{seed}-{lr:g}"), Recipe("r", values_), metrics, {})


def test_of_several_rates_validation_picks_one_a_seed_and_the_loss_breaks_ties() -> None:
    runs = [
        run_of(2, 1, auroc=0.7, loss=0.1),
        run_of(2, 2, auroc=0.9, loss=0.9),
        run_of(1, 1, auroc=0.8, loss=0.5),
        run_of(1, 2, auroc=0.8, loss=0.3),
        run_of(1, 3, auroc=0.8, loss=0.4),
    ]
    for order in (runs, runs[::-1]):
        assert [str(run.folder) for run in chosen(order)] == ["1-2", "2-2"]


def test_a_run_whose_validation_metric_was_undefined_is_chosen_last() -> None:
    runs = [run_of(1, 1, loss=0.1), run_of(1, 2, auroc=0.2, loss=0.9)]
    assert [str(run.folder) for run in chosen(runs)] == ["1-2"]


# --- a published split -------------------------------------------------------------------


@pytest.mark.data
def test_the_published_fold_that_shares_a_patient_warns_and_is_counted(
    store: Store, data: Path, tmp_path: Path
) -> None:
    fold = data / "camelyon16" / "transmil_fold0.csv"
    known = benchmark("camelyon16").need_table()
    given = ["data.slides=null", f"data.splits={fold}", *quick(epochs=1)]
    some = load_recipe("camelyon16-abmil", given)
    task = build(some)
    split = task.data.partition(1)
    shared = {known.by_slide[s].case for s in split.train} & {
        known.by_slide[s].case for s in split.val
    }
    assert len(shared) == 1
    (case,) = shared
    for part in split.parts().values():
        for label in known.classes:
            for slide in [s for s in part if known.by_slide[s].label == label][:2]:
                put(store, slide, values(6, planted=known.classes.index(label)))
    (run,) = train(some, out=tmp_path / "runs", store=store)
    assert any(
        "patients in both train and val: 1" in w and case in w for w in run.facts["warnings"]
    )
    assert len(run.facts["missing"]) == 399 - 12
    assert run.facts["split"]["name"] == "transmil_fold0.csv"
