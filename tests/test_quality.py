"""Quality flags: what is blurred, inked, dark or white is left out, and nothing else."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import synthetic
from conftest import open_slide
from PIL import Image

from pathcli.errors import UsageError
from pathcli.slides import quality
from pathcli.slides.quality import flag_tiles
from pathcli.slides.tiling import grid, summary, tile, tile_spec
from pathcli.slides.tissue import Tissue, find_tissue
from pathcli.store import Store

MPP = 1.0
SIDE = 128
ALL = ("blur", "dark", "pen", "white")


def picture() -> np.ndarray:
    """Return 1024 x 768 px of tissue at 1 um: column 1 blurred, 3 folded, 5 white, 7 inked.

    Column 2 has no contrast, and is sharp.
    """
    rng = np.random.default_rng(0)
    grain = [rng.integers(0, 2, (768 // k, 1024 // k)).astype(np.float32) for k in (4, 32)]
    cells = sum(cv2.resize(g, (1024, 768), interpolation=cv2.INTER_NEAREST) for g in grain)
    pixels = np.array((215, 150, 190)) - 30 * cells[..., None]
    pixels = (pixels + rng.integers(-4, 5, (768, 1024, 1))).clip(0, 255).astype(np.uint8)
    columns = [slice(k * SIDE, (k + 1) * SIDE) for k in range(8)]
    pixels[:, columns[1]] = cv2.GaussianBlur(pixels, (0, 0), 4)[:, columns[1]]
    pixels[:, columns[2]] = np.array((205, 160, 190)) + rng.integers(-2, 3, (768, SIDE, 1))
    pixels[:, columns[3]] = pixels[:, columns[3]] // 4 + np.array((62, 2, 45), np.uint8)
    pixels[:, columns[5]] = 245
    pixels[:, 7 * SIDE + 50 : 7 * SIDE + 90] = (20, 140, 120)
    return pixels


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return synthetic.slide(tmp_path / "scan.svs", picture(), mpp=MPP, levels=2)


def flagged(path: Path, drop: tuple[str, ...] = ALL) -> dict[str, list[int]]:
    """Return the columns in which all tiles have a flag; no column may be in part."""
    slide = open_slide(path)
    spec = tile_spec(SIDE, MPP, tissue="none", drop=drop)
    xy = grid(spec, MPP, slide.info.bounds)
    found = flag_tiles(slide, spec, MPP, find_tissue(slide, tile_spec(), MPP), xy)
    columns = {}
    for name, rows in found.items():
        share = [rows[xy[:, 0] == k * SIDE].mean() for k in range(8)]
        assert set(share) <= {0.0, 1.0}, (name, share)
        columns[name] = [k for k in range(8) if share[k]]
    return columns


def test_each_flag_has_its_tiles_and_no_others(scan: Path) -> None:
    assert flagged(scan) == {"blur": [1], "dark": [3], "pen": [7], "white": [5]}


def test_small_blocks_give_the_same_flags(scan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = flagged(scan, ("blur",))
    monkeypatch.setattr(quality, "_BLOCK_PX", 200)
    assert flagged(scan, ("blur",)) == whole


@pytest.mark.parametrize(("count", "read"), [(4, 2), (1, 0)])  # at 1 um, at 0.25
def test_blur_is_read_at_one_um_from_a_level_that_has_it(
    tmp_path: Path, count: int, read: int
) -> None:
    fine = cv2.resize(picture(), None, fx=4, fy=4, interpolation=cv2.INTER_LANCZOS4)
    path = synthetic.slide(tmp_path / "fine.svs", fine, mpp=0.25, levels=count)
    slide = open_slide(path)
    levels = []
    real = slide.read
    slide.read = lambda xy, level, size: levels.append(level) or real(xy, level, size)  # type: ignore[method-assign]
    spec = tile_spec(SIDE, MPP, tissue="none", drop=("blur",))
    xy = grid(spec, 0.25, slide.info.bounds)
    tissue = find_tissue(slide, tile_spec(), 0.25)
    levels.clear()
    blurred = flag_tiles(slide, spec, 0.25, tissue, xy)["blur"]
    assert set(levels) == {read}
    assert set(xy[blurred, 0] // (4 * SIDE)) == {1}
    assert blurred.sum() == 6


def test_the_variance_is_that_of_each_square(rng: np.random.Generator) -> None:
    values = rng.normal(100, 9, (60, 80)).astype(np.float32)
    corner = np.array([[0.0, 0.0], [30.2, 10.4], [60.0, 40.0]])
    found = quality._variance(values, corner, 20.0)
    for (x, y), variance in zip(corner.round().astype(int), found, strict=True):
        assert variance == pytest.approx(values[y : y + 20, x : x + 20].var(), rel=1e-4)


def test_dropped_tiles_are_gone_counted_and_many_are_told(scan: Path, store: Store) -> None:
    plain = tile(scan, spec=tile_spec(SIDE, MPP, tissue="none"), store=store)
    few = tile(scan, spec=tile_spec(SIDE, MPP, tissue="none", drop=("dark",)), store=store)
    assert summary(few)["dropped"] == {"dark": 6}
    assert set(plain.tiles.xy[:, 0]) - set(few.tiles.xy[:, 0]) == {3 * SIDE}
    assert not any("--drop" in w for w in few.warnings)
    many = tile(scan, spec=tile_spec(SIDE, MPP, tissue="none", drop=ALL), store=store)
    assert len(many.tiles) == 24
    assert len({r.tiles.key for r in (plain, few, many)}) == 3
    assert summary(plain)["dropped"] == {}


def test_most_tiles_dropped_is_a_warning(tmp_path: Path, store: Store) -> None:
    Image.fromarray(cv2.GaussianBlur(picture(), (0, 0), 5)).save(tmp_path / "soft.png")
    run = tile(tmp_path / "soft.png", spec=tile_spec(SIDE, MPP, drop=("blur",)), store=store, mpp=1)
    assert len(run.tiles) < 10
    assert any("--drop leaves out" in w and "blur" in w for w in run.warnings)


def test_pens_are_sought_in_the_slides_own_micrometres() -> None:
    """Cells of 16 level-0 px at 0.5 um are 8 um: a stroke of 112 um is ink, red of 48 um is not."""
    pixels = np.full((200, 300, 3), (200, 150, 190), np.uint8)
    pixels[40:54] = (20, 140, 120)
    pixels[120:126] = (205, 12, 24)
    seen = Tissue(np.ones((200, 300), bool), pixels, (16.0, 16.0))
    xy = np.array([[0, 640], [2400, 640], [0, 1920], [0, 2560]])
    spec = tile_spec(256, 0.5, drop=("pen",))
    found = flag_tiles(SimpleNamespace(), spec, 0.5, seen, xy)
    assert found["pen"].tolist() == [True, True, False, False]


def test_counts_of_dropped_tiles_survive_the_store(scan: Path, store: Store) -> None:
    spec = tile_spec(SIDE, MPP, tissue="none", drop=ALL)
    fresh = tile(scan, spec=spec, store=store)
    again = tile(scan, spec=spec, store=store)
    assert again.cached
    assert again.tiles.dropped == fresh.tiles.dropped
    assert fresh.tiles.dropped["pen"] == 6


def test_an_unreadable_tile_is_not_called_blurred(tmp_path: Path) -> None:
    pixels = cv2.GaussianBlur(picture()[:512], (0, 0), 5)
    path = synthetic.slide(tmp_path / "bad.svs", pixels, mpp=MPP, levels=1)
    synthetic.break_tile(path, 5)  # of 4 x 2: x 256..511, y 256..511
    slide = open_slide(path, "openslide")
    spec = tile_spec(SIDE, MPP, tissue="none", drop=("blur",))
    xy = grid(spec, MPP, slide.info.bounds)
    tissue = find_tissue(slide, tile_spec(tissue="none"), MPP)
    blurred = flag_tiles(slide, spec, MPP, tissue, xy)["blur"]
    broken = (xy[:, 0] >= 256) & (xy[:, 0] < 512) & (xy[:, 1] >= 256)
    assert not blurred[broken].any()
    assert blurred[~broken].sum() > 12


def test_an_unknown_flag_is_met_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'blur'"):
        tile_spec(drop=("blurr",))
    assert tile_spec(drop=("pen", "blur", "pen")).drop == ("blur", "pen")


@pytest.mark.data
def test_real_tissue_is_sharp_and_its_blurred_copy_is_not(data: Path, tmp_path: Path) -> None:
    slide = open_slide(data / "slides" / "cmu-1-small-region.svs")
    pixels = slide.read((0, 0), 0, (slide.info.width, slide.info.height))
    shares = []
    for name, sigma_um in (("sharp", 0), ("soft", 3)):
        copy = cv2.GaussianBlur(pixels, (0, 0), sigma_um / 0.499) if sigma_um else pixels
        Image.fromarray(copy).save(tmp_path / f"{name}.png")
        run = tile(tmp_path / f"{name}.png", spec=tile_spec(drop=("blur",)), mpp=0.499)
        assert run.tiles.dropped is not None
        shares.append(run.tiles.dropped["blur"] / (len(run.tiles) + run.tiles.dropped["blur"]))
    assert shares[0] == 0
    assert shares[1] > 0.95
