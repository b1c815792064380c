import glob
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import synthetic
import zarr
from conftest import Run, open_slide
from PIL import Image

from pathcli.data.formats.shards import webdataset
from pathcli.data.formats.source import Source
from pathcli.data.images import read_image
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.slides import pixel_layouts, pixels
from pathcli.slides.pixel_layouts import Layout
from pathcli.slides.pixels import save_pixels
from pathcli.slides.tiling import read_tile, tile, tile_spec
from pathcli.store import Store
from pathcli.types import Tiles

KINDS = pixel_layouts.KINDS


@pytest.fixture
def tiles(slide_path: Path, store: Store) -> Tiles:
    """99 overlapping tiles of 64 px, coarser than the scan."""
    spec = tile_spec(64, 0.6, step_px=50)
    return tile(slide_path, spec=spec, store=store, overview=False).tiles


def expected(path: Path, tiles: Tiles) -> np.ndarray:
    slide = open_slide(path)
    xy = [tuple(corner) for corner in tiles.xy.tolist()]
    return np.stack([read_tile(slide, at, tiles.spec, tiles.slide_mpp) for at in xy])


def read(place: Path, tiles: Tiles) -> dict[tuple[int, int], np.ndarray]:
    """Return the readable tiles of any layout by corner, read without pathcli."""
    if place.suffix == ".zarr":
        group = zarr.open_group(place, mode="r")
        rows = zip(group["coords"][:], group["status"][:], group["pixels"][:], strict=True)
        return {(int(x), int(y)): image for (x, y), status, image in rows if status == 0}
    found = {path.name: path.read_bytes() for path in place.glob("*.png")}
    for shard in sorted(place.glob("*.tar")):
        with tarfile.open(shard) as archive:
            found |= {m.name: archive.extractfile(m).read() for m in archive}
    images = {}
    for name, data in found.items():
        if not name.endswith(".json"):
            _, x, y = name.rpartition(".")[0].rsplit("_", 2)
            images[int(x), int(y)] = np.asarray(Image.open(io.BytesIO(data)))
    return images


