"""A slide and a `TileSpec` in, tiles out: the grid, the tissue rule, and each tile's pixels."""

from __future__ import annotations

import logging
import math
import time
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pathcli.errors import DataError, UsageError
from pathcli.slides.geojson import write_geojson
from pathcli.slides.overlay import draw_tiles, save_png
from pathcli.slides.overview import best_level
from pathcli.slides.quality import drop_flagged, flags
from pathcli.slides.readers import IMAGE_SUFFIXES, TIFF_SUFFIXES, open_slide, slide_mpp
from pathcli.slides.roi import LEAST_INSIDE, Roi, read_roi
from pathcli.slides.stains import stain_named
from pathcli.slides.tissue import (
    DARK_BACKGROUND,
    Tissue,
    find_tissue,
    method,
    parameters_of,
)
from pathcli.store import Store
from pathcli.types import MPP_RANGE, Key, Tiles, TileSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from pathcli.types import ByteArray, Slide

log = logging.getLogger("pathcli")

_ONE_FILE = IMAGE_SUFFIXES | TIFF_SUFFIXES | {".ndpi", ".scn", ".bif"}
_COARSE = 1.05  # a slide this much coarser than asked is upsampled visibly
_SUSPICIOUS = 0.98  # tissue share at which a coloured background is likelier than tissue


def tile_spec(
    size_px: int = 224,
    mpp: float = 0.5,
    *,
    step_px: int | None = None,
    tissue: str = "otsu",
    min_tissue: float = 0.5,
    drop: Iterable[str] = (),
    **parameters: float,
) -> TileSpec:
    """Return a complete specification: defaults filled in, the tissue method's included.

    Raises:
        UsageError: an unknown method or flag, or numbers that cannot be tiled.
    """
    built = method(tissue, **parameters)
    return TileSpec(
        size_px=size_px,
        mpp=mpp,
        step_px=step_px or size_px,
        tissue=tissue,
        tissue_params=parameters_of(built),
        tissue_version=built.version,
        min_tissue=min_tissue,
        drop=flags(drop),
    )


@dataclass(frozen=True)
class TileRun:
    """What `tile` did for one slide; `cached` says that the store already had the tiles.

    `why` says why this reader served.
    """

    path: str
    tiles: Tiles
    mpp_source: str
    reader: str
    cached: bool
    seconds: float
    overview: Path | None = None
    geojson: Path | None = None
    warnings: tuple[str, ...] = field(default=())
    why: str = ""


def tile(
    path: Path | str,
    *,
    spec: TileSpec | None = None,
    store: Store | None = None,
    mpp: float | None = None,
    mpp_source: str = "given",
    out: Path | None = None,
    overview: bool = True,
    geojson: bool = False,
    roi: Roi | Path | None = None,
) -> TileRun:
    """Cut one slide into tiles, or find them in the store.

    Args:
        path: the slide.
        spec: what to cut (default: 224 px at 0.5 um per pixel on Otsu's tissue).
        store: where tiles are kept (default: the user's store).
        mpp: um per level-0 pixel, overriding the header.
        mpp_source: who gave `mpp`, for the summary.
        out: folder for pictures; none are drawn without it.
        overview: draw scan, tissue and tiles as PNG.
        geojson: write the tissue for QuPath.
        roi: only tiles of which at least half lies inside: a region, or its annotation file.

    Raises:
        DataError: not a slide, no usable resolution, or no region on this slide.
        ResourceError: the store cannot be written.
    """
    with closing(open_slide(path)) as slide:
        return tile_slide(
            slide,
            spec or tile_spec(),
            store or Store(),
            mpp=mpp,
            mpp_source=mpp_source,
            out=out,
            overview=overview,
            geojson=geojson,
            roi=roi,
        )


def tile_slide(
    slide: Slide,
    spec: TileSpec,
    store: Store,
    *,
    mpp: float | None = None,
    mpp_source: str = "given",
    out: Path | None = None,
    overview: bool = True,
    geojson: bool = False,
    roi: Roi | Path | None = None,
) -> TileRun:
    """Do what `tile` does, for a slide that is already open."""
    start = time.perf_counter()
    source = mpp_source if mpp is not None else "header"
    used = slide_mpp(slide, mpp)
    known = slide.info.mpp
    if known and MPP_RANGE[0] <= known <= MPP_RANGE[1] and not 0.5 <= used / known <= 2:  # noqa: PLR2004
        log.warning("%s: %g um per pixel was given, its header says %g", slide.path, used, known)
    if roi is not None and not isinstance(roi, Roi):
        roi = read_roi(roi, slide.info.bounds, (slide.info.width, slide.info.height))
    if roi is not None:
        spec = replace(spec, roi=roi.digest)
    size = file_bytes(slide)
    kept, tissue = _kept(slide, store, Key(slide.info.item, used, spec.digest), size), None
    tiles = kept
    if tiles is None:
        tissue = find_tissue(slide, spec, used)
        tiles = replace(_cut(slide, spec, used, tissue, roi), file_bytes=size)
        store.tiles[tiles.key] = tiles
    store.remember(slide.info, slide.path, used, source)
    pictures: dict[str, Path] = {}
    if out is not None and (overview or geojson):
        tissue = tissue or find_tissue(slide, spec, used)
        pictures = _draw(slide, tiles, tissue, out, roi, overview=overview, geojson=geojson)
    return TileRun(
        path=str(slide.path),
        tiles=tiles,
        mpp_source=source,
        reader=slide.info.reader,
        cached=kept is not None,
        seconds=time.perf_counter() - start,
        warnings=tiles.warnings,
        why=getattr(slide, "why", ""),
        **pictures,
    )


