"""Images in, a frozen encoder's tokens out: read where batches are made, seen where trained.

The encoder is no part of what is trained; every process loads it once, onto its own device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch

from pathcli.device import pick_device
from pathcli.encoders.augment import Augment
from pathcli.errors import UsageError
from pathcli.vlm.sizes import TOWERS
from pathcli.vlm.tokens import TokenCache

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.data.corpus import Corpus
    from pathcli.data.pairs import Pictures
    from pathcli.store import Store
    from pathcli.types import ByteArray, Encoder, Progress, Sample
    from pathcli.vlm.tokens import CacheSettings


class Cutter(Protocol):
    """What of a `Connector` is needed where images are read."""

    def views(self, image: ByteArray, side: int) -> list[ByteArray]:
        """Return the views uint8 [side, side, 3] of an image uint8 [h, w, 3]."""
        ...


# --- where batches are made --------------------------------------------------------------


class Shown(NamedTuple):
    """A sample, and for each of its images the views uint8 [v, s, s, 3] or tokens [1, t, d]."""

    sample: Sample
    images: list[NDArray[Any]]


class Seeing(Protocol):
    """Reads images where batches are made: `Views` in training, `own.Seen` where one asks."""

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Shown:
        """Return a sample with its images, or another for one that is broken."""
        ...

    def batch(self, shown: Sequence[Shown]) -> dict[str, torch.Tensor]:
        """Return all images of a batch: `views` or `tokens`, and `of`; {} without; see `model`."""
        ...


class Views:
    """Reads a sample's images: pixels cut into the connector's views, or tokens of the store."""

    def __init__(
        self,
        pictures: Pictures,
        connector: Cutter,
        augment: Augment,
        side: int,
        cache: TokenCache | None = None,
    ) -> None:
        """Take what reads pixels, cuts them, changes them, their side in px, and the store's.

        Raises:
            UsageError: images are changed, which makes one square of them, and cut into several.
        """
        self.pictures, self.connector = pictures, connector
        self.augment = None if augment == Augment() else augment
        if self.augment and len(connector.views(np.zeros((side, side, 3), np.uint8), side)) > 1:
            msg = "augment makes one square of an image, which this connector cuts; leave it out"
            raise UsageError(msg)
        self.side, self.cache = side, cache

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Shown:
        """Return a sample and its images: the one given, or another for one that is broken.

        Raises:
            DataError: too many images cannot be read; one is named.
        """
        if self.cache is not None and all(ref in self.cache for ref in sample.images):
            self.pictures.read += len(sample.images)
            return Shown(sample, [self.cache[ref][None] for ref in sample.images])
        sample, images = self.pictures.all(sample)
        if self.cache is not None:  # it was broken, and is counted; another stands in for it
            return Shown(sample, [self.cache[ref][None] for ref in sample.images])
        return Shown(sample, [self._cut(image, rng) for image in images])

    def _cut(self, image: ByteArray, rng: np.random.Generator) -> ByteArray:
        if self.augment:
            image = self.augment(image, self.side, rng)
        return np.stack(self.connector.views(image, self.side))

    def batch(self, shown: Sequence[Shown]) -> dict[str, torch.Tensor]:
        """Return a batch's images: `views` uint8 [v, s, s, 3] or `tokens`, `of` [v]; or nothing."""
        images = [image for each in shown for image in each.images]
        if not images:
            return {}
        of = np.repeat(np.arange(len(images)), [len(image) for image in images])
        name = "views" if self.cache is None else "tokens"
        return {name: torch.from_numpy(np.concatenate(images)), "of": torch.from_numpy(of)}


# --- where it is trained -----------------------------------------------------------------

_loaded: WeakKeyDictionary[Any, torch.device] = WeakKeyDictionary()


def refuse_pooled(encoder: Encoder) -> None:
    """Refuse an encoder that gives one vector an image, where a connector reads patches."""
    if not getattr(encoder, "tokens", False):
        msg = f"encoder.tokens: a connector reads patches; set tokens: true for {encoder.name}"
        raise UsageError(msg)


def ready(encoder: Encoder, device: str | torch.device) -> Encoder:
    """Return an encoder that is loaded on a device; it is loaded there once.

    Raises:
        UsageError: it gives one vector an image.
        ResourceError: its weights are not here.
    """
    refuse_pooled(encoder)
    place = torch.device(device)
    if str(place) == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    if _loaded.get(encoder) != place:
        encoder.load(str(place))
        _loaded[encoder] = place
    return encoder


def prepared(
    corpus: Corpus,
    encoder: Encoder,
    store: Store,
    settings: CacheSettings,
    *,
    device: str,
    progress: Callable[[str], Progress],
) -> tuple[TokenCache | None, tuple[int, ...]]:
    """Return the store's tokens of a corpus, if they are kept, and the shape (t, d) of an image's.

    Tokens that are missing are made now; without them the encoder is loaded, to be used later.

    Raises:
        UsageError: the encoder gives one vector an image.
        DataError: not one image can be read.
        ResourceError: weights or space are missing.
    """
    if settings.tokens == "off":
        return None, ready(encoder, pick_device(device)).row_shape
    refs = [ref for side in (corpus.train, corpus.val) for s in side for ref in s.images]
    tokens = TokenCache(refs, encoder, store, settings, device)
    tokens.fill(progress("image tokens"))
    return tokens, tokens.row_shape


def token_shape(encoder: Encoder) -> tuple[int, ...]:
    """Return the shape (t, d) of an image's tokens; loads an encoder only if it is not known yet.

    Raises:
        ResourceError: it has to be loaded, and its weights are not here.
    """
    if known := TOWERS.get(encoder.name):
        return known.tokens, known.width
    shape: tuple[int, ...] | None = getattr(encoder, "row_shape", None)
    return shape or ready(encoder, "cpu").row_shape


def see(encoder: Encoder, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return float tokens [v, t, d] of a batch's views, on its device: the store's, or made now."""
    if "tokens" in batch:
        stored: torch.Tensor = batch["tokens"]
        return stored.float()
    views: torch.Tensor = batch["views"]
    return ready(encoder, views.device).encode(views).clone()  # else no gradient goes through


def sent(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch on a device, dictionaries within it too."""
    return {
        name: sent(part, device) if isinstance(part, dict) else part.to(device)
        for name, part in batch.items()
    }
