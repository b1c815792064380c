"""Files that other tools wrote: kept as they are, and what they do not say is marked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import Run
from peer_files import ORDER, XY, D, features, register, trident

from pathcli.errors import DataError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.store.entries import key_of
from pathcli.store.peers import Import
from pathcli.store.peers.parcel import UNKNOWN, Known, imported_spec, nominal_mpp
from pathcli.types import Key, SlideInfo, TileSpec, TileStatus


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def only(store: Store, form: str, path: Path, **more: object) -> dict[str, object]:
    ready = Import(store, form, path, **more)  # type: ignore[arg-type]
    (name,) = ready.names
    return ready(name)


def key_in(store: Store) -> Key:
    (key,) = store.features
    return key


def slide_at(mpp: float | None, **more: object) -> Callable[[str], Known | None]:
    told = {"width": 9000, "height": 8000, "bounds": (0, 0, 9000, 8000), **more}
    info = SlideInfo(
        "s1-abcdef01", "abcdef01", mpp=mpp, vendor="x", objective=40.0, reader="x", **told
    )  # type: ignore[arg-type]
    return lambda name: Known(info, mpp, "/slides/s1.svs") if name == "s1" else None


# --- what is kept and what is marked -----------------------------------------------------


def test_a_trident_file_is_kept_and_marked(store: Store, tmp_path: Path) -> None:
    only(store, "trident", trident(tmp_path).parents[2])
    key = key_in(store)
    found, tiles = store.features[key], store.tiles[Key(key.item, key.mpp, key.tiles)]
    assert key.encoder == "uni_v1-imported"
    assert key_of(store.features.path(key)) == key
    assert np.array_equal(found.values, features().astype(np.float16)[ORDER])
    assert np.array_equal(found.xy, XY[ORDER])
    assert tiles.spec == TileSpec(256, 0.5, 256, "imported", min_tissue=0.0)
    assert tiles.spec == tile_spec(256, 0.5, tissue="imported", min_tissue=0)
    assert (tiles.side0, tiles.width, tiles.height) == (512, 9000, 8000)
    card = store.slides()[key.item]
    assert card["mpp_source"] == "nominal, from level0_magnification 40"
    assert card["vendor"] == "imported: the fingerprint is of the features, not of the slide"
    assert card["mpp"] is None
    says = json.loads(tiles.warnings[0].partition("which says ")[2])
    assert says["coords"]["savetodir"] == "/data/out"


def test_the_real_slide_gives_its_fingerprint(store: Store, tmp_path: Path) -> None:
    one = only(store, "trident", trident(tmp_path), slide=slide_at(0.2527))
    assert one["item"] == "s1-abcdef01"
    assert store.slides()["s1-abcdef01"]["mpp"] == 0.2527
    assert key_in(store).mpp == 0.25  # TRIDENT cut by the objective
    trident(tmp_path, values=features(2), encoder="other", level0_width="None")
    small = slide_at(0.25, width=300, height=300)
    with pytest.raises(DataError, match=r"beyond /slides/s1\.svs with 300 x 300 px: not"):
        only(Store(tmp_path / "b"), "trident", trident(tmp_path), slide=small)


def test_a_clam_folder_is_one_specification_an_objective(store: Store, tmp_path: Path) -> None:
    values = features()
    for folder in ("h5_files", "patches"):
        (tmp_path / folder).mkdir()
    with h5py.File(tmp_path / "h5_files" / "s1.h5", "w") as file:
        file["features"], file["coords"] = values, XY.astype(np.int32)
    with h5py.File(tmp_path / "patches" / "s1.h5", "w") as file:
        file["coords"] = XY
        file["coords"].attrs.update(
            {"patch_size": 256, "patch_level": 1, "downsample": (4.0001, 4.0002), "name": "s1"}
        )
    with pytest.raises(DataError, match="give --encoder"):
        only(store, "clam", tmp_path, mpp=0.25)
    with pytest.raises(DataError, match="do not say the slide's resolution; give --mpp"):
        only(store, "clam", tmp_path, encoder="resnet50")
    only(store, "clam", tmp_path, encoder="resnet50", slide=slide_at(0.2527))
    key = key_in(store)
    tiles = store.tiles[Key(key.item, key.mpp, key.tiles)]
    assert (key.encoder, tiles.spec) == ("resnet50-imported", imported_spec(256, 1.0))
    assert tiles.side0 == 1024
    source = store.slides()[key.item]["mpp_source"]
    assert source == "nominal, from 0.2527 in the slide's header"
    assert [nominal_mpp(v) for v in (0.2204, 0.2527, 0.499, 0.98)] == [0.25, 0.25, 0.5, 1.0]


def test_a_tensor_alone_is_enough_to_train_on(store: Store, tmp_path: Path) -> None:
    import torch

    (tmp_path / "pt_files").mkdir()
    torch.save(torch.from_numpy(features()), tmp_path / "pt_files" / "s1.pt")
    one = only(store, "clam", tmp_path, encoder="uni")
    assert one["spec"] == UNKNOWN.to_json()
    assert any("does not say where its tiles are" in text for text in one["warnings"])  # type: ignore[attr-defined]
    torch.save({"model": torch.zeros(1)}, tmp_path / "pt_files" / "s1.pt")
    with pytest.raises(DataError, match="holds a dict, not one tensor"):
        only(store, "clam", tmp_path, encoder="uni")


def stamp(path: Path, **attrs: object) -> Path:
    with h5py.File(path, "w") as file:
        file["feats"] = features().astype(np.float16)
        file["coords"] = (XY * 0.25).astype(np.float32)
        told = {"unit": "um", "tile_size_um": 128.0, "tile_size_px": 224, "extractor": "ctp"}
        file.attrs.update(told | attrs)
    return path


def test_stamps_micrometres_need_the_slide(store: Store, tmp_path: Path) -> None:
    path = stamp(tmp_path / "s1.h5")
    with pytest.raises(DataError, match=r"coords are in micrometres.*--slides DIR, or --mpp"):
        only(store, "stamp", path)
    only(store, "stamp", path, slide=slide_at(0.25))
    key = key_in(store)
    assert np.array_equal(store.features[key].xy, XY[ORDER])
    assert store.tiles[Key(key.item, key.mpp, key.tiles)].spec == imported_spec(224, 128 / 224)
    with pytest.raises(DataError, match="feat_type 'slide'; those of tiles are wanted"):
        only(store, "stamp", stamp(tmp_path / "x.h5", feat_type="slide"), mpp=0.25)
    with pytest.raises(DataError, match="does not say unit 'um'"):
        only(store, "stamp", stamp(tmp_path / "y.h5", unit="px"), mpp=0.25)


def test_acmils_file_has_no_tile_size(store: Store, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "patch_feats_pretrain_ViT-S.h5", "w") as file:
        file["s1/feat"], file["s1/coords"] = features().astype(np.float16), XY
        file["s1"].attrs["label"] = 1
    one = only(store, "acmil", tmp_path)
    assert (one["encoder"], one["spec"]) == ("ViT-S-imported", UNKNOWN.to_json())
    assert np.array_equal(store.features[key_in(store)].xy, XY[ORDER])


@pytest.mark.filterwarnings("ignore:Writing zarr v2 data:UserWarning")
def test_a_slide_of_lazyslide_comes_with_its_parquet(store: Store, tmp_path: Path) -> None:
    anndata, pq = pytest.importorskip("anndata"), pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa
    import shapely
    import zarr

    folder = tmp_path / "s1.zarr"
    root = zarr.open_group(folder, mode="w", zarr_format=2)
    spec = {"width": 256, "stride_width": 256, "mpp": 0.5, "base_downsample": 2.0}
    root.attrs["tile_spec"] = {"tiles": spec}
    for name in ("shapes/tiles", "tables"):
        root.create_group(name)
    table = anndata.AnnData(features())
    table.write_zarr(folder / "tables" / "uni_tiles")
    root["tables/uni_tiles"].attrs.update({"region": "tiles", "region_key": "library_id"})
    squares = [shapely.box(x, y, x + 512, y + 512).wkb for x, y in XY]
    pq.write_table(pa.table({"geometry": squares}), folder / "shapes" / "tiles" / "shapes.parquet")
    one = only(store, "zarr", tmp_path)
    assert (one["encoder"], key_in(store).mpp) == ("uni-imported", 0.25)
    assert one["spec"] == imported_spec(256, 0.5).to_json()
    assert np.array_equal(store.features[key_in(store)].xy, XY[ORDER])


def test_numbers_that_float16_cannot_hold_are_told(store: Store, tmp_path: Path) -> None:
    whole = np.ones((4, D), np.float32)
    holed, large = whole.copy(), whole.copy()
    holed[1, 2], holed[3, 0], large[0, 0] = np.nan, np.inf, 7e4
    exact = only(store, "trident", trident(tmp_path / "a", values=whole))
    assert exact["warnings"] == []
    one = only(store, "trident", trident(tmp_path / "b", "s2", holed))
    assert one["warnings"] == ["2 of 4 rows have NaN or infinity: unreadable"]
    assert one["unreadable"] == 2
    key = next(key for key in store.features if key.item.startswith("s2"))
    bad = store.features[key].status[[ORDER.index(1), ORDER.index(3)]]
    assert bad.tolist() == [TileStatus.UNREADABLE] * 2
    rounded = only(store, "trident", trident(tmp_path / "c", "s3"))
    assert rounded["warnings"] == ["features are rounded to float16"]
    with pytest.raises(DataError, match="holds 70000; the store keeps float16"):
        only(store, "trident", trident(tmp_path / "d", "s4", large))
    with pytest.raises(DataError, match="not one row is of numbers alone"):
        only(store, "trident", trident(tmp_path / "e", "s5", whole * np.nan))


# --- what is wrong -----------------------------------------------------------------------


def test_a_batch_goes_on_past_what_is_broken(store: Store, tmp_path: Path, run: Run) -> None:
    """The states that a killed TRIDENT leaves behind, and others."""
    folder = trident(tmp_path, "good").parent
    whole = (folder / "good.h5").read_bytes()
    (folder / "cut.h5").write_bytes(whole[: len(whole) // 2])
    (folder / "start.h5").write_bytes(whole[:96])
    with h5py.File(folder / "half.h5", "w") as file:
        file["features"] = features()
    with h5py.File(folder / "short.h5", "w") as file:
        file["features"], file["coords"] = features(), XY[:2]
    trident(tmp_path, "locked")
    (folder / "locked.h5.lock").write_text('{"pid": 1}')
    trident(tmp_path, "wide", features(d=9))
    trident(tmp_path, "text")
    with h5py.File(folder / "text.h5", "a") as file:
        del file["features"]
        file["features"] = np.array([[b"a"]] * 4)
    told = ("store", "import", tmp_path, "--format", "trident", "--store", store.root, "--json")
    code, out, err = run(*told)
    done = json.loads(out)
    assert code == 3
    assert [one["slide"] for one in done["slides"]] == ["good"]
    reasons = {Path(f["path"]).stem: f["reason"] for f in done["failures"]}
    expected = {
        "cut": "cut short, or no HDF5 file",
        "start": "cut short, or no HDF5 file",
        "half": "no dataset 'coords', only features; was its writer stopped?",
        "short": "coords is (2, 2), but there are features of 4 tiles",
        "locked": "a .lock lies beside it",
        "wide": "features of length 9, others of uni_v1-imported have 5",
        "text": "numbers [tiles, length] are wanted",
    }
    assert set(reasons) == set(expected)
    for name, text in expected.items():
        assert text in reasons[name], name
        assert "\n" not in reasons[name]
        assert f"error: {reasons[name]}" in err.replace("\n", " ")
    assert {f["exit_code"] for f in done["failures"]} == {4}


def test_two_slides_of_one_name_are_told(store: Store, tmp_path: Path) -> None:
    trident(tmp_path / "a", values=features(seed=1))
    trident(tmp_path / "b", values=features(seed=2))
    ready = Import(store, "trident", tmp_path)
    first, second = (ready(name) for name in ready.names)
    assert first["item"] != second["item"]
    assert any("another slide called s1 was imported" in text for text in second["warnings"])
    again = Import(store, "trident", tmp_path)
    assert not any(again(name)["written"] for name in again.names)
    known = Store(tmp_path / "known")
    ready = Import(known, "trident", tmp_path, slide=slide_at(0.25))
    ready(ready.names[0])
    with pytest.raises(DataError, match="the store has other features of s1-abcdef01"):
        ready(ready.names[1])


def test_one_name_is_not_given_to_two_encoders(store: Store, tmp_path: Path) -> None:
    trident(tmp_path, encoder="uni_v1")
    trident(tmp_path, encoder="conch")
    with pytest.raises(UsageError, match="would name several: conch, uni_v1"):
        Import(store, "trident", tmp_path, encoder="mine")
    ready = Import(store, "trident", tmp_path)
    encoders = {ready(name)["encoder"] for name in ready.names}
    assert encoders == {"uni_v1-imported", "conch-imported"}


def test_nothing_to_import_says_so(store: Store, tmp_path: Path, run: Run) -> None:
    with pytest.raises(DataError, match="nothing of format trident here"):
        Import(store, "trident", tmp_path)
    code, _, err = run("store", "import", tmp_path / "gone", "--format", "clam")
    assert code == 4
    assert "no such file or folder" in err
    code, _, err = run("store", "import", tmp_path, "--format", "tridant")
    assert code == 2
    assert "did you mean 'trident'" in err


def test_geojson_that_is_no_tiles(store: Store, tmp_path: Path) -> None:
    def write(*rings: list[list[int]], **measured: float) -> Path:
        told = [
            {"geometry": {"coordinates": [ring]}, "properties": {"measurements": measured}}
            for ring in rings
        ]
        path = tmp_path / "s1.geojson"
        path.write_text(json.dumps({"type": "FeatureCollection", "features": told}))
        return path

    square = [[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]
    with pytest.raises(DataError, match="no object has measurements, of 1"):
        only(store, "geojson", write(square), mpp=0.5)
    with pytest.raises(DataError, match="not squares of one size"):
        only(store, "geojson", write(square, square[:3] + square[:1], a=1.0), mpp=0.5)
    with pytest.raises(DataError, match="give --slides DIR, or --mpp"):
        only(store, "geojson", write(square, a=1.0))
    known = slide_at(0.5, bounds=(100, 20, 800, 700))
    only(store, "geojson", write(square, a=1.0), slide=known)
    assert store.features[key_in(store)].xy.tolist() == [[100, 20]]
    (tmp_path / "s1.geojson").write_text('{"features": [')
    with pytest.raises(DataError, match="cut short"):
        only(store, "geojson", tmp_path / "s1.geojson", mpp=0.5)
