"""A slide's answer: which tiles are read, what they say together, and what is shown of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
from cohorts import RING, paint, quick, table
from PIL import Image
from shapely.geometry import box, shape

from pathcli import registry
from pathcli.cli.ask_slides import folder_name
from pathcli.data.images import read_image
from pathcli.errors import UsageError
from pathcli.evals import evidence, tile_sheet
from pathcli.mil.predict import predict
from pathcli.recipe import load_recipe
from pathcli.runs import train
from pathcli.slides.discovery import Found
from pathcli.slides.readers import open_slide
from pathcli.slides.tiling import tile, tile_spec
from pathcli.store import Store
from pathcli.types import Region, Sample
from pathcli.vlm.responders import Decoding
from pathcli.vlm.slide import SlideAnswer, ask_slide
from pathcli.vlm.slide_tiles import Attention, choose, nearest

WORDS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
SIDE, ACROSS, DOWN = 64, 8, 6
SPEC = tile_spec(SIDE, 0.5, tissue="none")
RED = (192, 128)
YES_NO = ("yes", "no")


class Colours(fakes.Colours):
    """Finds every colour in a word that names none."""

    unknown = (1, 1, 1)


class Painter:
    """Sees the strongest colour of a tile; yes is as probable as its share is large."""

    name, digest, scope, batch, temperature = "painter", "0123456789abcdef", "paint", 5, None
    decoding = Decoding()

    def __init__(self, *, says: bool = True) -> None:
        self.says, self.read = says, list[Region]()

    def prompt(self, sample: Sample) -> str:
        return sample.turns[-1]

    def answer(self, samples: Sequence[Sample], decoding: Any = None) -> Iterator[str]:
        for sample in samples:
            colour = max(WORDS, key=self.shares(sample).get)  # type: ignore[arg-type]
            if sample.turns[-1].startswith("What"):
                yield f"{colour}."
            else:
                yield "Yes." if colour in sample.turns[-1] else "no"

    def likelihoods(self, samples: Sequence[Sample], options: Any) -> list[np.ndarray] | None:
        if not self.says:
            return None
        found = []
        for sample, some in zip(samples, options, strict=True):
            shares = self.shares(sample)
            if tuple(some) == YES_NO:
                yes = next((shares[w] for w in WORDS if w in sample.turns[-1]), 0.5)
                found.append(np.log([yes, 1 - yes]))
            else:
                found.append(np.log([shares[option.split()[-1]] for option in some]))
        return found

    def shares(self, sample: Sample) -> dict[str, float]:
        (ref,) = sample.images
        assert isinstance(ref, Region)
        self.read.append(ref)
        assert len(sample.images) == 1
        mean = np.clip(read_image(ref).mean((0, 1)), 1, None)
        return dict(zip(WORDS, (mean / mean.sum()).tolist(), strict=True))


class Wary(Painter):
    """Knows only tiles whose corner is at the left of `until`."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def unfamiliar(self, images: Sequence[Region]) -> list[Region]:
        return [ref for ref in images if ref.xy[0] >= self.until]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose tiles are greyish, one of them red."""
    colours = np.random.default_rng(3).integers(90, 150, (DOWN, ACROSS, 3)).astype(np.uint8)
    colours[RED[1] // SIDE, RED[0] // SIDE] = (230, 10, 10)
    folder = tmp_path_factory.mktemp("board")
    return synthetic.slide(folder / "a.svs", colours.repeat(SIDE, 0).repeat(SIDE, 1))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that keeps the board's features."""
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def asked(board: Path, kept: Store) -> Any:
    def ask(question: str, responder: Any = None, **how: Any) -> SlideAnswer:
        how = {"encoder": Colours(), "store": kept, "spec": SPEC, "budget": 8} | how
        return ask_slide(board, question, responder or Painter(), **how)

    return ask


# --- which tiles are read ----------------------------------------------------------------


