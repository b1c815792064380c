import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathcli.data.classes import class_set
from pathcli.data.labelled import Labelled, open_dataset, read_labelled
from pathcli.errors import DataError, ResourceError, UsageError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def table(path: Path, *rows: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)  # type: ignore[arg-type]
    return path


def workbook(path: Path, *rows: list[object]) -> None:
    import openpyxl

    path.parent.mkdir(parents=True, exist_ok=True)
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)


def pairs(found: Labelled) -> set[tuple[str, str, str]]:
    return {(Path(str(s.images[0])).name, s.label, s.group) for s in found.samples}


# --- labels.csv ----------------------------------------------------------------------------


def test_labels_csv_gives_labels_groups_and_splits(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    rows = (["a.png", "lung_n", "g1", "train"], ["b.png", "lung_aca", "g2", "Testing"])
    last = ["c.png", "lung_scc", "", "test"]
    table(tmp_path / "labels.csv", ["Image", "label", "group", "split"], *rows, last)
    lung = class_set("lc-lung")
    every = read_labelled(lung, tmp_path)
    assert pairs(every) == {
        ("a.png", "lung_n", "g1"),
        ("b.png", "lung_aca", "g2"),
        ("c.png", "lung_scc", ""),
    }
    assert every.splits == ("train", "test", "test")
    assert every.warnings == ("1 of 3 images have no group; each of them counts by itself",)
    assert pairs(read_labelled(lung, tmp_path, split="test")) == pairs(every) - {
        ("a.png", "lung_n", "g1")
    }
    assert read_labelled(lung, tmp_path, split="all").digest == every.digest
    with pytest.raises(UsageError, match="no split 'tets' here: did you mean 'test'"):
        read_labelled(lung, tmp_path, split="tets")


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png", "c.png")
    labels = [["a.png", "lung_n"], ["a.png", "lung_n"], ["b.png", ""], ["c.png", "colon_n"]]
    table(tmp_path / "labels.csv", ["image", "label"], *labels, ["gone.png", "lung_aca"])
    found = read_labelled(class_set("lc-lung"), tmp_path)
    assert pairs(found) == {("a.png", "lung_n", "")}
    assert found.dropped == {
        "listed again": 1,
        "no label": 1,
        "label 'colon_n' is no class of lc-lung": 1,
        "no such file": 1,
    }
    assert any("no groups are known" in w for w in found.warnings)
    assert "no image is of class lung_aca, lung_scc" in found.warnings


def test_an_image_with_two_labels_is_an_error(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    table(tmp_path / "labels.csv", ["image", "label"], ["a.png", "lung_n"], ["a.png", "lung_aca"])
    with pytest.raises(DataError, match="has two labels, lung_n and lung_aca"):
        read_labelled(class_set("lc-lung"), tmp_path)


def test_a_table_elsewhere_replaces_labels_csv(tmp_path: Path) -> None:
    touch(tmp_path / "data", "a.png", "b.png")
    table(tmp_path / "data" / "labels.csv", ["image", "label"], ["a.png", "lung_n"])
    other = table(tmp_path / "other.csv", ["image", "label"], ["b.png", "lung_aca"])
    found = read_labelled(class_set("lc-lung"), tmp_path / "data", labels=other)
    assert pairs(found) == {("b.png", "lung_aca", "")}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("image,lable\na.png,x\n", "no column 'label', or two; did you mean 'lable'"),
        ("image,image,label\na,b,c\n", "no column 'image', or two"),
        ("", "no column 'image'"),
        ("image,label\n\xff\xfe", "not a CSV"),
        ("image,label\na,b.png,x\n", r"more cells than the header \(a, ...\)"),
    ],
)
def test_a_wrong_table_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=told):
        read_labelled(class_set("lc-lung"), tmp_path)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    table(tmp_path / "labels.csv", ["image", "label"], ["a.png", "lung_n"])
    with pytest.raises(DataError, match=r"can be used \(no such file: 1\)"):
        read_labelled(class_set("lc-lung"), tmp_path)


def test_a_folder_with_nothing_says_what_is_wanted_and_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no such folder"):
        read_labelled(class_set("bach"), tmp_path / "absent")
    with pytest.raises(ResourceError, match=r"neither labels\.csv nor .*download ICIAR2018"):
        read_labelled(class_set("bach"), tmp_path)


# --- the sets' own layouts -----------------------------------------------------------------


def test_lc25000_is_read_from_its_folders(tmp_path: Path) -> None:
    touch(tmp_path, "lung_image_sets/lung_n/n1.jpeg", "lung_image_sets/lung_aca/a1.jpeg")
    touch(tmp_path, "colon_image_sets/colon_n/c1.jpeg", "lung_image_sets/lung_n/.hidden.png")
    found = read_labelled(class_set("lc-lung"), tmp_path)
    assert pairs(found) == {("n1.jpeg", "lung_n", ""), ("a1.jpeg", "lung_aca", "")}
    assert found.dropped == {"label 'colon_n' is no class of lc-lung": 1}


