"""The direct reader against the slide below it: pixel for pixel, and honest about the rest."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import synthetic
import tifffile
from conftest import SIZE, open_slide

from pathcli.errors import DataError
from pathcli.slides import direct
from pathcli.types import Slide

FIXTURES = {
    "cmu-1-small-region.svs": ("openslide", "direct: 240 px JPEG tiles"),
    "fluorescence-dapi.ndpi": ("openslide", "direct: 3968x8 px JPEG tiles"),
    "os-1-detail.ome.tif": ("tiffslide", "direct: 512 px JPEG tiles"),
    "absurd-mpp.tiff": ("openslide", "direct: 64 px deflate tiles"),
}


def differences(mine: Slide, theirs: Slide, rng: np.random.Generator, n: int = 6) -> list[int]:
    """Return the largest difference of regions: at pixels of each level, between, and outside."""
    found = []
    for level, step in enumerate(theirs.downsamples):
        width, height = theirs.dimensions[level]  # type: ignore[attr-defined]
        regions = [((0, 0), (min(width, 700), min(height, 700)))]
        for k in range(n):
            size = (int(rng.integers(1, 300)), int(rng.integers(1, 300)))
            x, y = int(rng.integers(-40, width)), int(rng.integers(-40, height))
            if theirs.info.reader == "tiffslide":  # warns of what lies outside
                x, y = (max(0, min(a, m - 300)) for a, m in ((x, width), (y, height)))
            regions.append(((round(x * step) + k % 2, round(y * step)), size))
        for xy, size in regions:
            a, b = (s.read(xy, level, size) for s in (mine, theirs))
            assert a.shape == b.shape == (size[1], size[0], 3)
            found.append(int(cv2.absdiff(a, b).max()))
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every (width of the level, file tile) that is decoded, in order."""
    calls: list[tuple[int, int]] = []
    real = direct.DirectReader._decoded

    def count(
        self: direct.DirectReader, out: np.ndarray, level: direct._Level, index: int
    ) -> np.ndarray:
        calls.append((level.size[0], index))
        return real(self, out, level, index)

    monkeypatch.setattr(direct.DirectReader, "_decoded", count)
    return calls


def fresh(path: Path, decoded: list[tuple[int, int]]) -> direct.DirectReader:
    """Open a slide and forget what opening it decoded."""
    slide = open_slide(path, "direct")
    assert isinstance(slide, direct.DirectReader)
    slide.tiles.clear()
    decoded.clear()
    return slide


# --- agreement ---------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize("name", FIXTURES)
def test_every_shared_slide_has_the_pixels_of_the_reader_below(
    data: Path, name: str, rng: np.random.Generator
) -> None:
    below, why = FIXTURES[name]
    mine, theirs = open_slide(data / "slides" / name), open_slide(data / "slides" / name, below)
    assert (mine.info.reader, mine.why) == ("direct", why)
    assert replace(mine.info, reader=below) == theirs.info
    assert mine.downsamples == theirs.downsamples
    assert set(differences(mine, theirs, rng)) == {0}


@pytest.mark.data
def test_a_dicom_is_left_to_openslide(data: Path) -> None:
    slide = open_slide(data / "slides" / "cmu-1-dicom" / "level-0-frames-0-30.dcm")
    assert slide.info.reader == "openslide"
    assert slide.why == "openslide: dicom is no plain pyramid of TIFF tiles"


@pytest.mark.parametrize("aperio", [True, False])
@pytest.mark.parametrize("photometric", ["ycbcr", "rgb"])
def test_both_photometrics_and_odd_sizes_agree(
    tmp_path: Path, rng: np.random.Generator, photometric: str, aperio: bool
) -> None:
    texture = synthetic.picture(700, 600, (0, 0, 500, 600))
    path = synthetic.big_slide(
        tmp_path / "a.svs", texture, (1501, 1203), photometric=photometric, aperio=aperio
    )
    mine, theirs = open_slide(path), open_slide(path, "openslide")
    assert mine.why == "direct: 256 px JPEG tiles"
    assert sorted(mine._levels) == [0, 1, 2]  # type: ignore[attr-defined]
    assert set(differences(mine, theirs, rng)) == {0}


