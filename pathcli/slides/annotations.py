"""Annotation files in, lesion polygons out: ASAP's XML, CAMELYON16's JSON, QuPath's GeoJSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from xml.parsers import expat

import numpy as np
import shapely
from shapely import Polygon

from pathcli.errors import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

log = logging.getLogger("pathcli")

_EXCLUDED = {"_2", "exclusion", "normal", "ignore*"}  # healthy islands inside a lesion
_NO_LESION = {"tissue", "region*"}  # outlines of something else
_AREAS = {"polygon", "spline", "rectangle"}  # ASAP's kinds that enclose something
_CORNERS = 3
_SPECK = 0.01  # share of a ring's largest lobe under which another is no lesion of its own


class _Drawn(NamedTuple):
    """One annotation: its classes in lower case, and its rings [k, 2], the outer one first."""

    classes: set[str]
    rings: list[NDArray[np.float64]]


def read_lesions(
    path: Path | str, bounds: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> list[Polygon]:
    """Return the lesions of an annotation file: valid polygons in level-0 px, by (y, x).

    Read are ASAP's XML (CAMELYON16 and 17), `{"positive": [...], "negative": [...]}` with
    `name` and `vertices` (CAMELYON16 as JSON), and GeoJSON of annotations (QuPath). An
    annotation is a lesion whatever its group or class, except: `_2`, `Exclusion`, `Normal`
    and `Ignore*` are subtracted, `Tissue` and `Region*` are left out (case does not matter).
    Points, lines and rings of fewer than three points are left out with a warning.

    Lesions that overlap or share an edge become one, and an exclusion may split one in two:
    the organisers count connected components, not annotations. A ring that crosses itself is
    mended by the even-odd rule, as it is when drawn into a mask; lobes of less than 1 % of its
    largest are specks of the hand and dropped.

    Args:
        path: the file.
        bounds: the scan's bounds (x, y, width, height), from whose corner QuPath counts;
            the other formats count from the corner of level 0 and are not shifted.

    Raises:
        ResourceError: there is no such file, or it may not be read.
        DataError: the file is none of these formats, or is damaged.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        msg = f"{path}: annotations cannot be read ({error.strerror}); is the path right?"
        raise ResourceError(msg) from error
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        drawn = _from_xml(path, raw)
    else:
        drawn = _from_json(path, raw, bounds)
    kept = [one for one in drawn if one.rings and not one.classes & _NO_LESION]
    if len(kept) < len(drawn):
        log.warning(
            "%s: %d of %d annotations left out: points, lines, or outlines of tissue",
            *(path, len(drawn) - len(kept), len(drawn)),
        )
    shapes: tuple[list[Any], list[Any]] = ([], [])
    for one in kept:
        shell, *holes = map(_ring, one.rings)
        excluded = bool(one.classes & _EXCLUDED)
        shapes[excluded].append(shell.difference(shapely.unary_union(holes)))
    lesions, healthy = map(shapely.unary_union, shapes)
    return sorted(_polygons(lesions.difference(healthy)), key=lambda p: p.bounds[1::-1])


def _polygons(shape: Any) -> list[Polygon]:  # noqa: ANN401 - shapely is untyped
    """Return the polygons of any geometry; lines and points that mending left are dropped."""
    parts = shapely.get_parts(shapely.get_parts(shape))  # a collection may hold multipolygons
    return [part for part in parts if part.geom_type == "Polygon" and part.area > 0]


def _ring(points: NDArray[np.float64]) -> Any:  # noqa: ANN401 - shapely is untyped
    """Return the valid area of a ring: all its lobes but specks where the hand trembled."""
    lobes = _polygons(shapely.make_valid(Polygon(points)))
    largest = max((lobe.area for lobe in lobes), default=0.0)
    return shapely.unary_union([lobe for lobe in lobes if lobe.area >= _SPECK * largest])