def file_bytes(slide: Slide) -> int | None:
    """Return how long the file of a slide is; None for slides of several files, or elsewhere."""
    if isinstance(slide.path, Path) and slide.path.suffix.lower() in _ONE_FILE:
        with suppress(OSError):
            return slide.path.stat().st_size
    return None


def _kept(slide: Slide, store: Store, key: Key, size: int | None) -> Tiles | None:
    """Return the tiles that the store has, unless the slide was still being copied then."""
    if key not in store.tiles:
        return None
    tiles = store.tiles[key]
    if not (size and tiles.file_bytes and tiles.file_bytes < size):
        return tiles
    log.warning(
        "%s: has grown from %d to %d bytes since its tiles were cut; it is cut anew",
        *(slide.path, tiles.file_bytes, size),
    )
    for old in [old for old in store.features if replace(old, encoder=None) == key]:
        store.features.remove(old)
    return None


def _draw(
    slide: Slide,
    tiles: Tiles,
    tissue: Tissue,
    out: Path,
    roi: Roi | None,
    *,
    overview: bool,
    geojson: bool,
) -> dict[str, Path]:
    """Write the pictures asked for; return their paths by name."""
    written = {}
    name = f"{tiles.item}.{tiles.spec.digest}"  # other parameters, another picture
    if overview:
        written["overview"] = out / f"{name}.overview.png"
        save_png(written["overview"], draw_tiles(slide, tiles, tissue, roi.polygons if roi else ()))
    if geojson:
        written["geojson"] = out / f"{name}.tissue.geojson"
        write_geojson(written["geojson"], tissue, slide.info.bounds)
    return written


def _cut(slide: Slide, spec: TileSpec, mpp: float, tissue: Tissue, roi: Roi | None) -> Tiles:
    """Lay the grid over the scan; keep tiles with enough tissue, inside `roi`, without flags."""
    if spec.roi is not None and roi is None:
        msg = f"{slide.path}: these tiles are those of a region of interest; give it too, as roi"
        raise UsageError(msg)
    side0 = spec.size_um / mpp
    xy = candidates = grid(spec, mpp, slide.info.bounds)
    share = tissue.share(slide.info.bounds)
    warnings = [*tissue.warnings, *(roi.warnings if roi else ())]
    if mpp > spec.mpp * _COARSE:
        warnings.append(
            f"the slide has {mpp:g} um per pixel, coarser than the {spec.mpp:g} asked for: "
            "its tiles are upsampled"
        )
    if spec.tissue != "none" and share > _SUSPICIOUS:
        warnings.append(f"{share:.0%} of the scan counts as tissue: look at the overview")
    if len(candidates):
        fraction = tissue.fraction(candidates, (side0, side0))
        xy = candidates[(fraction >= spec.min_tissue) & (fraction > 0)]
    on_tissue = len(xy)
    if roi is not None:
        xy = xy[roi.fraction(xy, side0) >= LEAST_INSIDE]
    if on_tissue and not len(xy):
        warnings.append("no tile: none on tissue has half of its area in the region of interest")
    elif not on_tissue and DARK_BACKGROUND not in warnings:
        warnings.append(_why_no_tile(spec, mpp, slide, share, len(candidates)))
    xy, dropped, said = drop_flagged(slide, spec, mpp, tissue, xy)
    return Tiles(
        item=slide.info.item,
        xy=xy,
        status=np.zeros(len(xy), np.uint8),
        spec=spec,
        slide_mpp=mpp,
        width=slide.info.width,
        height=slide.info.height,
        tissue_share=share,
        warnings=(*warnings, *said),
        dropped=dropped,
    )


