"""An `ImageRef` in, its pixels out: an image file, a square of a slide, a member of an archive.

Safe in threads and in forked processes: each keeps files of its own open, the last few it used.
An archive is a tar file, or a Parquet file, whose members are cells: see `cell`.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pathcli.errors import DataError, ResourceError
from pathcli.slides import open_slide
from pathcli.types import Member, Region

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from pathcli.types import ByteArray, ImageRef, Slide

_OPEN = 8  # files a thread keeps open; OpenSlide caches up to 32 MB of a slide
_PIXELS = 80_000_000  # of a plain image: below the number at which Pillow begins to warn
_WIDE = {"I;16", "I;16B", "I;16L", "I;16N", "I"}
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_image(ref: ImageRef) -> ByteArray:
    """Return uint8 RGB [h, w, 3] of an image, upright, what is transparent in white.

    Greys of 16 bit keep their upper 8. A `Region` gives side0 x side0 pixels of level 0, white
    where it lies beyond the slide's edge.

    Raises:
        DataError: not an image, truncated, too large, not there, or beside the slide.
        ResourceError: the file may not be read.
    """
    if isinstance(ref, Region):
        return _region(ref)
    if isinstance(ref, Member):
        return _decode(BytesIO(member_bytes(ref)), image_name(ref))
    try:
        with Path(ref).open("rb") as file:
            return _decode(file, ref)
    except OSError as error:
        raise _unread(ref, error) from error


def image_name(ref: ImageRef) -> str:
    """Return where an image is, in words for a message."""
    if isinstance(ref, Region):
        return f"{ref.slide}, {ref.side0} px at {ref.xy}"
    return f"{ref.archive}: {ref.name}" if isinstance(ref, Member) else ref


def _unread(name: str, error: OSError) -> DataError | ResourceError:
    """Return a fault of the data where the file is not there, of the machine in all other cases."""
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return DataError(f"{name}: no such file")
    if isinstance(error, IsADirectoryError):
        return DataError(f"{name}: a folder, not an image")
    return ResourceError(f"{name}: cannot be read ({error.strerror or error})")


# --- plain images ------------------------------------------------------------------------


def _decode(file: BinaryIO, name: str) -> ByteArray:
    try:
        with Image.open(file) as image:
            return _rgb(image, name)
    except (DataError, MemoryError):
        raise
    except _BOMBS:
        raise _too_large(name) from None
    except UnidentifiedImageError:
        empty = file.seek(0, os.SEEK_END) == 0
        msg = f"{name}: empty file (0 bytes)" if empty else f"{name}: not an image"
        raise DataError(msg) from None
    except Exception as error:  # decoders raise what the bytes provoke
        lines = str(error).splitlines() or [type(error).__name__]
        msg = f"{name}: not a whole image ({lines[0][:80]})"
        raise DataError(msg) from error


def _too_large(name: str) -> DataError:
    limit = _PIXELS // 1_000_000
    return DataError(f"{name}: more than {limit} million pixels; cut it into tiles first")


def _rgb(image: Image.Image, name: str) -> ByteArray:
    if image.width * image.height > _PIXELS:
        raise _too_large(name)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in _WIDE:
        return _from_wide(np.asarray(image), name)
    if image.mode == "F":
        msg = f"{name}: pixels are fractions of an unknown range; save it with 8 or 16 bit"
        raise DataError(msg)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return np.array(white.convert("RGB"))
    return np.array(image.convert("RGB"))


def _from_wide(grey: NDArray[np.integer], name: str) -> ByteArray:
    if grey.min() < 0 or grey.max() >= 1 << 16:
        msg = f"{name}: pixels have more than 16 bit; save it with 8 or 16 bit"
        raise DataError(msg)
    return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=-1)


def member_bytes(ref: Member) -> bytes:
    """Return a member of an archive as it is stored there.

    Raises:
        DataError: the archive is not there, or is not whole.
        ResourceError: it may not be read.
    """
    if ref.archive.endswith(".parquet"):
        return _cell_bytes(ref)
    try:
        with Path(ref.archive).open("rb") as file:
            file.seek(ref.offset)
            data = file.read(ref.size)
    except OSError as error:
        raise _unread(ref.archive, error) from error
    if len(data) < ref.size:
        msg = f"{image_name(ref)}: the archive is truncated"
        raise DataError(msg)
    return data


def cell(archive: str, column: str, row: int) -> Member:
    """Return the image in a cell of a Parquet file, whose column is {bytes, path} as the hub's."""
    return Member(archive, row, 0, f"{column}[{row}]")


def _cell_bytes(ref: Member) -> bytes:
    """Return what a cell holds; its whole row group is read, about 100 rows in the hub's files."""
    file = _open.get(ref.archive, open_parquet)
    column, row, group = ref.name.partition("[")[0], ref.offset, 0
    while row >= file.metadata.row_group(group).num_rows:
        row -= file.metadata.row_group(group).num_rows
        group += 1
    try:
        found = file.read_row_group(group, columns=[f"{column}.bytes"]).column(0)[row].as_py()
    except (OSError, ValueError) as error:
        msg = f"{image_name(ref)}: the Parquet file is damaged ({type(error).__name__})"
        raise DataError(msg) from error
    return (found or {}).get("bytes") or b""


def open_parquet(path: str) -> Any:  # noqa: ANN401 - pyarrow is untyped
    """Return pyarrow's `ParquetFile`.

    Raises:
        ResourceError: pyarrow is not installed, or the file may not be read.
        DataError: no such file, or not Parquet.
    """
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError:
        msg = f"{path}: Parquet files need pyarrow: pip install pyarrow"
        raise ResourceError(msg) from None
    try:
        return parquet.ParquetFile(path)
    except OSError as error:
        raise _unread(path, error) from error
    except ValueError as error:  # of which pyarrow's ArrowInvalid is one
        msg = f"{path}: not a whole Parquet file"
        raise DataError(msg) from error


# --- slides ------------------------------------------------------------------------------


class _OpenFiles(threading.local):
    """The files a thread has open, the last used last; no other thread or process has them."""

    def __init__(self) -> None:
        self.process = os.getpid()
        self.files: dict[str, Any] = {}
        self.inherited: list[dict[str, Any]] = []

    def get(self, path: str, opener: Callable[[str], Any]) -> Any:  # noqa: ANN401 - a Slide or ParquetFile
        if self.process != os.getpid():
            # a fork shares file positions with its parent: these may be neither read nor closed
            self.inherited.append(self.files)
            self.process, self.files = os.getpid(), {}
        file = self.files.pop(path, None) or opener(path)
        self.files[path] = file
        if len(self.files) > _OPEN:
            self.files.pop(next(iter(self.files))).close()
        return file


_open = _OpenFiles()


def _region(ref: Region) -> ByteArray:
    slide: Slide = _open.get(ref.slide, open_slide)
    (x, y), side = ref.xy, ref.side0
    left, top = max(x, 0), max(y, 0)
    width, height = min(x + side, slide.info.width) - left, min(y + side, slide.info.height) - top
    if width <= 0 or height <= 0:
        size = f"{slide.info.width} x {slide.info.height}"
        msg = f"{image_name(ref)}: lies beside the slide of {size} px; is it the right slide?"
        raise DataError(msg)
    pixels = slide.read((left, top), 0, (width, height))
    if (width, height) == (side, side):
        return pixels
    padded = np.full((side, side, 3), 255, np.uint8)
    padded[top - y : top - y + height, left - x : left - x + width] = pixels
    return padded
