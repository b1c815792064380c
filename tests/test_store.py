import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import Run
from entries import D, fill, make_tiles, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.store import Store, upkeep
from pathcli.store.entries import key_of
from pathcli.store.files import part_path
from pathcli.store.hdf5 import BLOCK_ROWS
from pathcli.store.numbers import largest, missing
from pathcli.store.place import LocalPlace
from pathcli.store.store import item_name
from pathcli.types import Key


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(0, 300),
    item=st.text(min_size=1, max_size=40).map(lambda s: item_name(s, "0123456789")),
    mpp=st.floats(0.05, 20).map(lambda v: float(f"{v:.6g}")),
)
def test_what_is_stored_comes_back(store: Store, n: int, item: str, mpp: float) -> None:
    tiles = make_tiles(n, item, mpp)
    store.tiles[tiles.key] = tiles
    back = store.tiles[tiles.key]
    assert np.array_equal(back.xy, tiles.xy)
    assert back.xy.dtype == np.int32
    assert (back.item, back.slide_mpp, back.spec.digest) == (item, mpp, tiles.spec.digest)
    assert back.warnings == tiles.warnings
    assert key_of(store.tiles.path(tiles.key)) == tiles.key
    assert tiles.key in list(store.tiles)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 4 * BLOCK_ROWS + 3),
    stop=st.integers(0, 4 * BLOCK_ROWS),
    batches=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_an_interrupted_entry_is_resumed_to_the_same_rows(
    store: Store, n: int, stop: int, batches: tuple[int, int]
) -> None:
    tiles = make_tiles(n, f"i{time.monotonic_ns()}-00000000")
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, "enc-1")
    try:
        fill(store, tiles, batches[0], stop)
    except KeyboardInterrupt:
        assert key not in store.features
        assert part_path(store.features.path(key)).exists()
    if key not in store.features:
        fill(store, tiles, batches[1])
    assert np.array_equal(store.features[key].values, rows(0, n))
    assert {f.state for f in upkeep.verify(store)} == {"ok"}


def test_a_resumed_writer_loses_at_most_one_block(store: Store) -> None:
    tiles = make_tiles(1000)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, 50, stop=600)
    assert store.features.writer(tiles, "enc-1", (D,)).resumed == 600 // BLOCK_ROWS * BLOCK_ROWS


def test_a_half_written_block_is_not_believed(store: Store) -> None:
    tiles = make_tiles(1000)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, 50, stop=600)
    part = part_path(store.features.path(Key(tiles.item, 0.25, tiles.spec.digest, "enc-1")))
    with h5py.File(part, "r+") as file:
        file["features"][BLOCK_ROWS + 1] = 7
    assert store.features.writer(tiles, "enc-1", (D,)).resumed == BLOCK_ROWS


def test_unreadable_tiles_are_nan_exactly_where_status_says(store: Store) -> None:
    tiles = make_tiles(10)
    values, status = rows(0, 10), np.zeros(10, np.uint8)
    values[3], status[3] = np.nan, 1
    with store.features.writer(tiles, "enc-1", (D,)) as writer:
        writer.begin(0)
        writer.write(values, status)
    key = next(iter(store.features))
    assert np.isnan(store.features[key].values[3]).all()
    assert store.features.shape(key) == ((D,), 1)
    assert {f.state for f in upkeep.verify(store)} == {"ok"}


def test_a_value_beyond_float16_is_refused(store: Store) -> None:
    writer = store.features.writer(make_tiles(2), "enc-1", (D,))
    writer.__enter__().begin(0)
    with pytest.raises(DataError, match="float16") as caught:
        writer.write(np.full((2, D), np.inf, np.float16), np.zeros(2, np.uint8))
    writer.__exit__(DataError, caught.value, None)
    assert not list(store.features)


def test_files_open_as_those_of_the_field(store: Store) -> None:
    key = fill(store, make_tiles(300))
    with h5py.File(store.features.path(key)) as file:
        assert file["features"].shape == (300, D)
        assert file["features"].chunks is None
        assert file["coords"].shape == (300, 2)
        assert file["coords"].attrs["patch_size"] == 224
        assert file["coords"].attrs["patch_size_level0"] == 448
        assert file["features"].attrs["encoder"] == "enc-1"
        assert json.loads(file.attrs["spec"])["size_px"] == 224


def test_an_entry_that_takes_the_place_of_a_read_one_is_read(store: Store) -> None:
    for n in (300, 20, 400):
        tiles = make_tiles(n)
        key = fill(store, tiles)
        for back in (store.features[key], store.features.mapped(key), store.features[key]):
            assert np.array_equal(back.values, rows(0, n))
            assert np.array_equal(back.xy, tiles.xy)
        store.features.remove(key)


