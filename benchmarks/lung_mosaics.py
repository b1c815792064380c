"""Whole slides with known lesions, laid from the lung patches of LC25000.

Half of the mosaics are benign lung (`normal`), half have one to three tumor regions of known
outline (`tumor`); nothing but the planted patches tells them apart. The groups of LC25000 (one
original tile each, augmented many times) are dealt to disjoint pools, and a mosaic draws from
its pool alone: split by the column `site`, never by slide, and train and test share no tile.

    python benchmarks/lung_mosaics.py DATA OUT [--mosaics 120] [--tiles 160] [--seed 0]

DATA is the folder with labels.csv (image,label,group). OUT receives slides/<slide_id>.svs,
labels.csv (case_id,slide_id,label,site) and annotations/<slide_id>.xml (ASAP, level-0 pixels).
`--split` draws from the groups of one side of assets/benchmarks/lung-split.csv alone.
Mosaics are not slides of patients: neighbours in a mosaic are strangers, and the size of a
lesion is ours. They measure whether a method finds a few positive tiles in a bag, and where.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import cv2
import numpy as np
import tifffile
from lung_split import OUT as SPLIT
from lung_split import read_labels, shuffled_groups
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from shapely import Polygon, box, union_all
from shapely.geometry.polygon import orient

MOSAICS = 120
TILES = 160  # the most tissue tiles of a mosaic; the least are FEWEST of these
FEWEST = 5 / 8
POOLS = 10  # sites; 12 mosaics each, 6 a label
BENIGN, TUMORS = "lung_n", ("lung_aca", "lung_scc")
LESION_SHARE = (0.005, 0.2)  # of the tissue tiles, log-uniform; one tile at least
REGIONS = 3  # the most a mosaic has
MPP = 0.5  # of the patches, which are PX pixels a side
PX = 224
SCAN_MPPS = (0.5, 0.25, 0.4)
BORDER = 1  # cells of glass around the tissue
GLASS = (244, 243, 245)
FILE_TILE = 256
LEVELS = 4  # each half the one before
QUALITY = 90

Cells = NDArray[np.bool_]


@dataclass(frozen=True)
class Mosaic:
    """One mosaic before it is painted.

    `tissue` and `lesion` are bool [h, w] over the grid of cells, `images` are the pictures of
    the tissue cells by (y, x), and a cell is `side` pixels of a scan with `mpp` um per pixel.
    """

    number: int
    site: str
    mpp: float
    tissue: Cells
    lesion: Cells
    images: tuple[str, ...]

    @property
    def slide_id(self) -> str:
        """Name of the slide's file."""
        return f"mosaic_{self.number:03d}"

    @property
    def label(self) -> str:
        """Label of the slide."""
        return "tumor" if self.lesion.any() else "normal"

    @property
    def side(self) -> int:
        """Side of a cell in level-0 pixels; whole for all of SCAN_MPPS."""
        return round(PX * MPP / self.mpp)


def plan(rows: list[dict[str, str]], number: int, *, tiles: int = TILES, seed: int = 0) -> Mosaic:
    """Decide all of one mosaic; it depends on `rows`, `number`, `tiles` and `seed` alone.

    Labels alternate, and each pool has every pair of resolution and tumor class once a label.
    """
    rng = np.random.default_rng([seed, number])
    pool = number // 2 % POOLS
    turn = pool + number // (2 * POOLS)
    images = pool_images(rows, pool, seed)
    tissue = _tissue(rng, int(rng.integers(math.ceil(FEWEST * tiles), tiles + 1)))
    lesion = _lesion(rng, tissue) if number % 2 else np.zeros_like(tissue)
    classes = (BENIGN, TUMORS[turn % len(TUMORS)])
    drawn = [str(rng.choice(images[classes[int(ill)]])) for ill in lesion[tissue]]
    return Mosaic(
        number=number,
        site=f"pool_{pool}",
        mpp=SCAN_MPPS[turn % len(SCAN_MPPS)],
        tissue=tissue,
        lesion=lesion,
        images=tuple(drawn),
    )


