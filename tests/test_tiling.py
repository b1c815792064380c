import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import SIZE, TISSUE_BOX, open_slide
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from pathcli.errors import DataError
from pathcli.slides import discover, overlay, plain
from pathcli.slides.geojson import polygons, write_geojson
from pathcli.slides.overview import overview
from pathcli.slides.tiling import grid, read_tile, tile, tile_spec
from pathcli.slides.tissue import Tissue, find_tissue, method
from pathcli.store import Store

# --- grid --------------------------------------------------------------------------------

sizes = st.integers(1, 300)
mpps = st.floats(0.1, 4)


@given(sizes, sizes, mpps, mpps, st.integers(0, 3000), st.integers(0, 3000))
def test_tiles_lie_inside_in_order_at_the_rounded_multiple_of_the_step(
    size: int, step: int, mpp: float, slide_mpp: float, width: int, height: int
) -> None:
    spec = tile_spec(size + 20, mpp, step_px=step + 20)
    assume(spec.step_px * mpp >= slide_mpp)  # a step below a pixel of level 0 is refused
    xy = grid(spec, slide_mpp, (0, 0, width, height))
    side0, step0 = spec.size_um / slide_mpp, spec.step_px * mpp / slide_mpp
    assert (xy >= 0).all()
    assert (xy + side0 <= np.array([width, height]) + 1e-5).all()
    assert [tuple(p) for p in xy] == sorted({tuple(p) for p in xy}, key=lambda p: (p[1], p[0]))
    for axis, limit in enumerate((width, height)):
        k = np.arange(int(limit / step0) + 2)
        corners = np.floor(k * step0 + 0.5)
        expected = corners[corners + side0 <= limit + 1e-6]
        if len(xy):
            assert set(xy[:, axis]) == set(expected.astype(int))


def test_the_grid_stays_on_level_0_and_inside_the_bounds() -> None:
    spec = tile_spec(100, 0.5)
    xy = grid(spec, 0.5, (250, 130, 420, 300))
    assert xy.tolist() == [[x, y] for y in (200, 300) for x in (300, 400, 500)]


def test_a_step_larger_or_smaller_than_the_tile_spaces_or_overlaps() -> None:
    assert len(grid(tile_spec(100, 0.5, step_px=50), 0.5, (0, 0, 200, 100))) == 3
    assert len(grid(tile_spec(100, 0.5, step_px=200), 0.5, (0, 0, 400, 100))) == 2


# --- pixels ------------------------------------------------------------------------------


