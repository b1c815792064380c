"""Time tissue and coordinates of a large slide against a pass like CLAM's, and their coverage.

    python benchmarks/tissue.py [--texture SLIDE] [--side 40000] [--keep SLIDE.svs] [--threads 1]

The large slide is made of a real one's texture; its tissue is an ellipse, known file tile by
file tile. The other pass does what CLAM does, written from its description:
the level nearest to a downsampling of 64 through OpenSlide, saturation, median, threshold,
closing, contours with their holes, areas, then for each candidate of each contour whether
one of four points lies in the contour and in none of its holes. It is kinder than CLAM: no
process pool is started. One JSON line: medians of interleaved runs, seconds by part (those in
brackets are taken apart once more, after the rest), and coverage, the share of the known tissue
under the tiles kept. `--cpu` counts the seconds of the processor, where others are at work too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import synthetic

from pathcli.slides.overview import overview
from pathcli.slides.pens import pens
from pathcli.slides.readers import open_slide
from pathcli.slides.stains import dark_background, stain_warnings
from pathcli.slides.tiling import grid, tile_spec
from pathcli.slides.tissue import find_tissue, mask_um, method
from pathcli.weights import fetch

PATCH, MPP = 256, 0.5
Parts = dict[str, float]


class Clock:
    """Seconds by the name of a part."""

    now: Callable[[], float] = time.perf_counter

    def __init__(self) -> None:
        """Begin."""
        self.parts: Parts = {}
        self._last = self.now()

    def __call__(self, name: str) -> None:
        """Count the time since the last call to `name`."""
        now = self.now()
        self.parts[name] = self.parts.get(name, 0.0) + now - self._last
        self._last = now


def clam_like(path: Path, sthresh: int = 8, mthresh: int = 7, close: int = 4) -> tuple:
    """Return corners [n, 2] and seconds by part, with CLAM's preset for TCGA."""
    import openslide  # noqa: PLC0415

    clock = Clock()
    slide = openslide.OpenSlide(str(path))
    level = slide.get_best_level_for_downsample(64)
    down = slide.level_downsamples[level]
    clock("open")
    picture = np.array(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    clock("read")
    saturation = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)[:, :, 1]
    _, found = cv2.threshold(cv2.medianBlur(saturation, mthresh), sthresh, 255, cv2.THRESH_BINARY)
    found = cv2.morphologyEx(found, cv2.MORPH_CLOSE, np.ones((close, close), np.uint8))
    clock("mask")
    contours, tree = cv2.findContours(found, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    unit = (512 / down) ** 2
    islands = []
    for i in np.flatnonzero(tree[0][:, 3] == -1):
        holes = sorted(
            (contours[k] for k in np.flatnonzero(tree[0][:, 3] == i)),
            key=cv2.contourArea,
            reverse=True,
        )
        area = cv2.contourArea(contours[i]) - sum(map(cv2.contourArea, holes))
        if area > 16 * unit:
            kept = [h for h in holes[:8] if cv2.contourArea(h) > 4 * unit]
            islands.append([np.int32(ring * down) for ring in (contours[i], *kept)])
    clock("contours")
    corners = [corner for island in islands for corner in _candidates(island, slide.dimensions)]
    clock("coordinates")
    slide.close()
    return np.array(corners).reshape(-1, 2), clock.parts


def _candidates(island: list, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the corners on a contour's own grid that have one of four points inside."""
    outline, *holes = island
    x0, y0, w, h = cv2.boundingRect(outline)
    half, shift = PATCH // 2, PATCH // 4
    kept = []
    for x in range(x0, min(x0 + w, size[0] - PATCH + 1), PATCH):
        for y in range(y0, min(y0 + h, size[1] - PATCH + 1), PATCH):
            points = [
                (x + half + i, y + half + j) for i in (-shift, shift) for j in (-shift, shift)
            ]
            if any(cv2.pointPolygonTest(outline, p, measureDist=False) >= 0 for p in points):
                centre = (x + half, y + half)
                if all(cv2.pointPolygonTest(r, centre, measureDist=False) <= 0 for r in holes):
                    kept.append((x, y))
    return kept


def ours(path: Path, tissue: str) -> tuple:
    """Return corners [n, 2] and seconds by part, as `pathcli tile` finds them."""
    spec = tile_spec(PATCH, MPP, tissue=tissue, min_tissue=0.25)
    clock = Clock()
    with closing(open_slide(path)) as slide:
        clock("open")
        found = find_tissue(slide, spec, MPP)
        clock("tissue")
        xy = grid(spec, MPP, slide.info.bounds)
        share = found.fraction(xy, (PATCH, PATCH))
        xy = xy[share >= spec.min_tissue]
        clock("coordinates")
        parts = dict(clock.parts)
        clock("")  # the same again, taken apart
        built = method(tissue)
        um = mask_um(built, slide.info.width * slide.info.height * MPP**2)
        picture, _ = overview(slide, um / MPP)
        clock("(read)")
        dark_background(picture)
        clock("(dark?)")
        mask = built.mask(picture, um)
        clock("(mask)")
        pens(picture, um)
        clock("(pens)")
        stain_warnings(picture, mask)
        clock("(stain)")
    return xy, parts | {name: s for name, s in clock.parts.items() if name.startswith("(")}


def coverage(xy: np.ndarray, size: tuple[int, int]) -> tuple[float, float]:
    """Return the share of the known tissue that is covered, and of the cover that is tissue."""
    cell = synthetic.TILE // 16
    shape = (size[1] // cell, size[0] // cell)
    y, x = (np.arange(n) * cell // synthetic.TILE * synthetic.TILE for n in shape)
    truth = synthetic.in_ellipse(x, y[:, None], size)
    cover = np.zeros(shape, bool)
    side = PATCH // cell
    for a, b in np.rint(xy / cell).astype(int):
        cover[b : b + side, a : a + side] = True
    both = (truth & cover).sum()
    return float(both / truth.sum()), float(both / max(1, cover.sum()))


def main() -> None:
    """Run the comparison and print its line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texture", type=Path, help="a stained slide; else the demo's")
    parser.add_argument("--side", type=int, default=40_000)
    parser.add_argument("--keep", type=Path, help="where the large slide is, or goes")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--tissue", default="otsu,hsv,hsv:tcga,auto")
    parser.add_argument("--threads", type=int, default=1, help="for all alike")
    parser.add_argument("--cpu", action="store_true")
    given = parser.parse_args()
    cv2.setNumThreads(given.threads)
    if given.cpu:
        Clock.now = time.process_time
    size = (given.side, given.side)
    with tempfile.TemporaryDirectory() as folder:
        path = given.keep or Path(folder) / "large.svs"
        if not path.exists():
            with closing(open_slide(given.texture or fetch("demo-slide"))) as slide:
                texture = slide.read((0, 0), 0, (slide.info.width, slide.info.height))
            synthetic.big_slide(path, texture, size, mpp=MPP)
        print(json.dumps(measured(path, given)))


def measured(path: Path, given: argparse.Namespace) -> dict:
    """Run all ways in turn and return the line."""
    size = (given.side, given.side)
    ways: dict[str, Callable[[], tuple]] = {"clam-like": lambda: clam_like(path)}
    for name in given.tissue.split(","):
        ways[name] = lambda name=name: ours(path, name)
    runs: dict[str, list[tuple]] = {name: [] for name in ways}
    for _ in range(given.repeat):
        for name, way in ways.items():
            runs[name].append(way())
    line: dict = {"side": given.side, "repeat": given.repeat, "threads": given.threads}
    for name, done in runs.items():
        parts = {k: statistics.median(r[1][k] for r in done) for k in done[0][1]}
        total = statistics.median(
            sum(v for k, v in r[1].items() if not k.startswith("(")) for r in done
        )
        covered, precise = coverage(done[0][0], size)
        line[name] = {
            "seconds": round(total, 3),
            "parts": {k: round(v, 3) for k, v in parts.items()},
            "tiles": len(done[0][0]),
            "coverage": round(covered, 4),
            "precision": round(precise, 4),
        }
    for name in set(ways) - {"clam-like"}:
        times = line["clam-like"]["seconds"] / line[name]["seconds"]
        line[name]["times_faster"] = round(times, 2)
    return line


if __name__ == "__main__":
    main()
