"""Connectors: an image's tokens in, visual tokens of the language model's width out.

A connector also decides which views of an image the encoder sees. `mlp` is LLaVA-1.5's
(arXiv:2310.03744); the others have modules of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pathcli.encoders.imageset import centre_square
from pathcli.encoders.preprocess import OPENAI_MEAN
from pathcli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pathcli.types import ByteArray

Frame = Literal["centre", "pad", "squash"]


class Connector(Protocol):
    """What stands between the encoder and the language model, a torch module.

    Built as `Connector(dim_in, dim_out, *, ...)`: the width of the encoder's tokens, that of
    the language model, and what a recipe may set. `reads` tells whether it wants the question.
    """

    reads: bool

    def count(self, tokens: int) -> int:
        """Return how many visual tokens an image becomes, its views being of `tokens` tokens."""
        ...

    def views(self, image: ByteArray, side: int) -> list[ByteArray]:
        """Return what the encoder sees of uint8 [h, w, 3]: views, uint8 [side, side, 3] each."""
        ...

    def start(self) -> Mapping[str, Any]:
        """Read or draw the first weights; return where they are from, for provenance.

        Raises:
            ResourceError: the weights to begin with are not here.
            DataError: they are of another architecture.
        """
        ...

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return questions as `ids` and `mask`, int64 [n, t]; only where it `reads`."""
        ...

    def __call__(
        self, tokens: Tensor, of: Tensor, text: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Return [m, n, dim_out] for the tokens [v, t, dim_in] of all views of m images.

        `of` int64 [v] is the image (0..m-1, ascending) that a view is of; the views of one
        image stand as `views` gave them. `text` is what `tokens` gave for m questions.
        """
        ...


class Mlp(nn.Module):
    """Each token through linear layers with GELU between them: LLaVA-1.5's `mlp2x_gelu`.

    An image has one view and becomes as many visual tokens as the view has. `frame` makes an
    image square: `pad` it with CLIP's mean colour (as LLaVA-1.5 is tuned), take its `centre`
    (as LLaVA-1.5 aligns), or `squash` it.
    """

    reads = False

    def __init__(self, dim_in: int, dim_out: int, *, depth: int = 2, frame: Frame = "pad") -> None:
        """Make `depth` linear layers; `start` draws them.

        Raises:
            UsageError: no layers, or a frame that does not exist.
        """
        super().__init__()
        if depth < 1:
            msg = f"depth must be at least 1, not {depth}"
            raise UsageError(msg)
        if frame not in get_args(Frame):
            msg = f"frame is one of {', '.join(get_args(Frame))}, not {frame!r}"
            raise UsageError(msg)
        self.frame = frame
        self.layers = nn.Sequential(nn.Linear(dim_in, dim_out))
        for _ in range(depth - 1):
            self.layers += nn.Sequential(nn.GELU(), nn.Linear(dim_out, dim_out))

    def count(self, tokens: int) -> int:
        """See `Connector.count`: as many as the view has."""
        return tokens

    def views(self, image: ByteArray, side: int) -> list[ByteArray]:
        """See `Connector.views`: the image in its frame."""
        return [framed(image, side, self.frame)]

    def start(self) -> Mapping[str, Any]:
        """See `Connector.start`: torch's own draw."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        return {"kind": "mlp", "weights": "drawn"}

    def forward(
        self, tokens: Tensor, of: Tensor, text: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See `Connector.__call__`."""
        del of, text
        projected: Tensor = self.layers(tokens)
        return projected


# --- frames ------------------------------------------------------------------------------


def resized(image: ByteArray, height: int, width: int) -> ByteArray:
    """Return uint8 [h, w, 3] resized to [height, width, 3], antialiased bicubic."""
    if image.shape[:2] == (height, width):
        return image
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    sized = interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return np.asarray(sized[0].permute(1, 2, 0).numpy())


def padded(
    image: ByteArray, height: int, width: int, colour: Sequence[int] = (0, 0, 0)
) -> ByteArray:
    """Return the image in the middle of [height, width, 3], `colour` around it."""
    canvas = np.full((height, width, 3), colour, np.uint8)
    top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
    canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
    return canvas


def padded_square(image: ByteArray, side: int) -> ByteArray:
    """Return the whole image on a square of CLIP's mean colour, resized to `side`."""
    edge = max(image.shape[:2])
    return resized(padded(image, edge, edge, [int(255 * x) for x in OPENAI_MEAN]), side, side)


def squashed(image: ByteArray, side: int) -> ByteArray:
    """Return the whole image as a square of `side`, whatever its proportions."""
    return resized(image, side, side)


_FRAMES: Mapping[str, Callable[[ByteArray, int], ByteArray]] = {
    "centre": centre_square,
    "pad": padded_square,
    "squash": squashed,
}


def framed(image: ByteArray, side: int, frame: Frame) -> ByteArray:
    """Return an image as a square of `side`: its centre, padded, or squashed."""
    return _FRAMES[frame](image, side)
