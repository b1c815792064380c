"""A plain picture as a slide: PNG, JPEG, BMP or a simple TIFF."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from pathcli.errors import DataError
from pathcli.slides.readers import one_line, sampled_fingerprint, slide_info

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.types import ByteArray


class ImageReader:
    """PNG, JPEG, BMP or simple TIFF as a slide of one level; its mpp must be given."""

    why = "image: as asked"

    def __init__(self, path: Path | str) -> None:
        """Read the whole image.

        Raises:
            DataError: it is not an 8-bit image, or too large to be read at once.
        """
        from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

        self.path = path
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # its remarks on headers are no news
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    if image.mode not in {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"}:
                        msg = f"{path}: not an 8-bit image (mode {image.mode})"
                        raise DataError(msg)
                    flat = Image.new("RGBA", image.size, "white")
                    flat.alpha_composite(image.convert("RGBA"))
                    self._pixels = np.asarray(flat.convert("RGB"))
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            msg = f"{path}: too large for a plain image; convert it to a tiled pyramidal TIFF"
            raise DataError(msg) from error
        except UnidentifiedImageError as error:
            msg = f"{path}: not an image"
            raise DataError(msg) from error
        except (OSError, SyntaxError, ValueError) as error:
            msg = f"{path}: not a whole image ({one_line(error)})"
            raise DataError(msg) from error
        height, width = self._pixels.shape[:2]
        self.downsamples = (1.0,)
        self.info = slide_info(
            path,
            sampled_fingerprint(path),
            "image",
            "image",
            width=width,
            height=height,
            mpp=None,
            objective=None,
            bounds=(0, 0, width, height),
        )

    def read(self, xy: tuple[int, int], level: int, size: tuple[int, int]) -> ByteArray:
        """Return uint8 RGB [h, w, 3]; see `Slide.read`."""
        del level
        (x, y), (w, h) = xy, size
        return self._pixels[y : y + h, x : x + w]

    def close(self) -> None:
        """Nothing is held open."""
