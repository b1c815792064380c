"""The connector `scale-invariant` of PA-LLaVA (BIBM 2024): a glance, and a closer look.

A large image is seen once as a whole and once in 4 to 8 tiles; the tokens of the whole gather
what they need from those of the tiles, so that an image of any size becomes as many visual
tokens as one view has. Its published mask of padded tiles is off by one tile and cuts the
batch; here padding is left out of attention. Images above 16,777,216 px, which its training
skips, are read like others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm

from pathcli.errors import UsageError
from pathcli.vlm.connectors import padded, resized, squashed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pathcli.types import ByteArray

GRIDS = (
    *((1, 4), (2, 2), (4, 1), (1, 5), (5, 1), (1, 6), (2, 3), (3, 2)),
    *((6, 1), (1, 7), (7, 1), (1, 8), (2, 4), (4, 2), (8, 1)),
)
"""The grids an image may be cut by, (columns, rows); of equally good ones the first is taken."""

_EPS, _STD = 1e-12, 0.02  # BERT's


class ScaleInvariant(nn.Module):
    """Tokens of the whole image, which look at the tokens of its tiles through BERT's layers.

    Every layer is self-attention, cross-attention and feed-forward, of the encoder's width
    throughout; what they give is added to the tokens they began with, normed and projected.
    Tiles have no positions: the tokens of all of them are one set.
    """

    reads = False

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        *,
        layers: int = 6,
        heads: int = 12,
        hidden: int | None = None,
        dropout: float = 0.1,
    ) -> None:
        """Make the layers; `hidden` is the feed-forward width, 4 * `dim_in` unless given.

        Raises:
            UsageError: no layers, or heads that do not divide the encoder's width.
        """
        super().__init__()
        if layers < 1 or heads < 1 or dim_in % heads:
            msg = (
                f"scale-invariant needs a layer, and heads that divide the encoder's width "
                f"{dim_in}: layers {layers}, heads {heads}"
            )
            raise UsageError(msg)
        self.dropout = dropout
        self.layers = nn.ModuleList(
            _layer(dim_in, heads, hidden or 4 * dim_in, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim_in, eps=_EPS)
        self.projection = nn.Linear(dim_in, dim_out)

    def count(self, tokens: int) -> int:
        """See `Connector.count`: as many as one view has, whatever the image's size."""
        return tokens

    def views(self, image: ByteArray, side: int) -> list[ByteArray]:
        """See `Connector.views`: the image squashed, then its tiles, row by row."""
        return [squashed(image, side), *tiles(image, side)]

    def start(self) -> Mapping[str, Any]:
        """See `Connector.start`: BERT's draw for the layers, torch's for the projection."""
        for module in self.layers.modules():
            if isinstance(module, nn.Linear | nn.MultiheadAttention):
                for name, weight in module.named_parameters(recurse=False):
                    if name.endswith("bias"):
                        nn.init.zeros_(weight)
                    else:
                        nn.init.normal_(weight, std=_STD)
        self.projection.reset_parameters()
        return {"kind": "scale-invariant", "weights": "drawn"}

    def forward(
        self, tokens: Tensor, of: Tensor, text: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """See `Connector.__call__`; of each image the first view is the whole.

        Raises:
            UsageError: an image without tiles.
        """
        del text
        whole, local, padding = apart(tokens, of)
        x = layer_norm(whole, whole.shape[-1:], eps=_EPS)
        x = dropout(x, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, local, memory_key_padding_mask=padding)
        projected: Tensor = self.projection(self.norm(x + whole))
        return projected


def _layer(width: int, heads: int, hidden: int, dropout: float) -> nn.TransformerDecoderLayer:
    """Return BERT's layer with cross-attention, which is torch's but for one dropout."""
    layer = nn.TransformerDecoderLayer(
        width, heads, hidden, dropout, "gelu", layer_norm_eps=_EPS, batch_first=True
    )
    layer.dropout = nn.Dropout(0)  # between the two layers of its feed-forward
    return layer


def apart(tokens: Tensor, of: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return tokens [v, t, d] of all views as those of whole images, of tiles, and the padding.

    The first is [m, t, d], the second [m, k * t, d] with k the most tiles of an image; the
    last, bool [m, k * t], is true where an image has fewer, and None where all have as many.

    Raises:
        UsageError: an image without tiles.
    """
    views = torch.bincount(of)
    first = views.cumsum(0) - views
    fewest, most = (int(n) - 1 for n in (views.min(), views.max()))
    if fewest < 1:
        msg = "scale-invariant reads the whole image and its tiles; an image here has one view"
        raise UsageError(msg)
    place = torch.arange(len(of), device=of.device) - first[of] - 1
    tile = place >= 0
    local = tokens.new_zeros(len(views), most, *tokens.shape[1:])
    local[of[tile], place[tile]] = tokens[tile]
    padding = None
    if fewest < most:
        missing = torch.arange(most, device=of.device) >= (views - 1)[:, None]
        padding = missing.repeat_interleave(tokens.shape[1], 1)
    return tokens[first], local.flatten(1, 2), padding


# --- tiles -------------------------------------------------------------------------------


def best_grid(height: int, width: int, side: int) -> tuple[int, int]:
    """Return the (columns, rows) of `GRIDS` that keeps most of an image, then wastes least.

    LLaVA-NeXT's rule: the image is shrunk or grown into the grid, its sides cut to whole
    pixels; beyond the pixels it has itself nothing is kept, and what is not kept is waste.
    """

    def merit(grid: tuple[int, int]) -> tuple[int, int]:
        across, down = grid[0] * side, grid[1] * side
        fitted = min(across, width * down // height) * min(down, height * across // width)
        kept = min(fitted, height * width)
        return kept, kept - across * down

    return max(GRIDS, key=merit)


def tiles(image: ByteArray, side: int) -> list[ByteArray]:
    """Return 4 to 8 tiles [side, side, 3] of uint8 [h, w, 3], row by row.

    The image is resized into its grid with its proportions kept, its sides rounded up to whole
    pixels, and stands in the middle of black.
    """
    height, width = image.shape[:2]
    columns, rows = best_grid(height, width, side)
    across, down = columns * side, rows * side
    fitted = min(down, -(-height * across // width)), min(across, -(-width * down // height))
    canvas = padded(resized(image, *fitted), down, across)
    corners = [(y, x) for y in range(0, down, side) for x in range(0, across, side)]
    return [canvas[y : y + side, x : x + side] for y, x in corners]
