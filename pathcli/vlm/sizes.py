"""Sizes that need no weights: GPUs, frozen encoders, and the adapters of a language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathcli.vlm.language import Lora, Shape


class Gpu(NamedTuple):
    """Memory in GiB, the makers' dense TFLOP/s at `bits`, and the share of it training reaches."""

    memory: float
    tflops: float
    bits: str = "bfloat16"
    share: float = 0.35


GPUS = {
    "a100-40g": Gpu(40, 312),
    "a100-80g": Gpu(80, 312),
    "h100": Gpu(80, 989),
    "h200": Gpu(141, 989),
    "l40s": Gpu(48, 362),
    "rtx-4090": Gpu(24, 165),
    "v100": Gpu(32, 125, "float16"),
    "cpu-2-cores": Gpu(16, 0.167, "float32", 1.0),  # measured, ViT-B/16 on two cores with AVX2
}


class Tower(NamedTuple):
    """An encoder's tokens [tokens, width] and embedding [pooled], its weights, and operations."""

    tokens: int
    width: int
    pooled: int
    weights: int
    flops: float


def _vit(layers: int, width: int, hidden: int, grid: tuple[int, int], pooled: int) -> Tower:
    """Return a ViT of patches (side, px), whose class token is seen and then dropped."""
    side, px = grid
    seen = side * side + 1
    block = 4 * width * (width + 1) + 2 * width * hidden + hidden + 5 * width
    weights = layers * block + 3 * px * px * width + (seen + 1) * width
    return Tower(seen - 1, width, pooled, weights, forward(weights, seen, layers, width))


def forward(weights: float, tokens: float, layers: int, width: int) -> float:
    """Return the operations of `tokens` that go through `weights` and attend to one another."""
    return 2 * weights * tokens + 4 * layers * tokens**2 * width


_B16, _B32 = _vit(12, 768, 3072, (14, 16), 512), _vit(12, 768, 3072, (7, 32), 512)
_L14 = _vit(24, 1024, 4096, (24, 14), 768)
_LITE = Tower(49, 1280, 1280, 3_372_640, 0.8e9)
TOWERS = {
    "eva-clip-g": _vit(39, 1408, 6144, (16, 14), 1024)._replace(tokens=257),  # all are read
    "pathgen-clip": _B16,
    "pathgen-clip-l": _L14,
    "pathgen-clip-l-hf": _L14,
    "pallava-plip": _B16._replace(pooled=256),
    "plip": _B32,
    "quilt-net": _B32,
    "quilt-net:B-16": _B16,
    "conch": _B16,
    "uni": _vit(24, 1024, 4096, (14, 16), 1024),
    "lite0": _LITE,
    "mini-clip": _LITE._replace(pooled=256),
}
"""What encoders give that need not be here, by their own names."""


def lora_weights(shape: Shape, lora: Lora) -> int:
    """Return how many weights the adapters have beside a language model's layers."""
    if lora.targets == "all-linear":
        return shape.lora(lora.r)
    wide, keys, ffn = shape.hidden, shape.hidden * shape.kv_heads // shape.heads, shape.ffn
    ends = dict.fromkeys(("q_proj", "o_proj"), 2 * wide)
    ends |= dict.fromkeys(("k_proj", "v_proj"), wide + keys)
    ends |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), wide + ffn)
    ends |= dict.fromkeys(("q", "k", "v", "o"), 3 * 2 * wide)  # T5: in both, and across
    ends |= dict.fromkeys(("wi_0", "wi_1", "wo"), 2 * (wide + ffn))
    return lora.r * shape.layers * sum(ends.get(end, 0) for end in lora.targets)
