"""Quick masks and overviews: equal to their plain definitions, cell for cell."""

import hashlib
import re
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import synthetic
from conftest import open_slide
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pathcli.errors import DataError
from pathcli.slides import masks, overview, pens, quality, roi, stains, tissue, tissue_methods
from pathcli.slides.stains import dark_background
from pathcli.slides.tissue import Otsu, Tissue
from pathcli.types import Slide, TileSpec

# --- plain definitions -------------------------------------------------------------------


def without_small(mask: np.ndarray, least: float) -> np.ndarray:
    """Label every island; keep those of `least` cells."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= least
    keep[0] = False
    return keep[labels].astype(np.uint8)


def chroma(rgb: np.ndarray, sigma: float) -> np.ndarray:
    smooth = cv2.GaussianBlur(rgb, (0, 0), sigma)
    return smooth.max(axis=2) - smooth.min(axis=2)


def otsu(rgb: np.ndarray, um: float) -> np.ndarray:
    """Return the mask of `Otsu` with its defaults, step by step."""
    found = chroma(rgb, max(0.3, 8 / um))
    level, _ = cv2.threshold(found, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    side = min(2 * int(24 / um / 2) + 1, 255)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
    inside = (found > min(max(level, 10), 17)).astype(np.uint8)
    closed = cv2.morphologyEx(inside, cv2.MORPH_CLOSE, kernel)
    cell = (um / 1000) ** 2
    solid = without_small(closed, min(0.01 / cell, closed.size / 10))
    return without_small(1 - solid, 0.005 / cell) == 0


def dark(rgb: np.ndarray) -> bool:
    black, glass = rgb.max(axis=2) < 50, rgb.min(axis=2) > 180
    return bool(black.mean() > 0.5 and glass.mean() < 0.1 * (1 - black.mean()))


def whole_overview(slide: Slide, down: float) -> np.ndarray:
    """Read the best level in stripes of at most 16 megapixels and average each at once."""
    level = overview.best_level(slide, down)
    step, info = slide.downsamples[level], slide.info
    width, height = max(1, round(info.width / down)), max(1, round(info.height / down))
    w, h = round(info.width / step), round(info.height / step)
    stripes = -(-w * h // overview._READ_PX)
    edges = np.linspace(0, height, min(stripes, height) + 1).round().astype(int).tolist()
    parts = []
    for a, b in pairwise(edges):
        top, bottom = round(a * h / height), round(b * h / height)
        region = slide.read((0, round(top * step)), level, (w, bottom - top))
        parts.append(cv2.resize(region, (width, b - a), interpolation=cv2.INTER_AREA))
    return np.concatenate(parts)


def spots(rng: np.random.Generator, shape: tuple[int, int], sigma: float, part: float) -> object:
    """Return a random mask 0 or 1 whose islands are about `sigma` cells wide."""
    grain = rng.random(shape, np.float32)
    smooth = cv2.GaussianBlur(grain, (0, 0), sigma) if sigma else grain
    return (smooth < np.quantile(smooth, part)).astype(np.uint8)


# --- equal to them -----------------------------------------------------------------------


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([0, 0.7, 2]),
    st.floats(0, 1),
    st.floats(0, 60),
    st.integers(0, 2**32),
)
def test_outlines_and_labels_drop_the_same_islands(
    height: int, width: int, sigma: float, part: float, least: float, seed: int
) -> None:
    mask = spots(np.random.default_rng(seed), (height, width), sigma, part)
    expected = without_small(mask, least)
    for way in (masks._by_outline, masks._by_label, masks.without_small):
        assert np.array_equal(way(mask, least), expected), way.__name__


def test_a_ring_around_an_island_is_dropped_without_it() -> None:
    mask = np.zeros((30, 30), np.uint8)
    mask[2:28, 2:28], mask[3:27, 3:27] = 1, 0  # 100 cells
    mask[5:25, 5:25] = 1  # 400 cells
    left = masks._by_outline(mask, 101)
    assert left.sum() == 400
    assert left[5:25, 5:25].all()


@pytest.mark.parametrize("sigma", [0.3, 1, 2, 7.5])
@pytest.mark.parametrize("shape", [(1, 9), (40, 1), (7, 700), (333, 50)])
def test_stripes_give_the_chroma_of_the_whole(
    rng: np.random.Generator,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    sigma: float,
) -> None:
    rgb = rng.integers(0, 256, (*shape, 3)).astype(np.uint8)
    for px in (1, 500, 10**6):
        monkeypatch.setattr(masks, "_STRIPE_PX", px)
        assert np.array_equal(masks.smooth_chroma(rgb, sigma), chroma(rgb, sigma))


@pytest.mark.data
@pytest.mark.parametrize("name", ["green-pen", "red-pen", "lung-rgb"])
@pytest.mark.parametrize("um", [2.0, 4.0, 40.0])
def test_otsu_is_what_it_was_on_real_thumbnails(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, um: float
) -> None:
    path = data / "slides" / "thumbnails" / f"tcga-{name}.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    monkeypatch.setattr(masks, "_STRIPE_PX", 30_000)
    assert np.array_equal(Otsu().mask(pixels, um), otsu(pixels, um))


@pytest.mark.parametrize("limits", [pens._CORES, pens._RIMS])
def test_every_pixel_is_looked_up_in_the_ranges_of_ink(
    limits: dict[str, tuple[pens._Range, ...]], rng: np.random.Generator
) -> None:
    picture = rng.integers(0, 256, (300, 400, 3)).astype(np.uint8)
    hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL).astype(int)
    found = dict(pens._within(picture, limits))
    assert list(found) == list(limits)
    for name, ranges in limits.items():
        expected = np.zeros(hsv.shape[:2], bool)
        for (low, high), *others in ranges:
            hue, (first, last) = (
                hsv[..., 0],
                (round(degrees / 360 * 255) for degrees in (low, high)),
            )
            inside = (hue >= first) & (hue <= last)
            if low > high:
                inside = (hue >= first) | (hue <= last)
            for channel, (least, most) in enumerate(others, 1):
                inside &= (hsv[..., channel] >= least) & (hsv[..., channel] <= most)
            expected |= inside
        assert np.array_equal(found[name] > 0, expected), name
    rarest = min(np.count_nonzero(mask) for mask in found.values())
    assert len(dict(pens._within(picture, limits, rarest + 1))) == len(limits) - 1


def test_a_dark_background_is_told_as_by_looking_at_all(rng: np.random.Generator) -> None:
    told = []
    for black in (0.0, 0.4, 0.499, 0.5, 0.501, 0.8, 1.0):
        for bright in (60, 170, 181, 255):
            pixels = np.full((1000, 300, 3), bright, np.uint8)
            pixels[: round(1000 * black)] = 20
            for turned in (pixels, pixels[::-1], pixels[rng.permutation(1000)]):
                assert dark_background(turned) == dark(turned)
            told.append(dark(pixels))
    assert 0 < sum(told) < len(told)


def test_the_share_of_tissue_is_that_of_the_summed_area_table(rng: np.random.Generator) -> None:
    mask = rng.random((37, 53)) < 0.5
    found = Tissue(mask, np.zeros((37, 53, 3), np.uint8), (8.1, 7.9))
    xy = rng.integers(-60, 480, (400, 2))
    size = (61.7, 33.2)
    fine = np.kron(mask, np.ones((79, 81)))  # a tenth of a level-0 px
    table = np.pad(fine.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    low = np.clip(np.rint(xy * 10), 0, fine.shape[::-1]).astype(int)
    high = np.clip(np.rint((xy + size) * 10), 0, fine.shape[::-1]).astype(int)
    area = (
        table[high[:, 1], high[:, 0]]
        - table[low[:, 1], high[:, 0]]
        - table[high[:, 1], low[:, 0]]
        + table[low[:, 1], low[:, 0]]
    )
    assert np.allclose(found.fraction(xy, size), area / (617 * 332), atol=1e-9)


@pytest.mark.parametrize("size", [(1536, 1280), (1537, 1283)])
@pytest.mark.parametrize("down", [2, 4, 5.3, 16])
def test_blocks_in_threads_give_the_overview_of_whole_stripes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], down: float
) -> None:
    path = synthetic.slide(tmp_path / "s.svs", synthetic.picture(*size, (100, 90, 1300, 1100)))
    slide = open_slide(path)
    for stripe, block, threads in ((16_000_000, 1024, 1), (300_000, 100, 3)):
        monkeypatch.setattr(overview, "_READ_PX", stripe)
        monkeypatch.setattr(overview, "_BLOCK_PX", block)
        monkeypatch.setattr(cv2, "getNumThreads", lambda threads=threads: threads)
        picture, lost = overview.overview(slide, down)
        assert not lost
        assert np.array_equal(picture, whole_overview(slide, down))


def test_a_stripe_with_a_bad_block_is_saved_by_quarters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = synthetic.slide(
        tmp_path / "s.svs", synthetic.picture(1024, 1024, (0, 0, 1024, 1024)), levels=1
    )
    whole, _ = overview.overview(open_slide(path), 4)
    synthetic.break_tile(path, 5)  # of 4 x 4: x and y 256..511
    monkeypatch.setattr(overview, "_BLOCK_PX", 300)
    picture, lost = overview.overview(open_slide(path), 4)
    assert lost == 1 / 16
    assert (picture[64:128, 64:128] == 255).all()
    rest = np.ones((256, 256), bool)
    rest[64:128, 64:128] = False
    assert np.array_equal(picture[rest], whole[rest])


def test_a_file_that_is_gone_is_lost_as_a_whole(tmp_path: Path) -> None:
    class Gone:
        downsamples = (1.0,)
        info = open_slide(synthetic_png(tmp_path)).info

        def read(self, *_: object) -> np.ndarray:
            msg = "gone"
            raise DataError(msg)

    assert overview.overview(Gone(), 3)[1] == 1


def synthetic_png(folder: Path) -> Path:
    Image.fromarray(synthetic.picture(400, 300, (0, 0, 10, 10))).save(folder / "a.png")
    return folder / "a.png"


# --- what decides pixels is versioned ----------------------------------------------------

_SPEED_OR_WORDS = {
    masks: {"_STRIPE_PX", "_RAGGED"},
    overview: {"_BLOCK_PX", "_THREADS", "_STRIPES"},
    quality: {"_MANY", "_BLOCK_PX"},
    stains: {"SAID"},
    tissue: {"_INKED", "_MOST_LOST", "DARK_BACKGROUND"},
    tissue_methods: {"_INKED", "SAID"},
    pens: {"PENS", "_STRIPE_PX"},
    roi: {"SUFFIXES", "_OUTSIDE"},
}
PINNED = {"otsu 2, hsv 1, clam 1, auto 1, none 1, flags 1, grid 1": "ecc5b188f137"}


def constants(module: ModuleType, without: set[str]) -> list[str]:
    found = vars(module).items()
    return [
        f"{module.__name__}.{name} = {sorted(value) if isinstance(value, set) else value!r}"
        for name, value in sorted(found)
        if re.fullmatch(r"_?[A-Z][A-Z0-9_]*", name)
        and name not in without
        and isinstance(value, int | float | str | tuple | dict | set)
        and name != "TYPE_CHECKING"
    ]


def test_a_constant_that_decides_pixels_changes_with_a_version_only() -> None:
    """The digest of a TileSpec holds parameters and versions, and none of these constants."""
    built = (Otsu, tissue.HSV, tissue_methods.Clam, tissue_methods.Auto, tissue.Everything)
    names = ("otsu", "hsv", "clam", "auto", "none")
    versions = [f"{name} {way.version}" for name, way in zip(names, built, strict=True)]
    rules = re.search(r"rules are version (\d+)", " ".join(quality.__doc__.split()))
    lines = [line for of in _SPEED_OR_WORDS.items() for line in constants(*of)]
    state = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]
    now = ", ".join([*versions, f"flags {rules[1]}", f"grid {TileSpec().grid}"])
    assert PINNED.get(now) == state, (
        "a constant changed: raise the `version` of the methods that use it, then pin "
        f"{now!r}: {state!r}. The constants are:\n" + "\n".join(lines)
    )