def grid(spec: TileSpec, mpp: float, bounds: tuple[int, int, int, int]) -> NDArray[np.int32]:
    """Return the corners int32 [n, 2] (level-0 px) of all tiles inside `bounds`, by (y, x).

    Corner k is round(k * step_px * spec.mpp / mpp); a tile that crosses the border of
    `bounds` (x, y, width, height) is left out.

    Raises:
        UsageError: the step is less than one level-0 pixel.
    """
    side0, step0 = spec.size_um / mpp, spec.step_px * spec.mpp / mpp
    if step0 < 1:
        msg = (
            f"a step of {spec.step_px} px at {spec.mpp:g} um per pixel is {step0:.2g} px of a scan "
            f"with {mpp:g}: tiles would repeat; use --step {math.ceil(mpp / spec.mpp)} or more"
        )
        raise UsageError(msg)
    axes = []
    for start, length in zip(bounds[:2], bounds[2:], strict=True):
        k = np.arange(math.floor(start / step0), math.ceil((start + length) / step0) + 1)
        corner = np.floor(k * step0 + 0.5)
        inside = (corner >= start) & (corner + side0 <= start + length + 1e-6)
        axes.append(corner[inside].astype(np.int32))
    x, y = np.meshgrid(*axes)
    return np.stack([x.ravel(), y.ravel()], axis=1)


def _why_no_tile(spec: TileSpec, mpp: float, slide: Slide, share: float, candidates: int) -> str:
    _, _, width, height = slide.info.bounds
    if not candidates:
        return (
            f"no tile: the scan is {width * mpp:.0f} x {height * mpp:.0f} um, a tile needs "
            f"{spec.size_um:.0f} um a side; try a smaller --size or --mpp"
        )
    lower = "--min-tissue 0.1, " if share > 0 else ""
    return (
        f"no tile: {share:.1%} of the scan is tissue and no tile reaches the "
        f"{spec.min_tissue:.0%} asked for; try {lower}another --tissue method, or --tissue none"
    )


def read_tile(slide: Slide, xy: tuple[int, int], spec: TileSpec, mpp: float) -> ByteArray:
    """Return the pixels of one tile, uint8 RGB [size_px, size_px, 3].

    The tile covers `spec.size_um` micrometres exactly: the best level is read and resampled
    (bicubic, antialiased) from a window whose sides need not be whole pixels.

    Raises:
        DataError: the region cannot be decoded.
    """
    level = best_level(slide, spec.mpp / mpp)
    step = slide.downsamples[level]
    side = spec.size_um / mpp / step
    # the window begins inside a pixel of its level: read from that pixel on, resample the rest
    start = [math.floor(at / step + 1e-6) for at in xy]
    into = [max(0.0, at / step - pixel) for at, pixel in zip(xy, start, strict=True)]
    corner = [math.ceil(pixel * step - 1e-6) for pixel in start]
    need = [math.ceil(part + side - 1e-6) for part in into]
    limits = (slide.info.width, slide.info.height)
    here = [
        max(1, min(n, round(limit / step) - pixel))
        for n, limit, pixel in zip(need, limits, start, strict=True)
    ]
    pixels = slide.read((corner[0], corner[1]), level, (here[0], here[1]))
    short = (need[0] - here[0], need[1] - here[1])
    if any(short):  # the window ends up to one pixel beyond the last row or column
        pixels = np.pad(pixels, ((0, short[1]), (0, short[0]), (0, 0)), mode="edge")
    if max(abs(side - spec.size_px), *into) < 1e-6:  # noqa: PLR2004 - no resampling needed
        return np.ascontiguousarray(pixels)
    box = (into[0], into[1], min(into[0] + side, need[0]), min(into[1] + side, need[1]))
    size = (spec.size_px, spec.size_px)
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC, box=box))


def refuse_if_bad(name: str, bad: int, n: int, limit: float) -> None:
    """Refuse a slide of whose `n` tiles `bad` were unreadable so far, a share above `limit`.

    Raises:
        DataError: too many are.
    """
    if bad > limit * n:
        msg = (
            f"{name}: at least {bad} of {n} tiles cannot be read, more than {100 * limit:g}%; "
            "is the file whole? (--max-bad-tiles sets the limit)"
        )
        raise DataError(msg)


def summary(run: TileRun) -> dict[str, Any]:
    """Return one run as plain JSON values, for `--json` and reports."""
    tiles = run.tiles
    return {
        "path": run.path,
        "item": tiles.item,
        "width": tiles.width,
        "height": tiles.height,
        "mpp": tiles.slide_mpp,
        "mpp_source": run.mpp_source,
        "reader": run.reader,
        "reader_why": run.why,
        "tissue": tiles.spec.tissue,
        "tissue_share": round(tiles.tissue_share, 4),
        "stain": stain_named(run.warnings),
        "roi": tiles.spec.roi,
        "dropped": None if tiles.dropped is None else dict(tiles.dropped),
        "tiles": len(tiles),
        "tiles_digest": tiles.spec.digest,
        "cached": run.cached,
        "seconds": round(run.seconds, 3),
        "overview": str(run.overview) if run.overview else None,
        "geojson": str(run.geojson) if run.geojson else None,
        "warnings": list(run.warnings),
    }
