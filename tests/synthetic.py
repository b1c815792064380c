"""Slides painted in code: known tissue, known resolution, and known faults."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

TILE = 256
TISSUE = (171, 90, 140)
GLASS = (244, 243, 245)


def picture(
    width: int, height: int, tissue: tuple[int, int, int, int], *, seed: int = 0
) -> np.ndarray:
    """Return uint8 RGB [h, w, 3]: stained texture in the rectangle (x, y, w, h), glass around."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = GLASS
    x, y, w, h = tissue
    grain = rng.integers(-25, 25, (h, w, 1)) + rng.integers(-8, 8, (h, w, 3))
    pixels[y : y + h, x : x + w] = np.clip(np.array(TISSUE) + grain, 0, 255)
    return pixels


def slide(
    path: Path,
    pixels: np.ndarray,
    *,
    mpp: float | None = 0.5,
    levels: int = 3,
    aperio: bool = True,
) -> Path:
    """Write a tiled JPEG pyramid that OpenSlide opens: SVS-like, or generic TIFF."""
    resolution = (1e4 / mpp, 1e4 / mpp) if mpp else None
    known = f"|AppMag = 20|MPP = {mpp}" if mpp else ""
    text = f"Aperio Image Library v11\n{pixels.shape[1]}x{pixels.shape[0]} JPEG/RGB Q=80{known}"
    how = {
        "tile": (TILE, TILE),
        "compression": "jpeg",
        "compressionargs": {"level": 80},
        "photometric": "rgb",
        "resolution": resolution,
        "resolutionunit": "CENTIMETER" if mpp else None,
        "metadata": None,
    }
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, description=text if aperio else None, subfiletype=0, **how)
        for level in range(1, levels):
            step = 2**level
            h, w = pixels.shape[0] // step * step, pixels.shape[1] // step * step
            small = pixels[:h, :w].reshape(h // step, step, w // step, step, 3).mean((1, 3))
            # Aperio pyramids say so in the description, generic ones in the subfile type
            file.write(
                small.astype(np.uint8),
                description=text if aperio else None,
                subfiletype=0 if aperio else 1,
                **how,
            )
    return path


def break_tile(path: Path, index: int) -> None:
    """Overwrite the JPEG data of one level-0 file tile with noise."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.random.default_rng(0).bytes(count))
