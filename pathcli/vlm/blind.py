"""What stands in a recipe of words alone where others have an encoder and a connector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pathcli.types import WHOLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.types import ByteArray


class NoEncoder:
    """Sees no images."""

    name = id = "none"
    input_px, native, native_source = 1, WHOLE, "there is nothing to see"
    tokens, row_shape = True, (0, 0)

    def load(self, device: str) -> None:
        """Read nothing."""

    def encode(self, images: Tensor) -> Tensor:
        """Refuse: nobody asks it."""
        raise NotImplementedError


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

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Refuse: it reads nothing."""
        raise NotImplementedError
