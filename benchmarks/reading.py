"""Tiles a second at level 0, over openslide-python's read_region with one thread.

Neighbouring tissue tiles of a big SVS-like slide made of real texture, read by OpenSlide, tiffslide
and the direct reader with one and two threads or processes; beside each of the direct reader's
stands bare decoding of the bytes of the very file tiles it has just read, held in memory.
Every reading opens the slide anew and has an area of its own, so that none answers from
another's cache; variants alternate, medians count, of ratios those within a run. Prints one
JSON line.

    python benchmarks/reading.py [--texture SLIDE] [--side 40000] [--tiles 2048] [--runs 9]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import numpy as np
from simplejpeg import decode_jpeg
from tifffile import TiffFile

from pathcli.slides import open_slide
from pathcli.types import Slide
from pathcli.weights import fetch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import big_slide

Corner = tuple[int, int]
FILE_TILE = 256
CASES = {"256 aligned": (256, 0), "256 offset 100": (256, 100), "512 aligned": (512, 0)}
READERS = {
    "openslide 1 thread": ("openslide", "threads", 1),
    "openslide 2 threads": ("openslide", "threads", 2),
    "tiffslide 1 thread": ("tiffslide", "threads", 1),
    "direct 1 thread": ("direct", "threads", 1),
    "bare decoding 1 thread": ("bare", "threads", 1),
    "direct 2 threads": ("direct", "threads", 2),
    "bare decoding 2 threads": ("bare", "threads", 2),
    "direct 2 processes": ("direct", "processes", 2),
    "bare decoding 2 processes": ("bare", "processes", 2),
}
WIDE = 8192  # px of level 0 that a worker reads in a row
START_SECONDS = 0.3  # in which every worker gets ready
RNG = np.random.default_rng()
Work = Callable[[list[Corner]], float]


def read(slide: Slide | Path, reader: str, size: int, begin: float, corners: list[Corner]) -> float:
    """Return the seconds in which a slide gives the tiles at `corners`, counted from `begin`."""
    if isinstance(slide, Path):  # a process opens its own
        with closing(open_slide(slide, reader)) as opened:
            return read(opened, reader, size, begin, corners)
    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.perf_counter()
    for xy in corners:
        slide.read(xy, 0, (size, size))
    return time.perf_counter() - start


def decode(path: Path, size: int, begin: float, corners: list[Corner]) -> float:
    """Return the seconds of decoding all file tiles under `corners`, each of them once."""
    with TiffFile(path) as file:
        page = file.pages[0]
        across = -(-page.imagewidth // FILE_TILE)
        under = {
            row * across + column
            for x, y in corners
            for row in range(y // FILE_TILE, (y + size - 1) // FILE_TILE + 1)
            for column in range(x // FILE_TILE, (x + size - 1) // FILE_TILE + 1)
        }
        data = [
            os.pread(file.filehandle.fileno(), page.databytecounts[i], page.dataoffsets[i])
            for i in sorted(under)
        ]
    time.sleep(max(0.0, begin - time.monotonic()))
    start = time.perf_counter()
    for tile in data:
        decode_jpeg(tile)
    return time.perf_counter() - start


def areas(side: int, size: int, offset: int, n: int, workers: int) -> list[list[Corner]]:
    """Return `n` neighbouring tiles for each worker, in rows of `WIDE` px, beside each other.

    They lie somewhere inside the ellipse of tissue.
    """
    low, row = int(0.25 * side), WIDE // size
    x, y = (
        int(RNG.integers(low, int(0.7 * side) - extent)) // FILE_TILE * FILE_TILE + offset
        for extent in (workers * WIDE, n // row * size)
    )
    return [
        [(x + worker * WIDE + k % row * size, y + k // row * size) for k in range(n)]
        for worker in range(workers)
    ]


def rate(pool: Executor, work: Work, parts: list[list[Corner]]) -> float:
    """Return tiles a second of workers that begin together; the slowest decides."""
    return sum(map(len, parts)) / max(pool.map(work, parts))


def measure(path: Path, side: int, tiles: int, runs: int) -> dict[str, dict[str, list[float]]]:
    """Return the tiles a second of every case, variant and run."""
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    pools = {
        (kind, n): pool
        for n in (1, 2)
        for kind, pool in (
            ("threads", ThreadPoolExecutor(n)),
            ("processes", ProcessPoolExecutor(n, multiprocessing.get_context("spawn"))),
        )
    }
    for run in range(runs + 1):  # the first warms up
        for case, (size, offset) in CASES.items():
            for name, (reader, kind, workers) in READERS.items():
                n = tiles // (4 if size > FILE_TILE else 1) // (4 if "slide" in reader else 1)
                if reader != "bare":  # which decodes what the direct reader has just read
                    parts = areas(side, size, offset, n, workers)
                with ExitStack() as opened:
                    slide: Slide | Path = path
                    if kind == "threads" and reader != "bare":  # which share one slide
                        slide = opened.enter_context(closing(open_slide(path, reader)))
                    begin = time.monotonic() + START_SECONDS
                    work = partial(read, slide, reader, size, begin)
                    if reader == "bare":
                        work = partial(decode, path, size, begin)
                    seen = rate(pools[kind, workers], work, parts)
                if run:
                    rates[case][name].append(seen)
    for pool in pools.values():
        pool.shutdown()
    return rates


def over_bare(rates: dict[str, list[float]], who: str) -> dict[str, float]:
    """Return the quartiles over runs of direct reading over bare decoding of the same bytes."""
    pairs = zip(rates[f"direct {who}"], rates[f"bare decoding {who}"], strict=True)
    low, middle, high = statistics.quantiles([direct / bare for direct, bare in pairs], n=4)
    return {"median": round(middle, 2), "from": round(low, 2), "to": round(high, 2)}


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texture", type=Path, help="a stained slide; else the demo's")
    parser.add_argument("--side", type=int, default=40000)
    parser.add_argument("--tiles", type=int, default=2048, help="per worker and variant")
    parser.add_argument("--runs", type=int, default=9, help="at least 2")
    given = parser.parse_args()
    with closing(open_slide(given.texture or fetch("demo-slide"))) as slide:
        texture = slide.read((0, 0), 0, (slide.info.width, slide.info.height))
    with tempfile.TemporaryDirectory() as folder:
        path = big_slide(Path(folder) / "big.svs", texture, (given.side, given.side))
        seen = measure(path, given.side, given.tiles, given.runs)
    middle = {c: {n: statistics.median(v) for n, v in r.items()} for c, r in seen.items()}
    line = {
        "benchmark": "reading",
        "openslide_tiles_per_second": {
            case: round(rates["openslide 1 thread"], 1) for case, rates in middle.items()
        },
        "over_openslide_1_thread": {
            case: {name: round(r / rates["openslide 1 thread"], 2) for name, r in rates.items()}
            for case, rates in middle.items()
        },
        "direct_over_bare_decoding": {
            case: {who: over_bare(rates, who) for who in ("1 thread", "2 threads", "2 processes")}
            for case, rates in seen.items()
        },
        "runs": given.runs,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
