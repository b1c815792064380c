"""Annotation files in, polygons out: ASAP's and Aperio's XML, CAMELYON16's JSON, GeoJSON."""

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

NEGATIVE = "NegativeROA"  # Aperio's; upper case, so that no file's class "Negative" is it
_EXCLUDED = {"_2", "exclusion", "normal", "ignore*", NEGATIVE}  # healthy islands inside a lesion
_NO_LESION = {"tissue", "region*"}  # outlines of something else
_AREAS = {"polygon", "spline", "rectangle", "0", "1"}  # kinds that enclose something
_ELLIPSES = {"ellipse", "2"}  # Aperio's, given by points on their bounding box
_CORNERS = 3
_SPECK = 0.01  # share of a ring's largest lobe under which another is no lesion of its own


class Drawn(NamedTuple):
    """One annotation: its classes in lower case, and its rings [k, 2], the outer one first.

    Points, lines and rings of fewer than three points have no rings.
    """

    classes: set[str]
    rings: list[NDArray[np.float64]]

    @property
    def area(self) -> Any:  # noqa: ANN401 - shapely is untyped
        """The valid area: the outer ring's without the others'."""
        shell, *holes = map(_ring, self.rings)
        return shell.difference(shapely.unary_union(holes))


def read_lesions(
    path: Path | str, bounds: tuple[int, int, int, int] = (0, 0, 0, 0)
) -> list[Polygon]:
    """Return the lesions of an annotation file: valid polygons in level-0 px, by (y, x).

    Read are ASAP's XML (CAMELYON16 and 17), Aperio's XML, `{"positive": [...], "negative":
    [...]}` with `name` and `vertices` (CAMELYON16 as JSON), and GeoJSON of annotations
    (QuPath). An annotation is a lesion whatever its group or class, except: `_2`,
    `Exclusion`, `Normal`, `Ignore*` and Aperio's NegativeROA are subtracted, `Tissue` and
    `Region*` are left out (case does not matter).
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
    drawn = read_drawn(path, bounds)
    kept = [one for one in drawn if one.rings and not one.classes & _NO_LESION]
    if len(kept) < len(drawn):
        log.warning(
            "%s: %d of %d annotations left out: points, lines, or outlines of tissue",
            *(path, len(drawn) - len(kept), len(drawn)),
        )
    shapes: tuple[list[Any], list[Any]] = ([], [])
    for one in kept:
        shapes[bool(one.classes & _EXCLUDED)].append(one.area)
    lesions, healthy = map(shapely.unary_union, shapes)
    return sorted(polygons_of(lesions.difference(healthy)), key=lambda p: p.bounds[1::-1])


def read_drawn(path: Path, bounds: tuple[int, int, int, int]) -> list[Drawn]:
    """Return all annotations of a file, in level-0 px; see `read_lesions`.

    Raises:
        ResourceError: there is no such file, or it may not be read.
        DataError: the file is none of the known formats, or is damaged.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        msg = f"{path}: annotations cannot be read ({error.strerror}); is the path right?"
        raise ResourceError(msg) from error
    if raw.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        return _from_xml(path, raw)
    return _from_json(path, raw, bounds)


def polygons_of(shape: Any) -> list[Polygon]:  # noqa: ANN401 - shapely is untyped
    """Return the polygons of any geometry; lines and points that mending left are dropped."""
    parts = shapely.get_parts(shapely.get_parts(shape))  # a collection may hold multipolygons
    return [part for part in parts if part.geom_type == "Polygon" and part.area > 0]


def _ring(points: NDArray[np.float64]) -> Any:  # noqa: ANN401 - shapely is untyped
    """Return the valid area of a ring: all its lobes but specks where the hand trembled."""
    lobes = polygons_of(shapely.make_valid(Polygon(points)))
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


def _from_xml(path: Path, raw: bytes) -> list[Drawn]:
    """Read ASAP's or Aperio's XML without a document type, so that no entity can be declared."""
    found: list[tuple[Mapping[str, str], list[tuple[int, str, str]]]] = []
    roots: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        roots.append(name)
        if name == ("Annotation" if roots[0] == "ASAP_Annotations" else "Region"):
            found.append((attributes, []))
        elif name in {"Coordinate", "Vertex", "V"} and found:
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
    if roots[0] not in {"ASAP_Annotations", "Annotations"}:
        _refuse(path, f"<{roots[0]}> is neither ASAP's XML nor Aperio's")
    return [_from_region(path, attributes, points) for attributes, points in found]


def _from_region(
    path: Path, attributes: Mapping[str, str], points: list[tuple[int, str, str]]
) -> Drawn:
    """Return one annotation of ASAP's XML, or one region of Aperio's."""
    kind = attributes.get("Type", "polygon").lower()
    ring: Any = [(x, y) for _, x, y in sorted(points, key=lambda point: point[0])]
    if kind in _ELLIPSES:
        ring = _ellipse(_points(path, ring))
    group = attributes.get("PartOfGroup", "None").lower()
    if attributes.get("NegativeROA", "0").lower() not in {"0", "false"}:
        group = NEGATIVE
    return Drawn({group}, _rings(path, [ring]) if kind in _AREAS | _ELLIPSES else [])


def _ellipse(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the ring [64, 2] of the ellipse in the bounding box of points."""
    if not len(points):
        return points
    low, high = points.min(axis=0), points.max(axis=0)
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    around = np.stack([np.cos(turn), np.sin(turn)], axis=1)
    return np.asarray((low + high) / 2 + (high - low) / 2 * around)


def _from_json(path: Path, raw: bytes, bounds: tuple[int, int, int, int]) -> list[Drawn]:
    """Read CAMELYON16's JSON, or GeoJSON counted from the corner of `bounds`."""
    try:
        value = json.loads(raw)
        if isinstance(value, dict) and "positive" in value:
            return [
                Drawn({group}, _rings(path, [one["vertices"]]))
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
) -> Iterator[Drawn]:
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
        yield Drawn(classes, [ring + corner for ring in _rings(path, rings)])