def clusters(sizes: Sequence[int]) -> np.ndarray:
    """Return unit rows float32: groups of so many near the axes, in turn."""
    rng = np.random.default_rng(0)
    rows = np.eye(len(sizes)).repeat(sizes, 0) + rng.normal(size=(sum(sizes), len(sizes))) * 0.01
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_half_are_the_nearest_and_half_are_of_every_kind() -> None:
    rows = clusters([20, 200, 3, 1])
    kind = np.repeat([0, 1, 2, 3], [20, 200, 3, 1])
    order = np.r_[np.arange(20), 20, 220, 223, np.arange(21, 220), 221, 222]
    picked = choose({"similar": order}, rows.__getitem__, 8)
    similar = [at for at, why in picked.items() if why == "similar"]
    assert similar == [0, 20, 220, 223]  # those between are near-duplicates of the first
    spread = [at for at, why in picked.items() if why == "spread"]
    assert len(picked) == 8
    assert {0, 1, 2} <= set(kind[spread])  # the one of the fourth kind is taken


def test_near_duplicates_come_where_nothing_else_is_left() -> None:
    rows = clusters([50, 5])
    order = np.r_[np.arange(50)[::-1], np.arange(50, 55)]  # the second kind is out of reach
    picked = choose({"similar": order}, rows.__getitem__, 6)
    assert [at for at, why in picked.items() if why == "similar"] == [49, 48, 47]
    order = np.r_[np.arange(30, 50)[::-1], np.arange(50, 55), np.arange(30)]
    picked = choose({"similar": order}, rows.__getitem__, 6)
    assert [at for at, why in picked.items() if why == "similar"] == [49, 50, 48]
    assert list(picked.values()) == ["similar"] * 3 + ["spread"] * 3


def test_attention_has_an_equal_part() -> None:
    rows = clusters([20, 20, 20])
    ranked = {"similar": np.arange(60), "attended": np.arange(60)[::-1]}
    picked = choose(ranked, rows.__getitem__, 10)
    assert list(picked.values()) == ["similar"] * 4 + ["attended"] * 3 + ["spread"] * 3
    assert [list(picked)[at] for at in (0, 4)] == [0, 59]


@pytest.mark.parametrize("budget", [1, 2, 7, 12, 500])
def test_a_budget_is_kept_and_no_tile_is_read_twice(budget: int) -> None:
    same = np.ones((12, 3), np.float32)
    picked = choose({"similar": np.arange(12)}, same.__getitem__, budget)
    assert len(picked) == min(budget, 12)
    assert set(picked) <= set(range(12))


def test_attention_is_that_of_the_nearest_tile(board: Path, kept: Store) -> None:
    ours = tile(board, spec=SPEC, store=kept).tiles
    coarse = tile_spec(2 * SIDE, 0.5, tissue="none")
    theirs = tile(board, spec=coarse, store=kept).tiles
    values = np.arange(len(theirs)) / 10
    looked = nearest(Attention(theirs, values), ours)
    wanted = ours.xy // (2 * SIDE) @ [1, ACROSS // 2] / 10
    assert looked.tolist() == pytest.approx(wanted.tolist())
    with pytest.raises(UsageError, match="does not fit"):
        nearest(Attention(theirs, values[1:]), ours)


# --- a slide -----------------------------------------------------------------------------


def test_the_red_tile_says_yes_and_comes_first(asked: Any, board: Path) -> None:
    painter = Painter()
    steps: list[tuple[str, int, int]] = []

    def told(name: str) -> Any:
        return lambda done, of: steps.append((name, done, of))

    found = asked("is there red?", painter, progress=told)
    first = found.tiles[0]
    assert (found.text, found.abstained, found.confidence) == ("yes", False, None)
    assert (first.x0, first.y0, first.side0) == (*RED, SIDE)
    assert first.chosen == "similar"
    assert first.similarity > 0.99
    assert first.probability > 0.9
    chances = [read.probability for read in found.tiles]
    assert chances == sorted(chances, reverse=True)
    assert len({(t.x0, t.y0) for t in found.tiles}) == len(painter.read) == 8
    assert {ref.slide for ref in painter.read} == {str(board)}
    assert steps[-3:] == [("tiles read", 0, 8), ("tiles read", 5, 8), ("tiles read", 8, 8)]
    assert "no rule for slides was fitted" in found.rule
    assert asked("is there green?").text == "no"