def pool_images(rows: list[dict[str, str]], pool: int, seed: int = 0) -> dict[str, list[str]]:
    """Return the images of each class in `pool`: every POOLS-th group of the shuffled class."""
    groups = {
        group
        for shuffled in shuffled_groups(rows, f"pools/{seed}").values()
        for group in shuffled[pool::POOLS]
    }
    images: dict[str, list[str]] = {}
    for row in rows:
        if row["group"] in groups:
            images.setdefault(row["label"], []).append(row["image"])
    return images


def _tissue(rng: np.random.Generator, count: int) -> Cells:
    """Return a wavy ellipse of exactly `count` cells, with the border of glass around it."""
    stretch = math.sqrt(rng.uniform(0.7, 1 / 0.7))
    half = math.ceil(math.sqrt(count))  # more than any half axis
    y, x = np.mgrid[-half : half + 1, -half : half + 1] + rng.uniform(-0.5, 0.5, (2, 1, 1))
    angle = np.arctan2(y, x)
    waves = [rng.uniform(0, 0.08) * np.cos(k * angle + rng.uniform(0, 7)) for k in (2, 3, 5)]
    radius = np.hypot(x * stretch, y / stretch) / (1 + sum(waves))
    tissue = np.zeros(radius.shape, bool)
    tissue.ravel()[np.argsort(radius, axis=None)[:count]] = True
    return np.pad(tissue[ndimage.find_objects(tissue.astype(int))[0]], BORDER)


