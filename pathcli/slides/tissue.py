"""A slide in, a mask of its tissue out, at a few micrometres per pixel.

Each method is a class whose keyword arguments are the parameters a `TileSpec` records;
`version` changes when the same parameters would give another mask. Those that adapt to a
slide are in `tissue_methods`.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import cv2
import numpy as np

from pathcli.errors import DataError
from pathcli.registry import resolve
from pathcli.slides.masks import odd, smooth_chroma, tidy
from pathcli.slides.overview import overview
from pathcli.slides.pens import pen_mask, pens
from pathcli.slides.stains import dark_background, stain_warnings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathcli.types import ByteArray, Slide, TileSpec

_MOST_LOST = 0.25  # share of the scan that may be undecodable before the slide fails
_MASK_PX = 2_000_000  # pixels from which a mask is made coarser, if its method can
_INKED = 0.005  # share of the tissue under ink from which the user is told
DARK_BACKGROUND = (
    "no tile: the background is black, as in fluorescence, and tissue rules for stained slides "
    "do not apply; --tissue auto finds what is bright, --tissue none takes the whole scan"
)


class TissueMethod(Protocol):
    """RGB thumbnail in, boolean mask out."""

    version: ClassVar[int]
    mask_mpp: float

    def mask(self, thumbnail: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return bool [h, w] for uint8 RGB [h, w, 3] at `um_per_px`."""
        ...


class Masked(NamedTuple):
    """A mask bool [h, w], and what the user should know of how it was found."""

    mask: NDArray[np.bool_]
    warnings: tuple[str, ...] = ()


@runtime_checkable
class AdaptiveMethod(Protocol):
    """A `TissueMethod` that tries more than one rule and says which served.

    It is given the scanned part alone, and black backgrounds too; of the stain it speaks itself.
    """

    def masked(self, scan: ByteArray, um_per_px: float) -> Masked:
        """Return the mask of uint8 RGB [h, w, 3] at `um_per_px`, and what is to be said."""
        ...


@dataclass(frozen=True)
class Tissue:
    """Where the tissue is: `mask` bool [h, w] over the whole level 0, `scale` level-0 px a cell.

    `thumbnail` is the uint8 RGB picture the mask was made from (same size).
    """

    mask: NDArray[np.bool_]
    thumbnail: ByteArray
    scale: tuple[float, float]
    warnings: tuple[str, ...] = ()

    def share(self, bounds: tuple[int, int, int, int]) -> float:
        """Return the share of the scanned area (`bounds`, level-0 px) that is tissue."""
        x, y, w, h = bounds
        fractions = self.fraction(np.array([[x, y]]), (w, h))
        return float(fractions[0])

    def fraction(self, xy: NDArray[Any], size: tuple[float, float]) -> NDArray[np.float64]:
        """Return the tissue share [n] of rectangles `size` (w, h) at `xy` [n, 2], level-0 px.

        Areas are exact: a mask cell that a rectangle cuts counts by the part inside.
        """
        x0, y0 = xy[:, 0] / self.scale[0], xy[:, 1] / self.scale[1]
        x1, y1 = x0 + size[0] / self.scale[0], y0 + size[1] / self.scale[1]
        table = _Sums(self.mask, np.concatenate([y0, y1]))
        inside = table(x1, y1) - table(x0, y1) - table(x1, y0) + table(x0, y0)
        area = size[0] * size[1] / (self.scale[0] * self.scale[1])
        return np.asarray(np.clip(np.round(inside / area, 9), 0.0, 1.0))  # ties are ties


