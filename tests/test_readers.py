import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import SIZE, open_slide
from PIL import Image

from pathcli.errors import DataError
from pathcli.slides import discover
from pathcli.slides.readers import slide_mpp
from pathcli.slides.tiling import read_tile, tile_spec


def test_a_painted_svs_has_its_size_levels_and_resolution(slide_path: Path) -> None:
    slide = open_slide(slide_path)
    assert (slide.info.width, slide.info.height) == SIZE
    assert slide.info.vendor == "aperio"
    assert slide.info.mpp == 0.5
    assert slide.info.objective == 20
    assert len(slide.downsamples) == 3


def test_pixels_of_a_region_are_those_painted(slide_path: Path) -> None:
    painted = synthetic.picture(*SIZE, (256, 192, 640, 512)).astype(int)
    region = open_slide(slide_path).read((300, 250), 0, (200, 100)).astype(int)
    assert region.shape == (100, 200, 3)
    assert np.abs(region - painted[250:350, 300:500]).mean() < 9  # JPEG


def test_a_generic_tiff_without_resolution_needs_it_given(tmp_path: Path) -> None:
    pixels = synthetic.picture(600, 500, (0, 0, 300, 300))
    path = synthetic.slide(tmp_path / "x.tiff", pixels, mpp=None, aperio=False)
    slide = open_slide(path)
    assert slide.info.mpp is None
    with pytest.raises(DataError, match="--slide-mpp"):
        slide_mpp(slide)
    assert slide_mpp(slide, 0.25) == 0.25


@pytest.mark.parametrize("given", [0.0, -1.0, 352.9, 0.01, float("nan"), float("inf")])
def test_an_absurd_resolution_is_refused(slide_path: Path, given: float) -> None:
    with pytest.raises(DataError, match=r"outside 0\.05-20"):
        slide_mpp(open_slide(slide_path), given)


def test_a_plain_image_is_a_slide_of_one_level(tmp_path: Path) -> None:
    path = tmp_path / "patch.png"
    Image.fromarray(synthetic.picture(300, 200, (0, 0, 100, 100))).save(path, dpi=(96, 96))
    slide = open_slide(path)
    assert slide.downsamples == (1.0,)
    assert slide.info.mpp is None
    assert slide.read((10, 20), 0, (30, 40)).shape == (40, 30, 3)


def test_transparent_pixels_are_white(tmp_path: Path) -> None:
    Image.new("RGBA", (50, 50), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (open_slide(tmp_path / "clear.png").read((0, 0), 0, (50, 50)) == 255).all()


def test_a_sixteen_bit_image_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match="8-bit"):
        open_slide(tmp_path / "deep.png")


