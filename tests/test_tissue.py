"""Tissue that can be trusted: presets, fallbacks, pens, stains."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import synthetic
from conftest import open_slide
from PIL import Image

from pathcli.errors import DataError
from pathcli.slides.pens import pen_mask, pens
from pathcli.slides.stains import stain_named, stain_warnings
from pathcli.slides.tiling import tile, tile_spec
from pathcli.slides.tissue import find_tissue, mask_um, method, recorded
from pathcli.slides.tissue_methods import _islands
from pathcli.store import Store
from pathcli.types import TileSpec

UM = 8.0
BOX = (slice(60, 240), slice(60, 340))
INKS = {"green": (20, 140, 120), "blue": (20, 90, 190), "red": (205, 12, 24), "black": (18, 16, 20)}


def scan(
    colour: tuple[int, int, int] = synthetic.TISSUE, glass: object = synthetic.GLASS
) -> np.ndarray:
    """Return a scan [300, 400, 3] at 8 um per pixel: tissue in BOX, a little grain everywhere."""
    rng = np.random.default_rng(0)
    pixels = np.empty((300, 400, 3), np.int64)
    pixels[:] = glass
    pixels[BOX] = colour
    pixels += rng.integers(-2, 3, pixels.shape)
    pixels[BOX] += rng.integers(-12, 13, (180, 280, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def drawn(ink: tuple[int, int, int], at: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Return a scan with a stroke of ink over tissue and glass, and where the stroke is."""
    stroke = np.zeros((300, 400), np.uint8)
    cv2.line(stroke, (20, at), (385, at), 1, 14)
    pixels = scan()
    pixels[stroke > 0] = ink
    return pixels, stroke > 0


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def truth() -> np.ndarray:
    mask = np.zeros((300, 400), bool)
    mask[BOX] = True
    return mask


# --- how fine a mask is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mm2", "um"),
    [
        *(("otsu", mm2, um) for mm2, um in ((31, 4), (33, 8), (129, 16), (5000, 16))),
        ("auto", 1, 16),
        ("hsv", 5000, 8),
        ("none", 5000, 16),
    ],
)
def test_a_mask_gets_coarser_on_large_scans_down_to_its_limit(
    name: str, mm2: float, um: float
) -> None:
    assert mask_um(method(name), mm2 * 1e6) == um


def test_tiles_cut_by_an_older_version_are_cut_as_they_were(tmp_path: Path) -> None:
    old = tile_spec(tissue="otsu").to_json() | {"tissue_version": 1}
    del old["tissue_params"]["coarsest_mpp"]
    assert mask_um(recorded(TileSpec.from_json(old)), 5e9) == 4.0
    assert mask_um(method("otsu", mask_mpp=0), 5e9) == 0  # and no loop without end
    Image.fromarray(scan()).save(tmp_path / "a.png")
    found = find_tissue(open_slide(tmp_path / "a.png"), TileSpec.from_json(old), UM)
    assert overlap(found.mask, truth()) > 0.98
    with pytest.raises(DataError, match="otsu is version 2, not 7"):
        recorded(TileSpec.from_json(old | {"tissue_version": 7}))


def test_a_mask_kept_fine_covers_what_the_coarse_one_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rgb = synthetic.picture(2400, 1800, (300, 500, 900, 700)).astype(np.int16)
    rgb += rng.integers(-6, 7, rgb.shape[:2])[..., None].astype(np.int16)
    Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.png")
    slide = open_slide(tmp_path / "a.png")  # 8 um per pixel: 276 mm2
    fine, coarse = (find_tissue(slide, tile_spec(coarsest_mpp=most), 8.0) for most in (8.0, 16.0))
    assert fine.mask.shape == (1800, 2400)
    assert coarse.mask.shape == (900, 1200)
    xy = np.stack(np.meshgrid(range(0, 2400, 14), range(0, 1800, 14)), -1).reshape(-1, 2)
    chosen = [found.fraction(xy, (14, 14)) >= 0.5 for found in (fine, coarse)]
    assert overlap(*chosen) > 0.99


