"""One slide's features between the store and a peer's files, and what both have to agree on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli import __version__
from pathcli.errors import DataError
from pathcli.types import MPP_RANGE, Key, SlideInfo, Tiles, TileSpec, TileStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.types import HalfArray, IntArray

IMPORTED = "-imported"
"""How the id of an encoder ends whose features came from elsewhere; an own one has a digest."""

RECORD = "pathcli"
"""The attribute by which a file that pathcli wrote says what it was in the store."""

LABEL = "imported"
"""The tissue method of tiles whose method nobody knows."""

_EXPORTED = "as exported"
_ITEM = re.compile(r"[\w+-][\w.+-]*-[0-9a-f]{8}")
_ID = re.compile(r"[\w+-][^/\\\x00-\x1f]*")
_LONGEST = 60_000  # characters of a record: HDF5 keeps attributes up to 64 KB


def imported_spec(size_px: int, mpp: float, step_px: int | None = None) -> TileSpec:
    """Return the specification of tiles that another tool cut, on tissue it found."""
    return TileSpec(
        size_px=size_px,
        mpp=float(f"{mpp:.6g}"),
        step_px=step_px or size_px,
        tissue=LABEL,
        min_tissue=0.0,
    )


UNKNOWN = imported_spec(1, 1.0)
"""Stands for tiles of which a file says neither size nor resolution."""


@dataclass(frozen=True)
class Outgoing:
    """Features of one slide on their way out, readable rows only.

    `values` float16 [n, d], `xy` int32 [n, 2] level-0 px; `name` is the slide's at the peer's,
    `card` the store's knowledge of it, and `dropped` counts the unreadable rows left out.
    """

    name: str
    key: Key
    tiles: Tiles
    values: HalfArray = field(repr=False)
    xy: IntArray = field(repr=False)
    card: Mapping[str, Any]
    dropped: int

    @property
    def encoder(self) -> str:
        """The encoder's id."""
        return str(self.key.encoder)

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """The scanned part (x, y, width, height) in level-0 px; all of it where nobody knows."""
        x, y, w, h = self.card.get("bounds", (0, 0, self.tiles.width, self.tiles.height))
        return int(x), int(y), int(w), int(h)


@dataclass(frozen=True)
class Known:
    """A slide that is at hand: its card, the resolution to use, and where it is."""

    info: SlideInfo
    mpp: float | None
    path: str


@dataclass(frozen=True)
class Asked:
    """What an import was told beside the files.

    `encoder` names the encoder, `mpp` the slides' um per level-0 pixel, `slide` looks up a
    slide by its name (None: no slides were given).
    """

    encoder: str | None = None
    mpp: float | None = None
    slide: Callable[[str], Known | None] | None = None

    def resolution(self, name: str, record: str | None = None) -> tuple[float, str] | None:
        """Return um per level-0 pixel of a slide and who says so, None if nobody does.

        What pathcli left in the file comes first, then what was given, then the slide's header.
        """
        if own := parse_record(record).get("key", {}).get("mpp"):
            return float(own), _EXPORTED
        if self.mpp is not None:
            return self.mpp, "given"
        known = self.slide(name) if self.slide else None
        return (known.mpp, "the slide's header") if known and known.mpp else None

    def nominal(self, name: str, record: str | None = None) -> tuple[float, str] | None:
        """Return the same for tools that cut by level or objective: a header's is rounded to one.

        So all slides of an objective have one specification.
        """
        found = self.resolution(name, record)
        if found is None or self.mpp is not None or found[1] == _EXPORTED:
            return found
        return nominal_mpp(found[0]), f"nominal, from {found[0]:g} in {found[1]}"


@dataclass(frozen=True)
class Incoming:
    """Features of one slide as a peer's file has them.

    `values` [n, d] of any float, `xy` int [n, 2] level-0 px in the file's order, `encoder` as
    the file calls it, `size` level-0 (width, height), `says` the file's own attributes,
    `record` what pathcli left in it, and `notes` what the user should know. `measured`: the
    record is of the tiles alone, as the values are not the features it was made of.
    """

    path: Path
    name: str
    values: NDArray[Any] = field(repr=False)
    xy: NDArray[Any] = field(repr=False)
    encoder: str | None
    spec: TileSpec
    slide_mpp: float
    mpp_source: str
    size: tuple[int, int] | None = None
    says: Mapping[str, Any] = field(default_factory=dict)
    record: str | None = None
    notes: tuple[str, ...] = ()
    measured: bool = False


@dataclass(frozen=True)
class Source:
    """One slide in a peer's folder, not read yet; `shown` is how messages call it."""

    name: str
    path: Path
    shown: str
    read: Callable[[], Incoming]


# --- what pathcli leaves in its own files ------------------------------------------------


def record_of(
    key: Key, tiles: Tiles, status: NDArray[np.uint8], card: Mapping[str, Any], out: Outgoing
) -> str | None:
    """Return as JSON what an entry was, with a checksum over it and the rows written.

    None if it would be too long: many unreadable rows.
    """
    rows = np.flatnonzero(status != TileStatus.OK)
    kept = {
        "version": __version__,
        "key": asdict(key),
        "spec": tiles.spec.to_json(),
        "size": [tiles.width, tiles.height],
        "tissue_share": tiles.tissue_share,
        "warnings": list(tiles.warnings),
        "dropped": None if tiles.dropped is None else dict(tiles.dropped),
        "file_bytes": tiles.file_bytes,
        "card": {name: value for name, value in card.items() if name != "last_seen"},
        "unreadable": [[int(row), *map(int, tiles.xy[row])] for row in rows],
    }
    text = json.dumps(kept | {"sha256": _checksum(kept, out.values, out.xy)}, sort_keys=True)
    return text if len(text) <= _LONGEST else None


