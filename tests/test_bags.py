"""Which slides of a table are used, why others are not, and what a bag of them holds."""

from __future__ import annotations

from pathlib import Path

import fakes
import numpy as np
import pytest
import synthetic
from cohorts import D, paint, put, recipe, table, values

from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.mil.bags import BagData, Bags, Cohort, look_up, make
from pathcli.mil.tables import read_labels
from pathcli.runs import train
from pathcli.slides.discovery import discover
from pathcli.store import Store
from pathcli.types import Key, Progress

SPEC, ENCODER = fakes.MeanColour.native, fakes.MeanColour.id


def labels(folder: Path, *rows: tuple[str, str, object]) -> Path:
    return table(folder / "labels.csv", rows)


def cohort(folder: Path, store: Store, *rows: tuple[str, str, object]) -> Cohort:
    return look_up(read_labels(labels(folder, *rows)), store, ENCODER, SPEC)


# --- bags --------------------------------------------------------------------------------


def test_a_bag_has_no_unreadable_tile_and_keeps_the_order_of_the_rest(
    store: Store, tmp_path: Path
) -> None:
    rows = values(12)
    key = put(store, "a", rows, bad=[0, 5])
    put(store, "b", values(4))
    bag = Bags(cohort(tmp_path, store, ("p", "a", 0), ("q", "b", 1)), ["a"])[0]
    good = np.delete(np.arange(12), [0, 5])
    np.testing.assert_array_equal(bag.features, rows[good])
    np.testing.assert_array_equal(bag.xy, store.features[key].xy[good])
    assert (bag.name, bag.patient, bag.label, bag.slides) == ("a", "p", 0, ("a",))
    assert bag.features.dtype == np.float16
    assert bag.slide_of.tolist() == [0] * 10


def test_the_tiles_of_a_slide_come_in_order_of_y_then_x(
    store: Store, tmp_path: Path, fake: type
) -> None:
    paint(tmp_path / "a.tif")
    table_ = read_labels(labels(tmp_path, ("p", "a", 0), ("q", "b", 1)))
    found = make(table_, discover([str(tmp_path / "a.tif")]), Embedder(fake(), store), SPEC)
    xy = Bags(found, ["a"])[0].xy
    assert len(xy) > 50
    np.testing.assert_array_equal(np.lexsort((xy[:, 0], xy[:, 1])), np.arange(len(xy)))


def test_a_patients_bag_joins_its_slides_and_has_their_highest_label(
    store: Store, tmp_path: Path
) -> None:
    parts = {name: values(n, seed=n) for name, n in (("a", 3), ("b", 5), ("c", 2), ("d", 4))}
    for name, rows in parts.items():
        put(store, name, rows, bad=[1] if name == "b" else [])
    rows = [("p", "a", 0), ("q", "c", 0), ("p", "b", 2), ("p", "gone", 2), ("r", "d", 1)]
    bags = Bags(cohort(tmp_path, store, *rows), ["a", "c", "b", "gone"], "patient")
    assert (bags.names, bags.patients, bags.labels.tolist()) == (["p", "q"], ["p", "q"], [2, 0])
    bag = bags[0]
    assert (bag.slides, bag.label) == (("a", "b"), 2)
    assert bag.slide_of.tolist() == [0] * 3 + [1] * 4
    joined = np.concatenate([parts["a"], np.delete(parts["b"], 1, 0)])
    np.testing.assert_array_equal(bag.features, joined)
    assert [len(b.xy) for b in bags[:]] == [7, 2]


def test_features_are_mapped_and_training_leaves_their_files_as_they_are(
    store: Store, tmp_path: Path, fake: type
) -> None:
    assert fake.id == ENCODER
    rows = [(f"p{i}", f"s{i}", i % 2) for i in range(12)]
    keys = [put(store, name, values(20, planted=5 * c)) for _, name, c in rows]
    before = [store.features.path(key).read_bytes() for key in keys]
    bag = Bags(cohort(tmp_path, store, *rows), ["s0"])[0]
    assert isinstance(bag.features, np.memmap)
    assert Path(bag.features.filename) == store.features.path(keys[0])
    train(recipe(tmp_path / "labels.csv", "train.epochs=1"), out=tmp_path / "runs", store=store)
    bag.features[:] = 7  # what a careless head would do
    assert [store.features.path(key).read_bytes() for key in keys] == before