def _points(path: Path, values: Any) -> NDArray[np.float64]:  # noqa: ANN401 - from a file
    """Return coordinates as float [k, 2]; more dimensions than two are dropped.

    Raises:
        DataError: a coordinate is not a finite number.
    """
    try:
        points = np.array([(float(x), float(y)) for x, y, *_ in values]).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        _refuse(path, f"a coordinate is not a number ({error})", error)
    if not np.isfinite(points).all():
        _refuse(path, "a coordinate is not finite")
    return points


def _rings(path: Path, rings: Any) -> list[NDArray[np.float64]]:  # noqa: ANN401 - from a file
    """Return rings that enclose something; none if the first, the outer one, does not."""
    found = [_points(path, ring) for ring in rings]
    if not found or len(found[0]) < _CORNERS:
        return []
    return [ring for ring in found if len(ring) >= _CORNERS]


def _refuse(path: Path, why: str, cause: Exception | None = None) -> NoReturn:
    msg = f"{path}: {why}; export the annotations again as ASAP XML or QuPath GeoJSON"
    raise DataError(msg) from cause


def _from_xml(path: Path, raw: bytes) -> list[_Drawn]:
    """Read ASAP's XML without a document type, so that no entity can be declared."""
    found: list[tuple[Mapping[str, str], list[tuple[int, str, str]]]] = []
    roots: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        roots.append(name)
        if name == "Annotation":
            found.append((attributes, []))
        elif name == "Coordinate" and found:
            order = int(attributes.get("Order", len(found[-1][1])))
            found[-1][1].append((order, attributes["X"], attributes["Y"]))

    def refuse(*_: object) -> NoReturn:
        _refuse(path, "a document type (DTD) is not allowed in annotations")

    parser = expat.ParserCreate()
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(raw, True)  # noqa: FBT003 - the last part
    except expat.ExpatError as error:
        _refuse(path, f"not whole XML ({error})", error)
    except (KeyError, ValueError) as error:
        _refuse(path, f"a Coordinate without a proper Order, X or Y ({error})", error)
    if roots[0] != "ASAP_Annotations":
        _refuse(path, f"<{roots[0]}> is not ASAP's XML")
    drawn = []
    for attributes, points in found:
        area = attributes.get("Type", "Polygon").lower() in _AREAS
        ring = [(x, y) for _, x, y in sorted(points, key=lambda point: point[0])]
        group = attributes.get("PartOfGroup", "None").lower()
        drawn.append(_Drawn({group}, _rings(path, [ring]) if area else []))
    return drawn


def _from_json(path: Path, raw: bytes, bounds: tuple[int, int, int, int]) -> list[_Drawn]:
    """Read CAMELYON16's JSON, or GeoJSON counted from the corner of `bounds`."""
    try:
        value = json.loads(raw)
        if isinstance(value, dict) and "positive" in value:
            return [
                _Drawn({group}, _rings(path, [one["vertices"]]))
                for key, group in (("positive", "_0"), ("negative", "_2"))
                for one in value.get(key, [])
            ]
        if isinstance(value, dict):
            features = value["features"] if value["type"] == "FeatureCollection" else [value]
        else:
            features = list(value)
        return [one for feature in features for one in _from_feature(path, feature, bounds)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"neither ASAP's XML, CAMELYON16's JSON nor GeoJSON ({type(error).__name__}: {error})"
        _refuse(path, why, error)


def _from_feature(
    path: Path, feature: Mapping[str, Any], bounds: tuple[int, int, int, int]
) -> Iterator[_Drawn]:
    """Yield the areas of one GeoJSON feature; QuPath's detections and cells are no lesions."""
    properties = feature.get("properties") or {}
    looks = properties.get("classification") or {}
    classes = {str(name).lower() for name in (looks.get("name"), *looks.get("names", ())) if name}
    geometry, corner = feature["geometry"], np.array(bounds[:2], float)
    areas = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}
    drawn = areas.get(geometry["type"], [[]])
    if properties.get("objectType", "annotation") != "annotation":
        drawn = [[]]
    for rings in drawn:
        yield _Drawn(classes, [ring + corner for ring in _rings(path, rings)])
