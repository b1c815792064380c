import csv
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import synthetic
import torch
from conftest import Run, open_slide
from fakes import Colours, MeanColour
from PIL import Image
from shapely.geometry import box, shape

from pathcli import registry
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.search import Found, Searcher, distinct, search
from pathcli.errors import DataError, UsageError
from pathcli.evals import search as pictures
from pathcli.slides.overlay import COLOURS
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.types import TileStatus

SIDE, ACROSS, DOWN = 64, 10, 8
SPEC = tile_spec(SIDE, 0.5, tissue="none")
RED = (192, 128)


class Wary(Colours):
    """Knows only what is more green than red."""

    def familiar(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 1] > features[:, 0]


def checkerboard(path: Path, seed: int, red: tuple[int, int] | None = None) -> Path:
    """Write a slide whose tiles have a colour each, one of them red."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(40, 240, (DOWN, ACROSS, 3)).astype(np.uint8)
    if red:
        colours[red[1] // SIDE, red[0] // SIDE] = (230, 10, 10)
    return synthetic.slide(path, colours.repeat(SIDE, 0).repeat(SIDE, 1))


@pytest.fixture(scope="session")
def _painted_boards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("boards")
    checkerboard(folder / "a.svs", 1, RED)
    checkerboard(folder / "b.svs", 2)
    return folder


@pytest.fixture
def boards(_painted_boards: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copy(_painted_boards / n, tmp_path / n)) for n in ("a.svs", "b.svs")]


@pytest.fixture(autouse=True)
def _uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Colours, "passes", 0)


@pytest.fixture
def _commands(fake: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "colours", SimpleNamespace(Colours=Colours, Wary=Wary))  # type: ignore[arg-type]
    for name in ("Colours", "Wary"):
        monkeypatch.setitem(registry.BUILTIN["encoder"], name.lower(), f"colours:{name}")


def units(store: Store, found: Found) -> np.ndarray:
    """Return the unit embeddings, float64, of all tiles of all slides, in order."""
    values = [store.features[s.run.key].values.astype(np.float64) for s in found.slides]
    rows = np.concatenate(values)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def places(found: Found) -> list[int]:
    """Return the hits' places in what `units` gives."""
    starts = np.cumsum([0, *(len(s.score) for s in found.slides)])
    return [int(starts[h.slide]) + h.row for h in found.hits]


def greedy(rows: np.ndarray, order: list[int], top: int, limit: float) -> tuple[list[int], int]:
    """Return what is taken one by one, and how many were passed over on the way."""
    taken: list[int] = []
    passed = 0
    for at in order:
        if len(taken) == top:
            break
        if limit < 1 and any(rows[at] @ rows[other] >= limit for other in taken):
            passed += 1
        else:
            taken.append(at)
    return taken, passed


# --- ranking -----------------------------------------------------------------------------


def test_the_red_tile_is_found_for_red(boards: list[Path], store: Store) -> None:
    found = search(boards[:1], "red", Colours(), store=store, spec=SPEC, top=4)
    first = found.hits[0]
    assert (first.rank, first.xy) == (1, RED)
    r, g, b = store.features[found.slides[0].run.key].values[first.row].astype(float)
    assert first.cosine == pytest.approx(r / np.sqrt(r * r + g * g + b * b), abs=1e-5)
    assert first.cosine == first.score > 0.99
    assert first.higher_than == (ACROSS * DOWN - 1) / (ACROSS * DOWN)
    assert first.strange is None
    assert not found.warnings


@pytest.mark.parametrize("limit", [0.0, 0.9, 0.95, 0.99, 1.0])
def test_two_slides_are_ranked_together_as_a_reference_ranks_them(
    boards: list[Path], store: Store, limit: float
) -> None:
    found = search(boards, "red", Colours(), store=store, spec=SPEC, top=30, duplicates=limit)
    rows = units(store, found)
    order = np.argsort(-rows[:, 0], kind="stable").tolist()
    assert (places(found), found.passed_over) == greedy(rows, order, 30, limit)
    assert [h.rank for h in found.hits] == list(range(1, len(found.hits) + 1))
    assert {h.slide for h in found.hits} == ({0} if limit == 0 else {0, 1})
    short = f"{len(found.hits)} tiles instead of 30: the other {160 - len(found.hits)} have"
    assert [w.startswith(short) for w in found.warnings] == ([True] if limit < 1 else [])


