import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely import Point, Polygon, box, unary_union

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.mil.lesions import (
    _major_axis,
    detections,
    evaluation_lesions,
    inside,
    lesion_share,
)
from pathcli.slides.annotations import read_lesions
from pathcli.slides.geojson import write_geojson
from pathcli.slides.tiling import grid, tile_spec
from pathcli.slides.tissue import Tissue
from pathcli.types import Tiles

Corners = list[tuple[float, float]]


def square(x: float, y: float, side: float) -> Corners:
    return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]


def annotation(group: str, corners: Corners, kind: str = "Polygon") -> str:
    points = [f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>' for i, (x, y) in enumerate(corners)]
    return (
        f'<Annotation Name="a" Type="{kind}" PartOfGroup="{group}"><Coordinates>'
        f"{''.join(points)}</Coordinates></Annotation>"
    )


def asap(folder: Path, *annotations: str, head: str = "") -> Path:
    body = f"<Annotations>{''.join(annotations)}</Annotations>"
    path = folder / "lesions.xml"
    path.write_text(f'<?xml version="1.0"?>{head}<ASAP_Annotations>{body}</ASAP_Annotations>')
    return path


def qupath(folder: Path, *geometries: tuple[str, str, object], kind: str = "annotation") -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": {"type": shape, "coordinates": coordinates},
            "properties": {"objectType": kind, "classification": {"name": name}},
        }
        for name, shape, coordinates in geometries
    ]
    path = folder / "lesions.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


# --- reading -----------------------------------------------------------------------------


@pytest.mark.parametrize("lesion", ["_0", "_1", "Tumor", "metastases", "None", "anything"])
@pytest.mark.parametrize("healthy", ["_2", "Exclusion", "normal"])
def test_exclusions_are_subtracted_from_lesions(tmp_path: Path, lesion: str, healthy: str) -> None:
    path = asap(
        tmp_path, annotation(healthy, square(20, 20, 10)), annotation(lesion, square(10, 10, 40))
    )
    (found,) = read_lesions(path)
    assert found.equals(box(10, 10, 50, 50) - box(20, 20, 30, 30))


def test_an_exclusion_can_split_a_lesion_and_leaves_others_alone(tmp_path: Path) -> None:
    cut = annotation("_2", [(40, -5), (50, -5), (50, 105), (40, 105)])
    path = asap(
        tmp_path, annotation("_0", square(0, 0, 100)), cut, annotation("_0", square(0, 200, 9))
    )
    assert [p.area for p in read_lesions(path)] == [4000, 5000, 81]


def test_lesions_that_overlap_or_share_an_edge_are_one(tmp_path: Path) -> None:
    squares = [square(0, 0, 10), square(5, 5, 10), square(15, 5, 10), square(30, 0, 10)]
    found = read_lesions(asap(tmp_path, *(annotation("_0", s) for s in squares)))
    assert [p.area for p in found] == [275, 100]


def test_corners_follow_their_order_not_their_place(tmp_path: Path) -> None:
    shuffled = annotation("_0", square(0, 0, 10)).split("<Coordinate ")
    shuffled[2], shuffled[3] = shuffled[3], shuffled[2]
    (found,) = read_lesions(asap(tmp_path, "<Coordinate ".join(shuffled)))
    assert found.area == 100


def test_a_ring_that_crosses_itself_keeps_its_lobes_but_not_its_specks(tmp_path: Path) -> None:
    bow = annotation("_0", [(0, 0), (10, 10), (10, 0), (0, 10)])
    tail = annotation("_0", [(100, 100), (200, 100), (200, 199), (199, 199), (201, 200)])
    found = read_lesions(asap(tmp_path, bow, tail))
    assert all(p.is_valid and p.geom_type == "Polygon" for p in found)
    assert [p.area for p in found[:2]] == [25, 25]
    assert len(found) == 3


def test_points_and_lines_are_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = asap(
        tmp_path,
        annotation("_0", [(1, 1)], "Dot"),
        annotation("_0", square(0, 0, 9), "PointSet"),
        annotation("_0", [(0, 0), (5, 5)], "Spline"),
        annotation("_0", square(50, 50, 4), "Spline"),
    )
    with caplog.at_level(logging.WARNING, "pathcli"):
        assert [p.area for p in read_lesions(path)] == [16]
    assert "3 of 4 annotations left out" in caplog.text


