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


def sheet(
    pixels: Sequence[ByteArray], captions: Sequence[Sequence[str]], heading: Sequence[str] = ()
) -> ByteArray:
    """Return tiles of any size in rows of five, their captions (equally many lines) below.

    A caption whose last line is "unfamiliar" puts an orange frame around its tile. Lines of the
    `heading` stand above all tiles, broken where they are longer than the picture is wide.
    """
    font = ImageFont.load_default(size=_FONT)
    line = _FONT + 5
    down, right = SIDE + GAP + line * max(map(len, captions)), SIDE + GAP
    columns = min(_COLUMNS, len(pixels))
    width = columns * right + GAP
    above = [part for text in heading for part in _broken(text, font, width - 2 * GAP)]
    top = line * len(above) + (GAP if above else 0)
    size = width, top + math.ceil(len(pixels) / columns) * down + GAP
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for k, text in enumerate(above):
        draw.text((GAP, GAP + k * line), text, (28, 32, 36), font)
    for i, (tile, lines) in enumerate(zip(pixels, captions, strict=True)):
        x, y = i % columns * right + GAP, top + i // columns * down + GAP
        small = Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.paste(small, (x, y))
        if lines[-1] == "unfamiliar":
            draw.rectangle((x, y, x + SIDE - 1, y + SIDE - 1), outline=MARK, width=4)
        for k, text in enumerate(lines):
            fitting = _fitting(text, font)
            draw.text((x, y + SIDE + 2 + k * line), fitting, (28, 32, 36), font)
    return np.array(image)


def _broken(text: str, font: Any, width: int) -> list[str]:  # noqa: ANN401 - Pillow's
    """Return a text in lines no wider than `width`; a word that is wider is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fitting(word, font, width))
    return [line for line in lines if line]


def _fitting(text: str, font: Any, width: int = SIDE) -> str:  # noqa: ANN401 - Pillow's fonts
    """Return a text as it is, or with its middle left out so that it is as wide as a tile."""
    if font.getlength(text) <= width:
        return text
    half = next(n for n in range(len(text) // 2, -1, -1) if font.getlength(_cut(text, n)) <= width)
    return _cut(text, half)


def _cut(text: str, half: int) -> str:
    return f"{text[:half]}...{text[len(text) - half :]}"
