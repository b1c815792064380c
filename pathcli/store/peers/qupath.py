"""QuPath's GeoJSON: tiles as detections with measurements, one file a slide.

QuPath counts pixels from the corner of the scanned part, so the slide's bounds are subtracted
when written and added when read.
"""

from __future__ import annotations

import csv
import json
import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.errors import DataError
from pathcli.store.files import write_bytes
from pathcli.store.peers.files import OPTION
from pathcli.store.peers.parcel import (
    RECORD,
    Incoming,
    Source,
    corners,
    imported_spec,
    parse_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from pathcli.store.peers.parcel import Asked, Outgoing

COMPONENTS = 3
_CORNERS = 5  # of a closed square


def places(out: Path, one: Outgoing) -> tuple[Path, ...]:
    """Return the file of one slide."""
    return (out / f"{one.name}.geojson",)


@contextmanager
def writer(
    out: Path,
    *,
    scores: Path | None = None,
    **_: Any,  # noqa: ANN401 - options of other formats
) -> Iterator[Callable[[Outgoing, str | None], None]]:
    """Give a function that writes one slide; `scores` is a table of measurements.

    Raises:
        DataError: the table has no columns x, y and at least one of numbers.
    """
    yield partial(_write, out, read_scores(scores) if scores else None)


def _write(out: Path, scores: Scores | None, one: Outgoing, record: str | None) -> None:
    measured = scores.of(one) if scores else components(one.values)
    left, top = one.bounds[:2]
    ring = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * one.tiles.side0
    features = []
    for row, corner in enumerate(one.xy - np.array([left, top])):
        told = {n: round(float(v[row]), 6) for n, v in measured.items() if not np.isnan(v[row])}
        features.append(
            {
                "type": "Feature",
                "geometry": {
                    "type": "Polygon",
                    "coordinates": [np.round(ring + corner, 1).tolist()],
                },
                "properties": {"objectType": "detection", "measurements": told},
            }
        )
    collection: dict[str, Any] = {"type": "FeatureCollection", "features": features}
    if record:
        collection[RECORD] = record
    write_bytes(places(out, one)[0], json.dumps(collection).encode(), json_whole, OPTION)


def json_whole(path: Path) -> None:
    """Read a file that was just written."""
    json.loads(path.read_bytes())


def components(values: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return what can be shown of features [n, d]: their norm and principal components.

    Components are those of this slide's tiles; of the two signs that is taken which makes the
    largest loading positive.
    """
    rows = values.astype(np.float64)
    found = {"feature norm": np.linalg.norm(rows, axis=1)}
    centred = rows - rows.mean(0)
    # the covariance is at most as wide as a feature is long, whatever the number of tiles
    _, vectors = np.linalg.eigh(centred.T @ centred)
    for number in range(min(COMPONENTS, vectors.shape[1], max(len(rows) - 1, 0))):
        axis = vectors[:, -1 - number]
        axis = axis * np.sign(axis[np.argmax(np.abs(axis))])
        found[f"feature PC{number + 1}"] = centred @ axis
    return found


class Scores:
    """A table of measurements, found by slide and corner."""

    def __init__(self, path: Path, names: list[str], rows: dict[Any, list[float]]) -> None:
        """Take (slide, x, y) -> numbers, the slide "" where the table names none."""
        self.path, self.names, self.rows = path, names, rows

    def of(self, one: Outgoing) -> dict[str, NDArray[np.float64]]:
        """Return the measurements [n] of a slide's tiles, NaN for tiles not in the table.

        Raises:
            DataError: not one tile is in it.
        """
        blank = [math.nan] * len(self.names)
        called = {one.name, one.key.item, ""}
        found = []
        for x, y in one.xy.tolist():
            here = (self.rows.get((name, x, y)) for name in called)
            found.append(next((row for row in here if row), blank))
        table = np.array(found, np.float64).reshape(len(found), len(self.names))
        if np.isnan(table).all():
            msg = f"{self.path}: no row has slide {one.name} and the x, y of one of its tiles"
            raise DataError(msg)
        return {name: table[:, i] for i, name in enumerate(self.names)}


def read_scores(path: Path) -> Scores:
    """Read a CSV with x, y (level-0 px), columns of numbers and, for several slides, `slide`.

    Raises:
        DataError: a column is missing, or a cell is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            header = list(table.fieldnames or ())
            slide = next((name for name in ("slide", "slide_id", "item") if name in header), None)
            names = [n for n in header if n not in {"x", "y", "slide", "slide_id", "item"}]
            if not {"x", "y"} <= set(header) or not names:
                msg = f"{path}: scores need the columns x, y and one of numbers, not {header}"
                raise DataError(msg)
            rows = {}
            for row in table:
                place = (
                    row[slide] if slide else "",
                    round(float(row["x"])),
                    round(float(row["y"])),
                )
                rows[place] = [float(row[n]) if row[n] else math.nan for n in names]
    except (OSError, UnicodeDecodeError, csv.Error, TypeError, ValueError) as error:
        msg = f"{path}: cannot be read as scores ({error})"
        raise DataError(msg) from error
    return Scores(path, names, rows)


# --- reading -----------------------------------------------------------------------------


def sources(path: Path, asked: Asked) -> list[Source]:
    """Return the slides of a folder of GeoJSON files, or of one file."""
    found = [path] if path.is_file() else sorted([*path.glob("*.geojson"), *path.glob("*.json")])
    return [
        Source(p.stem, p, p.name, partial(_read, p, asked))
        for p in found
        if not p.name.startswith(".")
    ]


def _read(path: Path, asked: Asked) -> Incoming:
    try:
        told = json.loads(path.read_bytes())
        features = told["features"] if isinstance(told, dict) else told  # QuPath exports both
        tiles = [f for f in features if f["properties"].get("measurements")]
        rings = [np.array(f["geometry"]["coordinates"][0], float) for f in tiles]
        measured = [_numbers(f["properties"]["measurements"]) for f in tiles]
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror})"
        raise DataError(msg) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        msg = f"{path}: cut short, or no GeoJSON of polygons ({type(error).__name__}: {error})"
        raise DataError(msg) from error
    if not tiles:
        msg = f"{path}: no object has measurements, of {len(features)}"
        raise DataError(msg)
    names = list(measured[0])
    if any(set(row) != set(names) for row in measured):
        odd = next(i for i, row in enumerate(measured) if set(row) != set(names))
        msg = f"{path}: object {odd + 1} has other measurements than the first; all need the same"
        raise DataError(msg)
    record = told.get(RECORD) if isinstance(told, dict) else None
    left, top, notes = _corner(path.stem, record, asked)
    xy, side = _squares(path, rings)
    spec, mpp, source = _tiling(path, side, record, asked)
    return Incoming(
        path=path,
        name=path.stem,
        values=np.array([[row[n] for n in names] for row in measured]),
        xy=corners(xy + np.array([left, top]), len(xy), f"{path}: corners"),
        encoder="qupath",
        spec=spec,
        slide_mpp=mpp,
        mpp_source=source,
        says={"measurements": names},
        record=record,
        notes=notes,
        measured=True,
    )


