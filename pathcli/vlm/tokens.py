"""A frozen encoder's patch tokens: made once, kept in the store, read back while training.

The same entries as every other command's on these images, so what one has made the next finds.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pathcli.data.images import image_name
from pathcli.encoders.augment import Augment
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.imageset import ImageSet, MappedImages, centre_square
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.store.int8 import INT8

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pathcli.store import Store
    from pathcli.types import Encoder, HalfArray, ImageRef, Progress

MARGIN = 1_000_000_000
"""So many bytes of the store's disk are left free."""


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The section `cache` of a recipe: whether image tokens are kept in the store, and how.

    `tokens` is off, float16, or int8: half the space, with a scale for each token.
    """

    tokens: Literal["off", "float16", "int8"] = "off"

    def row_bytes(self, row_shape: Sequence[int]) -> int:
        """Return what the tokens [t, d] of one image take on disk."""
        values = int(np.prod(row_shape))
        if self.tokens == "int8":
            return values + 4 * int(np.prod(row_shape[:-1]))
        return 2 * values


def require_space(
    root: Path | str, n: int, row_shape: Sequence[int], settings: CacheSettings, kept: int = 0
) -> None:
    """Refuse a cache that a store's disk has no room for.

    Args:
        root: folder of the store, which need not be there yet; an address has room for all.
        n: images.
        row_shape: tokens [t, d] of one.
        settings: how they are kept.
        kept: bytes of them that are in the store already.

    Raises:
        ResourceError: it does not fit; the message has the numbers.
    """
    if "://" in str(root):
        return
    each, folder = settings.row_bytes(row_shape), Path(root)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if n * each - kept > free - MARGIN:
        shape = " x ".join(map(str, row_shape))
        msg = (
            f"{root}: {n} images' tokens need {n * each / 1e9:.3g} GB ({shape} "
            f"{settings.tokens} is {each / 1e6:.2f} MB an image), {free / 1e9:.3g} GB are "
            f"free, {MARGIN / 1e9:g} of which stay so; give another --store, or set "
            "cache.tokens to int8 or off"
        )
        raise ResourceError(msg)


class _Kept:
    """An encoder whose features are kept as int8: the same weights, other entries."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self.id = encoder, encoder.id + INT8

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the encoder has
        return getattr(self._encoder, name)


class TokenCache:
    """Images in, their tokens out: float16 [t, d], read from mapped files, never all in memory.

    It may be sent to other processes once it is filled. `ref in cache` tells whether an
    image's tokens are there; images that cannot be read have none.
    """

    def __init__(
        self,
        refs: Sequence[ImageRef],
        encoder: Encoder,
        store: Store,
        settings: CacheSettings,
        device: str = "auto",
    ) -> None:
        """Take the images, each of which may occur more than once; nothing is read yet."""
        self.settings, self.store = settings, store
        kept: Any = _Kept(encoder) if settings.tokens == "int8" else encoder
        self._embedder: Embedder | None = Embedder(kept, store, device=device)
        self._rows = {ref: i for i, ref in enumerate(dict.fromkeys(refs))}
        self._mapped: MappedImages | None = None

    def fill(self, progress: Progress) -> int:
        """Put the tokens that are missing into the store; return how many images were encoded.

        Images that cannot be read are left out. The encoder is loaded only if it is needed.

        Raises:
            DataError: not one image can be read.
            ResourceError: no weights, no space, or another process is at the same images.
        """
        if self._embedder is None:
            msg = "a cache that came from another process is filled there"
            raise RuntimeError(msg)
        images = ImageSet(list(self._rows), self._embedder.workers)
        encoder = self._embedder.encoder
        if missing := images.missing(encoder.id, self.store):
            self._embedder.load()
            require_space(self.store.root, missing, encoder.row_shape, self.settings)
        encoded = images.fill(self._embedder, progress)
        self._mapped = MappedImages(images, encoder.id, self.store)
        return encoded

    @property
    def _filled(self) -> MappedImages:
        if self._mapped is None:
            msg = "call fill first"
            raise RuntimeError(msg)
        return self._mapped

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape (t, d) of one image's tokens; known after `fill`, the encoder loaded or not."""
        return self._filled.row_shape

    def bytes(self, n: int) -> int:
        """Return what the tokens of `n` images take on disk."""
        return n * self.settings.row_bytes(self.row_shape)

    def __contains__(self, ref: object) -> bool:
        """Tell whether an image is one of these and could be read."""
        row = self._rows.get(ref)  # type: ignore[call-overload]
        return row is not None and bool(self._filled.readable[row])

    def __getitem__(self, ref: ImageRef) -> HalfArray:
        """Return the tokens float16 [t, d] of one image, as an array of its own.

        Raises:
            DataError: the image cannot be read.
        """
        if ref not in self:
            msg = f"{image_name(ref)}: no tokens of it in the store; the image cannot be read"
            raise DataError(msg)
        return self._filled[self._rows[ref]]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the encoder behind: another process only reads."""
        return self.__dict__ | {"_embedder": None}


def refuse_unless_still(augment: Augment, connector: Callable[..., Any]) -> None:
    """Refuse tokens of the store where images are not always seen as the store has them.

    Args:
        augment: what is done to training images.
        connector: a `Connector`, or what builds one of (dim_in, dim_out).

    Raises:
        UsageError: images change at random, or are not seen as one central square.
    """
    if augment != Augment():
        msg = "cache.tokens: the store has images as they are; take `augment` out, or set it to off"
        raise UsageError(msg)
    if isinstance(connector, partial):
        import torch  # noqa: PLC0415

        with torch.device("meta"):
            connector = connector(_WIDTH, _WIDTH)
    views = connector.views(_PROBE, _SIDE)  # type: ignore[attr-defined]
    if len(views) != 1 or not np.array_equal(views[0], centre_square(_PROBE, _SIDE)):
        msg = (
            f"cache.tokens: the store has the central square of an image, and "
            f"{type(connector).__name__} sees {_seen(len(views))}set it to off"
        )
        raise UsageError(msg)


def _seen(views: int) -> str:
    one = "another part of it; give connector.frame: centre, or "
    return one if views == 1 else f"{views} views of it; "


_WIDTH = 768
"""Any width will do for looking at how images are cut; heads divide this one."""
_SIDE = 16
_PROBE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
