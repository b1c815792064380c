"""What learns images and texts together, as the trainer sees it: batches in, a loss out.

A model of the registry's kind `model` is an `ImageTextModel`. Weights are saved under `model.`,
which `read_state` takes off again.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch

from pathcli.data.pairs import Pictures
from pathcli.objectives import contrastive, multi_positive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pathcli.data.corpus import Corpus
    from pathcli.encoders.preprocess import Preprocess
    from pathcli.types import ByteArray, Sample

    Change = Callable[[ByteArray, int, np.random.Generator], ByteArray]

Tokens = torch.Tensor | dict[str, torch.Tensor]
"""Texts as a model reads them: int64 [n, t], or several such tensors by name."""
Loss = Literal["infonce", "multi-positive"]


class ImageTextModel(Protocol):
    """Two towers and a scale, a torch module that is cheap to build: `start` makes the weights.

    `text_limit` is how many tokens a text may have, special ones included. `tokens` is called
    where images are read, so it stays on the CPU; the other methods run where the weights are.
    """

    preprocess: Preprocess
    text_limit: int

    def start(self) -> Mapping[str, Any]:
        """Read or draw the first weights, and return what provenance says of them.

        Called once a run, after random numbers are seeded; a seed's run has a copy of its own.

        Raises:
            ResourceError: the weights to begin with are not here.
            DataError: they are of another architecture.
        """
        ...

    def tokens(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of n texts, first dimension n; what is too long is cut off."""
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has before anything is cut off."""
        ...

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return [b, d], not normalised, for uint8 images [b, h, w, 3]."""
        ...

    def embed_texts(self, tokens: Tokens) -> torch.Tensor:
        """Return [n, d], not normalised."""
        ...

    def scale(self) -> torch.Tensor:
        """Return what cosines are multiplied by, a scalar."""
        ...


class Batches:
    """Samples in, a batch out: uint8 `images` [b, s, s, 3], `texts`, and int64 `labels` [b].

    `labels` are equal where samples mean the same: by their label, else by their caption. They
    are digests, so that they agree across batches and processes.
    """

    def __init__(
        self,
        corpus: Corpus,
        model: ImageTextModel,
        augment: Change,
        pictures: Pictures | None = None,
    ) -> None:
        """Take what captions are drawn by, what reads them, and what is done to images."""
        self.corpus, self.augment = corpus, augment
        self.size_px, self.tokens = model.preprocess.size, model.tokens
        self.pictures = pictures or Pictures(corpus.train)

    def __call__(self, samples: list[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Read, change and stack; `rng` decides crops, colours and wordings.

        Raises:
            DataError: too many images cannot be read; one is named.
        """
        read = [self.pictures(sample) for sample in samples]
        samples = [sample for sample, _ in read]  # another sample for one that is broken
        images = [self.augment(image, self.size_px, rng) for _, image in read]
        texts = [self.corpus.caption(sample, rng) for sample in samples]
        meant = [meaning(s.label, text) for s, text in zip(samples, texts, strict=True)]
        return {
            "images": torch.from_numpy(np.stack(images)),
            "texts": self.tokens(texts),
            "labels": torch.tensor(meant),
        }


def meaning(label: str, text: str) -> int:
    """Return a number that is equal where samples mean the same: by label, else by text."""
    told = f"label {label}" if label else f"text {text}"
    return int.from_bytes(hashlib.blake2b(told.encode(), digest_size=8).digest(), signed=True)


class Pairs(torch.nn.Module):
    """A model as the trainer sees it: batches in, loss out, whole or by way of embeddings."""

    def __init__(self, model: ImageTextModel, loss: Loss) -> None:
        """Take the model, a module itself."""
        super().__init__()
        self.model, self.kind = model, loss

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def embed(self, batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return embeddings of images and texts [b, d], and labels int64 [b] as they came."""
        images = self.model.embed_images(batch["images"].to(self.device))
        texts = self.model.embed_texts(moved(batch["texts"], self.device))
        return images, texts, batch["labels"].to(self.device)

    def loss_of(
        self, images: torch.Tensor, texts: torch.Tensor, labels: torch.Tensor, *, joint: bool = True
    ) -> torch.Tensor:
        """Return the loss of embeddings, over the rows of all processes or of this one alone."""
        if self.kind == "infonce":
            return contrastive(images, texts, self.model.scale(), joint=joint)
        return multi_positive(images, texts, labels, self.model.scale(), joint=joint)

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """Return the loss of one batch, a scalar."""
        return self.loss_of(*self.embed(batch))


def moved(tokens: Tokens, device: torch.device) -> Tokens:
    """Return tokens on a device."""
    if isinstance(tokens, torch.Tensor):
        return tokens.to(device)
    return {name: part.to(device) for name, part in tokens.items()}
