"""A sample's turns in; what each side said, words and the places of images in order, out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pathcli.errors import DataError
from pathcli.vlm.written import IMAGE

if TYPE_CHECKING:
    from pathcli.types import Sample


def pieces(sample: Sample) -> list[list[str]]:
    """Return each turn as words and `<image>`, of which there are as many as images.

    Turns are the user's and the model's by turns, the user's last. Images that no turn marks
    come first of all. What a model said has no images: a mark there is taken apart by a space.

    Raises:
        DataError: nothing is asked, the last turn is the model's, or marks and images differ.
    """
    if len(sample.turns) % 2 == 0:
        why = "its last turn is not the user's" if sample.turns else "nothing is asked"
        msg = f"{sample.name}: {why}"
        raise DataError(msg)
    turns = [
        [turn.replace(IMAGE, "< image>")] if number % 2 else re.split(f"({IMAGE})", turn)
        for number, turn in enumerate(sample.turns)
    ]
    split = [[piece.strip() for piece in turn if piece.strip()] for turn in turns]
    marks, images = sum(turn.count(IMAGE) for turn in split), len(sample.images)
    if not marks:
        split[0][:0] = [IMAGE] * images
    elif marks != images:
        msg = f"{sample.name}: {marks} {IMAGE} marks for {images} images"
        raise DataError(msg)
    return split
