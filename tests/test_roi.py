"""Regions of interest: what is read, what a tile inside is, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SIZE, Run
from shapely import Polygon, box

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.slides.roi import Roi, check_rois, read_roi, roi_file
from pathcli.slides.tiling import summary, tile, tile_spec
from pathcli.store import Store

WHOLE = (0, 0, *SIZE)
SQUARE = [[300, 250], [700, 250], [700, 550], [300, 550]]
HOLE = [[400, 300], [500, 300], [500, 400], [400, 400]]


def geojson(path: Path, *features: tuple[str, object, dict]) -> Path:
    made = [
        {"type": "Feature", "geometry": {"type": kind, "coordinates": at}, "properties": more}
        for kind, at, more in features
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": made}))
    return path


def closed(ring: list[list[int]]) -> list[list[int]]:
    return [*ring, ring[0]]


def aperio(path: Path, *regions: tuple[int, int, list[list[int]]]) -> Path:
    made = "".join(
        f'<Region Id="{i}" Type="{kind}" NegativeROA="{negative}"><Vertices>'
        + "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in ring)
        + "</Vertices></Region>"
        for i, (kind, negative, ring) in enumerate(regions)
    )
    head = '<Annotations MicronsPerPixel="0.5"><Annotation Id="1" Name="roi"><Regions>'
    path.write_text(f"{head}{made}</Regions></Annotation></Annotations>")
    return path


def asap(path: Path, *rings: list[list[int]]) -> Path:
    made = "".join(
        f'<Annotation Name="{i}" Type="Polygon" PartOfGroup="{"None" if i == 0 else "Exclusion"}">'
        "<Coordinates>"
        + "".join(f'<Coordinate Order="{k}" X="{x}" Y="{y}"/>' for k, (x, y) in enumerate(ring))
        + "</Coordinates></Annotation>"
        for i, ring in enumerate(rings)
    )
    path.write_text(f"<ASAP_Annotations><Annotations>{made}</Annotations></ASAP_Annotations>")
    return path


def files(folder: Path) -> list[Path]:
    """Return the same region, a square with a hole, in every format."""
    return [
        geojson(folder / "a.geojson", ("Polygon", [closed(SQUARE), closed(HOLE)], {})),
        aperio(folder / "b.xml", (0, 0, SQUARE), (0, 1, HOLE)),
        asap(folder / "c.xml", SQUARE, HOLE),
    ]


def test_every_format_gives_one_region_with_its_hole_and_one_digest(tmp_path: Path) -> None:
    read = [read_roi(path, WHOLE, SIZE) for path in files(tmp_path)]
    for roi in read:
        assert sum(p.area for p in roi.polygons) == pytest.approx(400 * 300 - 100 * 100)
        assert not roi.warnings
    assert len({roi.digest for roi in read}) == 1
    turned = geojson(tmp_path / "t.geojson", ("Polygon", [closed(SQUARE[::-1]), closed(HOLE)], {}))
    assert read_roi(turned, WHOLE, SIZE).digest == read[0].digest
    moved = geojson(tmp_path / "m.geojson", ("Polygon", [closed(SQUARE)], {}))
    assert read_roi(moved, WHOLE, SIZE).digest != read[0].digest


def test_classes_do_not_matter_but_exclusions_do_and_points_do_not_count(tmp_path: Path) -> None:
    named = {"classification": {"names": ["Tissue", "Negative"]}}  # no NegativeROA of Aperio's
    ignored = {"classification": {"name": "Ignore*"}}
    path = geojson(
        tmp_path / "a.geojson",
        ("Polygon", [closed(SQUARE)], named),
        ("Polygon", [closed(HOLE)], ignored),
        ("Point", [5, 5], {}),
        ("Polygon", [closed([[0, 0], [9, 0], [9, 9]])], {"objectType": "detection"}),
    )
    (only,) = read_roi(path, WHOLE, SIZE).polygons
    assert only.equals(Polygon(SQUARE, [HOLE]))


def test_qupath_counts_from_the_bounds_and_aperio_from_level_0(tmp_path: Path) -> None:
    bounds = (100, 50, 1200, 900)
    ours, theirs, _ = (read_roi(path, bounds, SIZE) for path in files(tmp_path))
    assert ours.polygons[0].bounds == (400, 300, 800, 600)
    assert theirs.polygons[0].bounds == (300, 250, 700, 550)


def test_aperios_ellipses_are_areas_and_its_rulers_are_not(tmp_path: Path) -> None:
    path = aperio(
        tmp_path / "a.xml", (2, 0, [[100, 100], [300, 200]]), (4, 0, [[0, 0], [9, 9], [0, 9]])
    )
    (ellipse,) = read_roi(path, WHOLE, SIZE).polygons
    assert ellipse.area == pytest.approx(np.pi * 100 * 50, rel=0.01)
    assert ellipse.bounds == pytest.approx((100, 100, 300, 200), abs=0.5)


def test_the_share_inside_is_exact_and_half_is_enough() -> None:
    roi = Roi((box(0, 0, 95, 95), box(200, 0, 300, 50)), "d")
    xy = np.array([[0, 0], [50, 0], [45, 45], [200, 0], [150, 0], [400, 0], [200, 25]])
    share = roi.fraction(xy, 50.0)
    expected = [1, 0.9, 1, 1, 0, 0, 0.5]
    assert share.tolist() == pytest.approx(expected)
    triangle = Roi((Polygon([(0, 0), (10, 0), (0, 10)]),), "d")
    assert triangle.fraction(np.array([[0, 0], [5, 0], [5, 5]]), 5.0).tolist() == [1, 0.5, 0]


def test_tiles_lie_in_tissue_and_mostly_in_the_region(slide_path: Path, store: Store) -> None:
    path = files(slide_path.parent)[0]
    spec = tile_spec(50, 0.5)
    run = tile(slide_path, spec=spec, store=store, roi=path)
    everywhere = tile(slide_path, spec=spec, store=store)
    region = Polygon(SQUARE, [HOLE])
    kept = {tuple(p) for p in run.tiles.xy.tolist()}
    for x, y in everywhere.tiles.xy.tolist():
        share = region.intersection(box(x, y, x + 50, y + 50)).area / 2500
        assert ((x, y) in kept) == (share >= 0.5)
    assert 0 < len(kept) < len(everywhere.tiles)
    assert not everywhere.tiles.spec.roi
    again = tile(slide_path, spec=spec, store=store, roi=path)
    assert again.cached
    assert summary(again)["roi"] == run.tiles.spec.roi == read_roi(path, WHOLE, SIZE).digest
    with pytest.raises(UsageError, match="region of interest; give it too"):
        tile(slide_path, spec=run.tiles.spec, store=Store(slide_path.parent / "other"))


def test_a_region_on_glass_gives_no_tile_and_says_why(slide_path: Path, store: Store) -> None:
    glass = Roi((box(1200, 900, 1400, 1050),), "d")
    run = tile(slide_path, spec=tile_spec(50, 0.5), store=store, roi=glass)
    assert len(run.tiles) == 0
    assert "in the region of interest" in run.warnings[0]


def test_what_no_region_is_is_refused_in_one_line(tmp_path: Path) -> None:
    point = geojson(tmp_path / "p.geojson", ("Point", [5, 5], {}))
    far = geojson(
        tmp_path / "f.geojson", ("Polygon", [closed((np.array(SQUARE) + 9999).tolist())], {})
    )
    gone = aperio(tmp_path / "g.xml", (0, 0, HOLE), (0, 1, SQUARE))
    half = tmp_path / "h.xml"
    half.write_text("<Annotations><Annotation>")
    other = tmp_path / "o.xml"
    other.write_text("<html></html>")
    for path, why in (
        (point, "no polygon in it"),
        (far, "outside the slide of 1500 x 1100 px"),
        (gone, "excluded again"),
        (half, "not whole XML"),
        (other, "neither ASAP's XML nor Aperio's"),
    ):
        with pytest.raises(DataError, match=why) as caught:
            read_roi(path, WHOLE, SIZE)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


def test_what_is_drawn_beyond_the_slide_is_cut_off_and_said(tmp_path: Path) -> None:
    path = geojson(
        tmp_path / "a.geojson",
        ("Polygon", [closed([[1400, 0], [1600, 0], [1600, 99], [1400, 99]])], {}),
    )
    roi = read_roi(path, WHOLE, SIZE)
    assert roi.polygons[0].bounds == (1400, 0, 1500, 99)
    assert "50% of the region of interest lies outside" in roi.warnings[0]


def test_a_file_is_one_slides_and_a_folder_has_one_per_stem(tmp_path: Path) -> None:
    path = tmp_path / "s1.geojson"
    path.write_text("{}")
    assert roi_file(path, "x/anything.svs") == path
    assert roi_file(tmp_path, "x/s1.svs", 7) == path
    assert roi_file(tmp_path, "x/s1.ome.tif") == path
    with pytest.raises(UsageError, match="there are 2 slides"):
        roi_file(path, "x/s1.svs", 2)
    with pytest.raises(DataError, match=r"no region of interest in .*s2.geojson"):
        roi_file(tmp_path, "x/s2.svs")
    (tmp_path / "s1.xml").write_text("")
    with pytest.raises(DataError, match="several"):
        roi_file(tmp_path, "x/s1.svs")
    with pytest.raises(ResourceError, match="no such file or folder"):
        roi_file(tmp_path / "nowhere", "x/s1.svs")


def test_slides_of_one_name_cannot_share_a_folders_file(tmp_path: Path) -> None:
    (tmp_path / "s1.geojson").write_text("{}")
    check_rois(tmp_path, ["a/s1.svs", "b/s2.svs", "b/s3.svs"])  # two have none: their own failure
    with pytest.raises(UsageError, match=r"a/s1.svs and b/s1.tiff would both be given s1.geojson"):
        check_rois(tmp_path, ["a/s1.svs", "b/s2.svs", "b/s1.tiff"])
    check_rois(tmp_path / "s1.geojson", ["b/other.svs"])


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_one_file_for_two_slides_is_refused_once_and_nothing_is_cut(
    slide_path: Path, run: Run, more: tuple[str, ...]
) -> None:
    path, out = files(slide_path.parent)[0], slide_path.parent / "out"
    other = slide_path.with_name("other.svs")
    other.write_bytes(slide_path.read_bytes())
    code, _, err = run("tile", slide_path, other, "--roi", path, "--out", out, *more)
    assert code == 2
    assert err.count("there are 2 slides") == 1
    assert "failed" not in err
    assert not out.exists()


def test_the_command_line_takes_a_region(slide_path: Path, run: Run) -> None:
    path = files(slide_path.parent)[0]
    options = ["tile", slide_path, "--size", 50, "--json", "--out", slide_path.parent / "out"]
    code, out, _ = run(*options, "--roi", path)
    assert code == 0
    (row,) = (
        json.loads(out)["slides"] if "slides" in json.loads(out) else json.loads(out)["results"]
    )
    assert row["roi"] == read_roi(path, WHOLE, SIZE).digest
    assert replace(tile_spec(50, 0.5), roi=row["roi"]).digest == row["tiles_digest"]
    code, _, err = run(*options, "--roi", slide_path.parent / "b.geojson")
    assert code != 0
    assert "no such file or folder" in err
