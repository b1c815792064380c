"""What an entry says about itself beside its arrays, the same in HDF5 and Zarr."""

from __future__ import annotations

import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pathcli import __version__
from pathcli.errors import DataError, ForeignError, NewerError
from pathcli.store.int8 import INT8
from pathcli.types import Key, Tiles, TileSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT = 1
CREATOR = f"pathcli {__version__}"


def entry_attributes(tiles: Tiles, encoder: str | None = None) -> dict[str, Any]:
    """Return the attributes of a whole entry: all of `tiles` but its arrays."""
    kept = {
        "format": FORMAT,
        "creator": CREATOR,
        "item": tiles.item,
        "spec": json.dumps(tiles.spec.to_json(), sort_keys=True),
        "slide_mpp": tiles.slide_mpp,
        "width": tiles.width,
        "height": tiles.height,
        "tissue_share": tiles.tissue_share,
        "warnings": json.dumps(tiles.warnings),
    }
    if tiles.dropped is not None:
        kept["dropped"] = json.dumps(dict(tiles.dropped))
    if tiles.file_bytes is not None:
        kept["file_bytes"] = tiles.file_bytes
    return kept | ({"encoder": encoder} if encoder else {})


def coords_attributes(tiles: Tiles) -> dict[str, Any]:
    """Return what a reader of TRIDENT or CLAM files looks for on `coords`."""
    return {
        "patch_size": tiles.spec.size_px,
        "patch_size_level0": round(tiles.side0),
        "level0_magnification": _magnification(tiles.slide_mpp),
        "target_magnification": _magnification(tiles.spec.mpp),
        "overlap": tiles.spec.size_px - tiles.spec.step_px,
        "name": tiles.item,
        "savetodir": "None",
        "level0_width": tiles.width,
        "level0_height": tiles.height,
    }


def features_attributes(item: str, encoder: str) -> dict[str, Any]:
    """Return what a reader of TRIDENT files looks for on `features`."""
    return {"name": item, "savetodir": "None", "encoder": encoder}


def _magnification(mpp: float) -> float:
    """Return the objective readers expect at a resolution: the nearest of ..., 10, 20, 40, ..."""
    return float(10 * 2 ** round(math.log2(1 / mpp)))


def tiles_of(attrs: Mapping[str, Any], xy: Any, status: Any) -> Tiles:  # noqa: ANN401 - arrays
    """Return the tiles that attributes and arrays tell, the inverse of `entry_attributes`.

    Raises:
        KeyError, ValueError, TypeError: they are not those of an entry.
    """
    return Tiles(
        item=str(attrs["item"]),
        xy=xy,
        status=status,
        spec=_spec(str(attrs["spec"]))[0],
        slide_mpp=float(attrs["slide_mpp"]),
        width=int(attrs["width"]),
        height=int(attrs["height"]),
        tissue_share=float(attrs["tissue_share"]),
        warnings=tuple(json.loads(attrs["warnings"])),
        dropped=json.loads(attrs["dropped"]) if "dropped" in attrs else None,
        file_bytes=int(attrs["file_bytes"]) if "file_bytes" in attrs else None,
    )


def key_in(attrs: Mapping[str, Any]) -> Key:
    """Return the key that a features entry itself says; raises as `tiles_of`."""
    digest = _spec(str(attrs["spec"]))[1]
    return Key(str(attrs["item"]), float(attrs["slide_mpp"]), digest, str(attrs["encoder"]))


@lru_cache(maxsize=64)
def _spec(text: str) -> tuple[TileSpec, str]:
    """Return a specification and its digest; all entries of a cohort say the same text."""
    spec = TileSpec.from_json(json.loads(text))
    return spec, spec.digest


def layout(encoder: str, row_shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the row shape and type of what is written row by row, in the checksum's order."""
    kept = {"features": (row_shape, "<f2")}
    if encoder.endswith(INT8):
        kept = {"features": (row_shape, "i1"), "scales": (row_shape[:-1], "<f4")}
    return {**kept, "status": ((), "u1")}


def require_format(attrs: Mapping[str, Any], where: object) -> None:
    """Refuse what another program wrote, or a later pathcli.

    Raises:
        ForeignError: no entry of this program.
        NewerError: of a format this version does not know.
    """
    found = attrs.get("format")
    if found is None:
        msg = f"{where}: not written by pathcli"
        raise ForeignError(msg)
    if found > FORMAT:
        msg = f"{where}: store format {found}, this pathcli reads up to {FORMAT}; update pathcli"
        raise NewerError(msg)


def later(where: object, why: object) -> NewerError:
    """Return the error of a specification with a field this version does not know."""
    return NewerError(f"{where}: its specification is of a later pathcli ({why}); update pathcli")


def block_faults(torn: int, nan: int, blocks: int) -> str:
    """Return in words how many of an entry's blocks are not what was written, or hold NaN."""
    told = f"{torn} of {blocks} blocks" if torn else ""
    also = f"NaN where no tile is unreadable in {nan} of {blocks} blocks" if nan else ""
    return ", and ".join(filter(None, (told, also)))


def damaged(where: object, why: object) -> DataError:
    """Return the error of an entry whose bytes cannot be trusted."""
    return DataError(f"{where}: damaged entry ({why}); run: pathcli store prune")
