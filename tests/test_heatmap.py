import json
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import synthetic
from conftest import SIZE, TISSUE_BOX, open_slide
from PIL import Image
from scipy.stats import percentileofscore
from shapely import box

from pathcli.errors import DataError, UsageError
from pathcli.mil.heatmap import (
    COLOURS,
    draw_heatmap,
    extreme_tiles,
    percentile,
    strip,
    write_attention_geojson,
)
from pathcli.slides.overlay import LONG_SIDE
from pathcli.slides.tiling import grid, read_tile, tile_spec
from pathcli.types import Slide, Tiles, TileStatus

BOUNDS = (300, 200, 900, 700)


def tiles_of(
    slide: Slide, size: int, mpp: float = 0.5, step: int | None = None, at: float = 0.5
) -> Tiles:
    """All tiles of a slide whose level-0 pixels are taken for `at` um."""
    spec = tile_spec(size, mpp, step_px=step, tissue="none")
    xy = grid(spec, at, slide.info.bounds)
    status = np.zeros(len(xy), np.uint8)
    return Tiles("slide", xy, status, spec, at, slide.info.width, slide.info.height, 1.0)


def picture(drawn: np.ndarray, bounds: tuple[int, int, int, int]) -> np.ndarray:
    """Return what was drawn without the legend below it."""
    return drawn[: round(LONG_SIDE * bounds[3] / bounds[2])]


def colour(percent: float) -> np.ndarray:
    return np.array(mpl.colormaps[COLOURS](percent / 100)[:3]) * 255


