"""The lung benchmarks: a split that keeps groups whole, and mosaics with exactly known lesions."""

from __future__ import annotations

import collections
import csv
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from conftest import open_slide
from scipy import ndimage
from shapely import Polygon, box, union_all

from pathcli.slides.tiling import tile
from pathcli.store import Store

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import lung_mosaics  # noqa: E402 - the scripts are no package
import lung_split  # noqa: E402 - likewise

TABLE = ROOT / "assets" / "benchmarks" / "lung-split.csv"
SHARES = {"train": 0.60, "val": 0.15, "test": 0.25}
FEW, SMALL = 4, 24  # mosaics of at most so many tiles; two at 0.5 and two at 0.25 um per pixel


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def patches() -> list[dict[str, str]]:
    """The labels of made-up patches: 3 classes of 40 groups of 3 images."""
    return [
        {"image": f"{label}/{g}-{i}.jpeg", "label": label, "group": f"{label}_{g}"}
        for label in (lung_mosaics.BENIGN, *lung_mosaics.TUMORS)
        for g in range(40)
        for i in range(3)
    ]


@pytest.fixture
def lung(data: Path) -> Path:
    return data / "lc25000-lung"


@pytest.fixture(scope="module")
def _few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mosaics")


@pytest.fixture
def few(lung: Path, _few: Path) -> Path:
    if not (_few / "labels.csv").exists():
        lung_mosaics.build(lung, _few, mosaics=FEW, tiles=SMALL)
    return _few


def squares(cells: np.ndarray, side: int) -> Polygon:
    corners = np.argwhere(cells) * side
    return union_all([box(x, y, x + side, y + side) for y, x in corners])


# --- the split ---------------------------------------------------------------------------


def test_the_split_has_no_group_on_two_sides() -> None:
    sides = collections.defaultdict(set)
    for row in rows_of(TABLE):
        sides[row["group"]].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert len(sides) == 517


def test_the_split_has_its_shares_in_each_class() -> None:
    rows = rows_of(TABLE)
    for label in {row["label"] for row in rows}:
        images = collections.Counter(row["split"] for row in rows if row["label"] == label)
        groups = collections.Counter(
            s for g, s in {(r["group"], r["split"]) for r in rows if r["label"] == label}
        )
        for counts in (images, groups):
            shares = {name: n / counts.total() for name, n in counts.items()}
            assert shares == pytest.approx(SHARES, abs=0.02)


def test_the_split_does_not_hang_on_the_order_of_the_rows(patches: list[dict[str, str]]) -> None:
    assert lung_split.split_groups(patches[::-1]) == lung_split.split_groups(patches)
    assert lung_split.split_groups(patches, seed=1) != lung_split.split_groups(patches)


@pytest.mark.data
def test_the_split_is_what_its_script_writes_from_the_labels(lung: Path, tmp_path: Path) -> None:
    written = lung_split.write_split(lung, tmp_path / "split.csv")
    assert written.read_bytes() == TABLE.read_bytes()
    known = [{k: row[k] for k in ("image", "label", "group")} for row in rows_of(TABLE)]
    assert known == rows_of(lung / "labels.csv")
    assert len({row["image"] for row in known}) == len(known) == 6163


# --- the plan of the mosaics -------------------------------------------------------------


@pytest.fixture(scope="module")
def plans(patches: list[dict[str, str]]) -> list[lung_mosaics.Mosaic]:
    return [lung_mosaics.plan(patches, number) for number in range(lung_mosaics.MOSAICS)]


def test_label_resolution_and_tumor_class_are_balanced_in_each_pool(
    plans: list[lung_mosaics.Mosaic],
) -> None:
    seen: dict[str, collections.Counter[tuple[object, ...]]] = collections.defaultdict(
        collections.Counter
    )
    for p in plans:
        classes = {image.split("/")[0] for image in p.images} - {lung_mosaics.BENIGN}
        assert len(classes) == (p.label == "tumor")
        seen[p.site][p.label, p.mpp, *classes] += 1
    assert len(seen) == 10
    for kinds in seen.values():
        assert {n for kind, n in kinds.items() if kind[0] == "normal"} == {2}
        assert {n for kind, n in kinds.items() if kind[0] == "tumor"} == {1}
        assert len(kinds) == 3 + 3 * 2


def test_pools_share_no_group_and_leave_none_out(
    patches: list[dict[str, str]], plans: list[lung_mosaics.Mosaic]
) -> None:
    group = {row["image"]: row["group"] for row in patches}
    dealt = [
        {group[i] for images in lung_mosaics.pool_images(patches, n).values() for i in images}
        for n in range(lung_mosaics.POOLS)
    ]
    assert sum(map(len, dealt)) == len(set.union(*dealt)) == 120
    for p in plans:
        assert {group[image] for image in p.images} <= dealt[int(p.site.removeprefix("pool_"))]


def test_tissue_is_framed_by_glass_and_lesions_are_few_regions_of_it(
    plans: list[lung_mosaics.Mosaic],
) -> None:
    for p in plans:
        assert 100 <= p.tissue.sum() == len(p.images) <= 160
        frame = np.ones_like(p.tissue)
        frame[1:-1, 1:-1] = False
        assert not (p.tissue & frame).any()
        assert not (p.lesion & ~p.tissue).any()
        ill = [image.split("/")[0] in lung_mosaics.TUMORS for image in p.images]
        assert ill == p.lesion[p.tissue].tolist()
        assert ndimage.label(p.lesion)[1] <= lung_mosaics.REGIONS


