"""A name in, the encoder out: `lite0`, `plip`, `open_clip:ViT-B-16`, `hf:FOLDER`, `timm:NAME`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

from pathcli.errors import UsageError
from pathcli.registry import resolve

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.types import Encoder, ImageTextEncoder

DEFAULT = "lite0"


def build_encoder(
    name: str = DEFAULT,
    *,
    checkpoint: Path | str | None = None,
    tokens: bool = False,
    precision: str = "float32",
) -> Encoder:
    """Build an encoder; its weights are read when it is loaded.

    Args:
        name: a registered name, or `family:what` for open_clip, hf and timm.
        checkpoint: weights to use instead of the published ones.
        tokens: give one vector per image patch [t, d] instead of one per image [d].
        precision: float32, bfloat16 or float16 arithmetic.

    Raises:
        UsageError: an unknown name, or an argument that this encoder does not take.
    """
    family, _, what = name.partition(":")
    factory = resolve("encoder", family)
    given: dict[str, Any] = {"tokens": tokens, "precision": precision}
    if checkpoint is not None:
        given["checkpoint"] = checkpoint
    takes = inspect.signature(factory).parameters
    if "model" in takes:
        if what:
            given["model"] = what
        elif takes["model"].default is inspect.Parameter.empty:
            msg = f"encoder {family!r} needs to know which: --encoder {family}:NAME"
            raise UsageError(msg)
    elif what:
        msg = f"encoder {family!r} takes no {':' + what!r}; just --encoder {family}"
        raise UsageError(msg)
    for argument in given:
        if argument not in takes:
            msg = f"encoder {family!r} does not take --{argument}"
            raise UsageError(msg)
    built: Encoder = factory(**given)
    return built


def text_encoder(encoder: Encoder) -> ImageTextEncoder:
    """Return the same encoder, known to read texts as well.

    Raises:
        UsageError: it has no text tower, or gives patches, which no text can be compared with.
    """
    if not hasattr(encoder, "encode_text"):
        msg = (
            f"encoder {encoder.name} has no text tower; use --encoder mini-clip, pathgen-clip, "
            "pathgen-clip-l, plip, quilt-net, conch, pallava-plip, open_clip:ARCH or hf:FOLDER"
        )
        raise UsageError(msg)
    if getattr(encoder, "tokens", False):
        msg = (
            f"encoder {encoder.name} gives patches, which texts cannot be compared with: no tokens"
        )
        raise UsageError(msg)
    return cast("ImageTextEncoder", encoder)
