"""An encoder whose numbers depend on every pixel, and one whose process dies, once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.slides.tiling import tile_spec

if TYPE_CHECKING:
    import torch

DIES = "PATHCLI_TEST_DIES"
"""Names a file: a process that finds it removes it and dies in its third pass."""


class Convolved:
    """A network of random weights, the same in every process."""

    name = "convolved"
    input_px = 32
    native = tile_spec(32, 0.5, tissue="none")
    native_source = "the tests"
    id = "convolved-000000000000"
    row_shape = (64,)
    passes = 0

    def __init__(self, *, tokens: bool = False, precision: str = "float32") -> None:
        self.tokens, self.precision = tokens, precision

    def load(self, device: str) -> None:
        import torch
        from torch import nn

        torch.manual_seed(0)
        parts = [nn.Conv2d(3, 32, 5, 2), nn.GELU(), nn.Conv2d(32, 64, 3, 2), nn.Flatten()]
        self.network = nn.Sequential(*parts, nn.Linear(64 * 6 * 6, 64)).eval().to(device)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        import torch

        type(self).passes += 1
        file = os.environ.get(DIES)
        if file and self.passes == 3 and Path(file).exists():
            Path(file).unlink()
            time.sleep(1)  # what was encoded is written
            os.kill(os.getpid(), signal.SIGKILL)
        with torch.inference_mode():
            return self.network(images.permute(0, 3, 1, 2).float() / 255)