def test_lesion_shares_are_log_uniform(plans: list[lung_mosaics.Mosaic]) -> None:
    shares = np.array([p.lesion.sum() / p.tissue.sum() for p in plans if p.label == "tumor"])
    assert shares.min() > 0.004
    assert shares.max() < 0.23  # a filled hole adds a tile or two
    assert np.median(shares) == pytest.approx(np.sqrt(0.005 * 0.2), rel=0.4)


def test_outlines_are_exactly_the_lesion_cells(plans: list[lung_mosaics.Mosaic]) -> None:
    for p in plans:
        polygons = lung_mosaics.outlines(p)
        assert all(polygon.is_valid and not polygon.interiors for polygon in polygons)
        assert sum(polygon.area for polygon in polygons) == p.lesion.sum() * p.side**2
        assert squares(p.lesion, p.side).symmetric_difference(union_all(polygons)).area == 0


def test_no_lesion_has_a_hole_or_leaves_the_tissue() -> None:
    for seed in range(600):
        rng = np.random.default_rng(seed)
        tissue = lung_mosaics._tissue(rng, 160)
        lesion = lung_mosaics._lesion(rng, tissue)
        assert tissue.sum() == 160
        assert 1 <= lesion.sum() == ndimage.binary_fill_holes(lesion).sum()
        assert not (lesion & ~tissue).any()


# --- the slides --------------------------------------------------------------------------


@pytest.mark.data
def test_our_tiler_finds_the_cells_and_nothing_else(few: Path, lung: Path, store: Store) -> None:
    rows = lung_split.read_labels(lung)
    for number in range(FEW):
        p = lung_mosaics.plan(rows, number, tiles=SMALL)
        path = few / "slides" / f"{p.slide_id}.svs"
        info = open_slide(path).info
        assert (info.vendor, info.mpp) == ("aperio", p.mpp)
        assert (info.height, info.width) == tuple(n * p.side for n in p.tissue.shape)
        cells = (np.argwhere(p.tissue) * p.side)[:, ::-1]
        np.testing.assert_array_equal(tile(path, store=store).tiles.xy, cells)


@pytest.mark.data
def test_annotations_are_the_lesions_of_the_tumor_slides(few: Path, lung: Path) -> None:
    rows = lung_split.read_labels(lung)
    table = rows_of(few / "labels.csv")
    assert [row["label"] for row in table] == ["normal", "tumor"] * 2
    assert [row["site"] for row in table] == ["pool_0", "pool_0", "pool_1", "pool_1"]
    assert len({row["case_id"] for row in table}) == FEW
    assert {p.stem for p in (few / "annotations").iterdir()} == {"mosaic_001", "mosaic_003"}
    for number in (1, 3):
        p = lung_mosaics.plan(rows, number, tiles=SMALL)
        path = few / "annotations" / f"{p.slide_id}.xml"
        root = ET.parse(path).getroot()  # noqa: S314 - written by ourselves
        found = root.findall("Annotations/Annotation[@PartOfGroup='Tumor']")
        drawn = union_all(
            [
                Polygon(
                    [(float(c.attrib["X"]), float(c.attrib["Y"])) for c in a.iter("Coordinate")]
                )
                for a in found
            ]
        )
        assert len(found) == ndimage.label(p.lesion)[1]
        assert drawn.symmetric_difference(squares(p.lesion, p.side)).area == 0


@pytest.mark.data
def test_a_cell_shows_its_patch_at_every_resolution(lung: Path) -> None:
    from PIL import Image

    rows = lung_split.read_labels(lung)
    for number in (1, 3, 5):
        p = lung_mosaics.plan(rows, number, tiles=6)
        scan = lung_mosaics.paint(p, lung)
        y, x = np.argwhere(p.lesion)[0] * p.side
        first = p.lesion[p.tissue].tolist().index(True)
        patch = Image.open(lung / p.images[first]).convert("RGB")
        seen = Image.fromarray(scan[y : y + p.side, x : x + p.side])
        error = np.abs(np.asarray(seen.resize((224, 224)), float) - np.asarray(patch)).mean()
        assert error < 4
    assert {lung_mosaics.plan(rows, n, tiles=6).mpp for n in (1, 3, 5)} == {0.5, 0.25, 0.4}


@pytest.mark.data
def test_the_same_seed_gives_the_same_bytes(few: Path, lung: Path, tmp_path: Path) -> None:
    files = (
        "labels.csv",
        "slides/mosaic_000.svs",
        "slides/mosaic_001.svs",
        "annotations/mosaic_001.xml",
    )
    same = lung_mosaics.build(lung, tmp_path / "same", mosaics=2, tiles=SMALL)
    other = lung_mosaics.build(lung, tmp_path / "other", mosaics=2, tiles=SMALL, seed=1)
    for name in files[1:]:
        assert (same / name).read_bytes() == (few / name).read_bytes()
        assert (other / name).read_bytes() != (few / name).read_bytes()
    assert (few / files[0]).read_text().startswith((same / files[0]).read_text())