def ramp(path: Path, side: int = 2048) -> Path:
    """Write a PNG whose red is x / 16 and whose green is y / 16."""
    y, x = np.mgrid[:side, :side] / 16
    Image.fromarray(np.stack([x, y, 0 * x], 2).round().astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("slide_mpp", [0.25, 0.499, 0.5, 0.7])
def test_a_tile_covers_its_micrometres_whatever_the_scan(tmp_path: Path, slide_mpp: float) -> None:
    slide = open_slide(ramp(tmp_path / "ramp.png"))
    spec = tile_spec(224, 0.5)
    pixels = read_tile(slide, (320, 480), spec, slide_mpp).astype(float)
    side0 = 112 / slide_mpp
    centre = (np.arange(224) + 0.5) * side0 / 224 - 0.5
    assert pixels.shape == (224, 224, 3)
    assert np.abs(pixels[:, :, 0].mean(0) - (320 + centre) / 16).max() < 0.8
    assert np.abs(pixels[:, :, 1].mean(1) - (480 + centre) / 16).max() < 0.8


def test_the_best_level_is_read_and_agrees_with_level_0(slide_path: Path, tmp_path: Path) -> None:
    slide = open_slide(slide_path)
    flat = tmp_path / "flat.png"
    Image.fromarray(slide.read((0, 0), 0, SIZE)).save(flat)
    spec = tile_spec(128, 2.0)
    a = read_tile(slide, (320, 256), spec, 0.5).astype(int)
    b = read_tile(open_slide(flat), (320, 256), spec, 0.5).astype(int)
    assert np.abs(a.mean((0, 1)) - b.mean((0, 1))).max() < 2


def test_a_tile_at_the_last_pixel_is_whole(tmp_path: Path) -> None:
    slide = open_slide(ramp(tmp_path / "ramp.png", 449))
    assert read_tile(slide, (0, 0), tile_spec(224, 0.5), 0.2494).shape == (224, 224, 3)


def test_a_coarse_level_is_read_from_the_right_fraction_of_a_pixel(tmp_path: Path) -> None:
    grey = ((np.arange(1600) - 395) * 0.9).clip(0, 255)
    pixels = np.tile(grey.round()[None, :, None], (1200, 1, 3)).astype(np.uint8)
    path = synthetic.slide(tmp_path / "ramp.tiff", pixels, aperio=False)
    spec = tile_spec(64, 2.0)  # level 2, four level-0 pixels each
    for reader in ("openslide", "tiffslide"):
        slide = open_slide(path, reader)
        assert slide.downsamples == (1.0, 2.0, 4.0)
        offs = []
        for corner in (400, 401, 402, 403):
            seen = read_tile(slide, (corner, corner), spec, 0.5).astype(float)
            centre = (corner - 395 + (np.arange(64) + 0.5) * 4 - 0.5) * 0.9
            offs.append((seen[:, :, 0].mean(0) - centre).mean() / 0.9)  # in level-0 pixels
        assert np.ptp(offs) < 0.7, (reader, offs)
        assert np.abs(offs).max() < 1.5, (reader, offs)


# --- tissue ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["otsu", "hsv"])
def test_painted_tissue_is_found_where_it_was_painted(slide_path: Path, name: str) -> None:
    slide = open_slide(slide_path)
    tissue = find_tissue(slide, tile_spec(tissue=name), 0.5)
    x, y, w, h = TISSUE_BOX
    truth = np.zeros(tissue.mask.shape, bool)
    sx, sy = tissue.scale
    truth[round(y / sy) : round((y + h) / sy), round(x / sx) : round((x + w) / sx)] = True
    overlap = (truth & tissue.mask).sum() / (truth | tissue.mask).sum()
    assert overlap > 0.9
    assert tissue.share(slide.info.bounds) == pytest.approx(w * h / (SIZE[0] * SIZE[1]), rel=0.1)


def test_none_takes_the_whole_scan(slide_path: Path) -> None:
    run = tile(slide_path, spec=tile_spec(100, 0.5, tissue="none"), store=Store())
    assert len(run.tiles) == (SIZE[0] // 100) * (SIZE[1] // 100)


def test_the_share_of_a_cut_cell_counts_by_area() -> None:
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = True
    tissue = Tissue(mask, np.zeros((4, 4, 3), np.uint8), (10.0, 10.0))
    xy = np.array([[10, 10], [15, 10], [15, 15], [30, 30], [5, 5]])
    assert tissue.fraction(xy, (10, 10)).tolist() == [1.0, 0.5, 0.25, 0.0, 0.25]
    assert tissue.share((0, 0, 40, 40)) == pytest.approx(1 / 16)


def test_min_tissue_keeps_what_reaches_it(slide_path: Path) -> None:
    counts = []
    for least in (0.0, 0.25, 0.5, 1.0):
        spec = tile_spec(100, 0.5, min_tissue=least)
        counts.append(len(tile(slide_path, spec=spec, store=Store()).tiles))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[-1] > 0
    assert counts[0] < 15 * 11  # no tile without tissue, even at 0


def test_an_empty_slide_gives_no_tile_and_says_why(tmp_path: Path) -> None:
    path = synthetic.slide(tmp_path / "glass.svs", synthetic.picture(900, 900, (0, 0, 0, 0)))
    run = tile(path, store=Store())
    assert len(run.tiles) == 0
    assert "0.0% of the scan is tissue" in run.warnings[0]
    assert "--tissue none" in run.warnings[0]


def test_a_patch_smaller_than_dust_on_a_slide_keeps_its_tissue(tmp_path: Path) -> None:
    Image.fromarray(synthetic.picture(150, 150, (0, 0, 150, 150))).save(tmp_path / "patch.png")
    run = tile(tmp_path / "patch.png", spec=tile_spec(140, 0.495), store=Store(), mpp=0.495)
    assert len(run.tiles) == 1


def test_a_scan_smaller_than_a_tile_says_so(slide_path: Path) -> None:
    run = tile(slide_path, spec=tile_spec(224, 8), store=Store())
    assert "750 x 550 um, a tile needs 1792 um" in run.warnings[-1]


def test_a_full_tile_counts_as_full(slide_path: Path) -> None:
    spec = tile_spec(37, 0.31, tissue="none", min_tissue=1.0)
    slide = open_slide(slide_path)
    assert len(tile(slide_path, spec=spec).tiles) == len(grid(spec, 0.5, slide.info.bounds))


def test_black_padding_around_a_stained_slide_is_not_fluorescence(tmp_path: Path) -> None:
    pixels = np.zeros((1400, 1400, 3), np.uint8)
    pixels[:900, :900] = synthetic.picture(900, 900, (200, 200, 400, 400))
    run = tile(synthetic.slide(tmp_path / "padded.svs", pixels), spec=tile_spec(64, 0.5))
    assert 20 < len(run.tiles) < 60
    assert run.tiles.xy.max() < 620


def test_a_black_background_is_not_called_tissue(tmp_path: Path) -> None:
    pixels = np.zeros((900, 900, 3), np.uint8)
    pixels[300:500, 300:500, 2] = 200
    path = synthetic.slide(tmp_path / "fluo.svs", pixels)
    run = tile(path, store=Store())
    assert len(run.tiles) == 0
    assert "fluorescence" in run.warnings[0]
    assert len(run.warnings) == 1


def test_a_coarse_scan_brings_a_warning(slide_path: Path) -> None:
    assert any(
        "upsampled" in w
        for w in tile(slide_path, spec=tile_spec(128, 0.25), store=Store()).warnings
    )
    assert not tile(slide_path, spec=tile_spec(128, 0.49), store=Store()).warnings


def test_a_damaged_file_tile_costs_its_own_area_and_is_said(tmp_path: Path) -> None:
    pixels = synthetic.picture(1536, 1280, (100, 100, 1300, 1100))
    path = synthetic.slide(tmp_path / "one-level.svs", pixels, levels=1)
    whole = len(tile(path, spec=tile_spec(64, 0.5)).tiles)
    synthetic.break_tile(path, 8)  # of 6 x 5: x 512..767, y 256..511
    run = tile(path, spec=tile_spec(64, 0.5), out=tmp_path / "out")
    assert "cannot be decoded" in run.warnings[0]
    assert whole * 0.8 < len(run.tiles) < whole
    assert run.overview
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # its index is at the end
    with pytest.raises(DataError):
        tile(path, spec=tile_spec(64, 0.5), store=Store(tmp_path / "other"))


def test_a_scan_mostly_undecodable_fails(tmp_path: Path, store: Store) -> None:
    pixels = synthetic.picture(1536, 1280, (100, 100, 1300, 1100))
    path = synthetic.slide(tmp_path / "bad.svs", pixels, levels=1)
    for index in range(0, 30, 2):
        synthetic.break_tile(path, index)
    with pytest.raises(DataError, match="cannot be decoded; is the file whole"):
        tile(path, spec=tile_spec(64, 0.5), store=store)
    assert not list(store.tiles)


def test_an_overview_of_a_large_level_is_read_in_stripes(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = open_slide(slide_path)
    whole = overview(slide, 10)[0].astype(int)
    monkeypatch.setattr("pathcli.slides.overview._READ_PX", 40_000)
    striped = overview(slide, 10)[0].astype(int)
    assert whole.shape == striped.shape == (110, 150, 3)
    assert np.abs(whole - striped).mean() < 2


@pytest.mark.parametrize("name", ["otsu", "hsv", "none"])
def test_a_tissue_method_is_built_from_its_parameters(name: str) -> None:
    spec = tile_spec(tissue=name)
    assert method(name, **spec.tissue_params) == method(name)


# --- store, pictures, GeoJSON ------------------------------------------------------------


def test_the_overview_shows_tissue_where_it_is(slide_path: Path, tmp_path: Path) -> None:
    run = tile(slide_path, store=Store(), out=tmp_path / "out")
    assert run.overview
    drawn = np.asarray(Image.open(run.overview))
    assert max(drawn.shape) == overlay.LONG_SIDE
    green = np.argwhere((np.abs(drawn.astype(int) - overlay.CONTOUR).sum(2)) < 30)
    scale = overlay.LONG_SIDE / SIZE[0]
    x, y, w, h = TISSUE_BOX
    assert np.allclose(green.min(0)[::-1] / scale, (x, y), atol=25)
    assert np.allclose(green.max(0)[::-1] / scale, (x + w, y + h), atol=25)


def test_polygons_have_holes_and_geojson_starts_at_the_bounds(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    mask[16:24, 16:24] = False
    tissue = Tissue(mask, np.zeros((40, 40, 3), np.uint8), (8.0, 8.0))
    (island,) = polygons(tissue)
    assert island.is_valid
    assert np.allclose(island.bounds, (80, 80, 240, 240), atol=0.1)
    (hole,) = island.interiors
    assert np.allclose(hole.bounds, (128, 128, 192, 192), atol=0.1)
    assert island.area == pytest.approx(160**2 - 64**2, rel=0.02)
    write_geojson(tmp_path / "t.geojson", tissue, (50, 20, 200, 200))
    (feature,) = json.loads((tmp_path / "t.geojson").read_text())["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert (ring[0] == ring[-1]).all()
    assert np.allclose(ring.min(0), (30, 60), atol=4)
    assert feature["properties"]["objectType"] == "annotation"


def test_polygons_of_ragged_masks_are_valid(rng: np.random.Generator) -> None:
    for density in (0.2, 0.5, 0.8):
        mask = rng.random((40, 40)) < density
        tissue = Tissue(mask, np.zeros((40, 40, 3), np.uint8), (8.0, 8.0))
        found = polygons(tissue)
        assert all(p.is_valid and p.geom_type == "Polygon" for p in found)
        assert sum(p.area for p in found) == pytest.approx(mask.sum() * 64, rel=0.2)


def test_an_empty_mask_has_no_polygon() -> None:
    assert polygons(Tissue(np.zeros((9, 9), bool), np.zeros((9, 9, 3), np.uint8), (1.0, 1.0))) == []


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A plain image that says, as MRXS slides do, that only part of it was scanned."""
    bounds = (300, 200, 900, 700)
    real = plain.ImageReader.__init__

    def init(self: plain.ImageReader, path: Path | str) -> None:
        real(self, path)
        self.info = replace(self.info, bounds=bounds)

    monkeypatch.setattr(plain.ImageReader, "__init__", init)
    pixels = np.full((1100, 1500, 3), 255, np.uint8)
    pixels[200:900, 300:1200] = synthetic.picture(900, 700, (100, 100, 500, 400))
    Image.fromarray(pixels).save(tmp_path / "bounded.png")
    return tmp_path / "bounded.png"


def test_bounds_crop_pictures_and_shift_geojson_but_not_tiles(bounded: Path, store: Store) -> None:
    run = tile(
        bounded, spec=tile_spec(64, 0.5), store=store, mpp=0.5, out=bounded.parent, geojson=True
    )
    assert run.overview
    assert run.geojson
    tissue0 = np.array([400, 300, 900, 700])  # level-0 pixels of the whole image
    centres = run.tiles.xy + 32
    assert ((centres > tissue0[:2] - 20) & (centres < tissue0[2:] + 20)).all()
    assert (run.tiles.xy % 64 == 0).all()  # the grid starts at level 0, not at the bounds
    assert run.tiles.tissue_share == pytest.approx(500 * 400 / (900 * 700), rel=0.15)
    with Image.open(run.overview) as drawn:
        assert drawn.width / drawn.height == pytest.approx(900 / 700, rel=0.01)
    (feature,) = json.loads(run.geojson.read_text())["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert np.allclose(ring.min(0), (100, 100), atol=25)
    assert np.allclose(ring.max(0), (600, 500), atol=25)


def test_no_tissue_rule_still_stays_inside_the_bounds(bounded: Path, store: Store) -> None:
    run = tile(bounded, spec=tile_spec(100, 0.5, tissue="none"), store=store, mpp=0.5)
    assert run.tiles.xy.min(0).tolist() == [300, 200]
    assert (run.tiles.xy.max(0) + 100).tolist() == [1200, 900]


# --- real slides -------------------------------------------------------------------------


@pytest.mark.data
def test_svs_and_dicom_of_one_region_agree_on_tissue_and_tiles(data: Path, store: Store) -> None:
    paths = [data / "slides" / "cmu-1-small-region.svs"]
    paths.append(Path(discover([str(data / "slides" / "cmu-1-dicom")])[0].path))
    spec = tile_spec()
    masks = [find_tissue(open_slide(p), spec, 0.499).mask for p in paths]
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() >= 0.95
    sets = [{tuple(p) for p in tile(p, store=store).tiles.xy} for p in paths]
    assert len(sets[0] & sets[1]) / len(sets[0] | sets[1]) >= 0.95


@pytest.mark.data
def test_a_fluorescence_slide_says_so(data: Path, store: Store) -> None:
    run = tile(data / "slides" / "fluorescence-dapi.ndpi", store=store)
    assert len(run.tiles) == 0
    assert "fluorescence" in run.warnings[0]
    spec = replace(tile_spec(tissue="none"))
    assert len(tile(data / "slides" / "fluorescence-dapi.ndpi", store=store, spec=spec).tiles) > 50


def test_a_resolution_far_from_the_headers_is_told_at_once(
    slide_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    tile(slide_path, store=store, mpp=0.3, overview=False)
    assert not caplog.text
    tile(slide_path, store=store, mpp=0.2, overview=False)
    assert "0.2 um per pixel was given, its header says 0.5" in caplog.text
