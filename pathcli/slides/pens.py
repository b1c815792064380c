"""A thumbnail in, the ink of pathologists' pens out: green, blue, red and black.

No stain has the hue of green or blue ink at its strength, so a stroke's core is found by
colour (`_CORES`) and area, and then followed into its paler rim (`_RIMS`): brown and blue
of immunohistochemistry, blood and dense nuclei have no core. The limits were chosen on
thumbnails with pens of each colour, and on H&E of lung, colon and skin, and DAB with
haematoxylin, without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pathcli.types import ByteArray

WORK_UM = 16.0  # um per pixel at which ink is sought: nuclei and red cells are averaged away
_STROKE_UM = 64.0  # a red or black core is at least this wide: blood and nuclei seldom are
_CORE_MM2 = 0.02  # and any core this large
_REACH_UM = 2000.0  # a rim ends this far from its core
_MARGIN_UM = 32.0  # what is left out around ink
_STRIPE_PX = 32_000  # pixels looked at in one go: they stay in the processor's cache


class _Range(NamedTuple):
    """Hues in degrees (from may exceed to: over 0), and limits of saturation and value, 0-255."""

    hue: tuple[float, float]
    saturation: tuple[int, int]
    value: tuple[int, int]


_CORES = {
    "green": (_Range((75, 190), (100, 255), (0, 255)),),
    "blue": (_Range((190, 230), (130, 255), (0, 255)),),
    "red": (_Range((345, 12), (215, 255), (110, 255)),),
    # black ink over eosin is purple; dense haematoxylin is as dark, but violet
    "black": (
        _Range((0, 360), (0, 110), (0, 85)),
        _Range((295, 350), (0, 255), (0, 80)),
        _Range((0, 360), (0, 255), (0, 32)),
    ),
}
_RIMS = {
    "green": (_Range((70, 235), (50, 255), (0, 255)),),  # over stained tissue it is blue
    "blue": (_Range((185, 235), (60, 255), (0, 255)),),
    "red": (_Range((343, 15), (112, 255), (90, 255)),),
    "black": (
        _Range((0, 360), (0, 110), (0, 105)),
        _Range((295, 350), (0, 255), (0, 115)),
        _Range((0, 360), (0, 255), (0, 40)),
    ),
}
PENS = tuple(_CORES)
_LIKE_TISSUE = {"red", "black"}


def pens(thumbnail: ByteArray, um_per_px: float) -> dict[str, NDArray[np.bool_]]:
    """Return where each colour's ink is, for those found: bool [h, w] by name of `PENS`.

    `thumbnail` is uint8 RGB [h, w, 3] at `um_per_px`.
    """
    height, width = thumbnail.shape[:2]
    factor = min(1.0, um_per_px / WORK_UM)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = thumbnail
    if size != (width, height):
        small = np.asarray(cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA), np.uint8)
    um = um_per_px * width / size[0]
    least = _CORE_MM2 / (um / 1000) ** 2
    found = {}
    for name, core in _within(small, _CORES, least):
        ink = _strokes(small, name, core, um)
        if ink is not None:
            whole = cv2.resize(ink, (width, height), interpolation=cv2.INTER_NEAREST)
            found[name] = whole.astype(bool)
    return found


def pen_mask(found: dict[str, NDArray[np.bool_]], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the ink of all colours as one mask bool [h, w] of `shape`."""
    return np.asarray(np.logical_or.reduce([np.zeros(shape[:2], bool), *found.values()]))


def _strokes(rgb: ByteArray, name: str, core: ByteArray, um: float) -> ByteArray | None:
    """Return the ink of one colour, 0 or 1 [h, w]: cores, the rims they reach, and a margin."""
    if name in _LIKE_TISSUE:
        stroke = _disc(_STROKE_UM / 2 / um)
        core = np.asarray(cv2.morphologyEx(core, cv2.MORPH_OPEN, stroke), np.uint8)
        if not cv2.hasNonZero(core):
            return None
    _, labels, stats, _ = cv2.connectedComponentsWithStats(core, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] * (um / 1000) ** 2 >= _CORE_MM2
    large[0] = False
    if name == "black":  # the scanner's border is no pen
        large &= ~_at_the_edge(stats, rgb.shape)
    if not large.any():
        return None
    core = large[labels].astype(np.uint8)
    near = cv2.distanceTransform(1 - core, cv2.DIST_L2, 3) <= _REACH_UM / um
    rim = core.copy()
    for _, wide in _within(rgb, {name: _RIMS[name]}):
        rim[(wide > 0) & near] = 1
    _, labels = cv2.connectedComponents(rim, connectivity=8)
    reached = np.unique(labels[core > 0])
    ink = np.isin(labels, reached[reached > 0]).astype(np.uint8)
    return np.asarray(cv2.dilate(ink, _disc(_MARGIN_UM / um)), np.uint8)


def _within(
    rgb: ByteArray, limits: dict[str, tuple[_Range, ...]], least: float = 1
) -> Iterator[tuple[str, ByteArray]]:
    """Yield a name and the pixels within one of its ranges, if `least` or more; uint8 [h, w].

    A bit stands for a range. Tables say of every value of a channel in which ranges it lies.
    """
    tables, bits, bit = np.zeros((256, 1, 3), np.uint8), dict.fromkeys(limits, 0), 1
    values: NDArray[np.int_] = np.arange(256)
    for name, ranges in limits.items():
        for (low, high), saturation, value in ranges:
            for hues in [(low, high)] if low <= high else [(low, 360), (0, high)]:
                hue_from, hue_to = (round(degrees * 255 / 360) for degrees in hues)
                for channel, (first, last) in enumerate(((hue_from, hue_to), saturation, value)):
                    tables[(values >= first) & (values <= last), 0, channel] |= bit
                bits[name] |= bit
                bit <<= 1
    of_pixels = np.empty(rgb.shape[:2], np.uint8)
    rows = max(1, _STRIPE_PX // rgb.shape[1])
    for top in range(0, len(rgb), rows):
        hsv = cv2.cvtColor(rgb[top : top + rows], cv2.COLOR_RGB2HSV_FULL)
        of_hue, of_saturation, of_value = cv2.split(cv2.LUT(hsv, tables))
        of_pixels[top : top + rows] = cv2.bitwise_and(
            cv2.bitwise_and(of_hue, of_saturation), of_value
        )
    count = np.asarray(cv2.calcHist([of_pixels], [0], None, [256], [0, 256])).ravel()
    for name, its in bits.items():
        if count[(values & its) > 0].sum() >= least:
            yield name, of_pixels & np.uint8(its)


def _disc(radius_px: float) -> NDArray[Any]:
    side = 2 * max(0, round(radius_px)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side)))


def _at_the_edge(stats: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Tell which components run along half of a side of the picture, as borders do."""
    x, y, w, h = stats[:, : cv2.CC_STAT_AREA].T
    across = (w >= shape[1] / 2) & ((y == 0) | (y + h == shape[0]))
    down = (h >= shape[0] / 2) & ((x == 0) | (x + w == shape[1]))
    return np.asarray(across | down)