def jpeg2000(path: Path, compression: int, pixels: np.ndarray) -> Path:
    """Write an Aperio slide of one level in JPEG 2000 tiles."""
    planes = pixels
    if compression == 33003:  # YCbCr
        planes = cv2.cvtColor(pixels, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    across, down = (-(-side // 256) for side in (pixels.shape[1], pixels.shape[0]))
    padded = np.pad(
        planes, ((0, down * 256 - len(planes)), (0, across * 256 - planes.shape[1]), (0, 0)), "edge"
    )
    tiles = (
        imagecodecs.jpeg2k_encode(
            np.ascontiguousarray(padded[y : y + 256, x : x + 256]),
            level=0,
            codecformat="j2k",
            mct=False,
        )
        for y in range(0, down * 256, 256)
        for x in range(0, across * 256, 256)
    )
    with tifffile.TiffWriter(path) as file:
        file.write(
            tiles,
            shape=pixels.shape,
            dtype=np.uint8,
            tile=(256, 256),
            compression=compression,
            photometric="rgb",
            description="Aperio Image Library v11\n1x1 J2K|AppMag = 20|MPP = 0.5",
            metadata=None,
        )
    return path


@pytest.mark.parametrize(("compression", "tolerance"), [(33003, 2), (33005, 0)])
def test_jpeg_2000_agrees(
    tmp_path: Path, rng: np.random.Generator, compression: int, tolerance: int
) -> None:
    pixels = synthetic.picture(700, 500, (100, 100, 500, 300))
    path = jpeg2000(tmp_path / "a.svs", compression, pixels)
    mine, theirs = open_slide(path), open_slide(path, "openslide")
    assert mine.why == "direct: 256 px JPEG 2000 tiles"
    assert max(differences(mine, theirs, rng)) <= tolerance
    assert np.abs(mine.read((0, 0), 0, (700, 500)).astype(int) - pixels).max() <= 2


@pytest.mark.parametrize("compression", [None, "lzw", "deflate"])
def test_lossless_tiles_are_the_pixels_written(tmp_path: Path, compression: str | None) -> None:
    pixels = synthetic.picture(700, 500, (100, 100, 500, 300))
    path = tmp_path / "a.tiff"
    how = {"tile": (128, 256), "compression": compression, "predictor": compression is not None}
    tifffile.imwrite(path, pixels, photometric="rgb", metadata=None, **how)
    slide = open_slide(path)
    assert slide.why.startswith("direct: 256x128 px")
    assert (slide.read((37, 81), 0, (600, 300)) == pixels[81:381, 37:637]).all()


def test_the_levels_of_an_ome_tiff_are_found_below_its_first_image(tmp_path: Path) -> None:
    pixels = synthetic.picture(1200, 900, (100, 100, 500, 300))
    path = tmp_path / "a.ome.tif"
    how = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg"}
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, subifds=1, **how)
        file.write(pixels[::2, ::2], subfiletype=1, **how)
    slide, below = open_slide(path), open_slide(path, "tiffslide")
    assert slide.info.reader == "direct"
    assert sorted(slide._levels) == [0, 1]  # type: ignore[attr-defined]
    a, b = (s.read((200, 100), 1, (300, 200)) for s in (slide, below))
    assert (a == b).all()


def test_grey_and_deep_tiles_are_left_to_the_slide_below(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    grey = synthetic.picture(600, 500, (0, 0, 300, 300))[..., 0]
    tifffile.imwrite(path, grey, tile=(256, 256), metadata=None)
    slide = open_slide(path)
    assert slide.why == "openslide: 1 x 8 bits are not 8-bit RGB"
    with pytest.raises(DataError, match="cannot be read directly: 1 x 8 bits"):
        open_slide(path, "direct")


@pytest.mark.parametrize("different", [1, 99])
def test_a_level_that_looks_different_is_not_trusted(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch, different: int
) -> None:
    real, seen = direct._jpeg, iter(range(99))

    def swapped(page: object) -> Callable[[bytes, int, np.ndarray], tuple[int, ...]]:
        decode = real(page)

        def swap(data: bytes, index: int, out: np.ndarray) -> tuple[int, ...]:
            shape = decode(data, index, out)
            out[:] = out[..., :: -1 if next(seen) < different else 1].copy()
            return shape

        return swap

    monkeypatch.setattr(direct, "_jpeg", swapped)
    slide = open_slide(slide_path)
    assert slide.why == "openslide: its JPEG tiles look different in openslide"


# --- file tiles are decoded once -----------------------------------------------------------


def test_threads_share_what_they_decode(slide_path: Path, decoded: list[tuple[int, int]]) -> None:
    slide = fresh(slide_path, decoded)
    corners = [(x, y) for y in range(60, 900, 100) for x in range(60, 1300, 100)]
    start = threading.Barrier(4)

    def read(part: int) -> None:
        start.wait()
        for xy in corners[part % 2 :: 2]:  # two threads want the same
            slide.read(xy, 0, (100, 100))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert len(set(decoded)) == 6 * 4
    assert len(decoded) <= 6 * 4 + 6  # until it is seen that they want the same


@pytest.mark.parametrize(("size", "step"), [(256, 128), (512, 256), (300, 100)])
def test_overlapping_regions_decode_a_file_tile_once(
    slide_path: Path, decoded: list[tuple[int, int]], size: int, step: int
) -> None:
    slide = fresh(slide_path, decoded)
    for y in range(0, slide.info.height - size + 1, step):
        for x in range(0, slide.info.width - size + 1, step):
            slide.read((x, y), 0, (size, size))
    assert len(set(decoded)) >= 20
    assert len(decoded) <= len(set(decoded)) + 2  # until it is seen that they overlap


@pytest.mark.parametrize("offset", [0, 100])
def test_regions_side_by_side_decode_a_file_tile_once_into_few_places(
    slide_path: Path, decoded: list[tuple[int, int]], offset: int
) -> None:
    slide, most = fresh(slide_path, decoded), 0
    for y in range(offset, 700, 256):
        for x in range(offset, 1200, 256):
            slide.read((x, y), 0, (256, 256))
            most = max(most, slide.tiles.held // (256 * 256 * 3))
    assert len(decoded) == len(set(decoded))
    assert most == (16 if offset else 0)  # at an offset the edges, of which parts are left


def test_a_region_visits_file_tiles_in_order(slide_path: Path, decoded: list[tuple]) -> None:
    fresh(slide_path, decoded).read((200, 200), 0, (600, 500))
    assert [index for _, index in decoded] == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15]


def test_what_a_caller_paints_stays_his(slide_path: Path) -> None:
    slide = open_slide(slide_path)
    slide.read((256, 256), 0, (256, 256))[:] = 0
    assert slide.read((256, 256), 0, (256, 256)).any()


# --- broken files --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["noise", "half"])
def test_a_corrupt_file_tile_costs_its_own_regions_only(slide_path: Path, how: str) -> None:
    if how == "noise":
        synthetic.break_tile(slide_path, 8)  # x 512..767, y 256..511
    else:
        synthetic.break_tile(slide_path, 8, part=0.5)  # libjpeg warns only
    slide = open_slide(slide_path)
    assert slide.info.reader == "direct"
    for _ in range(2):
        with pytest.raises(DataError, match=r"region \(600, 300\) of level 0 cannot be decoded"):
            slide.read((600, 300), 0, (64, 64))
    whole = synthetic.picture(*SIZE, (256, 192, 640, 512)).astype(int)
    for x, y in ((440, 300), (768, 300), (600, 512)):
        seen = slide.read((x, y), 0, (64, 64)).astype(int)
        assert np.abs(seen - whole[y : y + 64, x : x + 64]).mean() < 12


def test_a_truncated_tail_costs_only_what_it_held(tmp_path: Path) -> None:
    texture = synthetic.picture(700, 600, (0, 0, 500, 600))
    path = synthetic.big_slide(tmp_path / "a.tiff", texture, (1501, 1203), aperio=False)
    whole = open_slide(shutil.copy(path, tmp_path / "whole.tiff"), "openslide")
    synthetic.cut_tail(path)
    slide = open_slide(path)
    assert slide.info.reader == "direct"
    assert (slide.read((0, 0), 0, (512, 300)) == whole.read((0, 0), 0, (512, 300))).all()
    with pytest.raises(DataError, match=r"region \(1100, 1000\) of level 0 cannot be decoded"):
        slide.read((1100, 1000), 0, (300, 200))
    assert (slide.read((600, 300), 0, (99, 99)) == whole.read((600, 300), 0, (99, 99))).all()


@pytest.mark.parametrize("aperio", [True, False])
def test_a_tile_never_written_is_what_openslide_makes_of_it(tmp_path: Path, aperio: bool) -> None:
    texture = synthetic.picture(700, 600, (0, 0, 500, 600))
    path = synthetic.big_slide(tmp_path / "a.tiff", texture, (1501, 1203), aperio=aperio)
    synthetic.forget_tile(path, 8)
    mine, theirs = open_slide(path), open_slide(path, "openslide")
    assert mine.info.reader == "direct"
    for xy in ((512, 256), (450, 200), (100, 100)):
        a, b = (s.read(xy, 0, (200, 150)) for s in (mine, theirs))
        assert (a == b).all()


def test_a_list_of_tiles_that_is_cut_short_is_left_to_the_slide_below(slide_path: Path) -> None:
    with tifffile.TiffFile(slide_path, mode="r+b") as file:
        counts = file.pages[0].tags["TileByteCounts"]
        counts.overwrite(counts.value[:-3])
    slide = open_slide(slide_path)
    assert slide.why == "openslide: its list of tiles is cut short"
    assert slide.read((1300, 1000), 0, (200, 100)).shape == (100, 200, 3)


def test_a_slide_without_a_file_says_so_and_a_closed_one_gives_nothing(slide_path: Path) -> None:
    slide = open_slide(slide_path)
    slide.close()
    with pytest.raises(Exception, match=r"."):
        slide.read((0, 0), 0, (10, 10))


def test_a_remote_slide_is_left_to_tiffslide(slide_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/direct.tiff", slide_path.read_bytes())
    slide = open_slide("memory://bucket/direct.tiff")
    assert (slide.info.reader, slide.why) == ("tiffslide", "tiffslide: it is not on this machine")


def test_a_big_slide_has_tissue_in_half_of_it(tmp_path: Path) -> None:
    pixels = synthetic.picture(1400, 1300, (0, 0, 900, 1300))
    size = (4000, 3000)
    slide = open_slide(synthetic.big_slide(tmp_path / "big.svs", pixels, size))
    assert (slide.info.width, slide.info.height, slide.info.mpp) == (*size, 0.5)
    assert slide.downsamples == pytest.approx((1, 4, 16), rel=0.01)
    thumb = slide.read((0, 0), 2, (250, 187)).astype(int)
    tissue = thumb[..., 1] < 170
    assert 0.42 < tissue.mean() < 0.58
    assert tissue[93, 125]
    assert not tissue[3, 3]