def test_the_same_question_has_the_same_answer_and_makes_no_features(asked: Any) -> None:
    first = asked("is there red?")
    before = Colours.passes
    again = asked("is there red?")
    assert Colours.passes == before
    assert replace(again, seconds={}) == replace(first, seconds={})
    assert again.seconds["embed"] == 0


def test_a_model_that_tells_no_probabilities_is_read_by_its_words(asked: Any) -> None:
    found = asked("is there red?", Painter(says=False))
    assert found.text == "yes"
    assert {t.probability for t in found.tiles} == {0.0, 1.0}
    assert {t.answer for t in found.tiles} == {"yes", "no"}


def test_choices_and_open_questions_count_tiles(asked: Any) -> None:
    found = asked("Which? A. red B. blue", budget=500)
    assert len(found.tiles) == ACROSS * DOWN
    assert sum(found.scores.values()) == pytest.approx(1)
    assert next(iter(found.scores)) == found.text == found.tiles[0].answer
    open_ = asked("What colour?", budget=500)
    counts = {name: round(share * ACROSS * DOWN) for name, share in open_.scores.items()}
    assert sum(counts.values()) == ACROSS * DOWN
    assert open_.text.startswith(f"{next(iter(counts))} ({max(counts.values())} of 48 tiles); ")
    assert open_.tiles[0].answer == f"{next(iter(counts))}."


def test_what_must_hold_of_all_is_looked_for_where_it_fails(asked: Any) -> None:
    nearest_ = asked("is there normal red?").tiles
    least = asked("is all of it normal red?").tiles
    assert max(t.similarity for t in nearest_ if t.chosen == "similar") > 0.99
    assert max(t.similarity for t in least if t.chosen == "similar") < 0.7


