"""Features in peers' files: read as the peers read them, and back in a store as they were."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from entries import make_tiles

from pathcli.errors import DataError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.store.peers import FORMATS, Export, Import
from pathcli.types import Key, SlideInfo, Tiles, TileStatus

ENCODER = "lite0-0123456789ab"
D = 6
KEEPS_FEATURES = [name for name in FORMATS if name != "geojson"]


def put(store: Store, tiles: Tiles, encoder: str = ENCODER, *, bad: int | None = 3) -> Key:
    """Store tiles and random features of them, one unreadable."""
    store.tiles[tiles.key] = tiles
    key = replace(tiles.key, encoder=encoder)
    n = len(tiles)
    values = np.random.default_rng(n).normal(size=(n, D)).astype(np.float16)
    status = np.zeros(n, np.uint8)
    if bad is not None:
        status[bad], values[bad] = TileStatus.UNREADABLE, np.nan
    with store.features.lock(key), store.features.writer(tiles, encoder, (D,)) as writer:
        writer.begin(0)
        writer.write(values, status)
    return key


def card(store: Store, tiles: Tiles, path: str, bounds: tuple[int, int]) -> None:
    size = (tiles.width, tiles.height)
    box = (*bounds, size[0] - bounds[0], size[1] - bounds[1])
    digits = tiles.item.rpartition("-")[2] + "ff" * 4
    info = SlideInfo(tiles.item, digits, *size, tiles.slide_mpp, "aperio", 40.0, box, "openslide")
    store.remember(info, path, tiles.slide_mpp, "header")


@pytest.fixture
def filled(store: Store) -> Store:
    """Two slides at 0.25 um per pixel, the first with a card, bounds and an unreadable tile."""
    first, second = make_tiles(300, "case_7-00000000"), make_tiles(40, "b-11111111")
    put(store, first)
    card(store, first, "/slides/case 7.svs", (100, 20))
    put(store, second, bad=None)
    return store


def export(store: Store, form: str, out: Path, *slides: str, **more: object) -> list[dict]:  # type: ignore[type-arg]
    with Export(store, form, out, slides, **more) as one_by_one:  # type: ignore[arg-type]
        return [one_by_one(name) for name in one_by_one.names]


def bring(store: Store, form: str, path: Path, **more: object) -> list[dict]:  # type: ignore[type-arg]
    ready = Import(store, form, path, **more)  # type: ignore[arg-type]
    return [ready(name) for name in ready.names]


def good(store: Store, key: Key) -> tuple[np.ndarray, np.ndarray]:
    found = store.features[key]
    rows = found.status == TileStatus.OK
    return found.values[rows], found.xy[rows]


def key_named(store: Store, name: str) -> Key:
    return next(key for key in store.features if key.item.startswith(name))


# --- as the peers read them --------------------------------------------------------------


def trident_assets(path: Path) -> tuple[dict[str, np.ndarray], dict[str, dict[str, object]]]:
    """Read every dataset of a file and its attributes, as TRIDENT's readers do."""
    with h5py.File(path, "r") as file:
        return {k: file[k][:] for k in file}, {k: dict(file[k].attrs) for k in file}


TRIDENT_ATTRIBUTES = {
    *("patch_size", "patch_size_level0", "level0_magnification", "target_magnification"),
    *("overlap", "name", "savetodir", "level0_width", "level0_height"),
}


def test_a_trident_reader_finds_what_it_looks_for(filled: Store, tmp_path: Path) -> None:
    export(filled, "trident", tmp_path / "job")
    job = tmp_path / "job" / "20x_224px_0px_overlap"
    values, xy = good(filled, key_named(filled, "case_7"))
    arrays, attrs = trident_assets(job / f"features_{ENCODER}" / "case 7.h5")
    assert set(arrays) == {"features", "coords"}
    assert (arrays["features"].dtype, arrays["coords"].dtype) == (np.float32, np.int64)
    assert np.array_equal(arrays["features"], values)
    assert np.array_equal(arrays["coords"], xy)
    assert set(attrs["features"]) == {"name", "savetodir", "encoder"}
    assert attrs["features"]["encoder"] == ENCODER
    assert set(attrs["coords"]) == TRIDENT_ATTRIBUTES
    told = attrs["coords"]
    side = int(told["patch_size"]) * told["level0_magnification"] // told["target_magnification"]  # type: ignore[operator]
    assert (side, told["patch_size_level0"]) == (448, 448)
    assert isinstance(told["level0_magnification"], np.integer)
    assert (told["name"], told["level0_width"], told["level0_height"]) == ("case 7", 10_000, 9_000)
    patches, same = trident_assets(job / "patches" / "case 7_patches.h5")
    assert set(patches) == {"coords"}
    assert np.array_equal(patches["coords"], xy)
    assert set(same["coords"]) == TRIDENT_ATTRIBUTES
    with h5py.File(job / f"features_{ENCODER}" / "case 7.h5") as file:
        features = file["features"]
        assert features.maxshape == (None, D)
        assert features.compression is None
        assert features.chunks == (299, D)