def listed(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def spoil(path: Path) -> tuple[int, int]:
    """Break the file tile at (512, 256); return the corner of that tile."""
    synthetic.break_tile(path, 1 * 6 + 2)
    return 512, 256


# --- round trips -------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "workers"), [("zarr", 1), ("webdataset", 3), ("png", 3)])
def test_pixels_come_back_as_read_tile_gives_them(
    slide_path: Path, tiles: Tiles, tmp_path: Path, kind: str, workers: int
) -> None:
    run = save_pixels(slide_path, tiles, tmp_path / "out", Layout(kind), workers=workers)
    found = read(run.path, tiles)
    assert list(found) == [tuple(corner) for corner in tiles.xy.tolist()] or kind == "png"
    assert np.array_equal(
        [found[tuple(at)] for at in tiles.xy.tolist()], expected(slide_path, tiles)
    )
    assert (run.tiles, run.unreadable, run.cached, run.warnings) == (len(tiles), 0, False, [])
    assert listed(tmp_path / "out") == [run.path.name]


def test_zarr_keeps_a_tile_a_chunk_in_few_files_and_says_what_it_is(
    slide_path: Path, tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_layouts, "BLOCK_BYTES", 3 * 64 * 64 * 50)
    place = save_pixels(slide_path, tiles, tmp_path, Layout("zarr")).path
    group = zarr.open_group(place, mode="r")
    assert group["pixels"].chunks == (1, 64, 64, 3)
    assert len(tiles) == 99
    assert sum(p.is_file() for p in (place / "pixels" / "c").rglob("*")) == 2
    assert np.array_equal(group["pixels"][80], expected(slide_path, tiles)[80])
    about = dict(group.attrs)
    assert (about["item"], about["slide_mpp"]) == (tiles.item, 0.5)
    assert about["spec"] == tiles.spec.to_json()
    assert (group["coords"].dtype, group["status"].dtype) == (np.int32, np.uint8)


def test_shards_are_cut_and_read_by_the_readers_of_webdataset(
    slide_path: Path, tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_layouts, "SHARD_TILES", 40)
    dotted = replace(tiles, item="TCGA-A1.B34C-6335ea0e")
    place = save_pixels(slide_path, dotted, tmp_path, Layout("webdataset")).path
    shards = sorted(place.glob("*.tar"))
    assert [s.name for s in shards] == [f"TCGA-A1_B34C-6335ea0e-{k:06d}.tar" for k in range(3)]
    with tarfile.open(shards[0]) as archive:
        assert all(member.name.count(".") == 1 for member in archive)
        assert json.load(archive.extractfile(archive.getmembers()[1])) == {
            "item": dotted.item,
            "group": dotted.item,
            "mpp": 0.6,
            "x": int(tiles.xy[0, 0]),
            "y": int(tiles.xy[0, 1]),
        }
    samples = list(webdataset(Source(path=place), lambda _: [((), "a tile")]))
    assert {sample.group for sample in samples} == {dotted.item}
    images = [read_image(sample.images[0]) for sample in samples]
    assert np.array_equal(images, expected(slide_path, tiles))


def test_a_shard_ends_before_it_is_too_large(
    slide_path: Path, tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_layouts, "SHARD_BYTES", 300_000)
    place = save_pixels(slide_path, tiles, tmp_path, Layout("webdataset")).path
    sizes = [shard.stat().st_size for shard in place.glob("*.tar")]
    assert len(sizes) > 2
    assert max(sizes) < 300_000 + 20_000  # a record of JSON, and the tar's last block
    assert len(read(place, tiles)) == len(tiles)


def test_jpeg_shards_are_smaller_and_nearly_the_same(
    slide_path: Path, tiles: Tiles, tmp_path: Path
) -> None:
    exact = save_pixels(slide_path, tiles, tmp_path / "png", Layout("webdataset"))
    lossy = save_pixels(slide_path, tiles, tmp_path / "jpg", Layout("webdataset", "jpeg:90"))
    found = read(lossy.path, tiles)
    seen = np.array([found[tuple(at)] for at in tiles.xy.tolist()], float)
    assert 0 < np.abs(seen - expected(slide_path, tiles)).mean() < 3
    assert lossy.size < 0.7 * exact.size


def test_a_slide_without_tissue_has_a_folder_that_says_so(tmp_path: Path, store: Store) -> None:
    path = synthetic.slide(tmp_path / "glass.svs", synthetic.picture(600, 500, (0, 0, 0, 0)))
    tiles = tile(path, store=store, overview=False).tiles
    assert len(tiles) == 0
    for kind in KINDS:
        layout = Layout(kind)
        assert save_pixels(path, tiles, tmp_path / kind, layout).tiles == 0
        assert save_pixels(path, tiles, tmp_path / kind, layout).cached


@pytest.mark.parametrize(
    "wrong", [("zip", "png"), ("png", "jpeg:90"), ("webdataset", "jpeg:0"), ("webdataset", "webp")]
)
def test_what_cannot_be_written_is_a_usage_error(wrong: tuple[str, str]) -> None:
    with pytest.raises(UsageError):
        Layout(*wrong)


# --- once, whole or not at all -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_reads_nothing_and_changes_nothing(
    slide_path: Path, tiles: Tiles, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save_pixels(slide_path, tiles, tmp_path / "out", Layout(kind))
    before = content(tmp_path / "out")
    monkeypatch.setattr(pixels, "open_slide", None)
    again = save_pixels(slide_path, tiles, tmp_path / "out", Layout(kind))
    assert again.cached
    assert (again.tiles, again.size, again.path) == (first.tiles, first.size, first.path)
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("kind", KINDS)
def test_other_parameters_or_foreign_folders_are_not_touched(
    slide_path: Path, tiles: Tiles, tmp_path: Path, kind: str, store: Store
) -> None:
    place = save_pixels(slide_path, tiles, tmp_path / "out", Layout(kind)).path
    before = content(tmp_path / "out")
    other = tile(slide_path, spec=tile_spec(100, 0.7), store=store, overview=False).tiles
    with pytest.raises(DataError, match="other parameters; give another --pixels-out"):
        save_pixels(slide_path, other, tmp_path / "out", Layout(kind))
    assert content(tmp_path / "out") == before
    (tmp_path / "mine" / place.name).mkdir(parents=True)
    with pytest.raises(DataError, match="not written by --save-pixels"):
        save_pixels(slide_path, tiles, tmp_path / "mine", Layout(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_leaves_nothing(
    slide_path: Path, tiles: Tiles, tmp_path: Path, kind: str
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_pixels(slide_path, tiles, tmp_path / "out", Layout(kind), progress=stop)
    assert not list((tmp_path / "out").iterdir())


KILLED = """
import sys, time
from pathlib import Path
from pathcli.slides.pixel_layouts import Layout
from pathcli.slides.pixels import save_pixels
from pathcli.store.hdf5 import read_tiles

def wait(done, total):
    if done == 50:
        print("half", flush=True)
        time.sleep(60)

slide, entry, out = map(Path, sys.argv[1:])
save_pixels(slide, read_tiles(entry), out, Layout("png"), progress=wait)
"""


def test_a_killed_run_is_no_result_and_is_done_again(
    slide_path: Path, tiles: Tiles, store: Store, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", KILLED, slide_path, store.tiles.path(tiles.key), out]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "half\n"
        with pytest.raises(ResourceError, match="being written by process"):
            save_pixels(slide_path, tiles, out, Layout("png"))
        process.send_signal(signal.SIGKILL)
    assert not Layout("png").place(out, tiles.item).exists()
    assert len(list(out.glob(".*.part/*.png"))) >= 49
    assert not glob.glob(f"{out}/*/*.png")  # noqa: PTH207 - a shell's patterns do not find it
    run = save_pixels(slide_path, tiles, out, Layout("png"))
    assert not run.cached
    assert len(read(run.path, tiles)) == len(tiles)
    assert listed(out) == [run.path.name]


def test_hidden_folders_bear_their_process_and_only_this_slides_old_ones_go(
    slide_path: Path, tiles: Tiles, tmp_path: Path
) -> None:
    out, item = tmp_path / "out", tiles.item
    old = [f".{item}@elsewhere-7.part", f".{item}@{pixels._HERE}-999999.part"]
    others = [f".{item}.zarr@elsewhere-7.part", f".{item}0@elsewhere-7.part"]
    for name in (*old, *others):
        (out / name).mkdir(parents=True)
    seen: set[str] = set()

    def look(*_: int) -> None:
        seen.update(path.name for path in out.glob(".*.part"))

    save_pixels(slide_path, tiles, out, Layout("png"), progress=look)
    assert seen == {f".{item}@{pixels._HERE}-{os.getpid()}.part", *others}


def test_a_full_disk_is_one_line_and_leaves_nothing(
    slide_path: Path, tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Layout, "write_card", full)
    for kind in KINDS:
        with pytest.raises(ResourceError, match=r"disk full .* another folder with --pixels-out"):
            save_pixels(slide_path, tiles, tmp_path / "out", Layout(kind))
    assert not list((tmp_path / "out").iterdir())


def test_no_thread_reads_a_slide_that_is_closed_after_an_error(
    slide_path: Path, tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy, closed = [], []

    def slow(*_: object) -> str:
        busy.append(1)
        time.sleep(0.02)
        busy.pop()
        return "what cannot be written"

    slide = SimpleNamespace(close=lambda: closed.append(len(busy)))
    monkeypatch.setattr(pixels, "open_slide", lambda _: slide)
    monkeypatch.setattr(pixels, "read_or_none", slow)
    with pytest.raises(ValueError, match="what cannot be written"):
        save_pixels(slide_path, tiles, tmp_path, Layout("zarr"), workers=3)
    assert closed == [0]


# --- tiles that cannot be read -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_unreadable_tiles_are_recorded_and_left_out(
    slide_path: Path, store: Store, tmp_path: Path, kind: str
) -> None:
    tiles = tile(slide_path, spec=tile_spec(128), store=store, overview=False).tiles
    x, y = spoil(slide_path)
    inside = (tiles.xy + 128 > (x, y)) & (tiles.xy < (x + 256, y + 256))
    lost = tiles.xy[inside.all(1)].tolist()
    assert 0 < len(lost) < len(tiles)
    run = save_pixels(slide_path, tiles, tmp_path, Layout(kind), max_bad_tiles=0.5)
    assert (run.tiles, run.unreadable) == (len(tiles) - len(lost), len(lost))
    fate = "black" if kind == "zarr" else "left out"
    assert run.warnings == [f"{len(lost)} of {len(tiles)} tiles cannot be read and are {fate}"]
    assert set(read(run.path, tiles)) == {tuple(at) for at in tiles.xy.tolist() if at not in lost}
    assert Layout(kind).read_card(run.path)["unreadable"] == lost
    if kind == "zarr":
        group = zarr.open_group(run.path, mode="r")
        bad = group["status"][:] == 1
        assert np.array_equal(group["coords"][:][bad], lost)
        assert not group["pixels"][:][bad].any()
    with pytest.raises(DataError, match=r"--max-bad-tiles sets the limit"):  # done, and refused
        save_pixels(slide_path, tiles, tmp_path, Layout(kind))


def test_too_many_unreadable_tiles_fail_the_slide_and_not_the_batch(
    slide_path: Path, tmp_path: Path, run: Run
) -> None:
    whole = slide_path.rename(slide_path.with_name("whole.svs"))
    broken = Path(synthetic.slide(slide_path, synthetic.picture(1500, 1100, (256, 192, 640, 512))))
    options = ("--size", 128, "--no-overview", "--json", "--save-pixels", "png")
    assert run("tile", broken, *options, "--pixels-out", tmp_path / "before")[0] == 0
    spoil(broken)  # the item's name is of the whole file
    code, out, _ = run("tile", broken, whole, *options)
    result = json.loads(out)
    assert code == 3
    assert [failure["path"] for failure in result["failures"]] == [str(broken)]
    assert "--max-bad-tiles" in result["failures"][0]["reason"]
    saved = result["slides"][0]["pixels"]
    assert (
        saved["tiles"]
        == result["slides"][0]["tiles"]
        == len(list(Path(saved["path"]).glob("*.png")))
    )
    assert listed(Path("pathcli-out/pixels")) == [result["slides"][0]["item"]]
    code, out, _ = run("tile", broken, whole, *options, "--max-bad-tiles", 0.9)
    assert code == 0
    assert [s["pixels"]["cached"] for s in json.loads(out)["slides"]] == [False, True]
    assert "cannot be read and are left out" in json.loads(out)["slides"][0]["warnings"][0]


def test_a_slide_that_vanishes_is_not_called_unreadable(
    slide_path: Path, tiles: Tiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(done: int, total: int) -> None:
        if done == 1:
            slide_path.unlink()
            monkeypatch.setattr(pixels, "read_tile", gone)

    def gone(*_: object) -> None:
        msg = "cannot be decoded"
        raise DataError(msg)

    layout, where = Layout("png"), tmp_path / "out"
    with pytest.raises(DataError, match="cannot be decoded"):
        save_pixels(slide_path, tiles, where, layout, max_bad_tiles=1, progress=vanish)
    assert not listed(where)