@pytest.mark.parametrize("limit", [0.3, 0.88, 0.97, 1.0])
@pytest.mark.parametrize("top", [1, 20, 400])
def test_near_duplicates_are_passed_over_as_one_by_one(
    rng: np.random.Generator, limit: float, top: int
) -> None:
    rows = rng.normal(size=(40, 6)).repeat(50, 0) + rng.normal(size=(2000, 6)) * 0.2
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    order = rng.permutation(2000)
    asked: list[int] = []

    def read(some: np.ndarray) -> np.ndarray:
        asked.extend(some.tolist())
        return rows[some]

    taken = distinct(order, read, top, limit)
    assert taken == greedy(rows, order.tolist(), top, limit)
    assert asked == order[: len(asked)].tolist()  # each place once, and no more than needed
    assert top > 1 or len(asked) < 2000


def test_a_cosine_of_the_limit_itself_is_a_near_duplicate() -> None:
    rows = np.array([[1, 0, 0, 0], [0.5, 0.5, 0.5, 0.5], [0.5, -0.5, -0.5, -0.5]], np.float32)
    order = np.arange(3)
    assert distinct(order, rows.__getitem__, 3, 0.5) == ([0], 2)
    assert distinct(order, rows.__getitem__, 3, 0.5001) == ([0, 1, 2], 0)


def test_a_copy_of_a_slide_is_searched_once(boards: list[Path], store: Store) -> None:
    (boards[0].parent / "copy").mkdir()
    copy = Path(shutil.copy(boards[0], boards[0].parent / "copy"))
    found = search([boards[0], copy], "red", Colours(), store=store, spec=SPEC, duplicates=1)
    assert len(found.slides) == 1
    assert found.slides[0].run.tiling.path == str(boards[0])
    assert found.warnings == ("1 of 2 slides are copies of others and searched once",)


def test_what_must_not_fit_is_taken_off(boards: list[Path], store: Store) -> None:
    how = {"store": store, "spec": SPEC, "top": 10, "duplicates": 1}
    plain = search(boards, "red", Colours(), **how)  # type: ignore[arg-type]
    found = search(boards, "red", Colours(), negatives=["blue", "green"], **how)  # type: ignore[arg-type]
    rows = units(store, found)
    score = rows @ (np.array([1, 0, 0]) - np.array([0, 1, 1]) / np.sqrt(2))
    assert places(found) == np.argsort(-score, kind="stable")[:10].tolist() != places(plain)
    assert np.allclose([h.score for h in found.hits], score[places(found)], atol=1e-5)
    assert np.allclose([h.cosine for h in found.hits], rows[places(found), 0], atol=1e-5)


def test_a_second_search_embeds_nothing(boards: list[Path], store: Store) -> None:
    search(boards, "red", Colours(), store=store, spec=SPEC)
    before = Colours.passes
    other = search(boards, "green", Colours(), store=store, spec=SPEC)
    assert Colours.passes == before > 0
    assert [s.run.encoded for s in other.slides] == [0, 0]


def test_an_unreadable_tile_is_never_found(boards: list[Path], store: Store) -> None:
    synthetic.break_tile(boards[0], 0)
    embedder = Embedder(Colours(), store, max_bad_tiles=1)
    ready = Searcher("grey", embedder, top=1000, duplicates=1)
    one = ready(boards[0], spec=SPEC)
    found = ready.rank([one])
    bad = store.features[one.run.key].status != TileStatus.OK
    assert 0 < bad.sum() == one.run.unreadable < len(bad)
    assert {h.row for h in found.hits} == set(np.flatnonzero(~bad).tolist())
    assert found.hits[-1].higher_than == 0
    assert len(one.tiles) == len(found.hits)


# --- what the user is told ---------------------------------------------------------------


def test_what_the_encoder_does_not_know_is_ranked_and_marked(
    boards: list[Path], store: Store
) -> None:
    found = search(boards[:1], "red", Wary(), store=store, spec=SPEC, top=80, duplicates=1)
    values = store.features[found.slides[0].run.key].values
    assert found.hits[0].xy == RED
    unknown = values[:, 1] <= values[:, 0]
    assert [h.strange for h in found.hits] == [bool(unknown[h.row]) for h in found.hits]
    strange = int(unknown.sum())
    (told,) = found.warnings
    assert told.startswith(f"{strange} of 80 tiles ({strange / 80:.0%}) are unlike what colours")


