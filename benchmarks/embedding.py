"""End-to-end embedding over the pure forward pass, on the same tiles, in one process.

Slide in the store or not, tiles are read, resized, normalised, encoded and written (end to
end); against it stand the same network and the same tiles as tensors in memory (forward).
The two alternate; the ratios of neighbours are what counts, 1.00 means that the encoder
never waits. Prints one JSON line.

    python benchmarks/embedding.py [--encoder lite0] [--size 224] [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import closing
from typing import Any

import torch

from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.slides import open_slide
from pathcli.slides.tiling import read_tile, tile_spec
from pathcli.store import Store
from pathcli.types import Tiles, TileSpec
from pathcli.weights import fetch

BATCH = 32


def tiles_in_memory(tiles: Tiles, encoder: Any) -> list[torch.Tensor]:  # noqa: ANN401
    """Return the encoder's input for all tiles, float32 [b, 3, s, s] a batch."""
    with closing(open_slide(fetch("demo-slide"))) as slide:
        pixels = [
            torch.from_numpy(read_tile(slide, (x, y), tiles.spec, tiles.slide_mpp))
            for x, y in tiles.xy.tolist()
        ]
    batches = [torch.stack(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
    return [encoder.preprocess(batch) for batch in batches]


def forward_seconds(encoder: Any, batches: list[torch.Tensor]) -> float:  # noqa: ANN401
    """Return the time of the network alone."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            encoder._run(batch)  # noqa: SLF001 - the network without its preprocessing
    return time.perf_counter() - start


def end_to_end_seconds(embedder: Embedder, spec: TileSpec) -> float:
    """Return the time of `embed` into an empty store, the encoder being loaded."""
    with tempfile.TemporaryDirectory() as folder:
        embedder.store = Store(folder + "/store")
        start = time.perf_counter()
        embedder(fetch("demo-slide"), spec=spec)
        return time.perf_counter() - start


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="lite0", help="lite0 or a timm: encoder")
    parser.add_argument("--checkpoint", default=None)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    encoder = build_encoder(given.encoder, checkpoint=given.checkpoint)
    spec = tile_spec(given.size, step_px=given.size // 3)
    with tempfile.TemporaryDirectory() as folder:
        embedder = Embedder(encoder, Store(folder + "/s"), batch=BATCH, workers=given.workers)
        run = embedder(fetch("demo-slide"), spec=spec)
        batches = tiles_in_memory(embedder.store.tiles[run.tiling.tiles.key], encoder)
    forward, whole = [], []
    for _ in range(given.runs):
        forward.append(forward_seconds(encoder, batches))
        whole.append(end_to_end_seconds(embedder, spec))
    ratios = [w / f for w, f in zip(whole, forward, strict=True)]
    line = {
        "benchmark": "embedding",
        "encoder": given.encoder,
        "tiles": run.tiles,
        "size_px": given.size,
        "workers": given.workers,
        "forward_tiles_per_second": round(run.tiles / statistics.median(forward), 1),
        "end_to_end_tiles_per_second": round(run.tiles / statistics.median(whole), 1),
        "overhead": round(statistics.median(ratios), 3),
        "overhead_low_high": [round(min(ratios), 3), round(max(ratios), 3)],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
