"""Splits drawn here, splits of others, and the leaks in them."""

import csv
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pathcli.errors import DataError, UsageError
from pathcli.mil.benchmarks import benchmark
from pathcli.mil.splits import Split, check_leaks, k_fold, monte_carlo, official, read_split
from pathcli.mil.tables import LabelTable, Row, label_table


def cohort(patients: list[int], *, slides: int = 1, sites: int = 0) -> LabelTable:
    """Return a table of `patients[c]` patients of class c with `slides` slides each."""
    labels = [str(c) for c, n in enumerate(patients) for _ in range(n)]
    return label_table(
        [
            Row(f"p{i}", f"p{i}s{j}", label, f"site{i % sites}" if sites else None)
            for i, label in enumerate(labels)
            for j in range(slides)
        ],
        source="cohort",
    )


TABLE = cohort([12, 8])
IDS = [row.slide for row in TABLE.rows]
PARTS = {
    "train": [*IDS[:8], *IDS[12:16]],
    "val": [*IDS[8:10], *IDS[16:18]],
    "test": [*IDS[10:12], *IDS[18:]],
}


def patients(split: Split, table: LabelTable) -> dict[str, Counter[str | None]]:
    """Return how many patients of each label every part has; labels are the highest."""
    label: dict[str, str] = {}
    for row in table.rows:
        label[row.case] = max(label.get(row.case, ""), row.label or "")
    return {
        part: Counter(label[case] for case in {table.by_slide[s].case for s in slides})
        for part, slides in split.parts().items()
    }


def check(split: Split, table: LabelTable, by: str = "patient") -> None:
    """Check what holds for every drawn split."""
    parts = split.parts()
    everything = [slide for slides in parts.values() for slide in slides]
    assert sorted(everything) == sorted(row.slide for row in table.rows)
    assert check_leaks(split, table, allow=False, by=by) == ()  # type: ignore[arg-type]
    for slides in parts.values():
        assert {table.by_slide[s].label for s in slides} == set(table.classes)


@st.composite
def cohorts(draw: st.DrawFn) -> LabelTable:
    counts = draw(st.lists(st.integers(4, 25), min_size=2, max_size=4))
    rows = []
    for c, n in enumerate(counts):
        for i in range(n):
            labels = [str(c), *draw(st.lists(st.sampled_from(range(c + 1)).map(str), max_size=2))]
            rows += [Row(f"p{c}-{i}", f"p{c}-{i}s{j}", x) for j, x in enumerate(labels)]
    return label_table(draw(st.permutations(rows)), source="drawn")


@settings(max_examples=60)
@given(cohorts(), st.integers(0, 9), st.floats(0.05, 0.5), st.floats(0.05, 0.5))
def test_random_splits_keep_patients_whole_and_classes_present(
    table: LabelTable, seed: int, val: float, test: float
) -> None:
    split = monte_carlo(table, seed=seed, val=val, test=test)
    check(split, table)
    found = patients(split, table)
    for label in table.classes:
        n, tested = sum(part[label] for part in found.values()), found["test"][label]
        assert abs(tested - min(max(test * n, 1), n - 2)) < 1
        rest = n - tested
        assert abs(found["val"][label] - min(max(val * rest, 1), rest - 1)) < 1


@settings(max_examples=40)
@given(cohorts(), st.integers(0, 9), st.integers(2, 4))
def test_every_slide_is_tested_in_one_fold(table: LabelTable, seed: int, folds: int) -> None:
    made = [k_fold(table, folds=folds, fold=i, seed=seed) for i in range(folds)]
    for split in made:
        check(split, table)
    tested = [slide for split in made for slide in split.test]
    assert sorted(tested) == sorted(row.slide for row in table.rows)
    for label in table.classes:
        shares = [patients(split, table)["test"][label] for split in made]
        assert max(shares) - min(shares) <= 1


@settings(max_examples=30)
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing_and_the_seed_does(
    table: LabelTable, order: random.Random
) -> None:
    rows = list(table.rows)
    order.shuffle(rows)
    shuffled = label_table(rows, source="drawn")
    assert monte_carlo(shuffled, seed=3) == monte_carlo(table, seed=3)
    assert k_fold(shuffled, folds=3, fold=1, seed=3) == k_fold(table, folds=3, fold=1, seed=3)
    assume(len(table.rows) > 40)
    assert len({monte_carlo(table, seed=seed).test for seed in range(5)}) > 1


@settings(max_examples=15)
@given(st.integers(6, 12), st.integers(0, 5), st.integers(2, 3))
def test_sites_stay_whole_when_asked_for(sites: int, seed: int, folds: int) -> None:
    table = cohort([40, 30], slides=2, sites=sites)
    check(monte_carlo(table, seed=seed, by="site"), table, "site")
    made = [k_fold(table, folds=folds, fold=i, seed=seed, by="site") for i in range(folds)]
    for split in made:
        check(split, table, "site")
    assert sorted(s for split in made for s in split.test) == sorted(table.by_slide)