def test_features_that_are_tokens_are_refused_in_words(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        put(store, name, np.zeros((4, 2, D), np.float16))
    bags = Bags(cohort(tmp_path, store, ("p", "a", 0), ("q", "b", 1)), "ab")
    with pytest.raises(DataError, match=r"one vector per tile.* tokens \(2, 3\)"):
        _ = bags.dim


# --- found in the store ------------------------------------------------------------------


def test_missing_slides_are_counted_and_named_with_the_reason(store: Store, tmp_path: Path) -> None:
    for name in "ab":
        put(store, name, values(4))
    put(store, "d", values(4), encoder="other-111111111111")
    put(store, "b", values(4), mpp=0.25)
    rows = [("p", "a", 0), ("q", "b", 1), ("r", "c", 1), ("s", "d", 0)]
    found = cohort(tmp_path, store, *rows)
    assert list(found.keys) == ["a"]
    assert {name: why.partition(" in the store")[0] for name, why in found.missing.items()} == {
        "b": "2 slides of this name are",
        "c": "no features",
        "d": "no features",
    }
    assert len(found.missing) == 3
    assert "b-" in found.missing["b"]
    assert Bags(found, ["a", "b", "c", "d"]).names == ["a"]


@pytest.mark.parametrize("name", ["case 7 β", "a.b.c", "x-0000", "_lead", "(1) & 50%", "-"])
def test_a_slide_is_found_by_its_name_whatever_characters_it_has(
    store: Store, tmp_path: Path, name: str
) -> None:
    put(store, name, values(4))
    put(store, "other", values(5))
    found = cohort(tmp_path, store, ("p", name, 0), ("q", "other", 1))
    assert (len(found.keys), found.missing) == (2, {})
    assert len(Bags(found, [name])[0].xy) == 4


@pytest.mark.parametrize(("one", "other"), [("case 7", "case_7"), ("x" * 60 + "1", "x" * 60 + "2")])
def test_two_slides_the_store_cannot_tell_apart_are_not_guessed(
    store: Store, tmp_path: Path, one: str, other: str
) -> None:
    put(store, one, values(4))
    put(store, "b", values(4))
    found = cohort(tmp_path, store, ("p", one, 0), ("q", other, 1), ("r", "b", 1))
    assert list(found.keys) == ["b"]
    assert "2 slides of the table have this name in the store" in found.missing[one]
    assert found.missing[one] == found.missing[other]


def test_a_table_without_a_slide_in_the_store_says_the_command(
    store: Store, tmp_path: Path
) -> None:
    with pytest.raises(ResourceError) as caught:
        cohort(tmp_path, store, ("p", "a", 0), ("q", "b", 1))
    said = str(caught.value)
    assert "none of the 2 slides" in said
    assert str(tmp_path / "labels.csv") in said
    assert "pathcli embed DIR --encoder fake" in said
    assert "\n" not in said


def test_slides_stored_at_two_resolutions_are_not_called_absent(
    store: Store, tmp_path: Path
) -> None:
    for mpp in (0.25, 0.5):
        put(store, "a", values(4), mpp=mpp)
    with pytest.raises(ResourceError, match=r"can be used; 2 slides of this name .*name the slide"):
        cohort(tmp_path, store, ("p", "a", 0), ("q", "b", 1))


# --- made from slides --------------------------------------------------------------------


def test_features_are_made_once_and_found_the_second_time(
    store: Store, tmp_path: Path, fake: type
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for i, name in enumerate("ab"):
        paint(folder / f"{name}.tif", seed=i)
    for name in ("cut", "twice"):
        paint(folder / f"{name}.tif")
    (folder / "cut.tif").write_bytes((folder / "cut.tif").read_bytes()[:9000])
    (folder / "more").mkdir()
    paint(folder / "more" / "twice.tif")
    rows = [("p", "a", 0), ("q", "cut", 1), ("r", "b", 1), ("s", "gone", 0), ("t", "twice", 0)]
    data = BagData(labels=labels(tmp_path, *rows), slides=folder)
    told: list[str] = []

    def progress(name: str) -> Progress:
        told.append(name)
        return lambda *_: None

    first = data.cohort(store, fake(), SPEC, progress=progress)
    passes = fake.passes
    assert passes > 0
    assert list(first.keys) == ["a", "b"]
    assert first.missing["gone"] == "no file of this name"
    assert first.missing["twice"] == "2 files of this name"
    assert str(folder / "cut.tif") in first.missing["cut"]
    assert told[0] == "1/5 a"
    again = data.cohort(store, fake(), SPEC)
    assert (again.keys, fake.passes) == (first.keys, passes)
    found = BagData(labels=tmp_path / "labels.csv").cohort(store, fake(), SPEC)
    assert found.keys == first.keys
    assert set(found.missing) == set(first.missing)


def test_a_slide_with_too_many_broken_tiles_or_none_on_tissue_is_missing(
    store: Store, tmp_path: Path, fake: type
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    paint(folder / "a.tif")
    broken = paint(folder / "broken.tif")
    for index in range(6):
        synthetic.break_tile(broken, index)
    synthetic.slide(folder / "blank.tif", np.full((768, 1024, 3), synthetic.GLASS, np.uint8))
    rows = [("p", "a", 0), ("q", "broken", 1), ("r", "blank", 1)]
    data = BagData(labels=labels(tmp_path, *rows), slides=folder)
    found = data.cohort(store, fake(), SPEC)
    assert list(found.keys) == ["a"]
    assert "cannot be" in found.missing["broken"]
    assert found.missing["blank"] == "no tile on tissue"


def test_a_folder_without_the_tables_slides_is_one_line(
    store: Store, tmp_path: Path, fake: type
) -> None:
    paint(tmp_path / "x.tif")
    path = labels(tmp_path, ("p", "a", 0), ("q", "b", 1))
    with pytest.raises(ResourceError, match=r"none of the 2 slides .*no file of this name") as said:
        BagData(labels=path, slides=tmp_path / "x.tif").cohort(store, fake(), SPEC)
    assert "\n" not in str(said.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no slides in this folder"):
        BagData(labels=path, slides=tmp_path / "empty").cohort(store, fake(), SPEC)
    with pytest.raises(ResourceError, match="nowhere: no such folder"):
        BagData(labels=path, slides=tmp_path / "nowhere").cohort(store, fake(), SPEC)
    with pytest.raises(ResourceError, match="nowhere: no such folder"):
        make(read_labels(path), discover(["nowhere"]), Embedder(fake(), store), SPEC)
    assert fake.passes == 0


# --- labels and splits of a recipe --------------------------------------------------------


def test_data_without_labels_is_a_wrong_call() -> None:
    with pytest.raises(UsageError, match=r"data\.benchmark or data\.labels"):
        BagData()


def test_a_patient_of_two_labels_needs_the_order_of_the_classes(tmp_path: Path) -> None:
    rows = [("p", "a", "tumor"), ("p", "b", "normal"), ("q", "c", "tumor")]
    path = labels(tmp_path, *rows)
    with pytest.raises(DataError, match=r"1 \(p\).*data\.classes"):
        _ = BagData(labels=path, bag="patient").table
    order = {"tumor": "tumor", "normal": "normal"}
    assert BagData(labels=path, bag="patient", classes=order).table.classes == ("tumor", "normal")
    assert BagData(labels=path).table.classes == ("normal", "tumor")


def test_k_fold_tests_every_slide_once_over_as_many_seeds(tmp_path: Path) -> None:
    rows = [(f"p{i}", f"s{i}", i % 2) for i in range(30)]
    data = BagData(labels=labels(tmp_path, *rows), split="k-fold", folds=3)
    tested = [slide for seed in (1, 2, 3) for slide in data.partition(seed).test]
    assert sorted(tested) == sorted(name for _, name, _ in rows)
    assert data.partition(4).test == data.partition(1).test


def test_a_folder_of_splits_has_one_file_a_seed(tmp_path: Path) -> None:
    rows = [(f"p{i}", f"s{i}", i % 2) for i in range(8)]
    folder = tmp_path / "splits"
    folder.mkdir()
    for seed, test in ((1, 4), (2, 6), (12, 2)):
        parts = [f"s{(i + test) % 8}" for i in range(8)]
        lines = [",".join(parts[i : i + 6 : 2]) for i in range(2)]
        (folder / f"splits_{seed}.csv").write_text("\n".join(["train,val,test", *lines]) + "\n")
    data = BagData(labels=labels(tmp_path, *rows), splits=folder)
    assert data.partition(1).test == ("s0", "s1")
    assert data.partition(2).test == ("s2", "s3")
    with pytest.raises(DataError, match="0 split files end in _3"):
        data.partition(3)


def test_a_patient_in_train_and_test_is_refused_unless_allowed(tmp_path: Path) -> None:
    rows = [(f"p{i}", f"s{i}", i % 2) for i in range(6)] + [("p0", "again", 0)]
    split = tmp_path / "split.csv"
    split.write_text("train,val,test\ns0,s2,again\ns1,s3,s5\n")
    path = labels(tmp_path, *rows)
    with pytest.raises(DataError, match=r"in test and in train or val: 1 \(p0\).*allow_leak"):
        BagData(labels=path, splits=split).partition(1)
    allowed = BagData(labels=path, splits=split, allow_leak=True).partition(1)
    assert any("p0" in text for text in allowed.warnings)


def test_the_keys_of_a_cohort_name_what_is_in_the_store(store: Store, tmp_path: Path) -> None:
    key = put(store, "a", values(4))
    put(store, "b", values(4))
    bags = Bags(cohort(tmp_path, store, ("p", "a", 0), ("q", "b", 1)), ["b", "a"])
    assert bags.source("a") == (store, key)
    assert isinstance(key, Key)
    assert bags.names == ["b", "a"]
