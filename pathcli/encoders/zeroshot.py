"""Class texts in, a classifier of images out (Radford et al. 2021, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

    from pathcli.types import Encoder, HalfArray, ImageTextEncoder

    Floats = NDArray[np.float64]

_ROWS = 65_536


def class_weights(encoder: ImageTextEncoder, texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return a unit vector a class, float32 [c, d] on the CPU, from each class's texts.

    The mean of the normalised embeddings of all its texts, normalised again.

    Raises:
        DataError: the embedding of a text is zero or not finite.
    """
    import torch  # noqa: PLC0415
    from torch.nn.functional import normalize  # noqa: PLC0415

    every = [text for of_class in texts for text in of_class]
    embedded = normalize(encoder.encode_text(every).float().cpu(), dim=-1)
    sizes = [len(of_class) for of_class in texts]
    means = [rows.mean(0) for rows in torch.split(embedded, sizes)]
    weights = normalize(torch.stack(means), dim=-1)
    if not torch.allclose(weights.norm(dim=-1), torch.ones(len(texts)), atol=1e-3):
        msg = f"{encoder.name}: a class's texts have no direction in its space; are weights whole?"
        raise DataError(msg)
    return weights


def class_probabilities(features: HalfArray, weights: torch.Tensor, scale: float) -> Floats:
    """Return float64 [n, c]: the softmax of `scale` times the cosines with `weights` [c, d].

    `features` are float16 [n, d], not normalised.

    Raises:
        DataError: features and weights are of different spaces.
    """
    unit = np.asarray(weights, np.float64)
    if features.ndim != unit.ndim or features.shape[1] != unit.shape[1]:
        msg = f"image features {features.shape[1:]} and text features {unit.shape[1:]} differ"
        raise DataError(msg)
    rows = features.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    logits = scale * (rows / np.maximum(norms, np.finfo(np.float64).tiny)) @ unit.T
    odds = np.exp(logits - logits.max(1, keepdims=True))
    found: Floats = odds / odds.sum(1, keepdims=True)
    return found


def unfamiliar(encoder: Encoder, features: HalfArray) -> NDArray[np.bool_] | None:
    """Return bool [n], true for images the encoder says it does not know; None if it cannot say.

    An encoder that can say has a method `familiar`: float32 [n, d] in, bool [n] out.
    """
    import torch  # noqa: PLC0415

    familiar: Any = getattr(encoder, "familiar", None)
    if familiar is None:
        return None
    parts = [
        familiar(torch.from_numpy(features[start : start + _ROWS].astype(np.float32))).cpu()
        for start in range(0, len(features), _ROWS)
    ]
    known: NDArray[np.bool_] = torch.cat(parts).numpy().astype(bool)
    return ~known


def too_long(encoder: ImageTextEncoder, texts: Sequence[str]) -> list[str]:
    """Return the texts of which the encoder reads only the beginning."""
    counts = encoder.count_tokens(texts)
    return [t for t, n in zip(texts, counts, strict=True) if n > encoder.text_limit]
