"""TRIDENT's job folder: `<mag>x_<px>px_<overlap>px_overlap/features_<encoder>/<slide>.h5`.

Two datasets, `features` float32 [n, d] and `coords` int64 [n, 2] (level-0 px), uncompressed.
TRIDENT has chunks of one row; here they have 512, which every reader takes and which read
some tens of times faster.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.store.attributes import coords_attributes, features_attributes
from pathcli.store.peers import files
from pathcli.store.peers.parcel import (
    RECORD,
    UNKNOWN,
    Incoming,
    Source,
    corners,
    imported_spec,
    matrix,
    number,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pathcli.store.peers.parcel import Asked, Outgoing
    from pathcli.types import TileSpec

_SAME = 0.01  # relative difference up to which two ways to say a tile's side agree


def places(out: Path, one: Outgoing) -> tuple[Path, ...]:
    """Return the files of one slide, the one with the features first."""
    spec = one.tiles.spec
    magnification = 10 / spec.mpp
    overlap = spec.size_px - spec.step_px
    folder = out / f"{magnification:g}x_{spec.size_px}px_{overlap}px_overlap"
    return (
        folder / f"features_{one.encoder}" / f"{one.name}.h5",
        folder / "patches" / f"{one.name}_patches.h5",
    )


@contextmanager
def writer(out: Path, **_: Any) -> Iterator[Callable[[Outgoing, str | None], None]]:  # noqa: ANN401
    """Give a function that writes one slide."""
    yield partial(_write, out)


def _write(out: Path, one: Outgoing, record: str | None) -> None:
    features, patches = places(out, one)
    coords = one.xy.astype(np.int64)
    if not (patches.exists() and agrees(patches, one)):
        with files.writing(patches) as file:
            files.dataset(file, "coords", coords, _attributes(one, patches.parent))
    with files.writing(features) as file:
        told = features_attributes(one.name, one.encoder) | {"savetodir": str(features.parent)}
        files.dataset(file, "features", one.values.astype(np.float32), told)
        files.dataset(file, "coords", coords, _attributes(one, patches.parent))
        if record:
            file.attrs[RECORD] = record


def agrees(path: Path, one: Outgoing) -> bool:
    """Tell whether corners of a slide, which all encoders share, are those of these features."""
    try:
        with files.reading(path) as file:
            side = file["coords"].attrs.get("patch_size_level0")
            same = np.array_equal(files.content(file, "coords"), one.xy)
    except DataError:
        return False
    return bool(same and side == round(one.tiles.side0))


def _attributes(one: Outgoing, folder: Path) -> dict[str, Any]:
    """Return TRIDENT's attributes; its magnifications are whole numbers."""
    told = coords_attributes(one.tiles) | {"name": one.name, "savetodir": str(folder)}
    whole = {name: int(value) for name, value in told.items() if isinstance(value, float)}
    return told | {name: value for name, value in whole.items() if value == told[name]}


def sources(path: Path, asked: Asked) -> list[Source]:
    """Return the slides of a job folder, of one of its parts, or of one file."""
    if path.is_file():
        found, root = [path], path.parent
    else:
        root = path
        found = sorted(p for p in path.rglob("*.h5") if _is_features(p, path))
    return [
        Source(p.stem, p, str(p.relative_to(root)), partial(_read, p, asked))
        for p in found
        if not p.name.startswith(".")
    ]


def _is_features(path: Path, root: Path) -> bool:
    """Tell whether a file is below a folder `features_<encoder>`."""
    parents = [root.absolute().name, *path.relative_to(root).parts[:-1]]
    return any(name.startswith("features_") for name in parents)


def encoder_of(path: Path) -> str | None:
    """Return the encoder that the folder of a file names."""
    for parent in path.absolute().parents:
        if parent.name.startswith("features_"):
            return parent.name.removeprefix("features_")
    return None


def _read(path: Path, asked: Asked) -> Incoming:
    with files.reading(path) as file:
        values = matrix(files.content(file, "features"), "features")
        xy = corners(files.content(file, "coords"), len(values), "coords")
        says = files.attributes(file["coords"])
        told = files.attributes(file["features"])
        record = files.record_in(file)
    spec, mpp, source, notes = tiling(path.stem, says, asked)
    width, height = (number(says.get(f"level0_{side}")) for side in ("width", "height"))
    return Incoming(
        path=path,
        name=path.stem,
        values=values,
        xy=xy,
        encoder=str(told.get("encoder") or encoder_of(path) or "") or None,
        spec=spec,
        slide_mpp=mpp,
        mpp_source=source,
        size=(int(width), int(height)) if width and height else None,
        says={"features": told, "coords": says},
        record=record,
        notes=notes,
    )


def tiling(
    name: str, says: Mapping[str, Any], asked: Asked
) -> tuple[TileSpec, float, str, tuple[str, ...]]:
    """Return specification, slide resolution, its source and notes that attributes tell.

    TRIDENT knows a slide's resolution as 5, 10, 20, 40 only and cuts by it, so the specification
    is in nominal micrometres too: it is one for all slides of a folder, and a tile's side in
    level-0 px is exact.
    """
    size, side0 = number(says.get("patch_size")), number(says.get("patch_size_level0"))
    if size is None or side0 is None:
        note = "the file does not say how large its tiles are: unknown, 1 px stands for it"
        return UNKNOWN, 1.0, "unknown, 1 stands for it", (note,)
    step = int(size - _overlap(says))
    power, target = (number(says.get(f"{n}_magnification")) for n in ("level0", "target"))
    if power is None or asked.mpp is not None:
        found = asked.nominal(name)
        if found is None:
            msg = (
                f"{name}: its file does not say the slide's magnification; give --mpp, um per "
                "level-0 pixel, or --slides DIR"
            )
            raise DataError(msg)
        mpp, source = found
        return imported_spec(int(size), side0 * mpp / size, step), mpp, source, ()
    mpp, source = 10 / power, f"nominal, from level0_magnification {power:g}"
    wanted = 10 / target if target else side0 * mpp / size
    if abs(side0 * mpp / size - wanted) <= _SAME * wanted:
        return imported_spec(int(size), wanted, step), mpp, source, ()
    seen = side0 * mpp / size
    note = f"its tiles have nominally {seen:g} um per pixel, not the {wanted:g} of {target:g}x"
    return imported_spec(int(size), seen, step), mpp, source, (note,)


def _overlap(says: Mapping[str, Any]) -> float:
    try:
        return float(says.get("overlap", 0))
    except (TypeError, ValueError):  # 'None'
        return 0.0


def encoders(found: Sequence[Source]) -> set[str]:
    """Return the encoders that the folders of these files name."""
    return {encoder_of(source.path) or "" for source in found}