def test_crc_takes_the_training_images_unless_asked_for_others(tmp_path: Path) -> None:
    touch(tmp_path, "NCT-CRC-HE-100K/ADI/ADI-1.tif", "CRC-VAL-HE-7K/TUM/TUM-1.tif")
    crc = class_set("crc-100k")
    assert pairs(read_labelled(crc, tmp_path)) == {("ADI-1.tif", "ADI", "")}
    assert pairs(read_labelled(crc, tmp_path, split="test")) == {("TUM-1.tif", "TUM", "")}
    assert len(read_labelled(crc, tmp_path, split="all").samples) == 2
    inside = read_labelled(crc, tmp_path / "NCT-CRC-HE-100K")
    assert inside.splits == ("train",)


def test_a_usual_split_that_nobody_knows_is_said_aloud(tmp_path: Path) -> None:
    touch(tmp_path, "ADI/1.tif", "TUM/2.tif")
    found = read_labelled(class_set("crc-100k"), tmp_path)
    assert len(found.samples) == 2
    assert any("split train, so all are taken" in w for w in found.warnings)
    with pytest.raises(UsageError, match="no image has one"):
        read_labelled(class_set("crc-100k"), tmp_path, split="test")


def test_bach_is_read_from_file_names(tmp_path: Path) -> None:
    touch(tmp_path, "Photos/Benign/b001.tif", "Photos/InSitu/is002.tif", "Photos/x/iv003.tif")
    touch(tmp_path, "Photos/Normal/n100.tif", "Photos/test0.tif")
    found = read_labelled(class_set("bach"), tmp_path)
    assert {(name, label) for name, label, _ in pairs(found)} == {
        ("b001.tif", "Benign"),
        ("is002.tif", "InSitu"),
        ("iv003.tif", "Invasive"),
        ("n100.tif", "Normal"),
    }


def test_wsss4luad_is_read_from_the_list_in_the_file_name(tmp_path: Path) -> None:
    touch(tmp_path, "1.training/436723-7372-48969-[1, 0, 0].png", "1.training/p7-1-2-[0, 1, 0].png")
    touch(tmp_path, "1.training/s_38208_17984_[0_0_1].png", "2.validation/img/00.png")
    found = read_labelled(class_set("wsss4luad"), tmp_path)
    assert {(s.group, s.label) for s in found.samples} == {
        ("436723", "tumor"),
        ("p7", "normal"),
        ("s", "normal"),
    }


def test_sicapv2_is_read_from_workbooks_and_keeps_single_labels(tmp_path: Path) -> None:
    head: list[object] = ["image_name", "NC", "G3", "G4", "G5", "G4C"]
    names = [f"16B000{i}_Block_Region_1_0_{i}.jpg" for i in range(4)]
    root = tmp_path / "SICAPv2"
    touch(root, *(f"images/{name}" for name in names), *(f"masks/{n[:-4]}.png" for n in names))
    workbook(
        root / "partition/Test/Train.xlsx",
        head,
        [names[0], 1, 0, 0, 0, 0],
        [names[1], 0, 0, 1, 0, 1],
        [names[2], 0, 1, 1.0, 0, 0],
    )
    workbook(root / "partition/Test/Test.xlsx", head, [names[3], 0.0, 0, 0, 1.0, 0])
    sicap = class_set("sicapv2")
    found = read_labelled(sicap, root)
    assert pairs(found) == {(names[0], "NC", "16B0000"), (names[1], "G4", "16B0001")}
    assert found.dropped == {"not exactly one label": 1}
    above = read_labelled(sicap, tmp_path, split="test")
    assert {label for _, label, _ in pairs(above)} == {"G5"}


def test_osteo_finds_images_whose_names_the_table_spells_otherwise(tmp_path: Path) -> None:
    touch(tmp_path, "Training-Set-1/set1/Case-3-A15-23901-1148.jpg")
    touch(tmp_path, "Training-Set-2/set8/Case-48-P5-C17-7752-15521.jpg", "t/P9-B27-21147-3.jpg")
    rows = [
        ["Case 3 A15 23901-1148", "Non-Tumor"],
        ["Case 48 - P5 C17 7752-15521", "viable: non-viable"],
        ["P9-B27-21147-3", "Non-Viable-Tumor"],
        ["Case 4 absent", "Viable"],
    ]
    table(tmp_path / "ML_Features_1144.csv", ["image.name", "classification"], *rows)
    found = read_labelled(class_set("osteo"), tmp_path)
    assert {(s.group, s.label) for s in found.samples} == {
        ("Case-3", "Non-Tumor"),
        ("Case-48", "Viable"),
        ("P9", "Non-Viable-Tumor"),
    }
    assert found.dropped == {"no such file": 1}


