"""STAMP's features: `<extractor>/<slide>.h5` with `feats` float16 and `coords` in micrometres."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli import __version__
from pathcli.errors import DataError
from pathcli.store.peers import files
from pathcli.store.peers.parcel import (
    RECORD,
    Incoming,
    Source,
    corners,
    imported_spec,
    matrix,
    number,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pathcli.store.peers.parcel import Asked, Outgoing

_LAYOUT = "2.1.0"
"""The version of STAMP that brought this layout; STAMP refuses files of later ones than its own."""


def places(out: Path, one: Outgoing) -> tuple[Path, ...]:
    """Return the file of one slide."""
    return (out / one.encoder / f"{one.name}.h5",)


@contextmanager
def writer(out: Path, **_: Any) -> Iterator[Callable[[Outgoing, str | None], None]]:  # noqa: ANN401
    """Give a function that writes one slide."""
    yield partial(_write, out)


def _write(out: Path, one: Outgoing, record: str | None) -> None:
    spec = one.tiles.spec
    with files.writing(places(out, one)[0]) as file:
        file["coords"] = (one.xy * one.tiles.slide_mpp).astype(np.float32)
        file["feats"] = one.values
        file.attrs.update(
            {
                "stamp_version": _LAYOUT,
                "extractor": one.encoder,
                "unit": "um",
                "tile_size_um": spec.size_um,
                "tile_size_px": spec.size_px,
                "code_hash": f"pathcli {__version__}",
                "feat_type": "tile",
            }
        )
        if record:
            file.attrs[RECORD] = record


def sources(path: Path, asked: Asked) -> list[Source]:
    """Return the slides of a folder of feature files, or of one file."""
    root = path.parent if path.is_file() else path
    found = [path] if path.is_file() else sorted(path.rglob("*.h5"))
    return [
        Source(p.stem, p, str(p.relative_to(root)), partial(_read, p, asked))
        for p in found
        if not p.name.startswith(".")
    ]


def _read(path: Path, asked: Asked) -> Incoming:
    with files.reading(path) as file:
        says, record = files.attributes(file), files.record_in(file)
        _require_tiles(says)
        values = matrix(files.content(file, "feats"), "feats")
        um = files.content(file, "coords")
    size_um = number(says.get("tile_size_um")) or number(says.get("tile_size"))
    size_px = number(says.get("tile_size_px"))
    if says.get("unit") != "um" or size_um is None or size_px is None:
        msg = (
            f"{path}: does not say unit 'um', tile_size_um and tile_size_px, as STAMP 2 does; "
            "its coords cannot be placed"
        )
        raise DataError(msg)
    found = asked.resolution(path.stem, record)
    if found is None:
        msg = (
            f"{path}: its coords are in micrometres and STAMP does not keep the slide's "
            "resolution; give --slides DIR, or --mpp, um per level-0 pixel"
        )
        raise DataError(msg)
    mpp, source = found
    with np.errstate(invalid="ignore"):
        xy = corners(np.asarray(um, np.float64) / mpp, len(values), f"{path}: coords")
    return Incoming(
        path=path,
        name=path.stem,
        values=values,
        xy=xy,
        encoder=str(says.get("extractor") or "") or None,
        spec=imported_spec(int(size_px), size_um / size_px),
        slide_mpp=mpp,
        mpp_source=source,
        says=says,
        record=record,
        notes=("STAMP's files do not say the step from tile to tile: a tile's side is taken",),
    )


def _require_tiles(says: dict[str, Any]) -> None:
    """Refuse a file whose rows are slides or patients."""
    kind = says.get("feat_type", "tile")
    if kind != "tile":
        msg = f"holds features of feat_type {kind!r}; those of tiles are wanted"
        raise DataError(msg)