# --- CLAM's presets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("bwh_biopsy", (15, 11, 2, 1, 1, 2)),
        ("bwh_resection", (15, 11, 4, 100, 16, 8)),
        ("tcga", (8, 7, 4, 16, 4, 8)),
    ],
)
def test_a_preset_has_clams_numbers_in_physical_units(name: str, numbers: tuple[int, ...]) -> None:
    sthresh, mthresh, close, area, hole, holes = numbers
    spec = tile_spec(tissue=f"hsv:{name}")
    patch_mm2 = 0.128**2
    given = spec.tissue_params
    assert [given[k] for k in ("sthresh", "mthresh", "close", "max_holes")] == [
        *(sthresh, mthresh, close, holes)
    ]
    assert given["min_area_mm2"] == pytest.approx(area * patch_mm2)
    assert given["min_hole_mm2"] == pytest.approx(hole * patch_mm2)
    assert not given["use_otsu"]
    assert parameters_survive(spec)


def parameters_survive(spec: object) -> bool:
    back = type(spec).from_json(spec.to_json())
    return method(back.tissue, **back.tissue_params) == method(spec.tissue, **spec.tissue_params)


def test_presets_differ_and_plain_hsv_keeps_its_digest() -> None:
    names = ("otsu", "hsv", "hsv:bwh_biopsy", "hsv:bwh_resection", "hsv:tcga", "auto", "none")
    assert len({tile_spec(tissue=name).digest for name in names}) == len(names)
    assert tile_spec(tissue="hsv").digest == "d9b1a16254f7"
    assert tile_spec(close_um=24).digest == tile_spec(close_um=24.0).digest == tile_spec().digest


def test_an_island_counts_without_its_holes_and_keeps_the_largest() -> None:
    pixels = np.full((400, 400, 3), 240, np.uint8)
    pixels[40:360, 40:360] = synthetic.TISSUE
    for k, side in enumerate((90, 60, 40)):
        pixels[60 : 60 + side, 60 + 100 * k : 60 + 100 * k + side] = 240
    two = method("hsv:bwh_biopsy").mask(pixels, 16.0)
    assert not two[100, 100]
    assert not two[90, 190]
    assert two[80, 280]  # the third largest of the holes is filled
    small = method("hsv:bwh_resection").mask(pixels[:120, :], 16.0)  # 80 x 320 cells less holes
    assert small.any()
    assert not method("hsv:bwh_resection").mask(pixels, 2.0).any()  # 0.32 mm2 are too few
    assert method("hsv:tcga").mask(pixels, 2.0).any()


HOLE = 11**2 - 4 / 2
"""Area of the outline of a hole of 10 x 10, which runs on the island and cuts its corners."""


def ring(side: int, hole: int) -> np.ndarray:
    """Return a square island of `side` cells with a square hole, in 60 x 60 cells."""
    mask = np.zeros((60, 60), np.uint8)
    mask[10 : 10 + side, 10 : 10 + side] = 1
    mask[12 : 12 + hole, 12 : 12 + hole] = 0
    return mask


def test_an_islands_hole_is_no_part_of_its_area() -> None:
    net = 13**2 - HOLE
    assert _islands(ring(14, 10), net - 1, 0, 8).any()
    assert not _islands(ring(14, 10), net, 0, 8).any()


def test_a_hole_stays_only_above_its_least_area() -> None:
    kept = _islands(ring(30, 10), 1, HOLE - 1, 8)
    assert np.array_equal(kept, ring(30, 10) > 0)
    filled = _islands(ring(30, 10), 1, HOLE, 8)
    assert np.array_equal(filled, ring(30, 0) > 0)


# --- auto --------------------------------------------------------------------------------


def test_auto_is_otsu_where_otsu_finds_some_but_not_all() -> None:
    found = method("auto").masked(scan(), UM)
    assert (found.mask == method("otsu").mask(scan(), UM)).all()
    assert not found.warnings


def test_auto_falls_back_when_nothing_is_found_and_says_so() -> None:
    pale = scan((219, 219, 222))  # so pale that no chroma tells it from glass
    assert not method("otsu").mask(pale, UM).any()
    found = method("auto").masked(pale, UM)
    assert overlap(found.mask, truth()) > 0.9
    assert "otsu finds 0% of the scan" in found.warnings[0]
    assert "which is used" in found.warnings[0]


