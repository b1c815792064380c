"""Tissue methods beyond a threshold: CLAM's recipe with its presets, and one that adapts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import cv2
import numpy as np

from pathcli.slides.masks import chroma_of, odd, tidy
from pathcli.slides.pens import pen_mask, pens
from pathcli.slides.stains import SAID, dark_background, stain_warnings
from pathcli.slides.tissue import HSV, Masked, Otsu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pathcli.types import ByteArray

    Named = tuple[str, NDArray[np.bool_]]

_PATCH_MM2 = (512 * 0.25 / 1000) ** 2
"""CLAM counts areas in patches of 512 px at level 0: 0.0164 mm2 at 0.25 um per pixel."""

_ALL = 0.98  # share of a scan above which a mask is no answer
_INKED = 0.001  # share of a scan under ink from which it is said
_GLASS_BRIGHT, _GLASS_SHARE, _GLASS_FLAT = 0.6, 0.02, 2.0
_GLASS_NEAR = 3  # grey levels around the glass's own
_BLACK = 50  # of 255: a border, not tissue
_DARKEST, _BRIGHTEST = 3, 40  # limits of the threshold over a black background


@dataclass(frozen=True, kw_only=True)
class Clam(HSV):
    """CLAM's recipe whole: also Otsu's threshold, and a limit to the holes of an island.

    An island counts by its area without its holes; of its holes the `max_holes` largest stay,
    if larger than `min_hole_mm2`, and the others are filled. CLAM's areas are in patches of
    512 px at level 0 whatever the scan; here they are physical, as at 0.25 um per pixel
    (`_PATCH_MM2`), and so is the mask: 16 um, which is CLAM's downsampling by 64 there.
    Presets: github.com/mahmoodlab/CLAM, presets/bwh_biopsy.csv, bwh_resection.csv, tcga.csv.
    """

    version: ClassVar[int] = 1
    mask_mpp: float = 16.0
    use_otsu: bool = False
    max_holes: int = 8

    def mask(self, thumbnail: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return bool [h, w]; see `TissueMethod.mask`."""
        saturation = np.ascontiguousarray(cv2.cvtColor(thumbnail, cv2.COLOR_RGB2HSV)[..., 1])
        smooth = cv2.medianBlur(saturation, odd(self.mthresh))
        kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if self.use_otsu else 0)
        _, found = cv2.threshold(smooth, self.sthresh, 1, kind)
        kernel = np.ones((self.close, self.close), np.uint8)
        closed = cv2.morphologyEx(found, cv2.MORPH_CLOSE, kernel) if self.close else found
        cell_mm2 = (um_per_px / 1000) ** 2
        return _islands(
            closed, self.min_area_mm2 / cell_mm2, self.min_hole_mm2 / cell_mm2, self.max_holes
        )


