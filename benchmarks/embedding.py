"""End-to-end embedding over the pure forward pass, on the same tiles, in one process.

A slide in the store's tiles but not in its features is opened, read, resized, normalised,
encoded and written (end to end); against it stand the same network and the same tiles as
tensors in memory (forward). In between, the processor time of forward, decoding and
preprocessing is taken alone: their sum over forward is the floor, below which no loop can
come where all cores compute. Every round measures all of them; medians of rounds are told.
Ratios of processor time hold on a busy machine, too. Prints one JSON line.

    python benchmarks/embedding.py [--network micro|vit-b16|lite0] [--size 256] [--runs 5]
"""

# ruff: noqa: E402 - cores are shared out before torch is imported
from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from pathcli.device import share_cores

share_cores()  # as the command does, before torch is imported
import torch

from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.timm import TimmEncoder
from pathcli.slides import open_slide
from pathcli.slides.tiling import read_tile, tile_spec
from pathcli.store import Store
from pathcli.weights import fetch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pathcli.types import Tiles

NETWORKS = {
    "micro": {"embed_dim": 96, "depth": 2, "num_heads": 3},  # 0.1 GFLOP
    "vit-b16": {"embed_dim": 768, "depth": 12, "num_heads": 12},  # 35 GFLOP
}


class RandomViT(TimmEncoder):
    """A ViT/16 at 224 px with random weights."""

    def __init__(self, **sizes: int) -> None:
        """Take its sizes."""
        super().__init__(model="vit_base_patch16_224")
        self.sizes, self.id = sizes, "random-000000000000"

    def _network(self) -> torch.nn.Module:
        import timm  # noqa: PLC0415 - after the guard

        network: torch.nn.Module = timm.create_model(self.model, num_classes=0, **self.sizes)
        return network


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return the wall and the processor time of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class Bench:
    """The four things that are measured."""

    def __init__(self, given: argparse.Namespace, folder: str) -> None:
        """Tile the slide, and read its tiles into memory."""
        sizes = NETWORKS.get(given.network)
        self.encoder: Any = RandomViT(**sizes) if sizes else build_encoder(given.network)
        self.path = fetch("demo-slide")
        self.spec = tile_spec(given.size, step_px=given.step)
        self.embedder = Embedder(
            self.encoder, Store(folder), device="cpu", batch=given.batch, workers=given.workers
        )
        self.run = self.embedder(self.path, spec=self.spec)
        self.tiles: Tiles = self.embedder.store.tiles[self.run.tiling.tiles.key]
        pixels = torch.stack(self.decode())
        self.pixels = list(pixels.split(given.batch))
        self.inputs = [self.encoder.preprocess(batch) for batch in self.pixels]

    def decode(self) -> list[torch.Tensor]:
        """Read every tile, one after the other."""
        tiles = self.tiles
        with closing(open_slide(self.path)) as slide:
            return [
                torch.from_numpy(read_tile(slide, (x, y), tiles.spec, tiles.slide_mpp))
                for x, y in tiles.xy.tolist()
            ]

    def preprocess(self) -> None:
        """Resize and normalise every batch."""
        for batch in self.pixels:
            self.encoder.preprocess(batch)

    def forward(self) -> None:
        """Run the network alone."""
        with torch.inference_mode():
            for batch in self.inputs:
                self.encoder._run(batch)  # noqa: SLF001 - the network without its preprocessing

    def whole(self) -> None:
        """Embed the slide, whose tiles are known, anew."""
        self.embedder.store.features.path(self.run.key).unlink()
        self.embedder(self.path, spec=self.spec)


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="micro", help="micro, vit-b16, lite0 or timm:NAME")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--step", type=int, default=85)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given, folder + "/store")
        names = ("forward", "decode", "preprocess", "whole")
        rounds = [{n: seconds(getattr(bench, n)) for n in names} for _ in range(given.runs)]
    n = bench.run.tiles

    def median(of: Callable[[dict[str, tuple[float, float]]], float]) -> float:
        return statistics.median(of(r) for r in rounds)

    floor = median(lambda r: sum(r[k][1] for k in names[:3]) / r["forward"][1])
    line = {
        "benchmark": "embedding",
        "network": given.network,
        "tiles": n,
        "size_px": given.size,
        "batch": given.batch,
        "workers": given.workers,
        "threads": given.threads,
        "cpu_ms_a_tile": {k: round(1e3 / n * median(lambda r, k=k: r[k][1]), 2) for k in names},
        "forward_tiles_per_second": round(n / median(lambda r: r["forward"][0]), 1),
        "end_to_end_tiles_per_second": round(n / median(lambda r: r["whole"][0]), 1),
        "floor": round(floor, 3),
        "overhead": round(median(lambda r: r["whole"][0] / r["forward"][0]), 3),
        "overhead_cpu": round(median(lambda r: r["whole"][1] / r["forward"][1]), 3),
        "overhead_each": [round(r["whole"][0] / r["forward"][0], 3) for r in rounds],
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