def test_sites_of_unlike_size_and_mix_are_dealt_evenly() -> None:
    mix = {"a": (30, 10), "b": (10, 30), "c": (20, 20), "d": (25, 5), "e": (5, 25), "f": (10, 10)}
    rows = [
        Row(f"{site}{c}{i}", f"{site}{c}{i}", str(c), site)
        for site, counts in mix.items()
        for c, n in enumerate(counts)
        for i in range(n)
    ]
    table = label_table(rows, source="sites")
    found = [k_fold(table, folds=2, fold=i, seed=0, by="site") for i in (0, 1)]
    shares = [patients(split, table)["test"] for split in found]
    # of 100 + 100 patients the best halves are a + b + f and c + d + e, worked by hand
    assert shares == [{"0": 50, "1": 50}] * 2


def test_mixed_patients_count_with_their_highest_class() -> None:
    rows = [Row(f"p{i}", f"p{i}{x}", x) for i in range(9) for x in "01"]
    rows += [Row(f"n{i}", f"n{i}", "0") for i in range(9)]
    table = label_table(rows, source="mixed")
    assert patients(monte_carlo(table, seed=0, test=1 / 3), table)["test"] == {"0": 3, "1": 3}


def test_three_patients_of_a_class_suffice_and_two_do_not() -> None:
    table = cohort([20, 3])
    for seed in range(5):
        found = patients(monte_carlo(table, seed=seed), table)
        assert [part["1"] for part in found.values()] == [1, 1, 1]
    with pytest.raises(DataError, match=r"no slide of class '1' in \w+; it has 2 patients in all"):
        monte_carlo(cohort([20, 2]), seed=0)
    with pytest.raises(DataError, match="no slide of class '1' in test; it has 3 patients"):
        [k_fold(table, folds=5, fold=fold, seed=0) for fold in range(5)]


def test_official_splits_keep_the_test_set_and_draw_only_the_rest() -> None:
    table = benchmark("camelyon16").need_table()
    split = official(table, seed=1)
    check(split, table)
    assert len(split.test) == 129
    assert all(slide.startswith("test_") for slide in split.test)
    assert len({official(table, seed=seed).val for seed in range(1, 6)}) == 5
    found = patients(split, table)
    for label in table.classes:
        rest = found["train"][label] + found["val"][label]
        assert abs(found["val"][label] - 0.1 * rest) < 1


def test_official_splits_take_a_validation_set_as_given() -> None:
    rows = [
        Row(row.case, row.slide, row.label, None, part)
        for row in TABLE.rows
        for part in PARTS
        if row.slide in PARTS[part]
    ]
    split = official(label_table(rows, source="marked"), seed=5)
    assert {part: set(slides) for part, slides in split.parts().items()} == {
        part: set(slides) for part, slides in PARTS.items()
    }
    with pytest.raises(DataError, match="no row is marked as test"):
        official(TABLE, seed=0)


def test_impossible_calls_are_usage_errors() -> None:
    for bad in ({"val": 0.0}, {"test": 1.0}, {"seed": -1}):
        with pytest.raises(UsageError, match="a share between 0 and 1"):
            monte_carlo(TABLE, **{"seed": 0} | bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="fold 5 of 5"):
        k_fold(TABLE, folds=5, fold=5, seed=0)
    with pytest.raises(UsageError, match="fold 0 of 1"):
        k_fold(TABLE, folds=1, fold=0, seed=0)
    with pytest.raises(DataError, match="p0s0 has no site"):
        monte_carlo(TABLE, seed=0, by="site")
    with pytest.raises(DataError, match="5 folds need as many sites, there are 3"):
        k_fold(cohort([12, 8], sites=3), folds=5, fold=0, seed=0, by="site")
    torn = label_table([*cohort([12, 8], sites=4).rows, Row("p0", "x", "0", "site1")], source="t")
    with pytest.raises(DataError, match="t: patient p0 has slides of two sites"):
        monte_carlo(torn, seed=0, by="site")


# --- leaks -------------------------------------------------------------------------------

LEAKY = cohort([6, 6], slides=2, sites=3)


def test_a_patient_in_test_and_elsewhere_is_refused_unless_allowed() -> None:
    split = Split(("p0s0", "p1s0"), ("p2s0", "p1s1"), ("p0s1", "p2s1", "p3s0"), "theirs")
    with pytest.raises(
        DataError, match=r"theirs: patients in test .*: 2 \(p0, p2\); .*data.allow_leak=true"
    ):
        check_leaks(split, LEAKY, allow=False)
    assert check_leaks(split, LEAKY, allow=True) == (
        "patients in test and in train or val: 2 (p0, p2)",
        "patients in both train and val: 1 (p1)",
    )