def _islands(found: NDArray[Any], least: float, least_hole: float, holes: int) -> NDArray[np.bool_]:
    """Keep islands of more than `least` cells, and in each its largest `holes` holes."""
    contours, tree = cv2.findContours(found, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    kept = np.zeros(found.shape, np.uint8)
    outer = [i for i in range(len(contours)) if tree[0][i][3] < 0]
    # the largest first: an island in the hole of another is drawn after that hole
    for i in sorted(outer, key=lambda i: cv2.contourArea(contours[i]), reverse=True):
        contour, inner, child = contours[i], [], tree[0][i][2]
        while child >= 0:
            inner.append(contours[child])
            child = tree[0][child][0]
        areas = [cv2.contourArea(hole) for hole in inner]
        if cv2.contourArea(contour) - sum(areas) <= least:
            continue
        cv2.drawContours(kept, [contour], -1, 1, cv2.FILLED)
        largest = sorted(range(len(inner)), key=areas.__getitem__, reverse=True)[:holes]
        for k in largest:
            if areas[k] > least_hole:
                cv2.drawContours(kept, inner, k, 0, cv2.FILLED)
                cv2.drawContours(kept, inner, k, 1, 1)  # a hole's contour runs on its island
    return kept.astype(bool)


bwh_biopsy = partial(
    Clam,
    sthresh=15,
    mthresh=11,
    close=2,
    min_area_mm2=1 * _PATCH_MM2,
    min_hole_mm2=1 * _PATCH_MM2,
    max_holes=2,
)
bwh_resection = partial(
    Clam,
    sthresh=15,
    mthresh=11,
    close=4,
    min_area_mm2=100 * _PATCH_MM2,
    min_hole_mm2=16 * _PATCH_MM2,
    max_holes=8,
)
tcga = partial(
    Clam,
    sthresh=8,
    mthresh=7,
    close=4,
    min_area_mm2=16 * _PATCH_MM2,
    min_hole_mm2=4 * _PATCH_MM2,
    max_holes=8,
)


@dataclass(frozen=True, kw_only=True)
class Auto(Otsu):
    """Otsu's method without pens, and other rules where it finds nothing or everything.

    Where nothing is found, CLAM's preset for biopsies is tried (it serves on CAMELYON16's
    normal_027, of which CLAM's default drops the small pieces), then the distance from the
    glass's own colour; where everything is found, that distance alone. A rule serves when it
    finds something, and at most 98 % of the scan. In immunohistochemistry, whose stroma is
    nearly grey, that distance is added to Otsu's; over a black background what is bright
    counts. What served is said, in warnings.
    """

    version: ClassVar[int] = 1
    mask_mpp: float = 16.0

    def masked(self, scan: ByteArray, um_per_px: float) -> Masked:
        """Return the mask and what was tried; see `AdaptiveMethod.masked`."""
        if dark_background(scan):
            said = f"{SAID['fluorescence']}: what is brighter than it counts as tissue"
            return Masked(self._bright(scan, um_per_px), (said,))
        found = pens(scan, um_per_px)
        ink = pen_mask(found, scan.shape)
        clean = scan
        told: tuple[str, ...] = ()
        if _share(ink) > _INKED:
            told = (f"pen marks left out: {', '.join(found)} ({_share(ink):.1%} of the scan)",)
        if found:
            clean = np.where(ink[..., None], np.uint8(255), scan)

        def free(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
            return np.asarray(mask & ~ink)

        first = free(self.mask(clean, um_per_px))
        if 0 < _share(first) <= _ALL:
            stained = stain_warnings(clean, first)
            if stained:  # the stroma between is nearly grey
                first |= free(self._off_glass(clean, um_per_px))
                stained = stain_warnings(clean, first)
            return Masked(first, told + stained)
        for name, mask in self._others(clean, um_per_px, nothing=not first.any()):
            other = free(mask)
            if 0 < _share(other) <= _ALL:
                share = f"otsu finds {_share(first):.0%} of the scan"
                told += (f"{share}, {name} {_share(other):.1%}, which is used",)
                return Masked(other, told + stain_warnings(clean, other))
        if not first.any():
            told += ("no tissue by otsu, hsv:bwh_biopsy or distance from glass",)
        return Masked(first, told + stain_warnings(clean, first))

    def _others(self, scan: ByteArray, um_per_px: float, *, nothing: bool) -> Iterator[Named]:
        """Yield the names and masks of the rules to try next."""
        if nothing:
            yield "hsv:bwh_biopsy", _coarsely(bwh_biopsy(), scan, um_per_px)
        yield "distance from the glass's colour", self._off_glass(scan, um_per_px)

    def _off_glass(self, scan: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return what differs from the glass: the bright flat colour that is most common."""
        smooth = cv2.GaussianBlur(scan, (0, 0), max(0.3, self.blur_um / um_per_px))
        grey, raw = (cv2.cvtColor(p, cv2.COLOR_RGB2GRAY) for p in (smooth, scan))
        counts = np.bincount(grey.ravel(), minlength=256)
        bright = int(_GLASS_BRIGHT * np.percentile(grey, 99))
        peak = bright + int(counts[bright:].argmax())
        glass = cv2.absdiff(grey, np.full_like(grey, peak)) <= _GLASS_NEAR
        flat = glass.any() and cv2.absdiff(grey, raw)[glass].mean() < _GLASS_FLAT
        if glass.mean() < _GLASS_SHARE or not flat:  # a scan without glass
            return np.zeros(grey.shape, bool)
        colour = np.median(smooth[glass], axis=0).astype(np.uint8)
        away = cv2.absdiff(smooth, np.broadcast_to(colour, smooth.shape)).max(axis=2)
        level, _ = cv2.threshold(away, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        black = (smooth.max(axis=2) < _BLACK) & (chroma_of(smooth) < self.highest)
        found = (away > min(max(level, self.lowest), self.highest)) & ~black
        return tidy(found, um_per_px, self.close_um, self.min_area_mm2, self.min_hole_mm2)

    def _bright(self, scan: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Return what is brighter than a black background, by Otsu's threshold on its square root.

        The root evens out signals of different strength, as a gamma of 2 does.
        """
        smooth = cv2.GaussianBlur(scan, (0, 0), max(0.3, self.blur_um / um_per_px)).max(axis=2)
        root = np.sqrt(smooth.astype(np.float32) * 255).astype(np.uint8)
        level, _ = cv2.threshold(root, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
        dim = level**2 / 255
        found = smooth > min(max(dim, _DARKEST), _BRIGHTEST)
        return tidy(found, um_per_px, self.close_um, self.min_area_mm2, self.min_hole_mm2)


def _share(mask: NDArray[np.bool_]) -> float:
    return np.count_nonzero(mask) / mask.size


def _coarsely(built: HSV, scan: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
    """Return a method's mask made at its own resolution, in the size of `scan`."""
    height, width = scan.shape[:2]
    factor = min(1.0, um_per_px / built.mask_mpp)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = np.asarray(cv2.resize(scan, size, interpolation=cv2.INTER_AREA), np.uint8)
    mask = built.mask(small, um_per_px * width / size[0]).astype(np.uint8)
    return np.asarray(cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) > 0)