def _checksum(kept: Mapping[str, Any], values: NDArray[Any], xy: NDArray[Any]) -> str:
    state = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    state.update(np.ascontiguousarray(values, "<f2").tobytes())
    state.update(np.ascontiguousarray(xy, "<i4").tobytes())
    return state.hexdigest()


@dataclass(frozen=True)
class Restored:
    """An entry of a store as it was before it was exported."""

    key: Key
    tiles: Tiles
    values: HalfArray
    card: Mapping[str, Any]


def parse_record(text: str | None) -> dict[str, Any]:
    """Return what pathcli left in a file, nothing if it is not there or not whole."""
    try:
        kept: dict[str, Any] = json.loads(text or "{}")
        low, high = MPP_RANGE
        bounds = list(map(int, kept["card"].get("bounds", ())))
        whole = len(bounds) in {0, 4} and low <= kept["key"]["mpp"] <= high
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}
    return kept if whole else {}


def restore(incoming: Incoming) -> Restored | None:
    """Return the entry that a file's record tells, None unless rows and record are as written."""
    kept = parse_record(incoming.record)
    expected = kept.pop("sha256", None)
    if not kept:
        return None
    with np.errstate(over="ignore"):
        half = incoming.values.astype(np.float16)
    xy, checked = incoming.xy, half[:, :0] if incoming.measured else half
    if expected != _checksum(kept, checked, xy):
        return None
    try:
        return _restored(kept, half, xy)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # of a later pathcli
        return None


def _restored(kept: Mapping[str, Any], values: HalfArray, xy: NDArray[Any]) -> Restored | None:
    key, spec = Key(**kept["key"]), TileSpec.from_json(kept["spec"])
    named = _ITEM.fullmatch(key.item) and _ID.fullmatch(str(key.encoder))
    if not named or kept["card"].get("item", key.item) != key.item:
        return None  # a file from elsewhere may not say where else than in the store it goes
    lost = np.array(kept["unreadable"], np.int64).reshape(-1, 3)
    n = len(values) + len(lost)
    status = np.zeros(n, np.uint8)
    status[lost[:, 0]] = TileStatus.UNREADABLE
    good = status == TileStatus.OK
    places, rows = np.zeros((n, 2), np.int32), np.full((n, *values.shape[1:]), np.nan, np.float16)
    places[good], places[lost[:, 0]], rows[good] = xy, lost[:, 1:], values
    tiles = Tiles(
        item=key.item,
        xy=places,
        status=status,
        spec=spec,
        slide_mpp=key.mpp,
        width=int(kept["size"][0]),
        height=int(kept["size"][1]),
        tissue_share=float(kept["tissue_share"]),
        warnings=tuple(kept["warnings"]),
        dropped=kept.get("dropped"),
        file_bytes=kept.get("file_bytes"),
    )
    return Restored(key, tiles, rows, kept["card"]) if spec.digest == key.tiles else None


# --- resolutions and numbers -------------------------------------------------------------


def nominal_mpp(mpp: float) -> float:
    """Return the um per pixel of the objective nearest to a resolution: 0.25 for 0.2527.

    >>> nominal_mpp(0.4990)
    0.5
    """
    return float(2.0 ** round(math.log2(mpp)))


def number(value: Any) -> float | None:  # noqa: ANN401 - what an attribute holds
    """Return a positive number of an attribute, None for anything else, as for 'None'."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) and found > 0 else None


def plain(value: Any) -> Any:  # noqa: ANN401 - numpy and JSON values
    """Return an attribute as plain JSON values."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | list | dict) else str(value)


def matrix(values: Any, what: str) -> NDArray[Any]:  # noqa: ANN401 - an array as read
    """Return features [n, d] as a file has them, [1, n, d] too.

    Raises:
        DataError: of another shape or type, or without a row.
    """
    found = np.asarray(values)
    if found.ndim == 3 and len(found) == 1:  # noqa: PLR2004 - a batch of one
        found = found[0]
    if found.ndim != 2 or found.dtype.kind not in "fiu":  # noqa: PLR2004 - a row a tile
        msg = f"{what} is {found.dtype} {found.shape}; numbers [tiles, length] are wanted"
        raise DataError(msg)
    if not found.size:
        msg = f"{what} has no tile"
        raise DataError(msg)
    return found


def corners(values: Any, n: int, what: str) -> NDArray[np.int64]:  # noqa: ANN401
    """Return level-0 corners int64 [n, 2].

    Raises:
        DataError: not as many as features, no numbers, or beyond 32 bits.
    """
    found = np.asarray(values)
    if found.shape != (n, 2):
        msg = f"{what} is {found.shape}, but there are features of {n} tiles; was it cut short?"
        raise DataError(msg)
    if found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        msg = f"{what} holds what are no places"
        raise DataError(msg)
    if np.abs(found).max() >= 2**31:
        msg = f"{what} is beyond what a slide can have ({np.abs(found).max():g} px)"
        raise DataError(msg)
    return np.asarray(np.rint(found), np.int64)
