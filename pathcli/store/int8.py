"""Features as int8 with a scale for each last axis: half the space of float16.

Symmetric and linear: the largest value of a vector becomes 127.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathcli.types import HalfArray

INT8 = "-int8"
"""How the id of an encoder ends whose features are kept so."""


def as_int8(values: HalfArray) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 [..., d] and scales float32 [...] of float16 [..., d].

    The scale of a vector that is not a number is NaN.
    """
    known = values.astype(np.float32)
    scales = np.abs(known).max(-1) / np.float32(127)
    with np.errstate(invalid="ignore"):  # 0 / 0
        whole = np.rint(known / scales[..., None])
    return np.nan_to_num(whole).astype(np.int8), scales


class ScaledRows:
    """Rows kept as int8 that become float16 when they are asked for."""

    def __init__(self, values: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
        """Take int8 [n, ..., d] and float32 [n, ...], which may be mapped."""
        self.values, self.scales, self.shape = values, scales, values.shape

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values)

    def __getitem__(self, rows: Any) -> HalfArray:  # noqa: ANN401 - an index as of numpy
        """Return rows as float16."""
        half: HalfArray = (self.values[rows] * self.scales[rows][..., None]).astype(np.float16)
        return half
