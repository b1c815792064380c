"""Probes keep groups apart, learn nothing from the test, and say what they did."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_linear import overlapping

from pathcli.errors import DataError, UsageError
from pathcli.evals import linear
from pathcli.evals.linear import Learnt
from pathcli.evals.patch_scores import measure_patches
from pathcli.evals.probe import parse_shots, probe, probe_levels
from pathcli.evals.probe_report import level_section, level_table
from pathcli.evals.probe_sides import Images, sides_of
from pathcli.store import Store
from pathcli.types import Sample

Run = Callable[..., tuple[int, str, str]]
COLOURS = {"blue": (60, 60, 180), "green": (60, 180, 60), "red": (180, 60, 60)}


def images(n: int = 240, *, split: bool = True, seed: int = 0) -> Images:
    rows = overlapping(n, seed=seed)
    samples = [Sample(f"{i}", (f"{i}.png",), group=g) for i, g in enumerate(rows.groups)]
    number = np.arange(n) // 6
    splits = (
        np.choose(number % 5, ["train", "train", "train", "val", "test"]) if split else [""] * n
    )
    return Images(
        samples, rows.features.astype(np.float16), rows.labels, ("a", "b", "c"), [*splits]
    )


@pytest.fixture(autouse=True)
def _few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathcli.evals.probe.REPLICATES", 60)
    few = functools.partial(measure_patches, replicates=60)
    monkeypatch.setattr("pathcli.evals.patch_scores.measure_patches", few)


# --- who is on which side ----------------------------------------------------------------


def test_the_official_split_is_used() -> None:
    known = images()
    sides = sides_of(known)
    for part in ("train", "val", "test"):
        assert {known.splits[i] for i in getattr(sides, part)} == {part}
    assert (len(sides.train), len(sides.val), len(sides.test)) == (144, 48, 48)
    assert sides.warnings == ()


def test_without_a_test_part_validation_is_the_test() -> None:
    known = images()
    sides = sides_of(replace(known, splits=[s.replace("test", "train") for s in known.splits]))
    assert (len(sides.train), len(sides.val), len(sides.test)) == (192, 0, 48)
    assert "validation part as the test" in sides.how


def test_drawn_sides_keep_groups_whole_and_classes_even() -> None:
    known = images(split=False)
    sides = sides_of(known, seed=3)
    assert not set(known.units(sides.train)) & set(known.units(sides.test))
    assert sorted([*sides.train, *sides.test]) == list(range(240))
    assert np.bincount(known.labels[sides.test]).tolist() == [20, 20, 20]
    assert sides_of(known, seed=3).test.tolist() == sides.test.tolist()
    assert sides_of(known, seed=4).test.tolist() != sides.test.tolist()


def test_a_probe_cannot_recognise_a_group_it_never_saw(rng: np.random.Generator) -> None:
    groups = np.repeat(np.arange(60), 8)
    places = rng.normal(size=(60, 90))[groups] + 0.01 * rng.normal(size=(480, 90))
    labels = rng.integers(0, 2, 60)[groups]  # a label is a matter of the group alone
    samples = [Sample(f"{i}", ("x",), group=f"g{g}") for i, g in enumerate(groups)]
    known = Images(samples, places.astype(np.float16), labels, ("a", "b"), [""] * 480)
    (level,) = probe_levels(known, sides_of(known), method="ridge")
    assert level.numbers["accuracy"].value < 0.8
    loose = replace(known, samples=[replace(s, group="") for s in samples])
    sides = sides_of(loose)
    (leaky,) = probe_levels(loose, sides, method="ridge")
    assert leaky.numbers["accuracy"].value == 1
    assert any("without groups" in text for text in sides.warnings)


def test_what_a_reader_must_know_is_told() -> None:
    known = images()
    twin = known.features.copy()
    first, last = known.splits.index("test"), known.splits.index("train")
    twin[first] = twin[last]
    assert sides_of(replace(known, features=twin)).warnings == (
        "test images that equal one learnt from, by their features: 1",
    )
    odd = [s if i else "extra" for i, s in enumerate(known.splits)]
    assert sides_of(replace(known, splits=odd)).warnings[0].endswith("not used: 1")
    more = sides_of(
        replace(known, labels=np.where(known.labels == 2, 1, known.labels), classes=("a", "b"))
    ).warnings
    assert more == ()


def test_leaking_or_missing_classes_are_refused() -> None:
    known = images()
    one = [replace(s, group="same") if i in (0, 30) else s for i, s in enumerate(known.samples)]
    mixed = ["test" if i == 30 else s for i, s in enumerate(known.splits)]
    with pytest.raises(DataError, match=r"groups on two sides .*: 1 .*'same'"):
        sides_of(replace(known, samples=one, splits=mixed))
    gone = [
        "" if k == 1 and s == "train" else s
        for k, s in zip(known.labels, known.splits, strict=True)
    ]
    with pytest.raises(DataError, match="class b has no image to learn from"):
        sides_of(replace(known, splits=gone))
    few = replace(images(n=18, split=False), splits=[""] * 18)
    with pytest.raises(DataError, match=r"class a has 3 groups; .* takes 4"):
        sides_of(few)


# --- few shots ---------------------------------------------------------------------------


def test_draws_have_as_many_of_each_class_and_larger_ones_hold_smaller_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    real = linear.fit

    def spy(method: str, train: Learnt, classes: int, **options: object) -> linear.Linear:
        seen.append((train, options.get("val")))
        return real(method, train, classes, **options)

    monkeypatch.setattr("pathcli.evals.probe.fit", spy)
    known = images()
    levels = probe_levels(known, sides_of(known), shots=[None, 4, 1], draws=3)
    assert [(level.shots, level.images, len(level.fitted)) for level in levels] == [
        (1, 3, 3),
        (4, 12, 3),
        (None, 144, 1),
    ]
    ones, fours = seen[:3], seen[3:6]
    for (small, _), (large, val) in zip(ones, fours, strict=True):
        assert np.bincount(large.labels).tolist() == [4, 4, 4]
        rows = {row.tobytes() for row in large.features}
        assert len(rows) == 12
        assert {row.tobytes() for row in small.features} < rows
        assert val is None
    assert len({large.features.tobytes() for large, _ in fours}) == 3
    assert len(seen[6][1].labels) == 48


def test_no_classifier_changes_with_the_test_part_nor_few_shots_with_validation() -> None:
    known = images()
    sides = sides_of(known)
    mixed = known.features.copy()
    mixed[sides.test] = mixed[sides.test][::-1] * 3
    labels = known.labels.copy()
    labels[sides.test] = labels[sides.test][::-1]
    asked = {"method": "ridge", "shots": [8, None], "draws": 2}
    plain = probe_levels(known, sides, **asked)
    other = probe_levels(replace(known, features=mixed, labels=labels), sides, **asked)
    for a, b in zip(plain, other, strict=True):
        for x, y in zip(a.fitted, b.fitted, strict=True):
            assert (x.weights == y.weights).all()
    mixed = known.features.copy()
    mixed[sides.val] *= 5
    (few, _) = probe_levels(replace(known, features=mixed), sides, **asked)
    assert all(
        (x.weights == y.weights).all() for x, y in zip(few.fitted, plain[0].fitted, strict=True)
    )


def test_numbers_are_means_over_draws_with_their_spread() -> None:
    known = images()
    sides = sides_of(known)
    (level,) = probe_levels(known, sides, shots=[2], draws=4)
    right = [(p.argmax(1) == known.labels[sides.test]).mean() for p in level.chances]
    assert level.numbers["accuracy"].value == pytest.approx(np.mean(right))
    assert level.spread["accuracy"] == pytest.approx(np.std(right, ddof=1))
    assert level.numbers["accuracy"].n == len(set(known.units(sides.test)))
    (row,) = level_table([level])
    assert row["images a class"] == "2"
    assert f"sd\N{NO-BREAK SPACE}{np.std(right, ddof=1):.3f}" in row["accuracy"]
    assert not level_section([level]).charts
    (curve,) = level_section([level, replace(level, shots=None)]).charts
    assert re.findall(r">(2|all)</text>", curve) == ["2", "all"]  # though both have as many


def test_a_small_class_gives_all_it_has() -> None:
    known = images()
    keep = np.flatnonzero(
        (known.labels != 2) | (np.arange(240) % 4 == 0) | (np.array(known.splits) != "train")
    )
    part = Images(
        [known.samples[i] for i in keep],
        known.features[keep],
        known.labels[keep],
        known.classes,
        [known.splits[i] for i in keep],
    )
    (level,) = probe_levels(part, sides_of(part), shots=[40], draws=1)
    train = [k for k, s in zip(part.labels, part.splits, strict=True) if s == "train"]
    assert level.images == 80 + train.count(2) < 120


def test_shots_are_read_from_a_list() -> None:
    assert parse_shots("1, 2,all") == (1, 2, None)
    for text in ("", "1,,2", "many", "-1", "1.5"):
        with pytest.raises(UsageError, match="--shots"):
            parse_shots(text)


@pytest.mark.parametrize("wrong", [{"method": "svm"}, {"shots": [0]}, {"shots": []}, {"draws": 0}])
def test_what_no_probe_can_be_is_refused_before_anything_is_read(wrong: dict) -> None:
    with pytest.raises(UsageError, match=r"--method|--shots"):
        probe("nowhere", None, **wrong)


# --- a data set from end to end ----------------------------------------------------------


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """A folder of 3 colours x 12 groups x 2 images, one of them broken, with labels.csv."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "colours"
    rows = []
    for label, colour in COLOURS.items():
        (folder / label).mkdir(parents=True)
        for i in range(24):
            noise = rng.normal(0, 40, 3) + rng.normal(0, 5, (64, 64, 3))
            pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
            name = f"{label}/{i}.png"
            Image.fromarray(pixels).save(folder / name)
            split = ("train", "train", "val", "test")[i // 2 % 4]
            rows.append([name, label, f"{label}{i // 2}", split])
    (folder / rows[0][0]).write_bytes(b"not an image")
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label", "group", "split"], *rows])
    return folder


@pytest.fixture
def command(fake: type, run: Run) -> Run:
    return lambda *given: run("probe", *given, "--encoder", "fake")


def test_the_command_writes_a_report_and_says_the_same_in_json(
    colours: Path, command: Run, tmp_path: Path, fake: type
) -> None:
    given = [colours, "--shots", "1,4,all", "--draws", "3", "--out", tmp_path / "out"]
    code, text, err = command(*given, "--json")
    assert code == 0, err
    found = json.loads(text)
    page = Path(found["report"])
    assert page.parent.parent == tmp_path / "out"
    assert page.parent.name.startswith("probe-colours-fake-")
    saved = json.loads((page.parent / "report.json").read_text())
    assert saved == {k: v for k, v in found.items() if k != "report"}
    assert found["metrics"]["balanced_accuracy"]["n"] == 9
    assert found["metrics"]["balanced_accuracy"]["value"] > 0.8
    levels = found["provenance"]["levels"]
    assert [(row["shots"], row["draws"]) for row in levels] == [(1, 3), (4, 3), ("all", 1)]
    assert levels[2]["accuracy"]["value"] == found["metrics"]["accuracy"]["value"]
    assert levels[0]["accuracy"]["sd"] > 0
    assert levels[2]["accuracy"]["sd"] is None
    assert sum(found["provenance"]["dropped"].values()) == 1
    text = page.read_text()
    assert "By number of images to learn from" in text
    assert "Their groups (18 and 9) do not overlap" in text
    passes = fake.passes
    code, text, err = command(*given)
    assert code == 0
    assert fake.passes == passes  # features come from the store
    assert "balanced accuracy" in text
    assert "left out: 1" in err
    assert "not for diagnosis" in err


def test_a_second_folder_can_be_the_test(colours: Path, fake: type, store: Store) -> None:
    other = colours.parent / "other"
    for label in COLOURS:
        (other / label).mkdir(parents=True)
        for i in range(20, 24):
            (colours / label / f"{i}.png").rename(other / label / f"{i}.png")
    table = colours / "labels.csv"
    lines = [
        line for line in table.read_text().splitlines() if (colours / line.split(",")[0]).exists()
    ]
    table.write_text("\n".join(["image,label,group,split", *lines]) + "\n")
    found = probe(str(colours), fake(), test=other, method="logistic", store=store)
    assert len(found.scored.labels) == 12
    assert {Path(str(s.images[0])).parent.parent.name for s in found.scored.samples} == {"other"}
    assert found.levels[0].images == 35  # one of the 36 of train is broken
    assert "validation images" in found.scored.lead
    assert "do not overlap" not in found.scored.lead  # the other folder says no groups
    assert f"all of {other} to test on" in found.scored.lead


def test_class_folders_without_groups_are_split_with_a_warning(
    colours: Path, fake: type, store: Store
) -> None:
    (colours / "labels.csv").unlink()
    found = probe(str(colours), fake(), method="ridge", store=store)
    assert len(found.scored.labels) in {17, 18}  # of 71
    assert any("no groups are known" in text for text in found.scored.warnings)
    assert "drawn here" in found.scored.lead
    assert "cross-validation" in found.scored.lead


def test_more_shots_than_images_are_told(colours: Path, fake: type, store: Store) -> None:
    found = probe(str(colours), fake(), shots=[12, 100], draws=1, store=store)
    assert "class blue has 11 images to learn from" in " ".join(found.scored.warnings)


def test_images_that_are_all_broken_are_one_line(colours: Path, fake: type, store: Store) -> None:
    for path in colours.glob("*/*.png"):
        path.write_bytes(path.name.encode())
    with pytest.raises(DataError, match="none of 72 images can be read"):
        probe(str(colours), fake(), store=store)


def test_missing_weights_are_missed_before_an_image_is_read(
    colours: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.evals.probe.embed_images", lambda *_: pytest.fail("too late"))
    given = ("--encoder", "open_clip:ViT-B-32", "--checkpoint", "gone.pt")
    code, _, err = run("probe", colours, *given)
    assert code == 5, err
    assert "gone.pt" in err


@pytest.mark.parametrize(
    ("given", "code", "word"),
    [
        (["nowhere"], 2, "nowhere"),
        (["lc-lung"], 2, "--data"),
        (["lc-lung", "--data", "nowhere"], 5, "no such folder"),
        (["colours", "--method", "svm"], 2, "--method"),
        (["colours", "--shots", "none"], 2, "--shots"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_a_code(
    colours: Path, command: Run, given: list[str], code: int, word: str
) -> None:
    found, out, err = command(*given)
    assert found == code
    assert word in err
    assert out == ""
