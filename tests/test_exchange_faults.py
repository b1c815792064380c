"""Files that lie, runs that were stopped, folders that hold others' work, and any numbers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr
from entries import make_tiles
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_files import features, trident
from test_exchange import ENCODER, bring, card, export, put

from pathcli.errors import DataError
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.store.peers import Import, parcel
from pathcli.store.peers.files import writing_folder
from pathcli.store.peers.inbound import halves
from pathcli.types import Key, Tiles

ITEM = "b-11111111"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def filled(store: Store) -> Store:
    tiles = make_tiles(10, ITEM)
    put(store, tiles, bad=None)
    card(store, tiles, "/slides/b.svs", (0, 0))
    return store


def forged(filled: Store, folder: Path, change: Change) -> Path:
    """Export a slide, and change what pathcli left in its file, checksum and all."""
    export(filled, "stamp", folder, overwrite=True)
    path = folder / ENCODER / "b.h5"
    with h5py.File(path, "a") as file:
        kept = json.loads(str(file.attrs["pathcli"]))
        del kept["sha256"]
        change(kept)
        xy = np.rint(file["coords"][:] / 0.25).astype(int)
        checksum = parcel._checksum(kept, file["feats"][:], xy)
        file.attrs["pathcli"] = json.dumps(kept | {"sha256": checksum})
    return path


# --- files that lie ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: (kept["key"].update(item="../../x-00000000"), kept["card"].pop("item")),
        lambda kept: (kept["key"].update(item="a/../../x-00000000"), kept["card"].pop("item")),
        lambda kept: kept["key"].update(encoder="../../../x"),
        lambda kept: kept["key"].update(encoder=".."),
        lambda kept: kept["card"].update(item="../../x"),
    ],
)
def test_a_file_cannot_say_where_else_it_goes(
    filled: Store, tmp_path: Path, change: Change
) -> None:
    path = forged(filled, tmp_path / "out", change)
    root = tmp_path / "deep" / "deeper"
    (one,) = bring(Store(root / "store"), "stamp", path)
    assert (one["restored"], one["encoder"]) == (False, f"{ENCODER}-imported")
    assert [p.name for p in (tmp_path / "deep").rglob("*") if p.is_file()]
    outside = {p for p in (tmp_path / "deep").rglob("*") if not p.is_relative_to(root / "store")}
    assert outside == {root}
    assert {p.name for p in (root / "store").iterdir()} >= {"features", "slides", "tiles"}
    assert len([*(root / "store" / "slides").iterdir()]) == 1
    assert {p.name for p in (root / "store" / "features").iterdir()} == {f"{ENCODER}-imported"}


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept.update(unreadable=[[99, 0, 0]]),
        lambda kept: kept.update(size=[1]),
        lambda kept: kept.update(card=5),
        lambda kept: kept["card"].update(bounds=[1]),
        lambda kept: kept["key"].update(mpp="abc"),
        lambda kept: kept["key"].update(mpp=None),
        lambda kept: kept.update(key=[1]),
    ],
)
def test_a_record_of_nonsense_is_no_record(filled: Store, tmp_path: Path, change: Change) -> None:
    path = forged(filled, tmp_path / "out", change)
    (one,) = bring(Store(tmp_path / "other"), "stamp", path, mpp=0.25)
    assert not one["restored"]
    assert "exported by pathcli and changed since: not taken for the original" in one["warnings"]


@pytest.mark.parametrize(
    ("kind", "places", "said"),
    [
        ("Point", [1, 2], "not squares of one size"),
        ("LineString", [[1, 2], [3, 4]], "not squares of one size"),
        ("Polygon", [[[9e11 + x, y] for x, y in np.eye(5, 2)]], "beyond what a slide can have"),
    ],
)
def test_objects_that_are_no_tiles_are_told(
    store: Store, tmp_path: Path, kind: str, places: object, said: str
) -> None:
    square = [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]]
    told = [
        {"geometry": {"type": t, "coordinates": c}, "properties": {"measurements": {"a": 1.0}}}
        for t, c in (("Polygon", square), (kind, places))
    ]
    (tmp_path / "s.geojson").write_text(json.dumps({"features": told}))
    with pytest.raises(DataError, match=said):
        bring(store, "geojson", tmp_path / "s.geojson", mpp=0.5)


def test_one_damaged_file_of_acmil_does_not_hide_the_others(filled: Store, tmp_path: Path) -> None:
    export(filled, "acmil", tmp_path)
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    ready = Import(Store(tmp_path / "other"), "acmil", tmp_path)
    assert ready.names == ("a.h5", f"patch_feats_pretrain_{ENCODER}.h5/b")
    with pytest.raises(DataError, match=r"a\.h5: cut short, or no HDF5 file"):
        ready("a.h5")
    assert ready(ready.names[1])["restored"]


def test_an_encoders_name_that_no_folder_can_have(store: Store, tmp_path: Path) -> None:
    path = trident(tmp_path)
    with h5py.File(path, "a") as file:
        file["features"].attrs["encoder"] = "x" * 300
    with pytest.raises(DataError, match="too long; give --encoder"):
        bring(store, "trident", path)


# --- stopped runs, and folders that hold others' work ------------------------------------


def test_encoders_share_tridents_patches(filled: Store, tmp_path: Path) -> None:
    put(filled, make_tiles(10, ITEM), "uni-999999999999", bad=None)
    export(filled, "trident", tmp_path, encoder=ENCODER)
    (patches,) = tmp_path.rglob("b_patches.h5")
    before = patches.stat().st_mtime_ns
    assert all(one["written"] for one in export(filled, "trident", tmp_path, encoder="uni"))
    assert patches.stat().st_mtime_ns == before
    assert not any(one["written"] for one in export(filled, "trident", tmp_path, encoder=ENCODER))
    next(tmp_path.rglob(f"features_{ENCODER}/b.h5")).unlink()
    with h5py.File(patches, "a") as file:
        file["coords"][0] += 1
    with pytest.raises(DataError, match=r"b_patches\.h5: is there already, and not the same"):
        export(filled, "trident", tmp_path, encoder=ENCODER)


def test_an_export_that_was_stopped_goes_on(filled: Store, tmp_path: Path) -> None:
    export(filled, "clam", tmp_path)
    (tmp_path / "h5_files" / "b.h5").unlink()
    (one,) = export(filled, "clam", tmp_path)
    assert one["written"]
    (tmp_path / "h5_files" / "b.h5").unlink()
    (tmp_path / "pt_files" / "b.pt").write_bytes(b"another's")
    with pytest.raises(DataError, match=r"b\.pt: is there already"):
        export(filled, "clam", tmp_path)


def test_another_tools_zarr_is_never_replaced(filled: Store, tmp_path: Path) -> None:
    export(filled, "zarr", tmp_path)
    export(filled, "zarr", tmp_path, overwrite=True)
    theirs = zarr.open_group(tmp_path / "b.zarr", mode="w", zarr_format=2)
    theirs.attrs["spatialdata_attrs"] = {"spatialdata_software_version": "0.4.0"}
    theirs.create_group("shapes/tissues")
    with pytest.raises(DataError, match="another tool's, and not replaced"):
        export(filled, "zarr", tmp_path, overwrite=True)
    assert "shapes/tissues" in zarr.open_group(tmp_path / "b.zarr", mode="r")


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("x")
    real = Path.replace

    def stop(self: Path, target: Path) -> Path:
        if target == tmp_path / "a" and ".old" not in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt), writing_folder(tmp_path / "a"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]


def test_clams_list_of_another_encoding_is_not_lost(filled: Store, tmp_path: Path) -> None:
    listed = tmp_path / "process_list_autogen.csv"
    listed.write_text("slide_id,process\nold.svs,0\n", encoding="utf-8-sig")
    export(filled, "clam", tmp_path)
    assert [row.split(",")[0] for row in listed.read_text().split()] == [
        *("slide_id", "old.svs", "b.svs")
    ]
    listed.write_bytes("slide_id,process\nGrö.svs,0\n".encode("latin-1"))
    with pytest.raises(DataError, match="not extended, as it cannot be read"):
        export(filled, "clam", tmp_path, overwrite=True)
    assert "Grö" in listed.read_text("latin-1")


def test_clams_corners_are_those_of_the_nearest_run(store: Store, tmp_path: Path) -> None:
    for run, side in (("a", 256), ("b", 512)):
        for folder in ("feat/h5_files", "patches"):
            (tmp_path / run / folder).mkdir(parents=True)
        with h5py.File(tmp_path / run / "feat" / "h5_files" / "s.h5", "w") as file:
            file["features"], file["coords"] = features(), np.arange(8).reshape(4, 2) * side
        with h5py.File(tmp_path / run / "patches" / "s.h5", "w") as file:
            file["coords"] = np.arange(8).reshape(4, 2) * side
            file["coords"].attrs.update({"patch_size": side, "patch_level": 0})
    done = bring(store, "clam", tmp_path, encoder="x", mpp=0.5)
    assert [one["spec"]["size_px"] for one in done] == [256, 512]


# --- what the peers' own code takes, and any numbers -------------------------------------


def test_wsidata_takes_the_tile_spec(filled: Store, tmp_path: Path) -> None:
    export(filled, "zarr", tmp_path)
    told = zarr.open_group(tmp_path / "b.zarr", mode="r").attrs["tile_spec"]["tiles"]  # type: ignore[index]
    sides = {f"{n}{axis}" for n in ("", "stride_") for axis in ("height", "width")}
    levels = {f"{n}_{kind}" for n in ("ops", "base") for kind in ("level", "downsample")}
    assert set(told) == sides | levels | {"mpp", "tissue_name"}  # any other stops it
    assert int(told["width"] * told["base_downsample"]) == 448


def test_rows_of_a_table_say_whose_they_are(filled: Store, tmp_path: Path) -> None:
    export(filled, "zarr", tmp_path)
    root = zarr.open_group(tmp_path / "b.zarr", mode="a")
    table: Any = root[f"tables/{ENCODER}_tiles"]
    table.attrs["region"] = ["tiles"]
    del table["obsm/corner"]
    table["obs/tile_id"][...] = np.arange(10)[::-1]
    other = Store(tmp_path / "other")
    bring(other, "zarr", tmp_path)
    (mine,), (theirs,) = (list(store.features.values()) for store in (filled, other))
    assert np.array_equal(theirs.xy, mine.xy)
    assert np.array_equal(theirs.values, mine.values[::-1])


def test_a_name_that_is_not_used_is_told(filled: Store, tmp_path: Path) -> None:
    export(filled, "stamp", tmp_path)
    (one,) = bring(Store(tmp_path / "other"), "stamp", tmp_path / ENCODER, encoder="mine")
    assert one["warnings"] == [f"known again as {ENCODER}: --encoder is not used"]


def test_a_tensor_that_would_run_code_does_not(store: Store, tmp_path: Path) -> None:
    import pickle

    import torch

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    path = tmp_path / "s.pt"
    for data in (pickle.dumps(Evil()), b"another's", b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cut short, or not a file of one tensor"):
            bring(store, "clam", path, encoder="x")
    torch.save(torch.zeros(2, 3).to_sparse(), path)
    with pytest.raises(DataError, match="not one tensor"):
        bring(store, "clam", path, encoder="x")
    assert not (tmp_path / "ran").exists()


def test_what_was_counted_comes_back(store: Store, tmp_path: Path) -> None:
    tiles = replace(make_tiles(9, ITEM), dropped={"blur": 3}, file_bytes=123)
    key = put(store, tiles)
    export(store, "stamp", tmp_path / "out")
    other = Store(tmp_path / "other")
    bring(other, "stamp", tmp_path / "out")
    found = other.tiles[replace(key, encoder=None)]
    assert (found.dropped, found.file_bytes) == ({"blur": 3}, 123)


NAMES = st.text(st.characters(categories=("L", "N"), include_characters=" .+-_"), min_size=1)


@settings(max_examples=12, deadline=None)
@given(
    form=st.sampled_from(["trident", "clam", "stamp", "acmil", "zarr"]),
    mpp=st.sampled_from([0.2527, 0.1101, 0.499, 0.34567]),
    name=NAMES.map(lambda text: f"a{text[:30]}z"),
    corner=st.integers(0, 400_000),
    step=st.integers(1, 300),
    n=st.integers(2, 9),
)
def test_any_slide_goes_there_and_back(
    form: str, mpp: float, name: str, corner: int, step: int, n: int
) -> None:
    from pathcli.store.store import item_name

    spec = replace(tile_spec(), step_px=step)
    xy = np.stack([np.arange(n) * 101 + corner, np.arange(n) * 97 + corner], 1).astype(np.int32)
    item = item_name(name, "01234567")
    tiles = Tiles(item, xy, np.zeros(n, np.uint8), spec, mpp, 500_000, 500_000, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        mine, theirs = (Store(Path(folder) / which) for which in ("mine", "theirs"))
        key = put(mine, tiles, bad=n - 1)
        export(mine, form, Path(folder) / "out")
        assert bring(theirs, form, Path(folder) / "out")[0]["restored"]
        assert set(theirs.features) == {key}
        assert np.array_equal(theirs.features[key].xy, xy)
        assert theirs.tiles[Key(key.item, key.mpp, key.tiles)].spec == spec
        found = theirs.features[key].values
        assert np.array_equal(found, mine.features[key].values, equal_nan=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9000), st.integers(0, 3), st.sampled_from(["f2", "f4", "f8", "i8"]))
def test_halves_are_the_same_in_blocks(n: int, holes: int, kind: str) -> None:
    values = (np.random.default_rng(n).normal(size=(n + 3, 2)) * 9).astype(kind)
    if kind != "i8":
        values[: 2 * holes : 2] = np.nan
    half, warnings = halves(values, "x")
    whole = np.isfinite(values.astype(float)).all(1)
    with np.errstate(invalid="ignore"):
        expected = np.where(whole[:, None], values, np.nan).astype(np.float16)
    assert np.array_equal(half, expected, equal_nan=True)
    assert ("features are rounded to float16" in warnings) == (kind in {"f4", "f8"} and whole.any())


def test_tridents_overlap_is_a_step(filled: Store, tmp_path: Path) -> None:
    (one,) = bring(Store(tmp_path / "a"), "trident", trident(tmp_path, overlap=64))
    assert (one["spec"]["size_px"], one["spec"]["step_px"]) == (256, 192)
    put(
        filled,
        replace(make_tiles(4, ITEM), spec=replace(tile_spec(), step_px=200)),
        "x-1",
        bad=None,
    )
    export(filled, "trident", tmp_path, encoder="x")
    with h5py.File(tmp_path / "20x_224px_24px_overlap" / "features_x-1" / "b.h5") as file:
        assert file["coords"].attrs["overlap"] == 24
