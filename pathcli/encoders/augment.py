"""What is done to a training image before the network sees it: crop, turns, stain, colour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pathcli.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathcli.types import ByteArray

    Floats = NDArray[np.float32]

_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], np.float32)
"""Optical densities of hematoxylin, eosin and DAB (Ruifrok and Johnston 2001)."""
_TO_STAINS = np.linalg.inv(_STAINS)
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_ASPECT = (3 / 4, 4 / 3)


@dataclass(frozen=True, kw_only=True)
class Augment:
    """How far a training image may differ from the one on disk; the default changes nothing.

    `crop` is the least and largest share of the area that is kept; `turns` allows quarter
    turns and mirrors, `mirror` left for right alone, `stain` is how far the amount of each
    stain may change (0.2: by 20 %), `colour` how far brightness, contrast, saturation and each
    channel may, and `grey` the probability that colour is taken away altogether.
    """

    crop: tuple[float, float] = (1.0, 1.0)
    turns: bool = False
    mirror: bool = False
    stain: float = 0.0
    colour: float = 0.0
    grey: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no image could be made from.

        Raises:
            UsageError: a share or strength out of its range.
        """
        if not 0 < self.crop[0] <= self.crop[1] <= 1:
            msg = "augment.crop: two shares of the area, above 0, at most 1, in order"
            raise UsageError(msg)
        for name in ("stain", "colour", "grey"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"augment.{name} must be between 0 and 1, not {getattr(self, name)}"
                raise UsageError(msg)

    def __call__(self, image: ByteArray, size_px: int, rng: np.random.Generator) -> ByteArray:
        """Return uint8 [size_px, size_px, 3] for an RGB image [h, w, 3]; `rng` decides all."""
        cut = self._crop(image, rng) if self.crop != (1.0, 1.0) else image
        if cut.shape[:2] != (size_px, size_px):
            shrinks = min(cut.shape[:2]) > size_px
            how = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            cut = cv2.resize(cut, (size_px, size_px), interpolation=how)  # type: ignore[assignment]
        if self.turns:
            cut = np.rot90(cut, int(rng.integers(4)))
        if (self.turns or self.mirror) and rng.random() < 0.5:  # noqa: PLR2004 - a coin
            cut = cut[:, ::-1]
        if self.stain:
            cut = change_stain(cut, self.stain, rng)
        if self.colour:
            cut = change_colour(cut, self.colour, rng)
        if self.grey and rng.random() < self.grey:
            cut = to_grey(cut)
        return np.ascontiguousarray(cut)

    def _crop(self, image: ByteArray, rng: np.random.Generator) -> ByteArray:
        height, width = image.shape[:2]
        side = np.sqrt(rng.uniform(*self.crop) * height * width)
        aspect = np.exp(rng.uniform(*np.log(_ASPECT)) / 2) if self.crop[0] < 1 else 1.0
        w = min(width, max(1, round(side * aspect)))
        h = min(height, max(1, round(side / aspect)))
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        return image[y : y + h, x : x + w]


def change_stain(image: ByteArray, strength: float, rng: np.random.Generator) -> ByteArray:
    """Return an image whose stains are stronger or weaker, and shifted a little (Tellez 2018)."""
    factor = rng.uniform(1 - strength, 1 + strength, 3)
    shift = rng.uniform(-strength, strength, 3) * 0.15
    change = _TO_STAINS @ np.diag(factor) @ _STAINS  # densities are rows: to stains, and back
    density = _affine(cv2.LUT(image, _DENSITY), -change, -shift @ _STAINS)
    return _bytes(256 * cv2.exp(density) - 1)


def change_colour(image: ByteArray, strength: float, rng: np.random.Generator) -> ByteArray:
    """Return an image of other brightness, contrast, saturation and colour balance."""
    bright, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    balance = rng.uniform(1 - strength / 2, 1 + strength / 2, 3)
    mixed = saturation * np.eye(3) + (1 - saturation) * np.outer(_LUMA, np.ones(3))
    offset = bright * (1 - contrast) * float(image.mean())
    change = bright * contrast * mixed * balance
    return _bytes(_affine(image.astype(np.float32), change, offset * balance))


def to_grey(image: ByteArray) -> ByteArray:
    """Return an image without colour, still of three channels."""
    return np.repeat(_bytes(image @ _LUMA)[..., None], 3, axis=-1)


def _affine(pixels: Any, matrix: NDArray[Any], shift: NDArray[Any]) -> Any:  # noqa: ANN401 - cv2's
    """Return float32 `pixels @ matrix + shift` for pixels [h, w, 3]."""
    return cv2.transform(pixels, np.column_stack([matrix.T, shift]))


def _bytes(pixels: Floats) -> ByteArray:
    np.rint(pixels, out=pixels)
    return np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)
