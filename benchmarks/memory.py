"""Peak memory of embedding a slide of a thousand tiles and of a hundred thousand.

A synthetic slide, small tiles at a small step, and an encoder that only averages: what grows
is what the pipeline holds. Each size is embedded by a process of its own, whose largest
resident set is told, less that of a process that embeds ten tiles. Prints one JSON line.

    python benchmarks/memory.py [--tiles 1000 100000]
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile

from pathcli.encoders.embedding import Embedder
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store

SIDE = 3072  # of the slide, in pixels
TILE = 224


class Mean:
    """An encoder whose 512 features are the mean colour, over and over."""

    name, id, input_px, row_shape = "mean", "mean-000000000000", TILE, (512,)
    native_source = "the benchmark"
    reentrant = True

    def load(self, device: str) -> None:
        """Nothing is to be loaded."""

    def encode(self, images: Any) -> Any:  # noqa: ANN401 - a tensor; torch is imported late
        """Return [b, 512]."""
        return images[:, ::16, ::16].float().mean(dim=(1, 2)).repeat(1, 171)[:, :512]


def paint(path: Path) -> None:
    """Write a tiled JPEG pyramid full of grain."""
    pixels = np.random.default_rng(0).integers(60, 200, (SIDE, SIDE, 3), dtype=np.uint8)
    text = f"Aperio Image Library v11\n{SIDE}x{SIDE} JPEG/RGB Q=80|AppMag = 20|MPP = 0.5"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, tile=(256, 256), compression="jpeg", photometric="rgb", description=text)


def peak_mb(slide: Path, tiles: int) -> dict[str, float]:
    """Embed about so many tiles of the slide in this process; return how it went."""
    step = max(1, int((SIDE - TILE) / (math.sqrt(tiles) - 1)))
    spec = tile_spec(TILE, 0.5, step_px=step, tissue="none", min_tissue=0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = Embedder(cast("Any", Mean()), Store(folder + "/store"), device="cpu")(
            slide, spec=spec, mpp=0.5
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return {"tiles": run.tiles, "peak_mb": peak / unit, "seconds": time.perf_counter() - start}


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(peak_mb(Path(given.one), given.tiles[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        slide = Path(folder) / "grain.svs"
        paint(slide)
        found = []
        for tiles in (10, *given.tiles):
            command = [sys.executable, __file__, "--one", str(slide), "--tiles", str(tiles)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - itself
            found.append(json.loads(done.stdout))
    base, *rest = found
    line = {
        "benchmark": "memory",
        "tile_px": TILE,
        "base_mb": round(base["peak_mb"]),
        "runs": [
            {
                "tiles": r["tiles"],
                "peak_mb": round(r["peak_mb"]),
                "above_base_mb": round(r["peak_mb"] - base["peak_mb"], 1),
                "seconds": round(r["seconds"], 1),
            }
            for r in rest
        ],
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