def test_a_file_without_annotations_has_no_lesion(tmp_path: Path) -> None:
    assert read_lesions(asap(tmp_path)) == []
    assert read_lesions(qupath(tmp_path)) == []


def test_json_of_camelyon16_agrees_with_its_xml(tmp_path: Path) -> None:
    xml = asap(tmp_path, annotation("_0", square(0, 0, 40)), annotation("_2", square(10, 10, 5)))
    text = {
        "positive": [{"name": "_0", "vertices": square(0, 0, 40)}],
        "negative": [{"name": "_1", "vertices": square(10, 10, 5)}],
    }
    (tmp_path / "lesions.json").write_text(json.dumps(text))
    (a,), (b,) = read_lesions(xml), read_lesions(tmp_path / "lesions.json")
    assert a.equals(b)
    assert a.area == 1575


def test_geojson_has_holes_and_parts_and_counts_from_the_bounds(tmp_path: Path) -> None:
    ring, hole = [[*s, s[0]] for s in (square(0, 0, 40), square(10, 10, 5))]
    other = [*square(60, 0, 10), (60, 0)]
    path = qupath(
        tmp_path,
        ("Tumor", "MultiPolygon", [[ring, hole], [other]]),
        ("Ignore*", "Polygon", [[*square(60, 0, 5), (60, 0)]]),
        ("Tissue", "Polygon", [[*square(-100, -100, 900), (-100, -100)]]),
        ("Tumor", "Point", [3, 3]),
    )
    a, b = read_lesions(path, bounds=(1000, 500, 90, 90))
    assert a.equals(box(1000, 500, 1040, 540) - box(1010, 510, 1015, 515))
    assert b.equals(box(1060, 500, 1070, 510) - box(1060, 500, 1065, 505))
    assert read_lesions(path)[0].bounds == (0, 0, 40, 40)


def test_the_tissue_outline_and_detections_are_no_lesions(tmp_path: Path) -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:30, 10:30] = True
    tissue = Tissue(mask, np.zeros((40, 40, 3), np.uint8), (8.0, 8.0))
    write_geojson(tmp_path / "t.geojson", tissue, (0, 0, 320, 320))
    assert read_lesions(tmp_path / "t.geojson") == []
    tile = [[*square(0, 0, 9), (0, 0)]]
    assert read_lesions(qupath(tmp_path, ("Tumor", "Polygon", tile), kind="detection")) == []


def test_a_bare_list_or_a_single_feature_is_geojson_too(tmp_path: Path) -> None:
    path = qupath(tmp_path, ("Tumor", "Polygon", [[*square(0, 0, 9), (0, 0)]]))
    features = json.loads(path.read_text())["features"]
    for value in (features, features[0]):
        path.write_text(json.dumps(value))
        assert [p.area for p in read_lesions(path)] == [81]


BOMB = '<!DOCTYPE b [<!ENTITY a "aaaaaaaaaa"><!ENTITY c "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
FILE = '<!DOCTYPE b SYSTEM "file:///etc/passwd">'


@pytest.mark.parametrize("head", [BOMB, FILE])
def test_a_document_type_is_refused(tmp_path: Path, head: str) -> None:
    with pytest.raises(DataError, match="DTD"):
        read_lesions(asap(tmp_path, annotation("&c;", square(0, 0, 9)), head=head))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no annotations",
        "<ASAP_Annotations><Annotations>",
        "<html></html>",
        '<ASAP_Annotations><Annotation><Coordinate X="1"/></Annotation></ASAP_Annotations>',
        '<ASAP_Annotations><Annotation><Coordinate X="1" Y="one"/></Annotation></ASAP_Annotations>',
        '<ASAP_Annotations><Annotation><Coordinate X="1" Y="nan"/></Annotation></ASAP_Annotations>',
        "[1]",
        "7",
        '{"type": "FeatureCollection"}',
        '{"positive": [{"name": "_0"}]}',
        '{"positive": [{"vertices": [[1, 2], [3], [4, 5]]}]}',
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[["a", "b"]]]}}',
        '{"type": "Feature", "geometry": null}',
    ],
)
def test_what_is_no_annotation_file_is_one_clear_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad").write_text(text)
    with pytest.raises(DataError, match="bad") as caught:
        read_lesions(tmp_path / "bad")
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"none\.xml.*No such file"):
        read_lesions(tmp_path / "none.xml")