def test_a_slide_is_not_answered_where_most_tiles_are_unknown(asked: Any) -> None:
    more = Wary(SIDE * (ACROSS // 2 + 1))
    found = asked("is there red?", more, budget=500)
    assert not found.abstained
    assert len(more.read) == len(set(more.read)) == (ACROSS // 2 + 1) * DOWN
    unread = [t for t in found.tiles if not t.answer]
    assert {t.familiar for t in unread} == {False}
    assert found.tiles[-len(unread) :] == tuple(unread)
    half = Wary(SIDE * (ACROSS // 2))
    found = asked("is there red?", half, budget=500)
    assert (found.abstained, found.confidence, found.scores) == (True, None, {})
    assert found.text == "outside what this model was trained on"
    assert "24 of 48 tiles chosen, half or more, are unlike" in found.rule
    assert not half.read


def test_what_cannot_be_asked_is_refused(asked: Any) -> None:
    with pytest.raises(UsageError, match="nothing is asked"):
        asked("  ")
    with pytest.raises(UsageError, match="at least 1 tile"):
        asked("is there red?", budget=0)
    with pytest.raises(UsageError, match="no text tower"):
        asked("is there red?", encoder=fakes.MeanColour())


def test_a_run_s_attention_chooses_tiles(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILTIN["encoder"], "fake", "cohorts:Contrast")
    (tmp_path / "slides").mkdir()
    rows = [(f"p{i}", f"s{i}", ("normal", "tumor")[i % 2]) for i in range(6)]
    for i in range(6):
        paint(tmp_path / "slides" / f"s{i}.tif", RING if i % 2 else None, seed=i)
    given = [f"data.labels={table(tmp_path / 'labels.csv', rows)}"]
    given += [f"data.slides={tmp_path / 'slides'}", "data.val=0.3", *quick(epochs=1)]
    train(load_recipe("mil-abmil", given), out=tmp_path / "runs", store=store)
    run, slide = tmp_path / "runs" / "mil-abmil" / "seed-1", tmp_path / "slides" / "s1.tif"
    looked = evidence.attention_of(run, slide, store=store, device="cpu")
    drawn = predict(run, slide, store=store, device="cpu", out=tmp_path / "out").files["geojson"]
    objects = json.loads(Path(drawn).read_text())["features"]
    wanted = [o["properties"]["measurements"]["attention"] for o in objects]
    assert looked.values.tolist() == pytest.approx(wanted)
    answer = ask_slide(
        slide, "is there red?", Painter(), encoder=Colours(), budget=6, store=store, attend=looked
    )
    attended = [t.attention for t in answer.tiles if t.chosen == "attended"]
    assert len(attended) == 2
    assert max(t.attention or 0 for t in answer.tiles) == max(looked.values)


# --- what is shown -----------------------------------------------------------------------


def test_evidence_is_a_sheet_a_table_and_objects_from_the_bounds(
    asked: Any, board: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shifted:
        def __init__(self, path: str) -> None:
            with_bounds = open_slide(path)
            self.info = replace(with_bounds.info, bounds=(100, 50, 300, 200))
            self.close = with_bounds.close

    monkeypatch.setattr(evidence, "open_slide", Shifted)
    answer = asked("is there red?", Wary(SIDE * (ACROSS - 2)))
    files = evidence.write_evidence(tmp_path / "out", answer)
    assert {Path(path).name for path in files.values()} == {
        "sheet.png",
        "tiles.geojson",
        "tiles.csv",
        "answer.json",
    }
    objects = json.loads(Path(files["geojson"]).read_text())["features"]
    assert len(objects) == 8
    x, y = RED[0] - 100, RED[1] - 50
    assert shape(objects[0]["geometry"]).equals(box(x, y, x + SIDE, y + SIDE))
    assert objects[0]["properties"]["name"] == "1: yes"
    assert objects[0]["properties"]["measurements"]["rank"] == 1
    with Path(files["table"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["x0"]), int(r["y0"])) for r in rows] == [(t.x0, t.y0) for t in answer.tiles]
    assert rows[0]["note"] == "Research use only; not for diagnosis."
    told = json.loads(Path(files["answer"]).read_text())
    assert (told["answer"], told["confidence"], told["abstained"]) == ("yes", None, False)
    assert told["evidence"][0]["probability"] == pytest.approx(answer.tiles[0].probability)
    with Image.open(files["sheet"]) as sheet:
        assert sheet.getpixel((100, 200)) == pytest.approx((230, 10, 10), abs=6)


def test_a_sheet_has_rows_of_five_and_frames_what_is_unfamiliar() -> None:
    tiles = [np.full((s, s, 3), 90 + s, np.uint8) for s in (30, 40, 50, 60, 70, 80)]
    captions = [["1   cosine 0.5", "a-name-" * 20, "x 1, y 2"]] * 5
    drawn = tile_sheet.sheet(tiles, [*captions, ["6", "name", "x, y", "unfamiliar"]])
    side, gap = tile_sheet.SIDE, tile_sheet.GAP
    assert drawn.shape[1] == 5 * (side + gap) + gap
    down = (drawn.shape[0] - gap) // 2
    for i, shown in enumerate(tiles):
        x, y = gap + i % 5 * (side + gap), gap + i // 5 * down
        assert (drawn[y + side // 2, x + side // 2] == shown[0, 0]).all()
        framed = (drawn[y + 1, x + 1] != shown[0, 0]).any()
        assert framed == (i == 5)
        assert (drawn[y : y + down - gap, x + side : x + side + gap] > 250).all()


def test_evidence_of_slides_of_one_name_and_of_questions_lies_apart() -> None:
    asked = [(folder, q) for folder in ("a", "b") for q in ("is there tumor?", "what tissue?")]
    names = [folder_name(Found(Path(folder) / "s.svs"), q) for folder, q in asked]
    names += [folder_name(Found(Path("a/s.svs")), "is there tumor?", budget) for budget in "48"]
    assert len({*names, *names}) == 6
    assert all(name.startswith("s-ask-") for name in names)