def test_a_long_text_is_told_and_is_short_in_titles(boards: list[Path], store: Store) -> None:
    found = search(boards[:1], "red and one more " * 99, Colours(), store=store, spec=SPEC, top=1)
    (told,) = found.warnings
    assert told.startswith("colours reads 3 tokens of the 396 of 'red and one more red and")
    object_ = pictures._object(found, found.hits[0], open_slide(boards[0]), SIDE)
    for title in (told, pictures.search_report(found).title, object_["properties"]["name"]):
        assert len(title) < 130


@pytest.mark.parametrize("how", [{"text": " "}, {"negatives": [""]}])
def test_an_empty_text_is_refused(boards: list[Path], store: Store, how: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="is empty"):
        search(boards, encoder=Colours(), store=store, **({"text": "red"} | how))  # type: ignore[arg-type]
    assert not Colours.passes


def test_impossible_searches_are_refused(boards: list[Path], store: Store) -> None:
    with pytest.raises(UsageError, match="has no text tower"):
        search(boards, "red", MeanColour(), store=store)
    with pytest.raises(DataError, match="no direction"):
        search(boards, "nonsense", Colours(), store=store)
    with pytest.raises(UsageError, match="--top is at least 1"):
        search(boards, "red", Colours(), store=store, top=0)
    with pytest.raises(UsageError, match=r"--duplicates 0 to 1, not 20 and 1\.2"):
        search(boards, "red", Colours(), store=store, duplicates=1.2)
    with pytest.raises(UsageError, match="no slide"):
        search([], "red", Colours(), store=store)


# --- pictures and objects ----------------------------------------------------------------


def test_objects_for_qupath_are_squares_from_the_bounds(boards: list[Path], store: Store) -> None:
    found = search(boards[:1], "red", Colours(), store=store, spec=SPEC, mpp=0.37, top=3)
    slide = open_slide(boards[0])
    slide.info = replace(slide.info, bounds=(100, 50, 500, 400))
    hit = found.hits[1]
    side = SIDE * 0.5 / 0.37
    made = pictures._object(found, hit, slide, side)
    x, y = hit.xy[0] - 100, hit.xy[1] - 50
    square = shape(made["geometry"])
    assert square.is_valid
    assert np.allclose(square.bounds, box(x, y, x + side, y + side).bounds, atol=0.051)
    assert made["properties"]["objectType"] == "annotation"
    assert made["properties"]["name"] == "2: red"
    assert made["properties"]["measurements"]["score"] == pytest.approx(hit.score, abs=1e-6)


def test_the_map_is_brightest_on_the_nearest_tile(boards: list[Path], store: Store) -> None:
    found = search(boards[:1], "red", Colours(), store=store, spec=SPEC, top=1)
    slide = open_slide(boards[0])
    drawn = pictures._map(slide, found, found.slides[0], [])
    grow = 1600 / (ACROSS * SIDE)
    shown = drawn[: round(DOWN * SIDE * grow)].astype(float)
    middles = found.slides[0].run.tiling.tiles.xy + SIDE / 2
    seen = np.array([shown[round(y * grow), round(x * grow)] for x, y in middles])
    scan = store.features[found.slides[0].run.key].values.astype(float)
    score = found.slides[0].score
    rank = (score[:, None] > score).mean(1) + (score[:, None] == score).mean(1) / 2
    tint = np.array(mpl.colormaps[COLOURS](rank))[:, :3] * 255
    clear = middles[:, 1] < DOWN * SIDE - 80  # above the scale bar
    assert np.abs(seen - (scan + tint) / 2)[clear].max() < 6
    numbered = pictures._map(slide, found, found.slides[0], found.hits)
    changed = np.argwhere((numbered != drawn)[: len(shown)].any(2)) / grow
    assert np.allclose(changed.min(0), RED[::-1], atol=2)
    assert np.allclose(changed.max(0), np.add(RED[::-1], SIDE), atol=2)