def test_an_entry_replaced_while_it_is_being_opened_is_read(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = fill(store, make_tiles(300))
    path, fstat = store.features.path(key), os.fstat

    def replaced(handle: int) -> os.stat_result:
        (other := path.with_suffix(".other")).write_bytes(path.read_bytes())
        other.replace(path)
        return fstat(handle)

    monkeypatch.setattr("pathcli.store.hdf5_reading.os.fstat", replaced)
    for back in (store.features[key], store.features.mapped(key)):
        assert np.array_equal(back.values, rows(0, 300))


def test_an_entry_rewritten_in_place_with_its_old_time_is_read_anew(store: Store) -> None:
    tiles, whole = make_tiles(300), []
    for each in (tiles, replace(tiles, xy=tiles.xy + 1)):
        key = fill(store, each)
        whole.append((path := store.features.path(key)).read_bytes())
        path.unlink()
    path.write_bytes(whole[0])
    assert np.array_equal(store.features[key].xy, tiles.xy)
    old = path.stat().st_mtime_ns
    time.sleep(0.02)  # clocks of file systems tick more slowly than they tell
    path.write_bytes(whole[1])
    os.utime(path, ns=(old, old))
    assert np.array_equal(store.features[key].xy, tiles.xy + 1)


def test_an_entry_of_no_tiles_is_written_and_read(store: Store) -> None:
    key = store.features.verify(fill(store, make_tiles(0)))
    for back in (store.features[key], store.features.mapped(key)):
        assert (back.values.shape, back.xy.shape) == ((0, D), (0, 2))


def test_what_breaks_after_it_was_read_is_found(store: Store) -> None:
    key = fill(store, make_tiles(300))
    assert len(store.features[key].values) == 300
    os.truncate(store.features.path(key), store.features.path(key).stat().st_size - 1)
    for read in (store.features.__getitem__, store.features.mapped, store.features.verify):
        with pytest.raises(DataError, match="damaged"):
            read(key)


def test_damage_to_the_list_of_arrays_is_told_as_damage(store: Store) -> None:
    key = fill(store, make_tiles(300))
    with store.features.path(key).open("r+b") as file:
        file.seek(file.read().index(b"HEAP") + 16)  # where the free part of the names begins
        file.write(b"\3")
    for read in (store.features.__getitem__, store.features.mapped, store.features.verify):
        with pytest.raises(DataError, match="damaged"):
            read(key)


def test_what_another_program_cut_into_chunks_is_read(store: Store) -> None:
    key = fill(store, make_tiles(300))
    with h5py.File(store.features.path(key), "r+") as file:
        for name in ("features", "coords", "status"):
            values, told = file[name][:], dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values, compression="gzip").attrs.update(told)
    assert store.features.verify(key) == key
    for back in (store.features[key], store.features.mapped(key)):
        assert np.array_equal(back.values, rows(0, 300))
        assert np.array_equal(back.xy, make_tiles(300).xy)


def test_the_largest_magnitude_is_that_of_every_float16() -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert np.array_equal(largest(values[:, None]), np.abs(values), equal_nan=True)
    square = values.reshape(256, 16, 16)
    for some in (square, square[::3, :, 1:], square.astype(np.float32)):
        assert np.array_equal(largest(some), np.abs(some).max((1, 2)), equal_nan=True)
        assert np.array_equal(missing(some), np.isnan(some).any((1, 2)))


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from entries import fill, make_tiles
from pathcli.store import Store
import pathcli.store.hdf5 as h
slow = h.FeatureWriter.write
def write(self, *a):
    time.sleep(0.002); slow(self, *a)
h.FeatureWriter.write = write
store, tiles = Store(sys.argv[1]), make_tiles(3000)
store.tiles[tiles.key] = tiles
print("go", flush=True)
fill(store, tiles, 10)
print("done", flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_nothing_broken(store: Store, rng: np.random.Generator) -> None:
    here = str(Path(__file__).parent)
    seen = set()
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(store.root), here], stdout=subprocess.PIPE
        )
        assert child.stdout
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        seen |= {f.state for f in upkeep.verify(store)}
    assert seen <= {"ok", "pending", "stale"}
    assert "pending" in seen
    tiles = make_tiles(3000)
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, "enc-1")
    if key not in store.features:
        fill(store, tiles)
    assert np.array_equal(store.features[key].values, rows(0, 3000))
    upkeep.prune(store)  # a lease can outlive a process killed right after it published
    assert {f.state for f in upkeep.verify(store)} == {"ok"}


def test_a_disk_too_small_is_refused_before_the_work(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="disk full"):
        store.features.writer(make_tiles(1000), "enc-1", (D,))
    assert not [p for p in store.root.rglob("*") if p.suffix in {".h5", ".part"}]


def test_a_store_opens_only_what_is_a_store(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match="is a file"):
        Store(file)
    with pytest.raises(DataError, match="not empty"):
        Store(tmp_path)
    new = tmp_path / "ein Ort für Merkmale"
    Store(new)
    (new / "store.json").write_text('{"format": 99}')
    with pytest.raises(DataError, match="update pathcli"):
        Store(new)
    (new / "store.json").write_text("garbage")
    with pytest.raises(DataError, match="damaged"):
        Store(new)


