"""Samples a second of the trainer's step, over the bare step of the same model.

A small ViT on images of 64 px. `bare` is forward, backward and AdamW on batches that lie
ready in memory. `loop` is pathcli's trainer on the same batches ready in memory: what the
loop itself costs. `fed` is the trainer with JPEGs decoded, cropped and resized in collate,
by so many workers. `collate` is that work alone, in one process: where one core makes fewer
samples than the step takes, the step waits for images. The three alternate; the ratios of
neighbours count. Prints one JSON line.

    python benchmarks/training.py [--batch 32] [--steps 40] [--rounds 3] [--workers 1]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pathcli.settings import TrainSettings
from pathcli.trainer import Loop, Work

SIZE, STORED = 64, 224
CLASSES = 8


class Model(torch.nn.Module):
    """A ViT of 4 blocks, 192 wide, on patches of 8 px; batches of (uint8 images, labels)."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 192, 8, 8)
        block = torch.nn.TransformerEncoderLayer(192, 3, 768, 0.0, batch_first=True)
        self.blocks = torch.nn.TransformerEncoder(block, 4, enable_nested_tensor=False)
        self.last = torch.nn.Linear(192, CLASSES)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return the cross-entropy of uint8 images [b, h, w, 3] and labels int64 [b]."""
        images, labels = batch
        patches = self.patches(images.permute(0, 3, 1, 2).float() / 255)
        said = self.last(self.blocks(patches.flatten(2).transpose(1, 2)).mean(1))
        return torch.nn.functional.cross_entropy(said, labels)


def jpegs(count: int) -> list[tuple[bytes, int]]:
    """Return smooth noise as JPEGs of 224 px, each with a label."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        coarse = rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (STORED, STORED), interpolation=cv2.INTER_CUBIC)
        found.append((cv2.imencode(".jpg", image)[1].tobytes(), number % CLASSES))
    return found


def collate(
    rows: list[tuple[bytes, int]], rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode, crop at random, resize: uint8 [b, 64, 64, 3] and int64 [b]."""
    images = []
    for data, _ in rows:
        image: NDArray[Any] = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        side = int(rng.integers(STORED // 2, STORED + 1))
        y, x = rng.integers(0, STORED - side + 1, 2)
        crop = image[y : y + side, x : x + side]
        images.append(cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_AREA))
    return torch.from_numpy(np.stack(images)), torch.tensor([label for _, label in rows])


def bare(batches: list[Any], steps: int, device: str) -> float:
    """Return the seconds of so many bare steps."""
    torch.manual_seed(1)
    model = Model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    start = time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        model.loss(batches[step % len(batches)]).backward()
        optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ours(
    examples: list[Any], make: Callable[..., Any], batch: int, workers: int, device: str
) -> float:
    """Return the seconds of an epoch of the trainer, its workers started before."""
    torch.manual_seed(1)
    settings = TrainSettings(epochs=1, batch=batch, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(Work(Model(), examples, collate=make), settings, Path(folder), device)
        start = time.perf_counter()
        loop.run(lambda _done, _of: None)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    rows = given.batch * given.steps
    examples = jpegs(rows)
    ready = collate(examples[: given.batch], np.random.default_rng(0))
    ready = tuple(part.to(given.device) for part in ready)
    rounds = []
    bare([ready], 3, given.device)
    for _ in range(given.rounds):
        start = time.perf_counter()
        for at in range(0, rows, given.batch):
            collate(examples[at : at + given.batch], np.random.default_rng(at))
        alone = time.perf_counter() - start
        rounds.append(
            (
                bare([ready], given.steps, given.device),
                ours(examples, lambda _rows, _rng: ready, given.batch, 0, given.device),
                ours(examples, collate, given.batch, given.workers, given.device),
                alone,
            )
        )
    names = ("bare", "loop", "fed", "collate")
    line = {
        "benchmark": "training",
        "batch": given.batch,
        "steps": given.steps,
        "workers": given.workers,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": given.device,
        "samples_per_second": {
            name: round(rows / statistics.median(column))
            for name, column in zip(names, zip(*rounds, strict=True), strict=True)
        },
        "loop_over_bare": [round(b / o, 3) for b, o, _, _ in rounds],
        "fed_over_bare": [round(b / f, 3) for b, _, f, _ in rounds],
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
