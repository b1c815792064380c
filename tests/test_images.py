import os
import threading
from pathlib import Path

import numpy as np
import pytest
import synthetic
from PIL import Image

from pathcli.data import images
from pathcli.data.images import read_image
from pathcli.errors import DataError, ResourceError
from pathcli.types import Member, Region

RED, WHITE = (200, 30, 40), (255, 255, 255)


def saved(path: Path, image: Image.Image, **how: object) -> str:
    image.save(path, **how)  # type: ignore[arg-type]
    return str(path)


def test_plain_colour_comes_back_exactly(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (13, 7, 3), dtype=np.uint8)
    found = read_image(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)
    assert found.flags.writeable


def test_what_is_transparent_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1), (*RED, 255))
    image.putpixel((1, 0), (*RED, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    found = read_image(saved(tmp_path / "a.png", image))
    assert found[0, :2].tolist() == [list(RED), list(WHITE)]
    assert abs(int(found[0, 2, 0]) - 127) <= 1


def test_a_palette_with_a_transparent_colour_is_put_on_white(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 0])
    image.putpixel((1, 0), 1)
    found = read_image(saved(tmp_path / "a.png", image, transparency=1))
    assert found.tolist() == [[list(RED), list(WHITE)]]


def test_16_bit_grey_keeps_its_upper_8(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    for name in ("a.png", "a.tif"):
        found = read_image(saved(tmp_path / name, Image.fromarray(grey)))
        assert found.tolist() == [[[v] * 3 for v in (0, 0, 1, 0x12, 255)]]


def test_grey_and_cmyk_become_colour(tmp_path: Path) -> None:
    assert (
        read_image(saved(tmp_path / "l.png", Image.new("L", (2, 2), 90))).tolist()
        == [[[90] * 3] * 2] * 2
    )
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = read_image(saved(tmp_path / "c.jpg", cmyk, quality=95))
    assert np.abs(red.astype(int) - (255, 0, 0)).max() < 8


def test_a_photograph_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 2), WHITE)
    image.putpixel((0, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    found = read_image(saved(tmp_path / "a.png", image, exif=exif))
    assert found.shape == (4, 2, 3)
    assert found[0, 1].tolist() == list(RED)


def test_broken_files_are_named_with_the_reason(tmp_path: Path) -> None:
    whole = Path(saved(tmp_path / "whole.png", Image.effect_noise((64, 64), 50)))
    cases = {
        "cut.png": (whole.read_bytes()[:900], "not a whole image"),
        "text.png": (b"hello", "not an image"),
        "empty.jpg": (b"", "empty file"),
    }
    for name, (data, why) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: {why}"):
            read_image(str(tmp_path / name))
    with pytest.raises(DataError, match=r"absent\.png: no such file"):
        read_image(str(tmp_path / "absent.png"))
    with pytest.raises(DataError, match="a folder"):
        read_image(str(tmp_path))
    with pytest.raises(DataError, match="fractions"):
        read_image(saved(tmp_path / "f.tif", Image.new("F", (2, 2))))


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    for side in (9000, 14_000):  # above ours, and above the one at which Pillow refuses
        path = saved(tmp_path / "bomb.png", Image.new("1", (side, side)))
        assert Path(path).stat().st_size < 100_000
        with pytest.raises(DataError, match=r"bomb\.png: more than 80 million pixels"):
            read_image(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_no_broken_image(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "a.png", Image.new("RGB", (2, 2))))
    path.chmod(0)
    with pytest.raises(ResourceError, match=r"a\.png: cannot be read"):
        read_image(str(path))


def test_a_member_of_an_archive_is_read_by_its_place(tmp_path: Path) -> None:
    path = Path(saved(tmp_path / "a.png", Image.new("RGB", (3, 2), RED)))
    data = path.read_bytes()
    archive = tmp_path / "x.tar"
    archive.write_bytes(b"before" + data)
    assert read_image(Member(str(archive), 6, len(data), "a.png"))[0, 0].tolist() == list(RED)
    with pytest.raises(DataError, match=r"x\.tar: a\.png: the archive is truncated"):
        read_image(Member(str(archive), 6, len(data) + 1, "a.png"))


@pytest.mark.data
def test_a_region_has_the_pixels_openslide_gives(data: Path) -> None:
    import openslide

    path = str(data / "slides" / "cmu-1-small-region.svs")
    with openslide.OpenSlide(path) as slide:
        expected = np.asarray(slide.read_region((608, 1216), 0, (672, 672)))[..., :3]
    found = read_image(Region(path, (608, 1216), 672))
    assert found.std() > 10
    assert np.array_equal(found, expected)


def test_beyond_the_edge_of_a_slide_is_white_and_beside_it_is_an_error(slide_path: Path) -> None:
    inside = read_image(Region(str(slide_path), (1400, 1000), 100))
    over = read_image(Region(str(slide_path), (1400, 1000), 200))
    assert np.array_equal(over[:100, :100], inside)
    assert over.shape == (200, 200, 3)
    assert (over[100:] == 255).all()
    assert (over[:, 100:] == 255).all()
    left = read_image(Region(str(slide_path), (-50, 900), 100))
    assert (left[:, :50] == 255).all()
    expected = read_image(Region(str(slide_path), (0, 900), 100))
    assert np.array_equal(left[:, 50:], expected[:, :50])
    with pytest.raises(DataError, match=r"painted\.svs, 64 px at \(1500, 0\): lies beside"):
        read_image(Region(str(slide_path), (1500, 0), 64))


def test_only_a_few_slides_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = synthetic.picture(256, 256, (0, 0, 200, 200))
    paths = [
        str(synthetic.slide(tmp_path / f"{i}.svs", pixels, levels=1))
        for i in range(images._OPEN + 2)
    ]
    opened: list[str] = []
    real = images.open_slide
    monkeypatch.setattr(images, "open_slide", lambda path: opened.append(path) or real(path))
    monkeypatch.setattr(images, "_open", images._OpenFiles())
    for path in [*paths, paths[-1], paths[2], paths[0]]:
        read_image(Region(path, (0, 0), 16))
    assert opened == [*paths, paths[0]]
    assert len(images._open.files) == images._OPEN


def test_threads_and_forked_processes_read_the_same(slide_path: Path) -> None:
    ref = Region(str(slide_path), (300, 250), 200)
    expected = read_image(ref)
    same: list[bool] = []

    def look() -> None:
        same.extend(np.array_equal(read_image(ref), expected) for _ in range(5))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 20
    before = images._open.files[str(slide_path)]
    child = os.fork()
    if child == 0:
        equal = np.array_equal(read_image(ref), expected)
        own = images._open.files[str(slide_path)] is not before
        os._exit(0 if equal and own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(read_image(ref), expected)