def _numbers(measurements: Any) -> dict[str, float]:  # noqa: ANN401 - JSON
    """Return measurements by name; QuPath also writes them as a list of name and value."""
    if isinstance(measurements, list):
        return {str(m["name"]): float(m["value"]) for m in measurements}
    return {str(name): float(value) for name, value in measurements.items()}


def _squares(path: Path, rings: list[NDArray[np.float64]]) -> tuple[NDArray[Any], float]:
    """Return the corners [n, 2] and the side of squares of one size.

    Raises:
        DataError: they are no squares, or not of one size.
    """
    if all(ring.shape == (_CORNERS, 2) for ring in rings):  # a point has none, a line two
        sides = np.array([np.ptp(ring, axis=0) for ring in rings])
        side = float(np.median(sides))
        if np.abs(sides - side).max() <= 1:
            return np.array([ring.min(0) for ring in rings]), side
    msg = f"{path}: its objects are not squares of one size; tiles are wanted"
    raise DataError(msg)


def _corner(name: str, record: Any, asked: Asked) -> tuple[int, int, tuple[str, ...]]:  # noqa: ANN401
    """Return where QuPath's pixel (0, 0) is at level 0, and what nobody knows of it."""
    bounds = parse_record(record).get("card", {}).get("bounds")
    known = asked.slide(name) if asked.slide else None
    if bounds is None and known:
        bounds = known.info.bounds
    if bounds is None:
        note = "the slide's bounds are unknown: places are counted as QuPath does; give --slides"
        return 0, 0, (note,)
    return int(bounds[0]), int(bounds[1]), ()


def _tiling(
    path: Path,
    side: float,
    record: Any,  # noqa: ANN401 - JSON
    asked: Asked,
) -> tuple[Any, float, str]:
    """Return specification, slide resolution and its source of squares of a side in level-0 px."""
    found = asked.nominal(path.stem, record)
    if found is None:
        msg = (
            f"{path}: GeoJSON does not say the slide's resolution; give --slides DIR, or --mpp, um "
            "per level-0 pixel"
        )
        raise DataError(msg)
    return imported_spec(round(side), found[0]), *found
