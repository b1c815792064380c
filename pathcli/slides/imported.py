"""The tissue method of imported tiles: a name in specifications, and no rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pathcli.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pathcli.types import ByteArray


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Stands for what another tool called tissue when it cut the tiles."""

    version: ClassVar[int] = 1
    mask_mpp: ClassVar[float] = 64.0

    def mask(self, thumbnail: ByteArray, um_per_px: float) -> NDArray[np.bool_]:
        """Refuse: nobody knows the rule.

        Raises:
            DataError: always.
        """
        del thumbnail, um_per_px
        msg = (
            "tiles of tissue 'imported' were cut by another tool: they are in the store or "
            "nowhere; import them, or cut with another --tissue"
        )
        raise DataError(msg)