def test_a_clam_reader_finds_what_it_looks_for(filled: Store, tmp_path: Path) -> None:
    import torch

    out = tmp_path / "clam"
    export(filled, "clam", out)
    values, xy = good(filled, key_named(filled, "case_7"))
    with h5py.File(out / "h5_files" / "case 7.h5") as file:
        assert set(file) == {"features", "coords"}
        assert [file[k].dtype for k in ("features", "coords")] == [np.float32, np.int32]
        assert not any([*file.attrs, *file["features"].attrs, *file["coords"].attrs])
        assert np.array_equal(file["features"], values)
        assert np.array_equal(file["coords"], xy)
    tensor = torch.load(out / "pt_files" / "case 7.pt", weights_only=True)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch.float32, (299, D))
    assert np.array_equal(tensor.numpy(), values)
    with h5py.File(out / "patches" / "case 7.h5") as file:
        told = dict(file["coords"].attrs)
        assert file["coords"].dtype == np.int64
    names = {"patch_size", "patch_level", "downsample", "downsampled_level_dim", "level_dim"}
    assert set(told) == names | {"name", "save_path"}
    assert told["patch_size"] * told["downsample"][0] == 448
    assert told["patch_level"] == 0
    with (out / "process_list_autogen.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["slide_id"] for row in rows] == ["b", "case 7.svs"]
    assert {row["status"] for row in rows} == {"processed"}


def test_clams_own_list_keeps_its_rows(filled: Store, tmp_path: Path) -> None:
    listed = tmp_path / "process_list_autogen.csv"
    listed.write_text("slide_id,process,status,seg_level,sthresh\nold.svs,0,processed,6,8\n")
    export(filled, "clam", tmp_path, "b")
    rows = list(csv.DictReader(listed.read_text().splitlines()))
    assert rows[0] == dict(zip(rows[0], ["old.svs", "0", "processed", "6", "8"], strict=True))
    assert [row["slide_id"] for row in rows] == ["old.svs", "b"]


def test_a_stamp_reader_finds_what_it_looks_for(filled: Store, tmp_path: Path) -> None:
    export(filled, "stamp", tmp_path, "case 7")
    values, xy = good(filled, key_named(filled, "case_7"))
    with h5py.File(tmp_path / ENCODER / "case 7.h5") as file:
        assert [file[k].dtype for k in ("feats", "coords")] == [np.float16, np.float32]
        assert np.array_equal(file["feats"], values)
        assert np.allclose(file["coords"], xy * 0.25)
        assert file["feats"].chunks is None
        told = dict(file.attrs)
    assert (told["unit"], told["tile_size_um"], told["tile_size_px"]) == ("um", 112, 224)
    assert (told["feat_type"], told["extractor"]) == ("tile", ENCODER)
    assert {"stamp_version", "code_hash"} < set(told)


def test_an_acmil_reader_finds_what_it_looks_for(filled: Store, tmp_path: Path) -> None:
    done = export(filled, "acmil", tmp_path, labels={"case 7": 1})
    with h5py.File(tmp_path / f"patch_feats_pretrain_{ENCODER}.h5") as file:
        assert set(file) == {"case 7", "b"}
        assert file["b/feat"].dtype == np.float16
        assert file["case 7/coords"].shape == (299, 2)
        assert file["case 7"].attrs["label"] == 1
        assert "label" not in file["b"].attrs
    assert [one["warnings"] for one in done if one["slide"] == "b"] == [["no label in --labels"]]


def test_anndata_reads_the_table(filled: Store, tmp_path: Path) -> None:
    anndata = pytest.importorskip("anndata")
    export(filled, "zarr", tmp_path, "case 7")
    folder = tmp_path / "case 7.zarr"
    table = anndata.read_zarr(folder / "tables" / f"{ENCODER}_tiles")
    values, xy = good(filled, key_named(filled, "case_7"))
    assert np.array_equal(table.X, values)
    assert np.array_equal(table.obsm["spatial"], xy + 224)
    assert list(table.obs["tile_id"]) == list(range(299))
    assert set(table.obs["library_id"]) == {"tiles"}
    expected = {"region": "tiles", "region_key": "library_id", "instance_key": "tile_id"}
    assert {k: str(v) for k, v in table.uns["spatialdata_attrs"].items()} == expected
    assert json.loads(str(table.uns["tile_spec"]))["base_downsample"] == 2
    root = zarr.open_group(folder, mode="r")
    assert root.attrs["tile_spec"]["tiles"]["mpp"] == 0.5
    shapes = root["shapes/tiles"]
    assert shapes.attrs["encoding-type"] == "ngff:shapes"
    import shapely

    offsets = (shapes["offset0"][...], shapes["offset1"][...])
    kind = shapely.GeometryType.POLYGON
    squares = shapely.from_ragged_array(kind, shapes["coords"][...], offsets)
    assert [int(v) for v in squares[5].bounds] == [*xy[5], *(xy[5] + 448)]


def test_qupath_counts_from_the_bounds(filled: Store, tmp_path: Path) -> None:
    export(filled, "geojson", tmp_path, "case 7")
    told = json.loads((tmp_path / "case 7.geojson").read_text())
    values, xy = good(filled, key_named(filled, "case_7"))
    first = told["features"][0]
    corner = (xy[0] - [100, 20]).tolist()
    assert first["geometry"]["coordinates"][0][0] == corner
    assert first["geometry"]["coordinates"][0][2] == [corner[0] + 448, corner[1] + 448]
    assert first["properties"]["objectType"] == "detection"
    measured = first["properties"]["measurements"]
    assert measured["feature norm"] == pytest.approx(np.linalg.norm(values[0].astype(float)))
    from sklearn.decomposition import PCA

    expected = np.abs(PCA(1).fit_transform(values.astype(float))[:, 0])
    found = [abs(f["properties"]["measurements"]["feature PC1"]) for f in told["features"]]
    assert np.allclose(found, expected, atol=1e-5)


def test_scores_become_measurements(filled: Store, tmp_path: Path) -> None:
    _, xy = good(filled, key_named(filled, "b"))
    scores = tmp_path / "scores.csv"
    scores.write_text(f"slide,x,y,tumour\nb,{xy[4, 0]},{xy[4, 1]},0.75\n")
    export(filled, "geojson", tmp_path / "out", "b", scores=scores)
    told = json.loads((tmp_path / "out" / "b.geojson").read_text())["features"]
    assert told[4]["properties"]["measurements"] == {"tumour": 0.75}
    assert told[3]["properties"]["measurements"] == {}
    with pytest.raises(DataError, match="no row has slide case 7"):
        export(filled, "geojson", tmp_path / "out", "case 7", scores=scores)


# --- and back ----------------------------------------------------------------------------


@pytest.fixture(params=["folder", "zarr"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(tmp_path / ("other.zarr" if request.param == "zarr" else "other"))


@pytest.mark.parametrize("form", KEEPS_FEATURES)
def test_an_unchanged_file_brings_back_the_entry(
    filled: Store, empty: Store, tmp_path: Path, form: str
) -> None:
    export(filled, form, tmp_path / "out")
    done = bring(empty, form, tmp_path / "out")
    assert all(one["restored"] for one in done)
    assert set(empty.features) == set(filled.features)
    for key in filled.features:
        mine, theirs = filled.features[key], empty.features[key]
        assert np.array_equal(mine.values, theirs.values, equal_nan=True)
        assert np.array_equal(mine.xy, theirs.xy)
        assert np.array_equal(mine.status, theirs.status)
        place = replace(key, encoder=None)
        before, after = filled.tiles[place], empty.tiles[place]
        told = ("item", "spec", "slide_mpp", "width", "height", "tissue_share", "warnings")
        assert [getattr(before, n) for n in told] == [getattr(after, n) for n in told]
    mine, theirs = (s.slides()["case_7-00000000"] for s in (filled, empty))
    assert {k: v for k, v in mine.items() if k != "last_seen"} == {
        k: v for k, v in theirs.items() if k != "last_seen"
    }
    again = bring(empty, form, tmp_path / "out")
    assert not any(one["written"] for one in again)


@pytest.mark.parametrize("form", ["trident", "clam", "stamp", "zarr"])
def test_a_second_export_finds_the_files_done(filled: Store, tmp_path: Path, form: str) -> None:
    export(filled, form, tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.h5") if "store" not in p.parts}
    assert not any(one["written"] for one in export(filled, form, tmp_path))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_a_file_that_is_not_the_same_is_not_replaced_unasked(filled: Store, tmp_path: Path) -> None:
    export(filled, "stamp", tmp_path, "b")
    path = tmp_path / ENCODER / "b.h5"
    with h5py.File(path, "a") as file:
        file["feats"][0, 0] += 1
    with pytest.raises(DataError, match=r"is there already, and not the same.*--overwrite"):
        export(filled, "stamp", tmp_path, "b")
    export(filled, "stamp", tmp_path, "b", overwrite=True)
    assert not any(one["written"] for one in export(filled, "stamp", tmp_path, "b"))
    foreign = tmp_path / "f"
    (foreign / "b.zarr").mkdir(parents=True)
    (foreign / "b.zarr" / "theirs").write_text("x")
    with pytest.raises(DataError, match="is there already"):
        export(filled, "zarr", foreign, "b")
    assert (foreign / "b.zarr" / "theirs").read_text() == "x"


def test_a_changed_file_is_not_taken_for_the_original(
    filled: Store, empty: Store, tmp_path: Path
) -> None:
    export(filled, "trident", tmp_path, "b")
    path = next(tmp_path.rglob("features_*/b.h5"))
    with h5py.File(path, "a") as file:
        file["features"][0, 0] = 7
    (one,) = bring(empty, "trident", path)
    assert (one["restored"], one["encoder"]) == (False, f"{ENCODER}-imported")
    assert "exported by pathcli and changed since: not taken for the original" in one["warnings"]
    assert one["item"] != "b-11111111"


def test_measurements_come_back_as_features_of_the_tiles(
    filled: Store, empty: Store, tmp_path: Path
) -> None:
    export(filled, "geojson", tmp_path, "case 7")
    (one,) = bring(empty, "geojson", tmp_path / "case 7.geojson", encoder="pca")
    key = next(iter(empty.features))
    assert (one["encoder"], key.item) == ("pca-imported", "case_7-00000000")
    values, xy = good(empty, key)
    features, places = good(filled, key_named(filled, "case_7"))
    assert np.array_equal(xy, places)
    norms = np.linalg.norm(features.astype(float), axis=1)
    assert np.allclose(values[:, 0], norms, rtol=1e-3)
    assert empty.features[key].status[3] == TileStatus.UNREADABLE


# --- choosing ----------------------------------------------------------------------------


def test_several_encoders_or_tiles_have_to_be_chosen(filled: Store, tmp_path: Path) -> None:
    tiles = make_tiles(9, "b-11111111")
    put(filled, tiles, "uni-999999999999")
    with pytest.raises(UsageError, match=f"--encoder: {ENCODER}, uni-999999999999"):
        export(filled, "stamp", tmp_path)
    assert len(export(filled, "stamp", tmp_path, encoder="uni")) == 1
    put(filled, replace(tiles, spec=tile_spec(512, 0.25)), "uni-999999999999")
    with pytest.raises(UsageError, match=r"--tiles: .*512 px at 0.25 um, otsu; 1 slides"):
        export(filled, "stamp", tmp_path / "x", encoder="uni")
    with pytest.raises(UsageError, match="did you mean 'uni-999999999999'"):
        export(filled, "stamp", tmp_path, encoder="uni-99999" + "0999999")
    with pytest.raises(DataError, match=r"no features of slide nobody.*case 7"):
        export(filled, "stamp", tmp_path, "nobody", encoder=ENCODER)


def test_two_slides_of_one_name_get_files_of_their_own(filled: Store, tmp_path: Path) -> None:
    put(filled, make_tiles(12, "b-22222222"))
    done = export(filled, "stamp", tmp_path)
    names = {p.stem for p in (tmp_path / ENCODER).glob("*.h5")}
    assert names == {"b-11111111", "b-22222222", "case 7"}
    told = [one["warnings"] for one in done if one["slide"].startswith("b")]
    assert all("another slide has this name: the store's own is used" in text for text in told)


def test_tokens_are_not_exported(store: Store, tmp_path: Path) -> None:
    tiles = make_tiles(4)
    store.tiles[tiles.key] = tiles
    with store.features.writer(tiles, "tok-1", (2, D)) as writer:
        writer.begin(0)
        writer.write(np.zeros((4, 2, D), np.float16), np.zeros(4, np.uint8))
    with pytest.raises(DataError, match=r"tokens \(2, 6\) a tile"):
        export(store, "trident", tmp_path)
    assert not list(tmp_path.rglob("features_*/*"))
