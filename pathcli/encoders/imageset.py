"""Plain images and an encoder in, features in the store out: an image set is one entry there.

An image is named by its content, and a set by the names of its images, so neither paths nor the
order asked for matter. Sets of more than 10,000 images are kept as several entries.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pathcli.data.images import image_name, member_bytes, read_image
from pathcli.errors import DataError, ResourceError
from pathcli.slides.readers import open_slide
from pathcli.store.store import item_name
from pathcli.types import WHOLE, Key, Member, Region, SlideInfo, Tiles, TileStatus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pathcli.encoders.embedding import Embedder
    from pathcli.types import ByteArray, HalfArray, ImageRef, Progress

SHARD = 10_000
_MPP = 1.0
"""Plain images have no resolution; the store's key wants a number."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images, in the order asked for.

    `values` float16 [n, d], or tokens [n, t, d], NaN where `readable` bool [n] is false;
    `encoded` went through the encoder in this run, the rest was in the store; `copies` are
    images that are byte for byte another one; `keys` name the entries.
    """

    values: HalfArray = field(repr=False)
    readable: NDArray[np.bool_] = field(repr=False)
    encoded: int
    copies: int
    keys: tuple[Key, ...]


def embed_images(
    refs: Sequence[ImageRef], embedder: Embedder, progress: Progress | None = None
) -> ImageFeatures:
    """Embed images, or find their features in the store; a killed run is resumed.

    Of each image its central square is used, resized to the encoder's input by antialiased
    bicubic interpolation. One that is no image, or is not there, is marked, not refused.

    Raises:
        DataError: not one image can be read, or a file vanishes meanwhile.
        ResourceError: no weights, no space, or another process is embedding the same set.
    """
    with ThreadPoolExecutor(embedder.workers, thread_name_prefix="digest") as pool:
        names = list(pool.map(image_digest, refs))
    by_name = {name: ref for name, ref in zip(names, refs, strict=True) if name}
    if not by_name:
        raise _none_readable(refs)
    ordered = sorted(by_name)
    row_of = {name: row for row, name in enumerate(ordered)}
    rows = np.array([row_of[name] if name else -1 for name in names])
    readable = np.zeros(len(refs), bool)
    values: HalfArray | None = None
    keys, encoded = [], 0
    for start in range(0, len(ordered), SHARD):
        part = ordered[start : start + SHARD]

        def step(done: int, of: int, before: int = start) -> None:
            del of
            if progress:
                progress(before + done, len(ordered))

        key, new = _shard(part, [by_name[name] for name in part], embedder, step)
        found = embedder.store.features.mapped(key)
        if values is None:
            values = np.full((len(refs), *found.values.shape[1:]), np.nan, np.float16)
        here = np.flatnonzero((rows >= start) & (rows < start + len(part)))
        values[here] = found.values[rows[here] - start]
        readable[here] = found.status[rows[here] - start] == TileStatus.OK
        keys.append(key)
        encoded += new
    if values is None or not readable.any():
        raise _none_readable(refs)
    copies = int((rows >= 0).sum()) - len(by_name)
    return ImageFeatures(values, readable, encoded, copies, tuple(keys))


def _none_readable(refs: Sequence[ImageRef]) -> DataError:
    first = image_name(refs[0]) if refs else "none"
    return DataError(f"none of {len(refs)} images can be read; the first is {first}")


def _shard(
    names: Sequence[str], refs: Sequence[ImageRef], embedder: Embedder, progress: Progress
) -> tuple[Key, int]:
    """Return the key of an entry that holds these images, and how many were encoded for it."""
    name, n = hashlib.sha256("\n".join(names).encode()).hexdigest(), len(names)
    item = item_name(f"images-{name[8:24]}", name)
    key = Key(item, _MPP, WHOLE.digest, embedder.encoder.id)
    if key in embedder.store.features:
        return key, 0
    tiles = Tiles(
        item=item,
        xy=np.stack([np.arange(n), np.zeros(n)], 1).astype(np.int32),
        status=np.zeros(n, np.uint8),
        spec=WHOLE,
        slide_mpp=_MPP,
        width=n,
        height=1,
        tissue_share=1.0,
    )
    folder = _folder(refs)
    encoded = embedder.fill(
        _ImageRows(refs, embedder.encoder.input_px, folder), tiles, key, progress
    )
    card = SlideInfo(item, name, n, 1, None, "images", None, (0, 0, n, 1), "images")
    embedder.store.remember(card, folder, _MPP, "plain images have no resolution")
    return key, encoded


class _ImageRows:
    """Images as rows to embed; how many are unreadable is for the caller to judge."""

    max_bad = 1.0

    def __init__(self, refs: Sequence[ImageRef], side: int, name: str) -> None:
        self.refs, self.side, self.name = refs, side, name

    def read(self, row: int) -> ByteArray:
        """See `Rows.read`."""
        return centre_square(read_image(self.refs[row]), self.side)

    def gone(self, row: int) -> bool:
        """See `Rows.gone`."""
        return not Path(_file(self.refs[row])).exists()


def centre_square(image: ByteArray, side: int) -> ByteArray:
    """Return the central square of uint8 [h, w, 3], resized to [side, side, 3].

    As CLIP prepares images (Radford et al. 2021), and on the CPU as `Preprocess` resizes tiles.
    """
    import torch  # noqa: PLC0415
    from torch.nn.functional import interpolate  # noqa: PLC0415

    height, width = image.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = image[top : top + edge, left : left + edge]
    if edge == side:
        return square
    pixels = torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1)[None]
    sized = interpolate(pixels, size=(side, side), mode="bicubic", antialias=True)
    return np.asarray(sized[0].permute(1, 2, 0).numpy())


def image_digest(ref: ImageRef) -> str | None:
    """Return the SHA-256 of an image's bytes, or of a region's slide and place, as hex.

    None for what is not there, or is not whole.

    Raises:
        ResourceError: the file may not be read.
    """
    try:
        if isinstance(ref, Region):
            known = [_fingerprint(ref.slide), list(ref.xy), ref.side0]
            return hashlib.sha256(json.dumps(known).encode()).hexdigest()
        if isinstance(ref, Member):
            return hashlib.sha256(member_bytes(ref)).hexdigest()
        with Path(ref).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (DataError, FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        msg = f"{_file(ref)}: cannot be read ({error.strerror or error})"
        raise ResourceError(msg) from error


@lru_cache(maxsize=1024)
def _fingerprint(slide: str) -> str:
    with closing(open_slide(slide)) as opened:
        return opened.info.fingerprint


def _file(ref: ImageRef) -> str:
    return ref.slide if isinstance(ref, Region) else ref.archive if isinstance(ref, Member) else ref


def _folder(refs: Sequence[ImageRef]) -> str:
    """Return the folder that all images are below of, for messages and the store's card."""
    return os.path.commonpath({str(Path(_file(ref)).absolute().parent) for ref in refs})
