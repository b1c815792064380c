"""A name in, the encoder out: `lite0`, `open_clip:ViT-B-16`, `hf:FOLDER`, `timm:NAME`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pathcli.registry import resolve
from pathcli.types import Encoder, UsageError

if TYPE_CHECKING:
    from pathlib import Path

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
        if not what:
            msg = f"encoder {family!r} needs to know which: --encoder {family}:NAME"
            raise UsageError(msg)
        given["model"] = what
    elif what:
        msg = f"encoder {family!r} takes no {':' + what!r}; just --encoder {family}"
        raise UsageError(msg)
    for argument in given:
        if argument not in takes:
            msg = f"encoder {family!r} does not take --{argument}"
            raise UsageError(msg)
    built: Encoder = factory(**given)
    return built