@pytest.mark.data
def test_the_xml_of_tumor_003_agrees_with_its_json_and_its_exclusion(data: Path) -> None:
    folder = data / "camelyon16" / "annotations"
    a, b = read_lesions(folder / "tumor_003.xml"), read_lesions(folder / "tumor_003.json")
    raw = json.loads((folder / "tumor_003.json").read_text())
    positive, negative = (
        unary_union([Polygon(one["vertices"]).buffer(0) for one in raw[key]])
        for key in ("positive", "negative")
    )
    area = sum(p.area for p in a)
    assert area == pytest.approx(sum(p.area for p in b))
    assert area == pytest.approx((positive - negative).area, rel=1e-4)
    assert (positive & negative).area > 1000
    assert len(a) == len(b) == 13


@pytest.mark.data
@pytest.mark.parametrize(("name", "count"), [("001", 2), ("050", 6), ("075", 29), ("090", 6)])
def test_camelyon16_has_one_lesion_per_annotation(data: Path, name: str, count: int) -> None:
    found = read_lesions(data / "camelyon16" / "annotations" / f"tumor_{name}.xml")
    assert len(found) == count
    assert all(p.is_valid for p in found)


# --- tiles against lesions ---------------------------------------------------------------


def tiles_of(side: int = 100, across: int = 10, *, mpp: float = 0.5, step: int = 0) -> Tiles:
    """A square of `across` x `across` level-0 tiles of `side` px that begin at (0, 0)."""
    spec = tile_spec(side, mpp, step_px=step or side)
    length = (across - 1) * spec.step_px + side
    xy = grid(spec, mpp, (0, 0, length, length))
    status = np.zeros(len(xy), np.uint8)
    return Tiles("slide", xy, status, spec, mpp, length, length, 1.0)


def corners(tiles: Tiles, mask: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(p) for p in tiles.xy[mask].tolist()}


def test_a_tile_that_is_half_lesion_counts() -> None:
    tiles = tiles_of()
    lesions = [box(100, 100, 250, 200), box(500, 500, 549, 600), box(550, 500, 700, 600)]
    found = corners(tiles, inside(tiles, lesions))
    assert found == {(100, 100), (200, 100), (500, 500), (600, 500)}
    share = dict(zip(map(tuple, tiles.xy.tolist()), lesion_share(tiles, lesions), strict=True))
    assert share[200, 100] == pytest.approx(0.5)
    assert share[500, 500] == pytest.approx(0.99)
    assert share[300, 100] == 0


def test_a_small_lesion_counts_where_most_of_it_is() -> None:
    tiles = tiles_of()
    assert corners(tiles, inside(tiles, [box(180, 110, 210, 130)])) == {(100, 100)}
    assert len(corners(tiles, inside(tiles, [box(190, 190, 210, 210)]))) == 4  # all alike
    assert corners(tiles, inside(tiles, [box(410, 410, 411, 411)])) == {(400, 400)}
    # beside a large lesion the small one stands for itself only where it is missed
    large = box(0, 0, 160, 100)
    assert corners(tiles, inside(tiles, [large, box(95, 20, 98, 30)])) == {(0, 0), (100, 0)}
    near = [box(0, 0, 160, 100), box(170, 80, 180, 190)]  # 20 px in a tile of the large one
    assert corners(tiles, inside(tiles, near)) == {(0, 0), (100, 0)}


def test_holes_and_overlapping_tiles_count_by_area() -> None:
    tiles = tiles_of(step=50)
    ring = box(0, 0, 300, 300) - box(100, 100, 200, 200)
    share = lesion_share(tiles, [ring])
    rows = {tuple(p): s for p, s in zip(tiles.xy.tolist(), share, strict=True)}
    assert rows[100, 100] == 0
    assert rows[50, 50] == pytest.approx(0.75)
    assert rows[50, 100] == pytest.approx(0.5)
    assert inside(tiles, [ring]).sum() == 5 * 5 - 1 + 2 * 5  # within, the hole, half outside


def test_mere_contact_is_no_overlap() -> None:
    tiles = tiles_of()
    assert not inside(tiles, [box(1000, 0, 1100, 50)]).any()
    assert not inside(tiles, []).any()
    assert (lesion_share(tiles, []) == 0).all()