def test_ink_is_left_out_of_what_auto_falls_back_to() -> None:
    """What ink is replaced with, white, is itself off the glass's colour."""
    pixels = scan((219, 219, 222), (238, 238, 239))
    stroke = np.zeros((300, 400), np.uint8)
    cv2.line(stroke, (20, 150), (385, 150), 1, 14)
    pixels[stroke > 0] = INKS["green"]
    found = method("auto").masked(pixels, UM)
    ink = pen_mask(pens(pixels, UM), pixels.shape)
    assert "which is used" in found.warnings[1]
    assert ink[stroke > 0].mean() > 0.95
    assert not (found.mask & ink).any()
    assert overlap(found.mask, truth() & ~ink) > 0.9


def test_auto_falls_back_when_everything_is_found_and_says_so() -> None:
    yellow = scan(glass=(238, 236, 205))
    assert method("otsu").mask(yellow, UM).all()
    found = method("auto").masked(yellow, UM)
    assert overlap(found.mask, truth()) > 0.9
    assert "otsu finds 100% of the scan" in found.warnings[0]


def test_auto_leaves_a_scan_full_of_tissue_alone() -> None:
    full = scan()[BOX].copy()
    assert method("auto").masked(full, UM).mask.all()


def test_auto_says_that_nothing_serves() -> None:
    rng = np.random.default_rng(0)
    empty = (243 + rng.integers(-2, 3, (300, 400, 3))).astype(np.uint8)
    found = method("auto").masked(empty, UM)
    assert not found.mask.any()
    assert "no tissue by" in found.warnings[0]


def test_a_black_border_is_no_tissue_and_no_pen() -> None:
    pixels = scan()
    pixels[:20], pixels[:, :15], pixels[:, -15:] = 0, 0, 0
    for name in ("otsu", "auto"):
        assert overlap(method(name).mask(pixels, UM), truth()) > 0.95
    assert not pens(pixels, UM)
    pale = scan((219, 219, 222))
    pale[:20] = 0
    assert overlap(method("auto").masked(pale, UM).mask, truth()) > 0.9


def test_a_fallback_reaches_tiles_and_store(tmp_path: Path, store: Store) -> None:
    Image.fromarray(scan((219, 219, 222))).save(tmp_path / "pale.png")
    spec = tile_spec(20, 8.0, tissue="auto")
    run = tile(tmp_path / "pale.png", spec=spec, store=store, mpp=UM)
    assert len(run.tiles) > 80
    assert "which is used" in run.warnings[0]
    again = tile(tmp_path / "pale.png", spec=spec, store=store, mpp=UM)
    assert again.cached
    assert again.warnings == run.warnings


# --- pens --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(INKS))
def test_ink_is_found_by_its_colour_and_left_out(name: str) -> None:
    pixels, stroke = drawn(INKS[name])
    found = pens(pixels, UM)
    assert list(found) == [name]
    ink = found[name]
    assert (ink & stroke).sum() / stroke.sum() > 0.95
    assert ink.sum() < 2 * stroke.sum()
    masked = method("auto").masked(pixels, UM)
    assert not (masked.mask & stroke).any()
    assert overlap(masked.mask, truth() & ~ink) > 0.95
    assert f"pen marks left out: {name}" in masked.warnings[0]


@pytest.mark.parametrize("name", ["green", "blue", "red"])
def test_otsu_takes_ink_for_tissue_and_says_so(name: str, tmp_path: Path) -> None:
    pixels, _ = drawn(INKS[name])
    Image.fromarray(pixels).save(tmp_path / "pen.png")
    told = find_tissue(open_slide(tmp_path / "pen.png"), tile_spec(), UM).warnings
    assert f"under pen marks ({name})" in told[0]
    assert "--tissue auto" in told[0]


@pytest.mark.parametrize(
    "colour",
    [
        synthetic.TISSUE,
        (150, 105, 60),
        (120, 75, 40),
        (150, 165, 200),
        (205, 70, 80),
        (90, 60, 120),
    ],
    ids=["eosin", "dab", "dark dab", "haematoxylin", "blood", "dense nuclei"],
)
def test_stains_are_no_ink(colour: tuple[int, int, int]) -> None:
    assert not pens(scan(colour), UM)
    assert overlap(method("auto").mask(scan(colour), UM), truth()) > 0.95


