"""Tiles as they were cut in, a network's input out: resize and normalise whole batches."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pathcli.errors import UsageError
from pathcli.types import digest

if TYPE_CHECKING:
    import torch

Triple = tuple[float, float, float]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Preprocess:
    """Resize square tiles to `size` px, scale to 0..1, subtract `mean`, divide by `std`.

    The tile is used whole: a centre crop, which some models publish, would throw away its
    border. Resizing works on uint8 and smooths before it shrinks.
    """

    size: int
    mean: Triple = OPENAI_MEAN
    std: Triple = OPENAI_STD
    interpolation: str = "bicubic"

    def __post_init__(self) -> None:
        """Refuse what whole batches of bytes cannot be resized with.

        Raises:
            UsageError: an interpolation other than bilinear or bicubic.
        """
        if self.interpolation not in {"bilinear", "bicubic"}:
            msg = f"interpolation {self.interpolation!r} is not supported: bilinear or bicubic"
            raise UsageError(msg)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 [b, 3, size, size] for uint8 [b, h, w, 3]."""
        import torch  # noqa: PLC0415
        from torch.nn.functional import interpolate  # noqa: PLC0415

        pixels = images.permute(0, 3, 1, 2)
        if pixels.shape[-2:] != (self.size, self.size):
            whole = pixels if images.device.type == "cpu" else pixels.float()
            pixels = interpolate(
                whole, size=(self.size, self.size), mode=self.interpolation, antialias=True
            )
            if pixels.is_floating_point():  # torch resizes bytes on the CPU alone
                pixels = pixels.clamp(0, 255).round()
        shift, scale = _constants(self.mean, self.std, images.device)
        return torch.addcmul(shift, pixels, scale)  # in one go: each pass over memory counts


@lru_cache(maxsize=64)
def _constants(
    mean: Triple, std: Triple, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return shift and scale [3, 1, 1] that normalise bytes, on a device: copied there once."""
    import torch  # noqa: PLC0415

    with torch.inference_mode(mode=False):  # they serve training, too
        shift = [-m / s for m, s in zip(mean, std, strict=True)]
        scale = [1 / (255 * s) for s in std]
        return tuple(torch.tensor(x, device=device).view(3, 1, 1) for x in (shift, scale))  # type: ignore[return-value]


def encoder_id(name: str, weights: str, *how: Any) -> str:  # noqa: ANN401 - JSON-able values
    """Return `name-digest` over the weights' digest and all that changes the features."""
    readable = "".join(c if c.isalnum() or c in "-._" else "_" for c in name)
    return f"{readable}-{digest([weights, *how])}"


def token_layer(layer: int, *, tokens: bool, blocks: int | None = None) -> int:
    """Return `layer`, the block that tokens are taken from, -1 the last of `blocks` if known.

    Raises:
        UsageError: there is no such block, or no tokens are wanted.
    """
    if layer != -1 and not tokens:
        msg = f"layer {layer} is of patch tokens; set tokens: true, too"
        raise UsageError(msg)
    if layer >= 0 or (blocks is not None and layer < -blocks):
        has = f", and this tower has {blocks}" if blocks else ""
        msg = f"layers are counted from the last one's -1 backwards{has}: not {layer}"
        raise UsageError(msg)
    return layer


def describe(preprocess: Preprocess, *, tokens: bool, precision: str, layer: int = -1) -> list[Any]:
    """Return what an encoder's id needs beside its weights.

    Raises:
        UsageError: an unknown precision.
    """
    if precision not in PRECISIONS:
        msg = f"--precision is one of {', '.join(PRECISIONS)}, not {precision!r}"
        raise UsageError(msg)
    pooling = "pooled" if not tokens else "tokens" if layer == -1 else f"tokens of {layer}"
    return [asdict(preprocess), pooling, precision]


def run(
    network: Any,  # noqa: ANN401 - any callable [b, 3, s, s] -> [b, ...]
    images: torch.Tensor,
    preprocess: Preprocess,
    precision: str,
) -> torch.Tensor:
    """Return float32 features of uint8 images [b, h, w, 3], without gradients."""
    import torch  # noqa: PLC0415

    device = images.device.type
    lower = precision != "float32"
    with torch.inference_mode(), torch.autocast(device, getattr(torch, precision), enabled=lower):
        features: torch.Tensor = network(preprocess(images))
    return features.float()
