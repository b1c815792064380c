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
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.data.images import image_name, member_bytes, read_image
from pathcli.errors import DataError, ResourceError
from pathcli.slides.readers import open_slide
from pathcli.store.store import item_name
from pathcli.types import WHOLE, Key, Member, Region, SlideInfo, Tiles, TileStatus, silent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pathcli.encoders.embedding import Embedder
    from pathcli.store import Store
    from pathcli.types import ByteArray, Features, HalfArray, ImageRef, Progress

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
    images = ImageSet(refs, embedder.workers)
    encoded = images.fill(embedder, progress or silent)
    found = MappedImages(images, embedder.encoder.id, embedder.store)
    values = np.full((len(refs), *found.row_shape), np.nan, np.float16)
    for shard in range(len(found.keys)):
        here = np.flatnonzero(images.rows // SHARD == shard)
        values[here] = found.entry(shard).values[images.rows[here] % SHARD]
    return ImageFeatures(values, found.readable, encoded, images.copies, found.keys)


class ImageSet:
    """Images by their content: which entries of a store hold their features, and at which row.

    `rows` int64 [n] is the row of each image in the whole set, -1 where there is no image;
    `copies` are images that are byte for byte another one.
    """

    def __init__(self, refs: Sequence[ImageRef], workers: int = 2) -> None:
        """Read every image's bytes once, for their digest.

        Raises:
            DataError: not one image is there.
            ResourceError: a file may not be read.
        """
        with ThreadPoolExecutor(workers, thread_name_prefix="digest") as pool:
            names = list(pool.map(image_digest, refs))
        self.refs = refs
        self._by_name = {name: ref for name, ref in zip(names, refs, strict=True) if name}
        if not self._by_name:
            raise _none_readable(refs)
        self._names = sorted(self._by_name)
        row_of = {name: row for row, name in enumerate(self._names)}
        self.rows = np.array([row_of[name] if name else -1 for name in names])
        self.copies = int((self.rows >= 0).sum()) - len(self._by_name)

    @property
    def _shards(self) -> list[list[str]]:
        return [self._names[i : i + SHARD] for i in range(0, len(self._names), SHARD)]

    def keys(self, encoder: str) -> tuple[Key, ...]:
        """Return the keys of the entries of an encoder, given by its id."""
        return tuple(
            Key(_item(_digest(part)), _MPP, WHOLE.digest, encoder) for part in self._shards
        )

    def missing(self, encoder: str, store: Store) -> int:
        """Return how many images are in entries that the store does not have yet."""
        shards = zip(self.keys(encoder), self._shards, strict=True)
        return sum(len(part) for key, part in shards if key not in store.features)

    def fill(self, embedder: Embedder, progress: Progress) -> int:
        """Embed what the store does not have; return how many images were encoded.

        Raises:
            DataError: a file vanishes meanwhile.
            ResourceError: no weights, no space, or another process is embedding the same set.
        """
        encoded = before = 0
        for key, part in zip(self.keys(embedder.encoder.id), self._shards, strict=True):

            def step(done: int, of: int, before: int = before) -> None:
                del of
                progress(before + done, len(self._names))

            if key not in embedder.store.features:
                refs = [self._by_name[name] for name in part]
                encoded += _fill(key, _digest(part), refs, embedder, step)
            before += len(part)
        return encoded


class MappedImages:
    """Features of images that a store holds, read row by row from mapped files when asked for.

    `readable` bool [n] tells which images have any. It may be sent to other processes, each
    of which maps the files for itself.
    """

    def __init__(self, images: ImageSet, encoder: str, store: Store) -> None:
        """Find the entries.

        Raises:
            DataError: one is damaged, or not one image can be read.
            KeyError: one is not there.
        """
        self.keys, self.store, self._rows = images.keys(encoder), store, images.rows
        self._open: dict[int, Features] = {}
        status = np.concatenate([self.entry(i).status for i in range(len(self.keys))])
        self.readable = (self._rows >= 0) & (status[self._rows] == TileStatus.OK)
        if not self.readable.any():
            raise _none_readable(images.refs)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one image's features, (d,) or (t, d)."""
        return tuple(self.entry(0).values.shape[1:])

    def entry(self, shard: int) -> Features:
        """Return one entry, mapped once in each process."""
        if shard not in self._open:
            self._open[shard] = self.store.features.mapped(self.keys[shard])
        return self._open[shard]

    def __len__(self) -> int:
        """Return the number of images, readable or not."""
        return len(self._rows)

    def __getitem__(self, i: int) -> HalfArray:
        """Return float16 [d] or [t, d] of one readable image, as an array of its own."""
        shard, row = divmod(int(self._rows[i]), SHARD)
        return np.array(self.entry(shard).values[row])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is mapped here."""
        return self.__dict__ | {"_open": {}}


def _none_readable(refs: Sequence[ImageRef]) -> DataError:
    first = image_name(refs[0]) if refs else "none"
    return DataError(f"none of {len(refs)} images can be read; the first is {first}")


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def _item(digest: str) -> str:
    """Return what a set of images is called in the store."""
    return item_name(f"images-{digest[8:24]}", digest)


def _fill(
    key: Key, digest: str, refs: Sequence[ImageRef], embedder: Embedder, progress: Progress
) -> int:
    """Fill the entry of these images, in the order of their names; return how many were encoded."""
    n = len(refs)
    tiles = Tiles(
        item=key.item,
        xy=np.stack([np.arange(n), np.zeros(n)], 1).astype(np.int32),
        status=np.zeros(n, np.uint8),
        spec=WHOLE,
        slide_mpp=_MPP,
        width=n,
        height=1,
        tissue_share=1.0,
    )
    folder = _folder(refs)
    rows = _ImageRows(refs, embedder.encoder.input_px, folder)
    encoded = embedder.fill(rows, tiles, key, progress)
    card = SlideInfo(key.item, digest, n, 1, None, "images", None, (0, 0, n, 1), "images")
    embedder.store.remember(card, folder, _MPP, "plain images have no resolution")
    return encoded


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
