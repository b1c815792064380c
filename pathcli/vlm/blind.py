"""What stands in a recipe of words alone where others have an encoder and a connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, float32, nn

from pathcli.types import WHOLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pathcli.types import ByteArray


class NoEncoder:
    """Sees nothing: no tokens of any image; see `pathcli.types.Encoder`."""

    name = id = "none"
    input_px, native, native_source = 1, WHOLE, "there is nothing to see"
    tokens, row_shape = True, (0, 0)

    def load(self, device: str) -> None:
        """Read nothing."""

    def encode(self, images: Tensor) -> Tensor:
        """Return float32 [b, 0, 0] for uint8 images [b, h, w, 3]: no token of no width."""
        return images.new_zeros((len(images), *self.row_shape), dtype=float32)


class NoConnector(nn.Module):
    """Makes nothing of images, and has no weights; see `connectors.Connector`."""

    reads = False

    def __init__(self, dim_in: int, dim_out: int) -> None:
        """Keep nothing."""
        super().__init__()
        del dim_in, dim_out

    def count(self, tokens: int) -> int:
        """See `Connector.count`."""
        return 0 * tokens

    def views(self, image: ByteArray, side: int) -> list[ByteArray]:
        """See `Connector.views`."""
        del image, side
        return []

    def start(self) -> Mapping[str, Any]:
        """See `Connector.start`."""
        return {"kind": "none"}
