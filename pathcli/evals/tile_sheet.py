"""Tiles and their captions in, one picture out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.types import ByteArray

SIDE, GAP = 220, 14
MARK = (213, 94, 0)
"""The colour of what is to be seen at once."""

_COLUMNS, _FONT = 5, 15


def sheet(pixels: Sequence[ByteArray], captions: Sequence[Sequence[str]]) -> ByteArray:
    """Return tiles of any size in rows of five, their captions (equally many lines) below.

    A caption whose last line is "unfamiliar" puts an orange frame around its tile.
    """
    font = ImageFont.load_default(size=_FONT)
    line = _FONT + 5
    down, right = SIDE + GAP + line * max(map(len, captions)), SIDE + GAP
    columns = min(_COLUMNS, len(pixels))
    size = columns * right + GAP, math.ceil(len(pixels) / columns) * down + GAP
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for i, (tile, lines) in enumerate(zip(pixels, captions, strict=True)):
        x, y = i % columns * right + GAP, i // columns * down + GAP
        small = Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.paste(small, (x, y))
        if lines[-1] == "unfamiliar":
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=MARK, width=4)
        for k, text in enumerate(lines):
            fitting = _fitting(text, font)
            draw.text((x, y + SIDE + 2 + k * line), fitting, (28, 32, 36), font)
    return np.array(image)


def _fitting(text: str, font: Any) -> str:  # noqa: ANN401 - either of Pillow's fonts
    """Return a text as it is, or with its middle left out so that it is as wide as a tile."""
    if font.getlength(text) <= SIDE:
        return text
    half = next(n for n in range(len(text) // 2, -1, -1) if font.getlength(_cut(text, n)) <= SIDE)
    return _cut(text, half)


def _cut(text: str, half: int) -> str:
    return f"{text[:half]}...{text[len(text) - half :]}"
