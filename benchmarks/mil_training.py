"""Epochs of MIL training against the common loop, and against its matrix products alone.

Bags of 5,000 to 10,000 tiles of 512 numbers, ABMIL 512-256-128. `common` is the loop most
repositories have: a DataLoader with 8 workers that opens each bag's file and hands over
float32, batch 1, AdamW. `ours` is pathcli's trainer on bags mapped from the store, metrics
and all. `products` are the matrix products that any of them must do. The three alternate;
the ratios of neighbours count. Prints one JSON line.

    python benchmarks/mil_training.py [--bags 270] [--rounds 3] [--head abmil]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pathcli.mil.bags import Bags, Cohort
from pathcli.mil.tables import Row, label_table
from pathcli.mil.task import Classifier
from pathcli.registry import resolve
from pathcli.settings import TrainSettings
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.trainer import Loop, Work
from pathcli.types import Key, Tiles

DIM, ENCODER = 512, "random-000000000000"
SETTINGS = TrainSettings(epochs=1, lr=1e-4, decay_all=True)


def fill(store: Store, bags: int, seed: int = 0) -> Cohort:
    """Write random features of `bags` slides; return them as a cohort of two classes."""
    rng = np.random.default_rng(seed)
    keys, rows = {}, []
    for number in range(bags):
        n = int(rng.integers(5_000, 10_001))
        xy = np.stack([np.arange(n) % 100 * 224, np.arange(n) // 100 * 224], 1).astype(np.int32)
        item = f"bag{number:03d}-{number:08x}"
        status = np.zeros(n, np.uint8)
        tiles = Tiles(item, xy, status, tile_spec(), 0.5, 22_400, 22_400, 1.0)
        with store.features.writer(tiles, ENCODER, (DIM,)) as writer:
            writer.begin(0)
            writer.write(rng.standard_normal((n, DIM), np.float32).astype(np.float16), status)
        keys[item] = Key(item, 0.5, tiles.spec.digest, ENCODER)
        rows.append(Row(item, item, "ab"[number % 2]))
    return Cohort(label_table(rows, source="random"), store, keys, {})


class Files(Dataset[tuple[torch.Tensor, int]]):
    """The common data set: opens a file a bag, hands over float32."""

    def __init__(self, bags: Bags, store: Store, cohort: Cohort) -> None:
        """Know each bag's file and label."""
        self.paths = [store.features.path(cohort.keys[name]) for name in bags.names]
        self.labels = bags.labels.tolist()

    def __len__(self) -> int:
        """Return the number of bags."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Read one bag."""
        with h5py.File(self.paths[index], "r") as file:
            return torch.from_numpy(file["features"][:]).float(), self.labels[index]


def common(files: Files, head: str) -> float:
    """Return the seconds of an epoch of the common loop."""
    module = resolve("head", head)(DIM, 2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=1e-5)
    loader = DataLoader(files, batch_size=1, shuffle=True, num_workers=8)
    start = time.perf_counter()
    for features, label in loader:
        optimizer.zero_grad()
        loss = module.loss(features[0], label[0])
        loss.backward()
        optimizer.step()
        loss.item()
    return time.perf_counter() - start


def ours(bags: Bags, head: str, folder: Path) -> float:
    """Return the seconds of an epoch of pathcli's trainer."""
    torch.manual_seed(1)
    work = Work(Classifier(resolve("head", head)(DIM, 2)), bags)
    loop = Loop(work, SETTINGS, folder, "cpu")
    start = time.perf_counter()
    loop.run(lambda _done, _of: None)
    return time.perf_counter() - start


def products(bags: Bags) -> float:
    """Return the seconds of ABMIL's matrix products, forward and backward, on float32."""
    down, gates = torch.randn(DIM, 256), torch.randn(256, 256)  # value and gate side by side
    seconds = 0.0
    for i in range(len(bags)):
        x = torch.from_numpy(bags[i].features).float()
        start = time.perf_counter()
        hidden = x @ down
        units = hidden @ gates
        back = units @ gates.T  # to the hidden layer
        hidden.T @ units  # weights of value and gate
        x.T @ back  # weights of the projection
        seconds += time.perf_counter() - start
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bags", type=int, default=270)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--head", default="abmil")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store")
        cohort = fill(store, given.bags)
        bags = Bags(cohort, list(cohort.keys))
        files = Files(bags, store, cohort)
        ours(bags, given.head, Path(folder) / "warm")
        rounds = []
        for i in range(given.rounds):
            times = (
                common(files, given.head),
                ours(bags, given.head, Path(folder) / f"run{i}"),
                products(bags),
            )
            rounds.append(times)
    line = {
        "benchmark": "mil_training",
        "head": given.head,
        "bags": given.bags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "epoch_seconds": {
            name: round(statistics.median(column), 2)
            for name, column in zip(
                ("common", "ours", "products"), zip(*rounds, strict=True), strict=True
            )
        },
        "ours_over_common": [round(c / o, 2) for c, o, _ in rounds],
        "share_of_bound": [round(p / o, 2) for _, o, p in rounds],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