def test_sites_may_be_shared_unless_sites_were_to_be_kept() -> None:
    split = Split(("p0s0",), ("p1s0",), ("p3s0",), "shared site")  # p0 and p3 are of site0
    assert check_leaks(split, LEAKY, allow=False) == ()
    with pytest.raises(DataError, match=r"sites in test and in train or val: 1 \(site0\)"):
        check_leaks(split, LEAKY, allow=False, by="site")


# --- read --------------------------------------------------------------------------------


def as_clam(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *PARTS])
        for i in range(max(map(len, PARTS.values()))):
            writer.writerow([i, *(s[i] if i < len(s) else "" for s in PARTS.values())])


def as_clam_bool(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *PARTS])
        writer.writerows([i, *(i in s for s in PARTS.values())] for i in IDS)


def as_transmil(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", *(name for part in PARTS for name in (part, f"{part}_label"))])
        for i in range(max(map(len, PARTS.values()))):
            row = [(s[i], "1.0") if i < len(s) else ("", "") for s in PARTS.values()]
            writer.writerow([i, *(cell for pair in row for cell in pair)])


def as_acmil(path: Path) -> None:
    path.write_text(json.dumps({f"{part}_names": slides for part, slides in PARTS.items()}))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("splits_0.csv", as_clam),
        ("splits_0_bool.csv", as_clam_bool),
        ("fold0.csv", as_transmil),
        ("split_1.json", as_acmil),
    ],
)
def test_every_published_form_gives_the_same_split(name: str, write: object) -> None:
    write(Path(name))  # type: ignore[operator]
    split = read_split(name, TABLE)
    assert split == Split(*(tuple(sorted(PARTS[part])) for part in PARTS), name)
    assert read_split(name, TABLE, fold=1) == read_split(name, TABLE)  # it has but one


def test_stamps_folds_get_their_validation_slides_from_their_training_patients() -> None:
    table = cohort([10, 10], slides=2)
    cases = list(dict.fromkeys(row.case for row in table.rows))
    folds = [{"train_patients": cases[i::2], "test_patients": cases[1 - i :: 2]} for i in (0, 1)]
    Path("splits.json").write_text(json.dumps({"splits": folds}))
    with pytest.raises(UsageError, match="fold 2 was asked for, the file has 2"):
        read_split("splits.json", table, fold=2)
    for i, fold in enumerate(folds):
        split = read_split("splits.json", table, fold=i, val=0.2, seed=4)
        check(split, table)
        assert {table.by_slide[s].case for s in split.test} == set(fold["test_patients"])
        assert patients(split, table)["val"] == {"0": 1, "1": 1}
        assert split.name == f"splits.json, fold {i} of 2"
    with pytest.raises(DataError, match=r"patients that cohort does not have: 1 \(p19\)"):
        read_split("splits.json", cohort([10, 9], slides=2))


def test_slides_only_one_side_knows_are_told() -> None:
    as_acmil(Path("split.json"))
    more = cohort([12, 10])
    assert read_split("split.json", more).warnings == (
        "slides of cohort that the split leaves out: 2 (p20s0, p21s0)",
    )
    with pytest.raises(
        DataError,
        match=r"split.json: slides that cohort does not have: 4 \(p16s0, p17s0, p18s0 and 1",
    ):
        read_split("split.json", cohort([12, 4]))


def test_faulty_split_files_are_data_errors() -> None:
    Path("twice.csv").write_text("train,val,test\np0s0,p1s0,p0s0.svs\n")
    with pytest.raises(DataError, match=r"slides listed twice: 1 \(p0s0\)"):
        read_split("twice.csv", TABLE)
    Path("one.csv").write_text("train,val,test\np0s0,p1s0,p12s0\n")
    with pytest.raises(DataError, match=r"one.csv: no slide of class '1' in train; it has 8"):
        read_split("one.csv", TABLE)
    Path("no.csv").write_text("train,test\np0s0,p1s0\n")
    with pytest.raises(DataError, match="no column 'val'"):
        read_split("no.csv", TABLE)
    for text in ("[1, 2]", "{", "7", '{"splits": [1]}', '{"train_names": "p0s0"}'):
        Path("x.json").write_text(text)
        with pytest.raises(DataError, match=r"x.json: neither ACMIL's split nor STAMP's"):
            read_split("x.json", TABLE)
    with pytest.raises(DataError, match="no such file"):
        read_split("nowhere.json", TABLE)


@pytest.mark.data
def test_the_published_camelyon16_fold_shares_one_patient_between_train_and_val(
    data: Path,
) -> None:
    table = benchmark("camelyon16").need_table()
    split = read_split(data / "camelyon16" / "transmil_fold0.csv", table)
    assert [len(slides) for slides in split.parts().values()] == [216, 54, 129]
    assert split.warnings == ()
    assert check_leaks(split, table, allow=False) == (
        "patients in both train and val: 1 (patient_198)",
    )
