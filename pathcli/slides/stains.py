"""A thumbnail in, what it seems to be stained with out: fluorescence and IHC are no H&E.

Only what is not haematoxylin and eosin is told, as a warning; `stain_named` reads it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from pathcli.types import ByteArray

_MOST_PX = 250_000  # pixels looked at: a stain is seen in a few
_BLACK, _GLASS = 50, 180  # largest channel of a black pixel, smallest of glass, of 255
_LEAST_PX = 64  # pixels of tissue from which a stain is named
_COLOURED = 35  # saturation, 0-255, of a pixel whose hue means something
_BROWN, _BLUE = (13, 52), (185, 252)  # hues in degrees of DAB, and of haematoxylin beside it
_LEAST_BROWN, _MOST_PINK = 0.02, 0.5
_ALONE = 0.9  # share of blue from which there is no counterstain

SAID = {
    "fluorescence": "the background is black, as in fluorescence",
    "dab": "the stain looks like DAB and haematoxylin (immunohistochemistry)",
    "haematoxylin": "the stain looks like haematoxylin alone (immunohistochemistry without DAB?)",
}
"""What a warning contains, by the stain's name in summaries."""


def stain_named(warnings: Iterable[str]) -> str | None:
    """Return the stain that warnings tell of; None where nothing but H&E was noticed."""
    text = " ".join(warnings)
    return next((name for name, said in SAID.items() if said in text), None)


def extremes(rgb: NDArray[Any]) -> tuple[ByteArray, ByteArray]:
    """Return the smallest and the largest channel of [h, w, 3], uint8 [h, w] each."""
    red, green, blue = cv2.split(rgb)
    least = np.asarray(cv2.min(cv2.min(red, green), blue), np.uint8)
    return least, np.asarray(cv2.max(cv2.max(red, green), blue), np.uint8)


def dark_background(scan: ByteArray) -> bool:
    """Tell a fluorescence scan: mostly black, and what is not is not glass either.

    Rows are counted until half of the scan is known not to be black, as on all other slides.
    """
    size = scan.shape[0] * scan.shape[1]
    glass = seen = 0
    rows = max(1, _MOST_PX // scan.shape[1])
    for top in range(0, len(scan), rows):
        least, most = extremes(scan[top : top + rows])
        seen += int(np.count_nonzero(most >= _BLACK))
        if 2 * seen >= size:
            return False
        glass += int(np.count_nonzero(least > _GLASS))
    # black may be padding around glass
    return bool(glass / size < 0.1 * (1 - (size - seen) / size))


def stain_warnings(scan: ByteArray, mask: NDArray[np.bool_]) -> tuple[str, ...]:
    """Say of uint8 RGB [h, w, 3] what its tissue, bool [h, w], is stained with if not H&E."""
    name = _stain(scan, mask)
    if name is None:
        return ()
    return (f"{SAID[name]}: encoders and heads trained on H&E may not fit",)


def _stain(scan: ByteArray, mask: NDArray[np.bool_]) -> str | None:
    """Return "dab", "haematoxylin", or None for anything else, by the hues of the tissue.

    H&E is pink to violet; DAB is brown, and beside it haematoxylin is blue. Of 552 single H&E
    patches of lung and colon, many with altered colours, 14 are named otherwise.
    """
    step = max(1, round((mask.size / _MOST_PX) ** 0.5))
    hsv = cv2.cvtColor(np.ascontiguousarray(scan[::step, ::step]), cv2.COLOR_RGB2HSV_FULL)
    hue, saturation, value = cv2.split(hsv)
    chosen = mask[::step, ::step] & (saturation > _COLOURED) & (value > 40)  # noqa: PLR2004 - no border
    count = cv2.calcHist([hue], [0], chosen.view(np.uint8), [256], [0, 256]).ravel()
    if count.sum() < _LEAST_PX:
        return None
    share, degrees = count / count.sum(), np.arange(256) * 360 / 255
    brown = share[(degrees >= _BROWN[0]) & (degrees < _BROWN[1])].sum()
    blue = share[(degrees >= _BLUE[0]) & (degrees < _BLUE[1])].sum()
    pink = share[(degrees >= _BLUE[1]) | (degrees < _BROWN[0])].sum()
    if pink >= _MOST_PINK:
        return None
    if brown >= _LEAST_BROWN:
        return "dab"
    return "haematoxylin" if blue >= _ALONE else None