def test_an_address_is_text_without_a_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for lost in (Path("s3://bucket/store"), "s3:/bucket/store"):
        with pytest.raises(UsageError, match="two slashes"):
            Store(lost)
    for pattern in ("memory://a*", "memory://a[bc]", "memory://a?"):
        with pytest.raises(UsageError, match="without"):
            Store(pattern)
    assert not list(tmp_path.iterdir())


def test_those_who_read_make_no_store_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no store here"):  # as where nothing is mounted
        Store(tmp_path, create=False)
    assert not list(tmp_path.iterdir())


def test_an_entry_without_features_is_broken_and_stops_no_check(store: Store) -> None:
    key = fill(store, make_tiles(20))
    with h5py.File(store.features.path(key), "r+") as file:
        file.move("features", "gone")
    assert [f.state for f in upkeep.verify(store)] == ["broken"]


@pytest.mark.parametrize("array", ["features", "coords"])
@pytest.mark.parametrize(
    "told",
    [{"shape": []}, {"shape": [None, D]}, {"shape": [-1, D]}, {"data_type": []}, {"grid": 0}, None],
)
def test_nonsense_in_the_metadata_is_a_broken_entry(
    tmp_path: Path, array: str, told: dict[str, Any] | None
) -> None:
    store = Store(tmp_path / "s.zarr")
    key = fill(store, make_tiles(20))
    path = store.features.path(key) / "zarr.json"
    group = json.loads(path.read_text())
    arrays = group["consolidated_metadata"]["metadata"]
    if told is None:
        del arrays[array]
    elif "grid" in told:
        arrays[array]["chunk_grid"]["configuration"]["chunk_shape"][0] = 0
    else:
        arrays[array] |= told
    path.write_text(json.dumps(group))
    for read in (store.features.__getitem__, store.features.mapped, store.features.verify):
        with pytest.raises(DataError, match="damaged"):
            read(key)
    assert [f.state for f in upkeep.verify(store)] == ["broken"]


def test_a_lease_given_back_while_it_is_looked_at_stops_no_check(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = make_tiles(20)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, 5, 10)
    there = LocalPlace.exists
    monkeypatch.setattr(LocalPlace, "exists", lambda s, n: n.endswith(".lease") or there(s, n))
    assert {f.state for f in upkeep.verify(store)} == {"pending"}


def test_what_is_known_of_one_item_reads_no_other_card(store: Store, run: Run) -> None:
    for item in ("a-00000000", "b-00000000"):
        store.place.write(f"slides/{item}.json", b'{"item": "%b"}' % item.encode())
    store.place.write("slides/b-00000000.json", b"{")
    code, out, err = run("store", "info", "a-00000000", "--store", store.root, "--json")
    assert (code, json.loads(out)["item"], err) == (0, "a-00000000", "")
    assert run("store", "info", "b-00000000", "--store", store.root)[0] == 4
    assert "a-00000000" in run("store", "info", "a-0000000", "--store", store.root)[2]


def test_a_run_killed_just_before_publishing_is_only_published(store: Store) -> None:
    tiles = make_tiles(200)  # the last block is not full
    writer = store.features.writer(tiles, "enc-1", (D,))
    writer.__enter__()
    writer.begin(0)
    writer.write(rows(0, 200), np.zeros(200, np.uint8))
    writer.__exit__(KeyboardInterrupt, None, None)
    again = store.features.writer(tiles, "enc-1", (D,))
    assert again.resumed == 200
    with again:
        pass
    assert {f.state for f in upkeep.verify(store)} == {"ok"}


OPENER = (
    "import sys; from pathcli.store import Store; [Store(f'{sys.argv[1]}/{i}') for i in range(40)]"
)


@pytest.mark.slow
def test_a_new_store_may_be_opened_by_many_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OPENER, str(tmp_path)]
    children = [subprocess.Popen(command) for _ in range(4)]
    assert [child.wait() for child in children] == [0, 0, 0, 0]


def test_a_store_is_what_it_says_wherever_it_was_copied(tmp_path: Path) -> None:
    for kind, made, copied in (("hdf5", "a", "b.zarr"), ("zarr", "c.zarr", "d")):
        Store(tmp_path / made)
        (tmp_path / made).rename(tmp_path / copied)
        opened = Store(tmp_path / copied, create=False)
        assert type(opened.backend).__name__.lower() == kind
    (tmp_path / "b.zarr" / "store.json").write_text('{"format": 1}')  # before it said so
    assert type(Store(tmp_path / "b.zarr").backend).__name__ == "Zarr"
    (tmp_path / "d" / "store.json").write_text('{"format": 1, "entries": "parquet"}')
    with pytest.raises(DataError, match="update pathcli"):
        Store(tmp_path / "d")


def test_what_may_not_be_read_is_not_called_empty(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathcli.store.place.os.listdir", refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        list(store.features)