def test_a_remote_tiff_is_read_through_fsspec(slide_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/far.tiff", slide_path.read_bytes())
    far, near = open_slide("memory://bucket/far.tiff"), open_slide(slide_path)
    assert (far.info.reader, far.info.mpp) == ("tiffslide", 0.5)
    assert far.info.item.startswith("far-")
    regions = [s.read((300, 250), 0, (100, 80)).astype(int) for s in (far, near)]
    assert np.abs(regions[0] - regions[1]).max() <= 1
    with pytest.raises(DataError, match="memory://bucket/none"):
        open_slide("memory://bucket/none.tiff")


@pytest.mark.parametrize("name", ["x.svs", "x.png", "x.ndpi", "x.ome.tif"])
@pytest.mark.parametrize("body", [b"", b"not a slide at all" * 99])
def test_what_is_no_slide_says_so_in_one_line(tmp_path: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError) as caught:
        open_slide(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_two_slides_of_one_name_are_two_items_and_a_moved_one_is_the_same(
    slide_path: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other" / slide_path.name
    other.parent.mkdir()
    synthetic.slide(other, synthetic.picture(*SIZE, (0, 0, 500, 500), seed=1))
    first = open_slide(slide_path).info.item
    assert open_slide(other).info.item != first
    (tmp_path / "archive").mkdir()
    moved = slide_path.rename(tmp_path / "archive" / slide_path.name)
    assert open_slide(moved).info.item == first


def test_nothing_of_the_header_is_kept_but_geometry(tmp_path: Path) -> None:
    import tifffile

    path = tmp_path / "case.svs"
    header = "Aperio Image Library v1\n600x500 |AppMag = 20|MPP = 0.5|Patient = Jane Doe"
    with tifffile.TiffWriter(path) as file:
        file.write(
            synthetic.picture(600, 500, (0, 0, 300, 300)),
            description=header,
            tile=(256, 256),
            compression="jpeg",
            metadata=None,
        )
    slide = open_slide(path)
    assert "Jane" not in json.dumps(asdict(slide.info))
    assert set(asdict(slide.info)) == {
        *("item", "fingerprint", "width", "height", "mpp"),
        *("vendor", "objective", "bounds", "reader"),
    }


def test_a_corrupt_file_tile_fails_its_own_region_only(slide_path: Path) -> None:
    synthetic.break_tile(slide_path, 8)  # file tile (2, 1): x 512..767, y 256..511
    slide = open_slide(slide_path)
    spec = tile_spec(64, 0.5)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_tile(slide, (600, 300), spec, 0.5)
    assert read_tile(slide, (300, 300), spec, 0.5).shape == (64, 64, 3)


# --- discover ----------------------------------------------------------------------------


def test_folders_globs_files_and_lists_are_expanded_once_each(
    slide_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cohort" / "case 1"
    folder.mkdir(parents=True)
    inside = slide_path.rename(folder / "a.svs")
    (folder / "notes.txt").write_text("x")
    (tmp_path / "list.csv").write_text("wsi,mpp\ncohort/case 1/a.svs,0.25\n")
    given = [str(tmp_path / "cohort"), str(tmp_path / "**" / "*.svs"), str(inside)]
    assert [f.path for f in discover(given)] == [inside]
    assert discover([str(tmp_path / "list.csv")])[0].mpp == 0.25
    assert discover(["s3://bucket/x.tiff"])[0].path == "s3://bucket/x.tiff"


def test_a_folder_of_plain_images_counts_them_only_without_slides(
    slide_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "thumb.png")
    assert [f.path.name for f in discover([str(folder)])] == ["thumb.png"]  # type: ignore[union-attr]
    slide_path.rename(folder / "a.svs")
    assert [f.path.name for f in discover([str(folder)])] == ["a.svs"]  # type: ignore[union-attr]


def test_an_mrxs_and_its_folder_are_one_slide(tmp_path: Path) -> None:
    (tmp_path / "m.mrxs").write_bytes(b"x")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "Slidedat.ini").write_text("[GENERAL]")
    (tmp_path / "m" / "Data0000.dat").write_bytes(b"x")
    assert [f.path for f in discover([str(tmp_path)])] == [tmp_path / "m.mrxs"]
    assert [f.path for f in discover([str(tmp_path / "m")])] == [tmp_path / "m.mrxs"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("slide\na.svs\n", "header wsi"),
        ("wsi,mpp\n", "names no slide"),
        ("wsi,mmp\na.svs,1\n", "not wsi,mmp"),
        ("wsi,mpp\na.svs,352\n", "line 2: mpp '352'"),
        ("wsi,mpp\na.svs,fine\n", "line 2: mpp 'fine'"),
    ],
)
def test_a_bad_list_is_one_line(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "list.csv").write_text(text)
    (found,) = discover([str(tmp_path / "list.csv")])
    with pytest.raises(DataError, match=match):
        found.checked()


def test_an_input_without_a_slide_is_a_fault_and_the_rest_goes_on(
    slide_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    found = discover([str(tmp_path / "none"), str(tmp_path / "*.ndpi"), str(slide_path)])
    faults = [str(f.fault) for f in found]
    assert "no slides in this folder" in faults[0]
    assert "nothing matches" in faults[1]
    assert faults[2] == "None"


def test_spaces_in_a_list_are_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("wsi, mpp\na.svs, 0.25\na.svs, 0.5\n")
    assert [f.mpp for f in discover([str(tmp_path / "list.csv")])] == [0.25, 0.5]


def test_a_list_may_name_folders(slide_path: Path, tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    inside = slide_path.rename(tmp_path / "case" / "a.svs")
    (tmp_path / "list.csv").write_text("wsi,mpp\ncase,0.3\n")
    (found,) = discover([str(tmp_path / "list.csv")])
    assert (found.path, found.mpp) == (inside, 0.3)


@pytest.mark.parametrize(
    "body", [b"DICM" * 50, b"\0" * 128 + b"DICM" + b"\x08\0\x18\0UI\xff\xff" * 9]
)
def test_a_damaged_dicom_is_one_line_that_quotes_no_header(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "a.dcm").write_bytes(body + b"Jane Doe")
    (found,) = discover([str(tmp_path / "case")])
    with pytest.raises(DataError) as caught:
        open_slide(found.path)
    assert "Jane" not in str(caught.value)


def test_an_address_is_shown_without_its_secrets() -> None:
    with pytest.raises(DataError) as caught:
        open_slide("memory://user:pw@bucket/none.tiff?X-Amz-Signature=SECRET")
    assert "memory://bucket/none.tiff" in str(caught.value)
    for hidden in ("SECRET", "pw@"):
        assert hidden not in str(caught.value)


def test_pixels_that_are_not_square_are_not_averaged(tmp_path: Path) -> None:
    import tifffile

    with tifffile.TiffWriter(tmp_path / "flat.tiff") as file:
        file.write(
            synthetic.picture(600, 500, (0, 0, 300, 300)),
            resolution=(1e4 / 0.25, 1e4 / 0.5),
            resolutionunit="CENTIMETER",
            tile=(256, 256),
            compression="jpeg",
            metadata=None,
        )
    assert open_slide(tmp_path / "flat.tiff").info.mpp is None


# --- real slides -------------------------------------------------------------------------


@pytest.mark.data
def test_twelve_dicom_files_are_one_slide(data: Path) -> None:
    folder = data / "slides" / "cmu-1-dicom"
    files = sorted(folder.glob("*.dcm"))
    assert len(files) == 12
    one = discover([str(folder)])
    assert len(one) == 1
    assert discover([str(f) for f in files]) == one
    assert open_slide(one[0].path).info.item.startswith("cmu-1-dicom-")


@pytest.mark.data
def test_the_largest_image_of_a_series_decides_on_its_colours(data: Path, tmp_path: Path) -> None:
    import shutil

    from pydicom import dcmread

    folder = Path(shutil.copytree(data / "slides" / "cmu-1-dicom", tmp_path / "case"))
    small = dcmread(folder / "level-11-frames-0-1.dcm")
    small.PhotometricInterpretation = "YBR_FULL_422"  # rightly named, and listed first
    (folder / "level-11-frames-0-1.dcm").unlink()
    small.save_as(folder / "0000.dcm")
    slides = [open_slide(folder / n) for n in ("0000.dcm", "level-0-frames-0-30.dcm")]
    regions = [s.read((900, 900), 0, (200, 200)) for s in slides]
    assert (regions[0] == regions[1]).all()
    assert slides[0].info.item == slides[1].info.item


@pytest.mark.data
def test_a_dicom_whose_colours_are_misnamed_is_shown_right(data: Path) -> None:
    svs = open_slide(data / "slides" / "cmu-1-small-region.svs")
    dicom = open_slide(discover([str(data / "slides" / "cmu-1-dicom")])[0].path)
    regions = [s.read((900, 900), 0, (400, 400)).astype(int) for s in (svs, dicom)]
    assert np.abs(regions[0] - regions[1]).mean() < 9  # compressed once more
    assert np.abs((regions[0] - regions[1]).mean(axis=(0, 1))).max() < 1


@pytest.mark.data
def test_formats_go_to_the_reader_that_understands_them(data: Path) -> None:
    readers = {
        "cmu-1-small-region.svs": ("direct", "aperio"),
        "fluorescence-dapi.ndpi": ("direct", "hamamatsu"),
        "os-1-detail.ome.tif": ("direct", "tiff"),
    }
    for name, (reader, vendor) in readers.items():
        info = open_slide(data / "slides" / name).info
        assert (info.reader, info.vendor) == (reader, vendor), name


@pytest.mark.data
def test_tiffslide_and_openslide_give_the_same_pixels(data: Path) -> None:
    path = data / "slides" / "cmu-1-small-region.svs"
    a, b = (
        open_slide(path, reader).read((700, 800), 0, (300, 300))
        for reader in ("openslide", "tiffslide")
    )
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1
