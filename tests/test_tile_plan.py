import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import synthetic
from conftest import Run

from pathcli.errors import DataError
from pathcli.slides import plan as planning
from pathcli.slides.pixel_layouts import Layout
from pathcli.slides.pixels import save_pixels
from pathcli.slides.plan import NoResolutionError, Wanted, plan, totals, unwritten_store
from pathcli.slides.tiling import tile, tile_spec
from pathcli.store import Store
from pathcli.types import Key

SPEC = tile_spec(64, 0.5)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return every file and folder with its time and content; reading changes neither."""
    return {
        path.relative_to(folder).as_posix(): (
            path.stat().st_mtime_ns,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def mixed(slide_path: Path) -> Path:
    """A folder of three slides: one good, one without resolution, one that is none."""
    folder = slide_path.parent / "mixed"
    folder.mkdir()
    shutil.copy(slide_path, folder / "good.svs")
    picture = synthetic.picture(600, 500, (0, 0, 600, 500))
    synthetic.slide(folder / "nowhere.tiff", picture, mpp=None, aperio=False)
    (folder / "text.svs").write_text("no slide")
    return folder


@pytest.mark.parametrize("pixels", [(), ("--save-pixels", "zarr"), ("--save-pixels", "webdataset")])
def test_a_dry_run_writes_nothing_anywhere(
    mixed: Path, tmp_path: Path, run: Run, pixels: tuple[str, ...]
) -> None:
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    for store in ((), ("--store", "empty"), ("--store", "none")):
        code, _, _ = run("tile", mixed, "--dry-run", "--geojson", *store, *pixels)
        assert code == 3
    assert tree(tmp_path) == before
    (tmp_path / "pathcli-out").mkdir()
    kept = tmp_path / "pathcli-out" / "failures.csv"
    kept.write_text("of an earlier run")
    run("tile", mixed / "good.svs", "--dry-run")
    assert kept.read_text() == "of an earlier run"


def test_codes_and_reasons_are_those_of_the_real_run(mixed: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "holiday.jpg").touch()
    calls = (
        (mixed,),
        (mixed / "text.svs",),
        (mixed / "nowhere.tiff",),
        (mixed / "good.svs",),
        (mixed / "good.svs", "--store", "foreign"),
        (mixed / "good.svs", "--tissue", "foo"),
    )
    for call in calls:
        planned = run("tile", *call, "--json", "--dry-run")
        real = run("tile", *call, "--json", "--no-overview")
        assert planned[0] == real[0], call
        a, b = json.loads(planned[1]), json.loads(real[1])
        assert a.get("failures") == b.get("failures")
        assert a.get("error") == b.get("error")


def test_the_numbers_are_those_of_the_real_run(mixed: Path, tmp_path: Path, run: Run) -> None:
    options = ("--size", 64, "--json", "--save-pixels", "png", "--no-overview")
    told = json.loads(run("tile", mixed, *options, "--dry-run")[1])
    real = json.loads(run("tile", mixed, *options)[1])["slides"][0]
    (planned,), whole = told["slides"], told["plan"]
    for name in ("item", "tiles", "tiles_digest", "tissue_share", "mpp", "reader"):
        assert planned[name] == real[name], name
    assert planned["there"] == []
    assert planned["seconds"] == pytest.approx(sum(planned["seconds_of"].values()), abs=0.002)
    assert planned["seconds_of"]["read"] > 0
    entry = Store().tiles.path(next(iter(Store().tiles)))
    assert planned["bytes_of"]["tiles"] == pytest.approx(entry.stat().st_size, rel=0.2)
    assert planned["bytes_of"]["pixels"] == pytest.approx(real["pixels"]["bytes"], rel=0.1)
    assert (whole["slides"], whole["tiles"], whole["in_store"]) == (1, real["tiles"], 0)
    assert (whole["without_resolution"], whole["other_failures"]) == (1, 1)
    assert whole["bytes"] == planned["bytes"]
    assert whole["free_bytes"]["pixels"] == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)
    assert 10e6 < whole["memory_bytes"] < 100e9

    again = json.loads(run("tile", mixed, *options, "--dry-run")[1])
    assert again["slides"][0]["there"] == ["tiles", "pixels"]
    assert again["slides"][0]["bytes"] == again["slides"][0]["seconds_of"]["read"] == 0
    assert (again["plan"]["in_store"], again["plan"]["there"]) == (1, {"pixels": 1})


@pytest.mark.parametrize("kind", ["zarr", "webdataset"])
def test_the_size_of_pixels_is_about_right(slide_path: Path, tmp_path: Path, kind: str) -> None:
    store = unwritten_store(tmp_path / "none")
    found = plan(slide_path, SPEC, store, Wanted(Layout(kind), tmp_path / "out"))
    run = save_pixels(slide_path, found.run.tiles, tmp_path / "out", Layout(kind))
    assert found.disk["pixels"] == pytest.approx(run.size, rel=0.1)


def test_features_are_planned_by_their_bytes_and_the_encoders_time(
    slide_path: Path, store: Store
) -> None:
    wanted = Wanted(encoder="fake-000000000000", row_bytes=1024, forward_s=100.0)
    found = plan(slide_path, SPEC, store, wanted)
    n = len(found.run.tiles)
    assert n > 40
    assert n * 1024 < found.disk["features"] < n * 1100
    assert found.forward_s == 100.0 * n
    assert found.seconds == found.tile_s + found.forward_s  # readers work meanwhile
    assert 0 < found.read_s < found.forward_s
    key = replace(found.run.tiles.key, encoder=wanted.encoder)
    path = store.features.path(key)
    path.parent.mkdir(parents=True)
    path.touch()
    there = plan(slide_path, SPEC, store, wanted)
    assert there.there == ("features",)
    assert (there.forward_s, there.read_s, there.disk["features"]) == (0, 0, 0)


def test_tiles_that_cannot_be_read_are_told(slide_path: Path, tmp_path: Path) -> None:
    synthetic.break_tile(slide_path, 1 * 6 + 2)
    store = unwritten_store(tmp_path / "none")
    found = plan(slide_path, SPEC, store, Wanted(Layout("png"), tmp_path))
    assert any("tiles measured cannot be read" in text for text in found.warnings)


def test_runs_of_neighbours_are_measured_and_each_tile_once(
    slide_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watch(slide: object, tiles: object, row: int) -> None:
        seen.append(row)

    monkeypatch.setattr(planning, "read_or_none", watch)
    store = unwritten_store(tmp_path / "none")
    tiles = plan(slide_path, SPEC, store, Wanted(Layout("png"), tmp_path, workers=1)).run.tiles
    assert len(tiles) > 60
    assert len(seen) == len(set(seen)) == 32
    assert (seen[:8], seen[-1]) == (list(range(8)), len(tiles) - 1)
    seen.clear()
    few = tile_spec(256, 0.5)
    few_tiles = plan(slide_path, few, store, Wanted(Layout("png"), tmp_path, workers=1)).run.tiles
    assert seen == list(range(len(few_tiles)))


def test_a_store_that_is_not_written_finds_what_is_there(
    slide_path: Path, store: Store, tmp_path: Path
) -> None:
    assert not plan(slide_path, SPEC, unwritten_store(store.root)).run.cached
    done = tile(slide_path, spec=SPEC, store=store, overview=False).tiles
    before = tree(store.root)
    found = plan(slide_path, SPEC, unwritten_store(store.root))
    assert found.run.cached
    assert found.disk == {"tiles": 0}
    assert (found.run.tiles.xy == done.xy).all()
    assert tree(store.root) == before
    other = Key(done.item, 0.25, done.spec.digest)
    assert other not in unwritten_store(store.root).tiles


def test_a_slide_without_usable_resolution_is_known_by_its_error(mixed: Path) -> None:
    store = unwritten_store(Path("none"))
    with pytest.raises(NoResolutionError, match="--slide-mpp"):
        plan(mixed / "nowhere.tiff", SPEC, store)
    assert len(plan(mixed / "nowhere.tiff", SPEC, store, mpp=0.5).run.tiles)
    with pytest.raises(DataError, match="not a slide"):
        plan(mixed / "text.svs", SPEC, store)


def test_nothing_planned_is_nothing(tmp_path: Path) -> None:
    whole = totals([], unwritten_store(tmp_path / "none"))
    assert (whole["slides"], whole["tiles"], whole["seconds"], whole["bytes"]) == (0, 0, 0, 0)


def test_a_person_reads_a_table_and_what_it_comes_to(mixed: Path, run: Run) -> None:
    code, out, err = run("tile", mixed, "--dry-run", "--size", 64, "--save-pixels", "zarr")
    assert code == 3
    assert "there already" in out.splitlines()[0]
    assert len(out.splitlines()) == 2
    assert "1 more have no usable resolution, 1 fail otherwise" in err
    assert "with 2 workers (opening and tissue as just measured" in err
    assert "free for pixels; memory about" in err