def _lesion(rng: np.random.Generator, tissue: Cells) -> Cells:
    """Return one to REGIONS blobs of tissue cells without holes, apart from one another."""
    share = math.exp(rng.uniform(*np.log(LESION_SHARE)))
    count = max(1, round(share * int(tissue.sum())))
    regions = int(rng.integers(1, min(REGIONS, count) + 1))
    lesion = np.zeros_like(tissue)
    for size in [count // regions + (k < count % regions) for k in range(regions)]:
        free = tissue & ~ndimage.binary_dilation(lesion, np.ones((3, 3)))
        blob = np.zeros_like(tissue)
        front = free
        for _ in range(size):
            if not front.any():
                break
            blob.ravel()[rng.choice(np.flatnonzero(front))] = True
            front = ndimage.binary_dilation(blob) & free & ~blob
        lesion |= blob
    # ASAP's polygons have no holes; the tissue has none either, so what is filled is tissue
    return np.asarray(ndimage.binary_fill_holes(lesion))


def paint(mosaic: Mosaic, data: Path) -> NDArray[np.uint8]:
    """Return the scan, uint8 RGB [h, w, 3]: patches resampled to its resolution, and glass."""
    side = mosaic.side
    height, width = (n * side for n in mosaic.tissue.shape)
    scan = np.empty((height, width, 3), np.uint8)
    scan[:] = GLASS
    for (y, x), name in zip(np.argwhere(mosaic.tissue) * side, mosaic.images, strict=True):
        with Image.open(data / name) as image:
            patch = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
        scan[y : y + side, x : x + side] = patch
    return scan


def write_svs(path: Path, scan: NDArray[np.uint8], mpp: float) -> None:
    """Write a tiled JPEG pyramid as Aperio writes it; `mpp` in um per pixel of level 0."""
    height, width = scan.shape[:2]
    text = (
        f"Aperio Image Library v11\n{width}x{height} JPEG/RGB Q={QUALITY}"
        f"|AppMag = {round(10 / mpp)}|MPP = {mpp}"
    )
    with tifffile.TiffWriter(path) as file:
        for level in range(LEVELS):
            if level:
                size = (scan.shape[1] // 2, scan.shape[0] // 2)
                scan = np.asarray(cv2.resize(scan, size, interpolation=cv2.INTER_AREA), np.uint8)
            file.write(
                scan,
                description=text,
                subfiletype=0,  # Aperio pyramids say what they are in the description
                tile=(FILE_TILE, FILE_TILE),
                compression="jpeg",
                compressionargs={"level": QUALITY},
                photometric="rgb",
                metadata=None,
            )


def outlines(mosaic: Mosaic) -> list[Polygon]:
    """Return the tumor regions as polygons in level-0 pixels: exact unions of cells."""
    regions, count = ndimage.label(mosaic.lesion)
    polygons = []
    for region in range(1, count + 1):
        corners = np.argwhere(regions == region) * mosaic.side
        cells = [box(x, y, x + mosaic.side, y + mosaic.side) for y, x in corners.tolist()]
        polygons.append(orient(union_all(cells).simplify(0)))
    return polygons


def write_asap(path: Path, polygons: list[Polygon]) -> None:
    """Write `polygons` as annotations of the group Tumor in ASAP's XML."""
    root = ET.Element("ASAP_Annotations")
    parent = ET.SubElement(root, "Annotations")
    for number, polygon in enumerate(polygons):
        about = {"Name": f"Tumor {number}", "Type": "Polygon", "PartOfGroup": "Tumor"}
        annotation = ET.SubElement(parent, "Annotation", about, Color="#F4FA58")
        points = ET.SubElement(annotation, "Coordinates")
        for order, (x, y) in enumerate(polygon.exterior.coords[:-1]):
            ET.SubElement(points, "Coordinate", Order=str(order), X=f"{x:g}", Y=f"{y:g}")
    groups = ET.SubElement(root, "AnnotationGroups")
    ET.SubElement(groups, "Group", Name="Tumor", PartOfGroup="None", Color="#F4FA58")
    ET.indent(root)
    ET.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def drawn_from(data: Path, split: str | None = None) -> list[dict[str, str]]:
    """Return the rows of labels.csv, or those whose group is on one side of the split."""
    rows = read_labels(data)
    if split is None:
        return rows
    with SPLIT.open(newline="") as file:
        groups = {row["group"] for row in csv.DictReader(file) if row["split"] == split}
    return [row for row in rows if row["group"] in groups]


def build(
    data: Path,
    out: Path,
    *,
    mosaics: int = MOSAICS,
    tiles: int = TILES,
    seed: int = 0,
    split: str | None = None,
) -> Path:
    """Write `mosaics` slides of at most `tiles` tissue tiles and their tables; return `out`.

    One mosaic is in memory at a time (the finest take about 200 MB). With `split` patches come
    from that side's groups alone.
    """
    rows = drawn_from(data, split)
    (out / "slides").mkdir(parents=True, exist_ok=True)
    (out / "annotations").mkdir(exist_ok=True)
    with (out / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["case_id", "slide_id", "label", "site"])
        for number in range(mosaics):
            mosaic = plan(rows, number, tiles=tiles, seed=seed)
            path = out / "slides" / f"{mosaic.slide_id}.svs"
            write_svs(path, paint(mosaic, data), mosaic.mpp)
            if mosaic.label == "tumor":
                write_asap(out / "annotations" / f"{mosaic.slide_id}.xml", outlines(mosaic))
            table.writerow([f"case_{number:03d}", mosaic.slide_id, mosaic.label, mosaic.site])
    return out


def main() -> None:
    """Build the mosaics."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--mosaics", type=int, default=MOSAICS)
    parser.add_argument("--tiles", type=int, default=TILES, help="the most a mosaic has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=["train", "val", "test"], help="draw from it alone")
    given = parser.parse_args()
    how = {"mosaics": given.mosaics, "tiles": given.tiles, "seed": given.seed}
    build(given.data, given.out, **how, split=given.split)
    print(given.out)


if __name__ == "__main__":
    main()
