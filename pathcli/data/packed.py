"""Many samples as one block of bytes: as objects they would fill the memory of every worker."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from pathcli.types import Member, Region, Sample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pathcli.types import ImageRef

    Indices = NDArray[np.int64]


class Packed(Sequence[Sample]):
    """Samples as one block of bytes; a sample is made when it is asked for."""

    def __init__(
        self, blob: bytearray, ends: Indices, places: tuple[str, ...], rows: Indices
    ) -> None:
        """Take samples packed one after the other; `rows` says which are meant, in order."""
        self._blob, self._ends, self._places, self._rows = blob, ends, places, rows

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Packed: ...

    def __getitem__(self, index: int | slice) -> Sample | Packed:
        """Return one sample, or a part of them."""
        if isinstance(index, slice):
            return self.select(self._rows[index])
        row = int(self._rows[index])
        start = int(self._ends[row - 1]) if row else 0
        return _unpack(self._blob[start : int(self._ends[row])], self._places)

    def select(self, rows: Indices) -> Packed:
        """Return other rows of the same block."""
        return Packed(self._blob, self._ends, self._places, rows)


def pack(sample: Sample, places: dict[str, int]) -> bytes:
    """Return a sample as JSON; the folders, slides and archives of its images go to `places`."""

    def packed(ref: ImageRef) -> list[Any]:
        if isinstance(ref, Region):
            return [places.setdefault(ref.slide, len(places)), *ref.xy, ref.side0]
        if isinstance(ref, Member):
            place = places.setdefault(ref.archive, len(places))
            return [place, ref.offset, ref.size, ref.name]
        folder, name = os.path.split(ref)
        return [places.setdefault(folder, len(places)), name]

    refs = [packed(ref) for ref in sample.images]
    row = [sample.name, refs, sample.answer, sample.turns, sample.label, sample.group]
    return json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def _unpack(data: bytearray, places: Sequence[str]) -> Sample:
    name, refs, answer, turns, label, group = json.loads(data.decode(errors="surrogatepass"))

    def unpacked(place: int, first: Any, *rest: Any) -> ImageRef:  # noqa: ANN401 - JSON
        if not rest:
            return os.path.join(places[place], first)  # noqa: PTH118 - once for each image
        second, third = rest
        if isinstance(third, str):
            return Member(places[place], first, second, third)
        return Region(places[place], (first, second), third)

    images = tuple(unpacked(*ref) for ref in refs)
    return Sample(name, images, answer, tuple(turns), label, group)
