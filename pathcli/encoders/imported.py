"""Features that came from elsewhere, as an encoder of recipes: known by name, without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pathcli.errors import ResourceError, UsageError
from pathcli.store.peers.parcel import IMPORTED, UNKNOWN

if TYPE_CHECKING:
    import torch


class Imported:
    """An encoder whose features were imported: `{kind: imported, id: uni_v1-imported}`.

    Its features are found in the store; it cannot make any.
    """

    input_px = 1
    native = UNKNOWN
    native_source = "nobody: the features were imported"

    def __init__(self, *, id: str) -> None:  # noqa: A002 - as the store calls it
        """Know the id.

        Raises:
            UsageError: it is not one that an import gives.
        """
        if not id.endswith(IMPORTED):
            msg = f"id {id!r} is not of imported features: those end in {IMPORTED}"
            raise UsageError(msg)
        self.id, self.name = id, id.removesuffix(IMPORTED)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Refuse: only an entry of the store knows.

        Raises:
            ResourceError: always.
        """
        raise self._absent()

    def load(self, device: str) -> None:
        """Refuse: there are no weights.

        Raises:
            ResourceError: always.
        """
        del device
        raise self._absent()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Refuse: there are no weights.

        Raises:
            ResourceError: always.
        """
        del images
        raise self._absent()

    def _absent(self) -> ResourceError:
        return ResourceError(
            f"{self.id} is known by imported features alone and embeds no slide; import those of "
            "the other slides, too: pathcli store import"
        )