def extent(mask: np.ndarray) -> list[float]:
    """Return x0, y0, x1, y1 of the true pixels, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def hottest(shown: np.ndarray, attention: np.ndarray) -> list[float]:
    top = colour(percentile(attention).max())
    return extent(np.abs(shown - top).max(2) < 2)


def scanned(bounds: tuple[int, int, int, int], x0: float, y0: float, x1: float, y1: float) -> list:
    """Return a level-0 rectangle in pixels of the picture of `bounds`."""
    scale = LONG_SIDE / bounds[2]
    return [scale * v for v in (x0 - bounds[0], y0 - bounds[1], x1 - bounds[0], y1 - bounds[1])]


@pytest.fixture
def bounded(tmp_path: Path) -> Slide:
    """A scan of only a part of its level 0, with tissue at (400, 300) to (900, 700)."""
    pixels = np.full((1100, 1500, 3), 255, np.uint8)
    pixels[200:900, 300:1200] = synthetic.picture(900, 700, (100, 100, 500, 400))
    Image.fromarray(pixels).save(tmp_path / "bounded.png")
    slide = open_slide(tmp_path / "bounded.png")
    slide.info = replace(slide.info, bounds=BOUNDS)
    return slide


# --- alignment ---------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.5, 0.25, 0.37, 1.0])
def test_heat_is_drawn_where_its_tile_is(slide_path: Path, at: float) -> None:
    slide = open_slide(slide_path)
    tiles = tiles_of(slide, 64, at=at)
    for row in (0, len(tiles) // 3, len(tiles) - 1):
        attention = np.zeros(len(tiles))
        attention[row] = 1
        drawn = draw_heatmap(slide, tiles, attention, strength=1)
        x, y = tiles.xy[row]
        expected = scanned((0, 0, *SIZE), x, y, x + tiles.side0, y + tiles.side0)
        assert np.allclose(hottest(picture(drawn, (0, 0, *SIZE)), attention), expected, atol=2)


def test_heat_lies_on_the_tissue_it_is_of(slide_path: Path) -> None:
    slide = open_slide(slide_path)
    tiles = tiles_of(slide, 64)  # the box of the tissue is 10 x 8 of these tiles
    x, y, w, h = TISSUE_BOX
    xy = tiles.xy
    within = ((xy >= (x, y)) & (xy < (x + w, y + h))).all(1)
    drawn = picture(draw_heatmap(slide, tiles, within * 0.1, strength=1), (0, 0, *SIZE))
    scan = picture(draw_heatmap(slide, tiles, within * 0.1, strength=0), (0, 0, *SIZE))
    assert within.sum() == 80
    tissue = extent(np.ptp(scan.astype(int), axis=2) > 40)
    assert np.allclose(hottest(drawn, within), tissue, atol=2)


def test_heat_lies_on_the_tissue_of_a_scan_that_begins_elsewhere(bounded: Slide) -> None:
    tiles = tiles_of(bounded, 50)
    xy = tiles.xy
    within = ((xy >= (400, 300)) & (xy < (900, 700))).all(1)
    drawn = picture(draw_heatmap(bounded, tiles, within * 1.0, strength=1), BOUNDS)
    scan = picture(draw_heatmap(bounded, tiles, within * 1.0, strength=0), BOUNDS)
    tissue = extent(np.ptp(scan.astype(int), axis=2) > 40)
    assert drawn.shape == scan.shape == (round(1600 * 7 / 9), 1600, 3)
    assert np.allclose(hottest(drawn, within), tissue, atol=3)
    assert np.allclose(tissue, scanned(BOUNDS, 400, 300, 900, 700), atol=3)


def test_a_lesion_is_outlined_where_it_is(bounded: Slide) -> None:
    tiles = tiles_of(bounded, 50)
    flat = np.ones(len(tiles))
    plain = draw_heatmap(bounded, tiles, flat)
    drawn = draw_heatmap(bounded, tiles, flat, lesions=[box(500, 400, 700, 650)])
    changed = extent(picture((plain != drawn).any(2), BOUNDS))
    expected = np.array(scanned(BOUNDS, 500, 400, 700, 650))
    assert np.allclose(changed, expected, atol=4)
    assert (plain != drawn)[round(1600 * 7 / 9) :].any()  # the legend names it


# --- colours -----------------------------------------------------------------------------


def test_a_percentile_is_the_mean_rank_of_scipy(rng: np.random.Generator) -> None:
    attention = rng.integers(0, 9, 50) / 10
    expected = percentileofscore(attention, attention, kind="mean")
    assert np.allclose(percentile(attention), expected)
    assert percentile(np.ones(7)).tolist() == [50] * 7
    assert percentile(np.array([3e-9])).tolist() == [50]


def test_overlapping_tiles_are_averaged(bounded: Slide) -> None:
    tiles = tiles_of(bounded, 200, step=100)
    two = replace(tiles, xy=tiles.xy[:2], status=tiles.status[:2])  # at x 300 and 400
    drawn = draw_heatmap(bounded, two, np.array([0.1, 0.9]), strength=1)
    scale = 1600 / 900
    seen = [drawn[50, round((x - 300) * scale)] for x in (350, 450, 550, 650)]
    for pixel, percent in zip(seen, (25, 50, 75), strict=False):
        assert np.allclose(pixel, colour(percent), atol=1)
    assert (seen[3] > 230).all()  # glass: no tile, no colour


def test_colour_is_mixed_with_the_scan(bounded: Slide) -> None:
    tiles = tiles_of(bounded, 50)
    flat = np.ones(len(tiles))
    scan = draw_heatmap(bounded, tiles, flat, strength=0).astype(float)
    drawn = draw_heatmap(bounded, tiles, flat, strength=0.3)
    at = (slice(100, 900), slice(100, 1500))
    assert np.allclose(drawn[at], 0.7 * scan[at] + 0.3 * colour(50), atol=1)


@pytest.mark.parametrize("at", [0.37, 0.243, 0.5031])
def test_no_gap_shows_between_tiles_whose_side_is_no_whole_number(
    slide_path: Path, at: float
) -> None:
    slide = open_slide(slide_path)
    tiles = tiles_of(slide, 33, at=at)
    flat = np.ones(len(tiles))
    drawn = draw_heatmap(slide, tiles, flat, strength=1)
    x1, y1 = np.rint((tiles.xy.max(0) + tiles.side0) * 1600 / 1500).astype(int)
    assert np.abs(drawn[: y1 - 150, :x1] - colour(50)).max() < 2  # above the scale bar


def test_an_unreadable_tile_shows_the_scan(bounded: Slide) -> None:
    tiles = tiles_of(bounded, 100)
    tiles.status[0] = TileStatus.UNREADABLE
    drawn = draw_heatmap(bounded, tiles, np.arange(len(tiles) - 1.0), strength=1)
    assert (drawn[:170, :170] > 230).all()
    assert np.allclose(drawn[50, 250], colour(percentile(np.arange(len(tiles) - 1.0))[0]), atol=1)


def test_attention_that_does_not_fit_is_refused(bounded: Slide) -> None:
    tiles = tiles_of(bounded, 100)
    with pytest.raises(UsageError, match="does not fit 63 readable tiles"):
        draw_heatmap(bounded, tiles, np.ones(62))
    with pytest.raises(DataError, match="nan or infinite"):
        draw_heatmap(bounded, tiles, np.full(63, np.nan))
    tiles.status[:] = TileStatus.UNREADABLE
    with pytest.raises(DataError, match="no readable tile"):
        draw_heatmap(bounded, tiles, np.ones(0))


# --- GeoJSON -----------------------------------------------------------------------------


def test_geojson_has_a_square_per_readable_tile_from_the_bounds(
    bounded: Slide, tmp_path: Path
) -> None:
    tiles = tiles_of(bounded, 100, at=0.37)
    tiles.status[1] = TileStatus.UNREADABLE
    attention = np.arange(len(tiles) - 1) / 1000
    write_attention_geojson(tmp_path / "a.geojson", tiles, attention, BOUNDS)
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    assert len(features) == len(tiles) - 1
    for one, row in zip(features[:2], (0, 2), strict=True):
        (ring,) = one["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
        low, high = tiles.xy[row] - BOUNDS[:2], tiles.xy[row] - BOUNDS[:2] + 50 / 0.37
        assert np.allclose(np.min(ring, 0), low, atol=0.051)
        assert np.allclose(np.max(ring, 0), high, atol=0.051)
        assert one["properties"]["objectType"] == "detection"
    measured = features[1]["properties"]["measurements"]
    assert measured["attention"] == 0.001
    assert measured["attention_percentile"] == pytest.approx(150 / len(attention), abs=1e-4)


def test_geojson_of_the_most_attended_tiles(bounded: Slide, tmp_path: Path) -> None:
    tiles = tiles_of(bounded, 100)
    attention = np.arange(63.0)[::-1] % 50
    write_attention_geojson(tmp_path / "a.geojson", tiles, attention, BOUNDS, most=3)
    features = json.loads((tmp_path / "a.geojson").read_text())["features"]
    measured = [f["properties"]["measurements"] for f in features]
    assert [m["attention"] for m in measured] == [49, 48, 47]
    assert measured[0]["attention_percentile"] > 99


# --- extreme tiles -----------------------------------------------------------------------


def test_extreme_tiles_are_the_highest_and_the_lowest_with_their_pixels(
    slide_path: Path, rng: np.random.Generator
) -> None:
    slide = open_slide(slide_path)
    tiles = tiles_of(slide, 100)
    tiles.status[7] = TileStatus.UNREADABLE
    attention = rng.permutation(len(tiles) - 1) / 1000
    most, least = extreme_tiles(slide, tiles, attention, 4)
    n = len(attention)
    assert [t.attention for t in most] == [(n - i) / 1000 for i in (1, 2, 3, 4)]
    assert [t.attention for t in least] == [0, 0.001, 0.002, 0.003]
    assert [t.rank for t in most] == [1, 2, 3, 4]
    assert [t.rank for t in least] == [n, n - 1, n - 2, n - 3]
    whole = np.insert(attention, 7, np.nan)
    for one in (*most, *least):
        assert whole[one.row] == one.attention
        assert one.xy == tuple(tiles.xy[one.row])
        assert (one.pixels == read_tile(slide, one.xy, tiles.spec, 0.5)).all()


@pytest.mark.parametrize(("n", "sizes"), [(1, (1, 0)), (3, (3, 0)), (5, (4, 1)), (8, (4, 4))])
def test_no_tile_is_both_most_and_least_attended(
    slide_path: Path, n: int, sizes: tuple[int, int]
) -> None:
    slide = open_slide(slide_path)
    tiles = tiles_of(slide, 32)
    few = replace(tiles, xy=tiles.xy[:n], status=tiles.status[:n])
    most, least = extreme_tiles(slide, few, np.zeros(n), 4)
    assert (len(most), len(least)) == sizes
    assert len({t.row for t in (*most, *least)}) == sum(sizes)


def test_a_strip_puts_tiles_in_rows() -> None:
    tiles = [np.full((20, 20, 3), i, np.uint8) for i in range(7)]
    sheet = strip(tiles, columns=5)
    assert sheet.shape == (44, 116, 3)
    assert (sheet[:20, 24:44] == 1).all()
    assert (sheet[24:, 24:44] == 6).all()
    assert (sheet[20:24] == 255).all()
    assert (sheet[24:, 48:] == 255).all()
    assert strip(tiles[:2]).shape == (20, 44, 3)
    with pytest.raises(UsageError, match="no tile"):
        strip([])
