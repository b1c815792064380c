"""Slides painted in code: known tissue, known resolution, and known faults."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
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


def break_tile(path: Path, index: int, *, part: float = 1.0) -> None:
    """Overwrite the JPEG data of one level-0 file tile with noise; `part` of it from its end."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, count = page.dataoffsets[index], page.databytecounts[index]
    kept = round(count * (1 - part))
    with path.open("r+b") as file:
        file.seek(offset + kept)
        file.write(np.random.default_rng(0).bytes(count - kept))


def cut_tail(path: Path) -> None:
    """Move the last quarter of level 0 behind the rest of the file, and cut it off."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        offsets = list(page.dataoffsets)
        gone = len(offsets) * 3 // 4
        end = path.stat().st_size
        page.tags["TileOffsets"].overwrite(offsets[:gone] + [end] * (len(offsets) - gone))


def forget_tile(path: Path, index: int) -> None:
    """Make one level-0 file tile one that was never written."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        page = file.pages[0]
        for tag, values in (
            ("TileOffsets", page.dataoffsets),
            ("TileByteCounts", page.databytecounts),
        ):
            left = list(values)
            left[index] = 0
            page.tags[tag].overwrite(left)


def big_slide(
    path: Path,
    texture: np.ndarray,
    size: tuple[int, int],
    *,
    mpp: float = 0.5,
    photometric: str = "ycbcr",
    aperio: bool = True,
    seed: int = 0,
) -> Path:
    """Write an SVS-like pyramid (1, 4, 16) of any `size` (w, h): an ellipse of tissue on glass.

    `texture` (uint8 RGB) is cut into tiles, the brightest of which are the glass; the ellipse
    covers half of the slide (see `in_ellipse`). JPEG 4:2:0 of quality 80 in tiles of 256 px,
    written one by one: memory does not grow with the slide.
    """
    rng = np.random.default_rng(seed)
    h, w = (side // 128 for side in texture.shape[:2])
    corners = [(y * 128, x * 128) for y in range(h - 1) for x in range(w - 1)]
    cuts = np.stack([texture[y : y + TILE, x : x + TILE] for y, x in corners])
    cuts = cuts[np.argsort(cuts.mean((1, 2, 3)))]
    pools = [cuts[-8:], cuts[: len(cuts) // 3]]  # glass, tissue
    across, down = (-(-side // TILE) for side in size)
    tissue = in_ellipse(np.arange(across) * TILE, np.arange(down)[:, None] * TILE, size)
    choice = rng.integers(0, 2**16, (down, across))
    text = f"Aperio Image Library v11\n{size[0]}x{size[1]} JPEG/RGB Q=80|AppMag = 20|MPP = {mpp}"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for step in (1, 4, 16):
            few = [p.reshape(len(p), TILE // step, step, TILE // step, step, 3) for p in pools]
            small = [f.mean((2, 4)).astype(np.uint8) for f in few]
            level = (size[0] // step, size[1] // step)
            file.write(
                _mosaic(small, tissue.astype(int), choice, step, photometric),
                shape=(level[1], level[0], 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                compression="jpeg",
                compressionargs={"outcolorspace": photometric},
                photometric=photometric,
                subsampling=(2, 2) if photometric == "ycbcr" else None,
                description=text if aperio else None,
                subfiletype=int(step > 1 and not aperio),
                metadata=None,
            )
    return path


def in_ellipse(x: np.ndarray, y: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Tell which file tiles, given by their corners, hold the tissue of `big_slide`."""
    radius = [side * (0.5 / np.pi) ** 0.5 for side in size]
    far = [(at + TILE / 2 - side / 2) / r for at, side, r in zip((x, y), size, radius, strict=True)]
    return far[0] ** 2 + far[1] ** 2 < 1


def _mosaic(
    pools: list[np.ndarray], kind: np.ndarray, choice: np.ndarray, step: int, photometric: str
) -> Iterator[bytes]:
    """Yield the JPEG tiles of one level, row by row; equal tiles are compressed once."""

    @functools.cache
    def compressed(*cells: tuple[int, int]) -> bytes:
        side = pools[0].shape[1]
        grid = np.stack([pools[k][c] for k, c in cells]).reshape(step, step, side, side, 3)
        pixels = grid.swapaxes(1, 2).reshape(TILE, TILE, 3)
        colour = {"ycbcr": "YCBCR", "rgb": "RGB"}[photometric]
        sampling = "420" if photometric == "ycbcr" else "444"
        return imagecodecs.jpeg8_encode(
            pixels, level=80, colorspace="RGB", outcolorspace=colour, subsampling=sampling
        )

    rows, columns = (-(-n // step) for n in kind.shape)
    for row in range(rows):
        for column in range(columns):
            y, x = (
                np.minimum(np.arange(step) + at * step, n - 1)
                for at, n in zip((row, column), kind.shape, strict=True)
            )
            k, c = kind[np.ix_(y, x)].ravel(), choice[np.ix_(y, x)].ravel()
            yield compressed(*((int(a), int(b) % len(pools[a])) for a, b in zip(k, c, strict=True)))
