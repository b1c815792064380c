import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathcli.data.packed import Packed, pack
from pathcli.data.pairs import PairData, Pictures, split
from pathcli.errors import DataError, UsageError
from pathcli.recipe import Recipe, _Check
from pathcli.types import Member, Region, Sample

WORDS = ["gland", "mucosa", "stroma", "nuclei", "mitosis", "necrosis", "oedema", "fibrosis"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def table(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def rows(count: int = 60, *, groups: int = 0) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for i in range(count):
        caption = f"{WORDS[i % 8]} and {WORDS[i // 8 % 8]} number {i}"
        found.append({"image": f"{i}.png", "caption": caption})
        if groups:
            found[-1]["patient"] = f"p{i % groups}"
    return found


def names(pairs: object) -> list[str]:
    return [sample.name for sample in pairs]  # type: ignore[attr-defined]


def test_the_order_of_rows_changes_nothing(images: Path, tmp_path: Path) -> None:
    made = []
    for seed in range(3):
        shuffled = rows(groups=7)
        np.random.default_rng(seed).shuffle(shuffled)  # type: ignore[arg-type]
        path = table(tmp_path / f"{seed}.jsonl", shuffled)
        made.append(PairData(source=path, images=images, val=0.2).corpus())
    for other in made[1:]:
        assert other.digest == made[0].digest
        assert list(other.train) == list(made[0].train)
        assert list(other.val) == list(made[0].val)
    assert sorted(names(made[0].train) + names(made[0].val)) == sorted(
        f"{i}.png" for i in range(60)
    )
    changed = rows(groups=7)
    changed[3]["caption"] = "other words"
    path = table(tmp_path / "changed.jsonl", changed)
    assert PairData(source=path, images=images).corpus().digest != made[0].digest


def test_the_digest_does_not_depend_on_where_the_data_lie(images: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", rows(5))
    first = PairData(source=path, images=images).corpus()
    moved = images.rename(tmp_path / "moved")
    second = PairData(source=path, images=moved).corpus()
    assert first.digest == second.digest
    assert names(first.train) == names(second.train)


@pytest.mark.parametrize("val", [0.01, 0.1, 0.3, 0.5])
def test_a_group_is_never_on_both_sides(images: Path, tmp_path: Path, val: float) -> None:
    path = table(tmp_path / "t.jsonl", rows(groups=20))
    corpus = PairData(source=path, images=images, val=val).corpus()
    sides = [{s.group for s in side} for side in (corpus.train, corpus.val)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 20
    assert len(corpus.val) == max(3, round(60 * val) // 3 * 3)  # groups of three
    assert len(corpus.train) + len(corpus.val) == 60


def test_an_image_with_several_captions_is_never_on_both_sides(
    images: Path, tmp_path: Path
) -> None:
    twice = rows() + [row | {"caption": f"{row['caption']} again"} for row in rows()]
    path = table(tmp_path / "t.jsonl", twice)
    corpus = PairData(source=path, images=images, val=0.25).corpus()
    assert (len(corpus.train), len(corpus.val)) == (90, 30)
    assert not {*names(corpus.train)} & {*names(corpus.val)}
    assert "no pair has a group" in corpus.warnings[0]


def test_an_image_of_two_groups_is_not_validated_on(images: Path, tmp_path: Path) -> None:
    twice = rows(groups=20)
    twice += [row | {"patient": "all", "caption": f"{row['caption']} again"} for row in twice]
    path = table(tmp_path / "t.jsonl", twice)
    corpus = PairData(source=path, images=images, val=0.1).corpus()
    assert not corpus.val
    assert len(corpus.train) == 108
    assert corpus.dropped == {"the image is in train under another group": 12}


def test_splitting_by_hand() -> None:
    groups = np.array([5, 5, 9, 1, 9, 9], np.uint64)  # sizes: 1 -> 1, 5 -> 2, 9 -> 3
    images = np.arange(6, dtype=np.uint64)
    for val, expected in ((0.0, []), (0.01, [3]), (0.34, [3]), (0.5, [0, 1, 3]), (0.99, [0, 1, 3])):
        train, held, torn = split(groups, images, val)
        assert held.tolist() == expected
        assert sorted([*train.tolist(), *expected]) == [*range(6)]
        assert torn == 0
    large = np.array([1, 1, 1, 2, 2, 2, 2], np.uint64)
    assert split(large, np.arange(7, dtype=np.uint64), 0.1)[1].tolist() == [0, 1, 2]
    one = np.ones(4, np.uint64)
    assert split(one, np.arange(4, dtype=np.uint64), 0.5)[1].tolist() == []


def test_one_group_alone_is_trained_on_and_said(images: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", rows(groups=1))
    corpus = PairData(source=path, images=images, val=0.2).corpus()
    assert (len(corpus.train), len(corpus.val)) == (60, 0)
    assert corpus.warnings == ("nothing is validated on: all pairs are of one group",)


def test_what_is_left_out_is_counted_and_said(images: Path, tmp_path: Path) -> None:
    more = [
        *rows(20, groups=4),
        {"image": "1.png", "caption": "", "patient": "p1"},
        {"image": "./2.png", "caption": rows()[2]["caption"], "patient": "p2"},
        {"image": "gone.png", "caption": "a caption of more words", "patient": "p2"},
        {"image": "3.png", "caption": "too short", "patient": "p3"},
        {"image": ["3.png", "4.png"], "caption": "both of these are glands", "patient": "p3"},
    ]
    path = table(tmp_path / "t.jsonl", more)
    corpus = PairData(source=path, images=images, min_words=4).corpus()
    assert len(corpus.train) + len(corpus.val) == 20
    assert corpus.dropped == {
        "no caption": 1,
        "the same pair again": 1,
        "no such image file": 1,
        "fewer than 4 words": 1,
        "several images": 1,
    }
    assert corpus.warnings[0].startswith("5 of 25 rows left out: ")
    assert "no such image file 1 (e.g. gone.png)" in corpus.warnings[0]


def test_nothing_left_is_an_error_that_says_where_was_looked(tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", rows(5))
    with pytest.raises(
        DataError, match=rf"no such image file 5 .*below {tmp_path}: give data.images"
    ):
        PairData(source=path).corpus()


def test_a_limit_takes_the_same_pairs_whatever_the_order(images: Path, tmp_path: Path) -> None:
    taken = []
    for made in (rows(), rows()[::-1]):
        path = table(tmp_path / "t.jsonl", made)
        corpus = PairData(source=path, images=images, limit=11, val=0).corpus()
        assert (len(corpus.train), len(corpus.val)) == (11, 0)
        taken.append(names(corpus.train))
    assert taken[0] == taken[1]
    assert taken[0] != sorted(taken[0])


def test_a_recipe_can_set_every_argument(images: Path, tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", rows(5))
    given = {
        "kind": "pairs",
        "source": str(path),
        "images": str(images),
        "format": "manifest",
        "keep": {"caption": ["*"]},
        "val": 0.5,
        "limit": 4,
        "min_words": 1,
        "max_broken": 0.1,
    }
    check = _Check(Recipe("x", {"version": 1, "task": "mil"}))
    check.faults.clear()
    data = check._section("data", "CorpusData", given, PairData)
    assert check.faults == []
    assert len(data.corpus().train) + len(data.corpus().val) == 4
    check._section(
        "data", "CorpusData", given | {"format": "csv", "keep": {"caption": "x"}}, PairData
    )
    assert [fault.split(":")[0] for fault in check.faults] == ["data.format", "data.keep"]


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    for wrong in ({"val": 1.0}, {"max_broken": -0.1}, {"limit": 0}, {"min_words": -1}):
        with pytest.raises(UsageError, match=f"data.*{next(iter(wrong))}"):
            PairData(source=tmp_path, **wrong)  # type: ignore[arg-type]


def test_packed_samples_come_back_equal() -> None:
    samples = [
        Sample("a", ("/x/y/a.png",), "caption \N{GREEK SMALL LETTER MU} \ud800", label="l"),
        Sample("b", (Region("/s/w.svs", (32, 64), 672),), "b", group="g"),
        Sample("c", (Member("/t/0.tar", 512, 99, "n/c.png"), "rel.png"), "c", ("q", "r")),
    ]
    places: dict[str, int] = {}
    blob, ends = bytearray(), []
    for sample in samples:
        blob += pack(sample, places)
        ends.append(len(blob))
    packed = Packed(blob, np.array(ends), tuple(places), np.array([2, 0, 1, 0]))
    expected = [samples[i] for i in (2, 0, 1, 0)]
    assert list(packed) == expected
    assert list(packed[1:3]) == expected[1:3]
    assert packed[-1] == samples[0]
    assert list(pickle.loads(pickle.dumps(packed))) == expected  # noqa: S301 - our own
    with pytest.raises(IndexError):
        packed[4]


def test_a_table_of_many_rows_is_held_in_little_more_than_its_text(tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "W.svs").touch()
    text = "words " * 50
    records = [{"wsi_id": "W", "position": [i, 7], "caption": text} for i in range(5_000)]
    path = table(tmp_path / "x.jsonl", records)
    del records
    tracemalloc.start()
    try:
        corpus = PairData(source=path, val=0).corpus()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(corpus.train) == 5_000
    assert held < 500 * 5_000
    assert peak < 700 * 5_000


# --- broken images -----------------------------------------------------------------------


@pytest.fixture
def corpus_of_broken(images: Path, tmp_path: Path) -> PairData:
    for number in (3, 17, 40):
        (images / f"{number}.png").write_bytes(b"\x89PNG broken")
    path = table(tmp_path / "t.jsonl", rows())
    return PairData(source=path, images=images, val=0, max_broken=0.2)


def test_another_pair_stands_in_for_a_broken_image(
    corpus_of_broken: PairData, caplog: pytest.LogCaptureFixture
) -> None:
    train = corpus_of_broken.corpus().train
    pictures = corpus_of_broken.pictures(train)
    with caplog.at_level(logging.WARNING, "pathcli"):
        seen = [pictures(sample) for _ in range(2) for sample in train]
    for sample, pixels in seen:
        assert pixels[0, 0].tolist() == [int(sample.name.removesuffix(".png")), 0, 0]
        assert sample.answer.endswith(f"number {sample.name.removesuffix('.png')}")
    replaced = [a.name for (a, _), b in zip(seen[:60], train, strict=True) if a != b]
    assert len(replaced) == 3
    assert not {*replaced} & {"3.png", "17.png", "40.png"}
    told = sorted(
        record.message.split(": ")[1].split("/")[-1]
        for record in caplog.records
        if record.levelname == "WARNING"
    )
    assert told == ["17.png", "3.png", "40.png"]
    assert pictures.broken >= 6
    assert pictures.read == 120 + pictures.broken
    resumed = corpus_of_broken.pictures(train)
    assert [resumed(s)[0] for s in train[30:]] == [s for s, _ in seen[30:60]]


def test_too_many_broken_images_stop_the_work(corpus_of_broken: PairData, images: Path) -> None:
    train = corpus_of_broken.corpus().train
    strict = Pictures(train, max_broken=0.01)
    with pytest.raises(DataError, match=r"\.png: .*more than data\.max_broken=0\.01; mend"):
        list(map(strict, train))
    for path in images.iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no such file; 13 of 13 images read are broken"):
        corpus_of_broken.pictures(train)(train[0])