@given(st.lists(st.tuples(*[st.floats(50, 900)] * 2, st.floats(5, 300)), max_size=4))
def test_shares_add_up_to_the_area_and_no_lesion_is_lost(
    discs: list[tuple[float, float, float]],
) -> None:
    tiles = tiles_of()
    whole = unary_union([Point(x, y).buffer(r) for x, y, r in discs])
    lesions = [p for p in getattr(whole, "geoms", [whole]) if not p.is_empty]
    area = (whole & box(0, 0, 1000, 1000)).area
    assert lesion_share(tiles, lesions).sum() * 100**2 == pytest.approx(area)
    found = tiles.xy[inside(tiles, lesions)]
    for lesion in lesions:
        assert any(lesion.intersects(box(x, y, x + 100, y + 100)) for x, y in found)


# --- detections --------------------------------------------------------------------------


def test_the_highest_tile_silences_its_neighbours_within_the_radius() -> None:
    tiles = tiles_of(across=4)  # tiles of 50 um, centres 50 um apart
    attention = np.arange(16.0)
    attention[5] = 99
    found = detections(tiles, attention, [], radius_um=50)
    # 5 silences 1, 4, 6 and 9; 15: 11 and 14; 13: 12; 7: 3
    assert found.scores.tolist() == [99, 15, 13, 10, 8, 7, 2, 0]
    assert detections(tiles, attention, [], radius_um=49).scores.tolist() == sorted(
        attention, reverse=True
    )


def test_a_candidate_hits_the_lesion_that_holds_its_centre() -> None:
    tiles = tiles_of(across=4)
    attention = np.zeros(16)
    attention[[0, 3, 12]] = 3, 2, 1
    lesions = [box(300, 0, 349, 100), box(40, 40, 60, 60), box(300, 50, 400, 60)]
    found = detections(tiles, attention, lesions, {2}, radius_um=70)
    assert found.scores[:3].tolist() == [3, 2, 1]
    assert found.hits[:3].tolist() == [1, 2, -1]
    assert (found.lesions, found.ignored) == (3, frozenset({2}))


def test_the_radius_is_in_micrometres_of_the_slide() -> None:
    for at in (0.25, 0.5, 1.0):
        tiles = replace(tiles_of(64, 5), slide_mpp=at)  # corners 64 px of the slide apart
        for share, count in ((0.99, 25), (1.01, 13)):
            found = detections(tiles, np.ones(25), [], radius_um=64 * at * share)
            assert len(found.scores) == count


def test_attention_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match="does not fit 16 readable tiles"):
        detections(tiles_of(across=4), np.ones(15), [])


# --- the challenge's rules ---------------------------------------------------------------


def test_isolated_tumour_cells_are_ignored_by_their_diameter() -> None:
    mpp = 0.25
    discs = [Point(4000 * i, 4000).buffer(d / 2 / mpp, 64) for i, d in enumerate((190, 210, 50))]
    merged, ignored = evaluation_lesions(discs, mpp)
    assert [round(p.bounds[2] - p.bounds[0]) * mpp for p in merged] == [285, 265, 125]
    assert ignored == {1, 2}


def test_lesions_nearer_than_75_um_are_one_and_holes_are_filled() -> None:
    mpp = 0.5
    ring = box(0, 0, 2000, 2000) - box(500, 500, 1500, 1500)
    near, far = box(2140, 0, 3000, 1000), box(3160, 0, 4000, 1000)
    within = box(900, 900, 1100, 1100)
    merged, ignored = evaluation_lesions([ring, near, far, within], mpp)
    assert len(merged) == 2
    assert not ignored
    assert all(not p.interiors for p in merged)
    assert merged[0].bounds == pytest.approx((-75, -75, 3075, 2075))


def test_the_major_axis_is_that_of_the_ellipse_with_the_same_moments() -> None:
    assert _major_axis(box(9000, 9000, 9300, 9100)) == pytest.approx(4 * 300 / 12**0.5, rel=1e-4)
    turned = Polygon([(0, 0), (300, 300), (200, 400), (-100, 100)])
    assert _major_axis(turned) == pytest.approx(4 * 300 * 2**0.5 / 12**0.5, rel=1e-4)