def test_skincancer_and_mhist_are_read_from_their_tables(tmp_path: Path) -> None:
    skin, mhist = tmp_path / "skin", tmp_path / "mhist"
    key = "nontumor_skin_dermis_dermis"
    touch(skin, f"tiles/{key}/ws_44_6.jpg", "tiles/tumor_skin_naevus_naevus/ws_44_6.jpg")
    table(
        skin / "tiles-v2.csv",
        ["file", "class", "set"],
        [f"data/tiles/{key}/ws_44_6.jpg", key, "Train"],
        ["data/tiles/tumor_skin_naevus_naevus/ws_44_6.jpg", "tumor_skin_naevus_naevus", "Test"],
    )
    found = read_labelled(class_set("skincancer"), skin)
    assert [(s.label, split) for s, split in zip(found.samples, found.splits, strict=True)] == [
        ("dermis", "train"),
        ("naevus", "test"),
    ]
    touch(mhist, "images/MHIST_aaa.png", "images/MHIST_aab.png")
    head = ["Image Name", "Majority Vote Label", "Number of Annotators", "Partition"]
    rows = (["MHIST_aaa.png", "SSA", 6, "train"], ["MHIST_aab.png", "HP", 1, "test"])
    table(mhist / "annotations.csv", head, *rows)
    assert pairs(read_labelled(class_set("mhist"), mhist)) == {("MHIST_aab.png", "HP", "")}


@pytest.fixture
def pcam(tmp_path: Path, rng: np.random.Generator) -> Path:
    import h5py

    stem = "camelyonpatch_level_2_split_test"
    pixels = rng.integers(0, 255, (5, 96, 96, 3), np.uint8)
    with h5py.File(tmp_path / f"{stem}_x.h5", "w") as file:
        file["x"] = pixels
    with h5py.File(tmp_path / f"{stem}_y.h5", "w") as file:
        file["y"] = np.array([0, 1, 1, 0, 1], np.uint8).reshape(5, 1, 1, 1)
    slides = [[i, f"slide_{i % 2}"] for i in range(5)]
    table(tmp_path / f"{stem}_meta.csv", ["", "wsi"], *slides)
    return tmp_path


def test_pcam_is_unpacked_once_without_loss(
    pcam: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import h5py

    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path / "cache")
    found = read_labelled(class_set("pcam"), pcam)
    assert Counter(s.label for s in found.samples) == {"normal": 2, "tumor": 3}
    assert [s.group for s in found.samples] == ["slide_0", "slide_1"] * 2 + ["slide_0"]
    with h5py.File(next(pcam.glob("*_x.h5"))) as file:
        for sample, pixels in zip(found.samples, file["x"], strict=True):
            assert np.array_equal(np.asarray(Image.open(str(sample.images[0]))), pixels)
    before = [Path(str(s.images[0])).stat().st_mtime_ns for s in found.samples]
    again = read_labelled(class_set("pcam"), pcam, split="test")
    assert [Path(str(s.images[0])).stat().st_mtime_ns for s in again.samples] == before
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_pcam_arrays_of_other_lengths_are_refused(
    pcam: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import h5py

    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path / "cache")
    path = next(pcam.glob("*_y.h5"))
    path.unlink()
    with h5py.File(path, "w") as file:
        file["y"] = np.zeros((4, 1, 1, 1), np.uint8)
    with pytest.raises(DataError, match="5 images for 4 labels"):
        read_labelled(class_set("pcam"), pcam)


# --- sets of one's own ---------------------------------------------------------------------


def test_class_folders_are_a_set_of_ones_own(tmp_path: Path) -> None:
    touch(tmp_path, "in_situ/1.png", "benign/2.png", "stray.png")
    classes, found = open_dataset(str(tmp_path))
    assert classes.texts()["in_situ"] == ("An H&E image of in situ",)
    assert pairs(found) == {("1.png", "in_situ", ""), ("2.png", "benign", "")}
    assert found.dropped == {"in no class folder": 1}


def test_split_folders_above_class_folders_are_splits(tmp_path: Path) -> None:
    touch(tmp_path, "train/a/1.png", "train/b/2.png", "test/a/3.png", "valid/b/4.png")
    _, found = open_dataset(str(tmp_path), split="test")
    assert pairs(found) == {("3.png", "a", "")}
    assert open_dataset(str(tmp_path))[1].splits == ("test", "train", "train", "val")


def test_a_table_is_a_set_of_ones_own(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    path = table(tmp_path / "mine.csv", ["image", "label"], ["a.png", "x"], ["b.png", "y"])
    classes, found = open_dataset(str(path))
    assert classes.keys == ("x", "y")
    assert len(found.samples) == 2


def test_a_known_set_without_a_folder_says_how_to_get_it() -> None:
    with pytest.raises(UsageError, match=r"--data DIR; download LC25000"):
        open_dataset("lc-lung")


def test_a_known_set_keeps_its_texts_where_a_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "mhist/x/a.png", "mhist/y/b.png")
    table(tmp_path / "mhist/labels.csv", ["image", "label"], ["x/a.png", "HP"], ["y/b.png", "SSA"])
    monkeypatch.chdir(tmp_path)
    assert open_dataset("mhist", "mhist")[0] == class_set("mhist")
    assert open_dataset("./mhist")[0].keys == ("HP", "SSA")


@pytest.mark.data
def test_the_shared_lung_images_are_read_with_their_groups(data: Path) -> None:
    _, found = open_dataset("lc-lung", data / "lc25000-lung")
    assert len(found.samples) == 6163
    assert not found.dropped
    assert not found.warnings
    assert all(s.group for s in found.samples)