# --- stains ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("colours", "name"),
    [
        ([synthetic.TISSUE, (120, 80, 150)], None),
        ([(150, 105, 60), (150, 165, 200)], "dab"),
        ([(150, 165, 200), (165, 180, 210)], "haematoxylin"),
    ],
)
def test_ihc_is_told_from_h_and_e(colours: list[tuple[int, int, int]], name: str | None) -> None:
    pixels = scan(colours[0])
    pixels[60:150, 60:340] = scan(colours[1])[60:150, 60:340]
    found = method("auto").masked(pixels, UM)
    assert overlap(found.mask, truth()) > 0.95
    assert stain_named(stain_warnings(pixels, found.mask)) == name


def test_the_stain_stands_in_the_summary_and_survives_the_store(tmp_path: Path) -> None:
    from pathcli.slides.tiling import summary

    Image.fromarray(scan((150, 105, 60))).save(tmp_path / "ihc.png")
    for cached in (False, True):
        run = tile(tmp_path / "ihc.png", spec=tile_spec(20, 8.0), mpp=UM)
        assert run.cached == cached
        assert len(run.tiles) > 80
        assert summary(run)["stain"] == "dab"


def test_fluorescence_is_tissue_for_auto_alone() -> None:
    dark = np.zeros((300, 400, 3), np.uint8)
    dark[BOX[0], BOX[1], 2] = 120
    found = method("auto").masked(dark, UM)
    assert overlap(found.mask, truth()) > 0.9
    assert stain_named(found.warnings) == "fluorescence"


# --- real scans --------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "um", "expected", "least"),
    [
        ("tcga-green-pen", 4, {"green", "blue"}, 0.15),
        ("tcga-red-pen", 4, {"red"}, 0.2),
        ("wsi-blue-pen", 60, {"blue"}, 0.02),
        ("diagnostic-slide-thumb-rgb", 40, {"green", "blue", "red", "black"}, 0.2),
        ("tcga-lung-rgb", 0.5, set(), 0),
    ],
)
def test_pens_of_real_thumbnails(
    data: Path, name: str, um: float, expected: set[str], least: float
) -> None:
    pixels = np.asarray(Image.open(data / "slides" / "thumbnails" / f"{name}.png").convert("RGB"))
    found = pens(pixels, um)
    assert set(found) == expected
    assert pen_mask(found, pixels.shape).mean() >= least


@pytest.mark.data
@pytest.mark.parametrize("times", [1 / 16, 1 / 4, 1, 4, 16])
def test_a_false_resolution_makes_no_ink_of_h_and_e(data: Path, times: float) -> None:
    """Strokes are sought in micrometres: a scan said to be finer loses them, and no tissue."""
    folder = data / "patches" / "lc25000-colon-few"
    for path in sorted(folder.rglob("*.jpeg"))[::4]:
        assert not pens(np.asarray(Image.open(path).convert("RGB")), 0.5 * times)
    thumbnail = Image.open(data / "slides" / "thumbnails" / "tcga-red-pen.png").convert("RGB")
    assert bool(pens(np.asarray(thumbnail), 4 * times)) == (times >= 1)


@pytest.mark.data
def test_real_h_and_e_without_pens_has_none(data: Path) -> None:
    for name in ("cmu-1-small-region.svs", "os-1-detail.ome.tif"):
        for method_name in ("otsu", "auto"):
            slide = open_slide(data / "slides" / name)
            assert not find_tissue(slide, tile_spec(tissue=method_name), 0.499).warnings


@pytest.mark.data
def test_auto_finds_the_cells_of_a_fluorescence_slide(data: Path, store: Store) -> None:
    path = data / "slides" / "fluorescence-dapi.ndpi"
    run = tile(path, spec=tile_spec(tissue="auto"), store=store)
    assert 0.2 < run.tiles.tissue_share < 0.6
    assert len(run.tiles) > 10
    assert stain_named(run.warnings) == "fluorescence"
