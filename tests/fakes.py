"""Components small enough to see through, registered as real ones are."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pathcli.slides.tiling import tile_spec

if TYPE_CHECKING:
    import torch


class MeanColour:
    """An encoder whose feature is the mean colour, 0 to 255, and counts its forward passes."""

    name = "fake"
    input_px = 64
    native = tile_spec(64, 0.5)
    native_source = "the tests"
    id = "fake-000000000000"
    row_shape = (3,)
    passes = 0

    def __init__(self, *, tokens: bool = False, precision: str = "float32") -> None:
        self.tokens, self.precision = tokens, precision

    def load(self, device: str) -> None:
        self.device = device

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        type(self).passes += 1
        return images.float().mean(dim=(1, 2))


class Slow(MeanColour):
    """Takes its time."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.05)
        return super().encode(images)


COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "grey": (1, 1, 1)}


class Colours(MeanColour):
    """Reads the names of colours; a picture's embedding is its mean colour."""

    name = "colours"
    id = "colours-000000000000"
    text_limit = 3
    logit_scale = 10.0
    unknown = (0, 0, 0)  # a word that names none

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        import numpy as np
        import torch

        words = [
            [COLOURS[w] for w in text.split() if w in COLOURS] or [self.unknown] for text in texts
        ]
        return torch.tensor(np.array([np.sum(w, 0) for w in words])).float()

    def count_tokens(self, texts: list[str]) -> list[int]:
        return [len(text.split()) for text in texts]