class _Sums:
    """A summed-area table of a mask, of those rows alone that are asked for."""

    def __init__(self, mask: NDArray[np.bool_], y: NDArray[Any]) -> None:
        """Sum up to the cells around each of `y`."""
        self._height, width = mask.shape
        above = np.unique(self._above(y))
        self._rows = np.union1d(above, above + 1)
        cells, table = mask.view(np.uint8), np.zeros((len(self._rows), width + 1), np.int32)
        for i, (top, bottom) in enumerate(pairwise([0, *self._rows.tolist()])):
            if bottom > top:
                table[i, 1:] = cv2.reduce(cells[top:bottom], 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)
        table.cumsum(axis=0, out=table)
        self._table = table.cumsum(axis=1, out=table)

    def _above(self, y: NDArray[Any]) -> NDArray[np.int64]:
        row = np.clip(y, 0, self._height).astype(np.int64)
        return np.asarray(np.minimum(row, self._height - 1))

    def __call__(self, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        """Read the table at fractional places, bilinearly."""
        table, width = self._table, self._table.shape[1] - 1
        x = np.clip(x, 0, width)
        row, j = self._above(y), np.minimum(x.astype(int), width - 1)
        v, u = np.clip(y, 0, self._height) - row, x - j
        i = np.searchsorted(self._rows, row)
        return np.asarray(
            table[i, j] * (1 - u) * (1 - v)
            + table[i, j + 1] * u * (1 - v)
            + table[i + 1, j] * (1 - u) * v
            + table[i + 1, j + 1] * u * v
        )


@dataclass(frozen=True, kw_only=True)
class Otsu:
    """Otsu's threshold on chroma (largest minus smallest channel), within sane limits.

    Chroma is near zero for white, grey and black alike, so dust, shadows and black borders
    are not tissue. The limits keep a slide full of tissue, or without any, from being split
    at its noise. `blur_um` is the standard deviation of a Gaussian, taken before the colours
    are compared, so that a pyramid made without averaging gives the same mask. A mask cell
    is `mask_mpp` wide, doubled while there are more than two million (`_MASK_PX`) and up to
    `coarsest_mpp`: 8 um on scans of more than 32 mm2, 16 um on those of more than 128.
    """

    version: ClassVar[int] = 2
    mask_mpp: float = 4.0
    coarsest_mpp: float = 16.0
    blur_um: float = 8.0
    lowest: int = 10
    highest: int = 17
    close_um: float = 24.0
    min_area_mm2: float = 0.01
    min_hole_mm2: float = 0.005

    def mask(self, thumbnail: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return bool [h, w]; see `TissueMethod.mask`."""
        chroma = smooth_chroma(thumbnail, max(0.3, self.blur_um / um_per_px))
        level, _ = cv2.threshold(chroma, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        found = chroma > min(max(level, self.lowest), self.highest)
        return tidy(found, um_per_px, self.close_um, self.min_area_mm2, self.min_hole_mm2)


@dataclass(frozen=True, kw_only=True)
class HSV:
    """CLAM's recipe: median-blurred saturation over a fixed threshold, then closing.

    `sthresh`, `mthresh` and `close` are CLAM's defaults (pixels of the mask); small islands
    and holes are dropped by physical area instead of by patches.
    """

    version: ClassVar[int] = 1
    mask_mpp: float = 8.0
    sthresh: int = 8
    mthresh: int = 7
    close: int = 4
    min_area_mm2: float = 0.01
    min_hole_mm2: float = 0.005

    def mask(self, thumbnail: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return bool [h, w]; see `TissueMethod.mask`."""
        saturation = np.ascontiguousarray(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1])
        found = cv2.medianBlur(saturation, odd(self.mthresh)) > self.sthresh
        closing = self.close * um_per_px
        return tidy(found, um_per_px, closing, self.min_area_mm2, self.min_hole_mm2)


@dataclass(frozen=True, kw_only=True)
class Everything:
    """No tissue rule: the whole scan counts."""

    version: ClassVar[int] = 1
    mask_mpp: float = 16.0

    def mask(self, thumbnail: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return bool [h, w], all true."""
        del um_per_px
        return np.ones(thumbnail.shape[:2], bool)


def method(name: str, **parameters: float) -> TissueMethod:
    """Build a tissue method by name; unnamed parameters keep their defaults.

    Raises:
        UsageError: no method has this name.
    """
    built: TissueMethod = resolve("tissue", name)(**parameters)
    return built


def parameters_of(built: TissueMethod) -> dict[str, float]:
    """Return all parameters of a method, defaults included; 24 um are 24.0 um in a digest."""
    known = inspect.signature(type(built)).parameters.items()
    values = {name: getattr(built, name) for name, _ in known}
    return values | {name: float(values[name]) for name, p in known if p.annotation == "float"}


def mask_um(built: TissueMethod, area_um2: float) -> float:
    """Return the width of a mask cell over a scan of `area_um2`, in micrometres."""
    um = built.mask_mpp
    while 0 < _MASK_PX * um**2 < area_um2 and 2 * um <= getattr(built, "coarsest_mpp", um):
        um *= 2
    return um


def recorded(spec: TileSpec) -> TissueMethod:
    """Return the tissue method that a specification records.

    Raises:
        DataError: it is of a version that is not known here.
    """
    parameters, version = dict(spec.tissue_params), spec.tissue_version
    if (spec.tissue, version) == ("otsu", 1):  # whose cells had one width on all scans
        parameters["coarsest_mpp"] = parameters.get("mask_mpp", Otsu.mask_mpp)
        version = Otsu.version
    built = method(spec.tissue, **parameters)
    if built.version != version:
        msg = f"tissue method {spec.tissue} is version {built.version}, not {version}"
        raise DataError(msg)
    return built


def find_tissue(slide: Slide, spec: TileSpec, mpp: float) -> Tissue:
    """Return the tissue of `slide`, whose level-0 pixels are `mpp` micrometres wide.

    Raises:
        DataError: more than a quarter cannot be decoded, or the mask is of another version.
    """
    built = recorded(spec)
    cell_um = mask_um(built, slide.info.width * slide.info.height * mpp**2)
    thumbnail, lost = overview(slide, max(1.0, cell_um / mpp))
    if lost > _MOST_LOST:
        msg = f"{slide.path}: {lost:.0%} of the scan cannot be decoded; is the file whole?"
        raise DataError(msg)
    told: tuple[str, ...] = ()
    if lost:
        told = (f"{lost:.2%} of the scan cannot be decoded: no tissue is found there",)
    height, width = thumbnail.shape[:2]
    scale = (slide.info.width / width, slide.info.height / height)
    um = mpp * scale[0]
    scan = _window(slide, scale)
    if spec.tissue == "none":
        mask = built.mask(thumbnail, um)
    elif isinstance(built, AdaptiveMethod):
        mask = np.zeros((height, width), bool)
        mask[scan], said = built.masked(thumbnail[scan], um)
        told += said
    elif dark_background(thumbnail[scan]):
        return Tissue(np.zeros((height, width), bool), thumbnail, scale, (DARK_BACKGROUND, *told))
    else:
        mask = built.mask(thumbnail, um)
        told += _ink_warnings(thumbnail[scan], mask[scan], um)
        told += stain_warnings(thumbnail[scan], mask[scan])
    return Tissue(mask, thumbnail, scale, told)


def _window(slide: Slide, scale: tuple[float, float]) -> tuple[slice, slice]:
    """Return the rows and columns of an overview that hold the scan."""
    x, y, w, h = slide.info.bounds
    rows = slice(int(y / scale[1]), math.ceil((y + h) / scale[1]))
    return rows, slice(int(x / scale[0]), math.ceil((x + w) / scale[0]))


def _ink_warnings(scan: ByteArray, mask: NDArray[np.bool_], um_per_px: float) -> tuple[str, ...]:
    """Say how much of the tissue is a pen's ink, where it is worth saying."""
    found = pens(scan, um_per_px)
    if not found:
        return ()
    inked = int(np.count_nonzero(pen_mask(found, scan.shape) & mask))
    share = inked / max(1, int(np.count_nonzero(mask)))
    if share < _INKED:
        return ()
    said = f"{share:.1%} of the tissue is under pen marks ({', '.join(found)}); "
    return (said + "--tissue auto leaves them out, --drop pen the tiles",)