def test_a_slide_that_is_gone_leaves_the_page_without_its_pictures(
    boards: list[Path], store: Store, tmp_path: Path
) -> None:
    found = search(boards, "red", Colours(), store=store, spec=SPEC, duplicates=1)
    boards[0].unlink()
    written = pictures.write_found(tmp_path / "out", found, "pathcli search")
    assert [bool(f) for f in written.files] == [False, True]
    assert "no pictures of a.svs" in written.unseen[0]
    assert written.page.read_text().count("<img") == 2


# --- the command -------------------------------------------------------------------------

HOW = ("--encoder", "colours", "--tissue", "none", "--device", "cpu", "--out", "out")


@pytest.mark.usefixtures("_commands")
def test_the_command_writes_all_it_names(run: Run, boards: list[Path], tmp_path: Path) -> None:
    code, out, err = run("search", *boards, "red <b>", "--top", 6, "--json", *HOW)
    assert code == 0, err
    said = json.loads(out)
    page = tmp_path / said["report"]
    assert [r["rank"] for r in said["tiles"]] == list(range(1, 1 + len(said["tiles"])))
    assert (said["tiles"][0]["x"], said["tiles"][0]["y"]) == RED
    assert said["tiles"][0]["familiar"] is None
    assert page.read_text().count("<img") == 3
    assert "red &lt;b&gt;" in page.read_text()
    with (page.parent / "tiles.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["x"]) for r in rows] == [r["x"] for r in said["tiles"]]
    assert {r["note"] for r in rows} == {said["notice"]}
    objects = []
    for slide in said["slides"]:
        objects += json.loads((tmp_path / slide["files"]["geojson"]).read_text())["features"]
        with Image.open(tmp_path / slide["files"]["map"]) as drawn:
            assert drawn.width == 1600
    assert sorted(o["properties"]["measurements"]["rank"] for o in objects) == [
        r["rank"] for r in said["tiles"]
    ]
    report = json.loads((page.parent / "report.json").read_text())
    assert report["metrics"]["tiles"]["value"] == 2 * ACROSS * DOWN
    assert (page.parent / "tiles.png").is_file()


@pytest.mark.usefixtures("_commands")
def test_the_table_and_a_slide_that_fails(run: Run, boards: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.svs").write_bytes(b"no slide")
    code, out, err = run("search", tmp_path, "red", "--not", "blue", "--top", 4, *HOW)
    assert code == 3
    lines = out.splitlines()
    assert lines[0].split()[:6] == ["rank", "slide", "x", "y", "cosine", "score"]
    assert lines[1].split()[:4] == ["1", "a.svs", *map(str, RED)]
    assert "1 of 3 slides failed" in err
    assert "bad.svs" in (tmp_path / "out" / "failures.csv").read_text()
    assert "Research use only" in err
    assert "less that with “blue”" in next((tmp_path / "out").glob("*/report.html")).read_text()


@pytest.mark.usefixtures("_commands")
def test_the_command_refuses_what_cannot_be_searched(
    run: Run, boards: list[Path], tmp_path: Path
) -> None:
    for arguments, words in [
        ((*boards, *HOW), "is a file; add the text"),
        ((boards[0], "", *HOW), "is empty"),
        ((boards[0], "red", "--encoder", "fake"), "has no text tower"),
        ((boards[0], "red", *HOW, "--duplicates", 2), "duplicates"),
    ]:
        code, _, err = run("search", *arguments)
        assert (code, words in err) == (2, True), err
    glass = synthetic.slide(tmp_path / "glass.svs", synthetic.picture(900, 900, (0, 0, 0, 0)))
    code, _, err = run("search", glass, "red", "--encoder", "colours")
    assert code == 4
    assert "no tile to compare" in err
    assert not Colours.passes


@pytest.mark.usefixtures("_commands")
def test_unfamiliar_tiles_are_named_on_the_page(run: Run, boards: list[Path]) -> None:
    code, out, err = run("search", boards[0], "red", *HOW, "--encoder", "wary", "--json")
    assert code == 0
    said = json.loads(out)
    assert not said["tiles"][0]["familiar"]
    assert said["warnings"]
    assert "are unlike what colours was trained on" in err
    assert "orange frame" in Path(said["report"]).read_text()
