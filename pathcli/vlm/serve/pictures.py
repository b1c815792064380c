"""Images inside requests: a data: URL in, a file that was seen to be an image out.

Nothing is fetched from anywhere. A file is named by its contents and bears no date, so that an
image that is sent again is the same image to a model that remembers it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import threading
from collections import Counter
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from PIL import Image

from pathcli.data.images import read_image
from pathcli.errors import DataError
from pathcli.vlm.serve.limits import MEGA, RefusedError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Others are refused: some of their readers start programs."""
_HEAD = 200  # letters before the data, at most
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)


class Pictures:
    """A folder, readable by its owner alone, of the images that are being asked about."""

    def __init__(self) -> None:
        """Make the folder."""
        self._folder = TemporaryDirectory(prefix="pathcli-serve-")
        self._uses: Counter[Path] = Counter()
        self._turn = threading.Lock()

    def keep(self, images: Sequence[tuple[str, str]], pixels: int) -> list[str]:
        """Return a file for each (address, place) of an image; they are there until `release`.

        Args:
            images: addresses, and their places in the request.
            pixels: most pixels of all together.

        Raises:
            RefusedError: an address is none of an image's data, or what it holds is no image,
                not a whole one, or too large. None of the files is kept then.
        """
        kept: list[str] = []
        left = pixels
        try:
            for url, place in images:
                data = _bytes(url, place)
                left -= _size(data, place, left)
                kept.append(self._put(data))
                _check(kept[-1], place)
        except BaseException:
            self.release(kept)
            raise
        return kept

    def release(self, paths: Sequence[str]) -> None:
        """Remove files that nobody else asks about."""
        with self._turn:
            for path in map(Path, paths):
                self._uses[path] -= 1
                if not self._uses[path]:
                    del self._uses[path]
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()

    def _put(self, data: bytes) -> str:
        path = Path(self._folder.name) / hashlib.sha256(data).hexdigest()
        with self._turn:
            if not self._uses[path]:
                path.write_bytes(data)
                os.utime(path, (0, 0))
            self._uses[path] += 1
        return str(path)


def _bytes(url: str, place: str) -> bytes:
    head = _DATA.match(url, 0, _HEAD)
    if head is None:
        msg = f"{place}: not data:image/png;base64,...; this server fetches nothing, send the data"
        raise RefusedError(msg, param=place, code="invalid_image_url")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        msg = f"{place}: broken base64 ({error})"
        raise RefusedError(msg, param=place, code="invalid_base64") from None


def _size(data: bytes, place: str, most: int) -> int:
    """Return how many pixels an image says it has, `most` at most; nothing is decoded."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            size = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        size = most + 1
    except Exception:  # noqa: BLE001 - decoders raise what the bytes provoke
        msg = f"{place}: not an image; {', '.join(FORMATS)} are read"
        raise RefusedError(msg, param=place, code="invalid_image") from None
    if size > most:
        msg = f"{place}: too many pixels; at most {most / MEGA:.3g} million are left for it"
        raise RefusedError(msg, status=413, param=place, code="image_too_large")
    return size


def _check(path: str, place: str) -> None:
    try:
        read_image(path)
    except DataError as error:
        msg = str(error).replace(path, place)
        raise RefusedError(msg, param=place, code="invalid_image") from error
