import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathcli.slides.tiling import tile_spec
from pathcli.store import Store, upkeep
from pathcli.store import lease as leases
from pathcli.store.files import part_path
from pathcli.store.hdf5 import BLOCK_ROWS
from pathcli.store.store import item_name, key_of
from pathcli.types import BusyError, DataError, Key, ResourceError, Tiles

D = 5


def make_tiles(n: int, item: str = "a-00000000", mpp: float = 0.25) -> Tiles:
    xy = np.stack([np.arange(n) * 7, np.arange(n) * 3], 1).astype(np.int32)
    blank = np.zeros(n, np.uint8)
    return Tiles(item, xy, blank, tile_spec(), mpp, 10_000, 9_000, 0.5, ("careful",))


def rows(start: int, stop: int) -> np.ndarray:
    return (np.arange(start, stop)[:, None] * np.ones(D) % 97).astype(np.float16)


def fill(store: Store, tiles: Tiles, batch: int = 50, stop: int | None = None) -> Key:
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, "enc-1")
    writer = store.features.writer(tiles, "enc-1", (D,))
    first = writer.resumed // batch * batch
    with store.features.lock(key), writer:
        writer.begin(first)
        for at in range(first, len(tiles), batch):
            if stop is not None and at >= stop:
                raise KeyboardInterrupt
            end = min(at + batch, len(tiles))
            writer.write(rows(at, end), np.zeros(end - at, np.uint8))
    return key


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


@pytest.mark.parametrize("place", ["features", "coords", "status", "block_crc32"])
def test_one_changed_value_is_found(store: Store, place: str) -> None:
    key = fill(store, make_tiles(300))
    with h5py.File(store.features.path(key), "r+") as file:
        file[place][1] = 1 - np.asarray(file[place][1]).astype(file[place].dtype)
    assert [f.state for f in upkeep.verify(store) if f.path.suffix == ".h5"] == ["broken"]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_entry_is_broken_and_pruned(store: Store, keep: int) -> None:
    key = fill(store, make_tiles(900))
    path = store.features.path(key)
    os.truncate(path, keep)
    with pytest.raises(DataError, match="damaged"):
        store.features[key]
    assert [r.path for r in upkeep.prune(store, dry_run=True)] == [path]
    assert path.exists()
    upkeep.prune(store)
    assert not path.exists()


def test_verify_names_pending_stale_and_foreign_files(store: Store) -> None:
    tiles = make_tiles(500)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, stop=100)
    foreign = store.root / "notes.txt"
    foreign.write_text("mine")
    states = {f.path.name: f.state for f in upkeep.verify(store)}
    part = part_path(store.features.path(Key(tiles.item, 0.25, tiles.spec.digest, "enc-1")))
    assert states == {part.name: "pending", "notes.txt": "foreign"}
    os.utime(part, (0, 0))
    assert {f.state for f in upkeep.verify(store)} == {"stale", "foreign"}
    assert upkeep.prune(store)[0].why == "stale"
    assert foreign.exists()


def test_an_entry_moved_to_another_key_is_broken(store: Store) -> None:
    path = store.features.path(fill(store, make_tiles(5)))
    path.rename(path.with_name("b-00000000@0.25.h5"))
    assert [f.state for f in upkeep.verify(store)] == ["broken"]


def test_prune_by_encoder_and_by_age(store: Store) -> None:
    key = fill(store, make_tiles(5))
    with pytest.raises(DataError, match="enc-1"):
        upkeep.prune(store, encoder="enc-2")
    assert upkeep.prune(store, encoder="enc-1", older_than_days=1) == []
    assert len(upkeep.prune(store, encoder="enc-1")) == 1
    assert key not in store.features


def test_a_lease_keeps_a_second_writer_out_and_is_released(tmp_path: Path) -> None:
    entry = tmp_path / "e.h5"
    with leases.lease(entry):
        owner = json.loads(leases.lease_path(entry).read_text())
        assert owner["pid"] == os.getpid()
        with pytest.raises(BusyError, match=str(os.getpid())), leases.lease(entry):
            pass
    with leases.lease(entry):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lease_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    entry = tmp_path / "e.h5"
    code = "import sys, pathlib, pathcli.store.lease as l; l._take(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(leases.lease_path(entry))], check=True)
    with leases.lease(entry):
        pass


CONTENDER = """
import sys, pathlib, time, pathcli.store.lease as l
entry = pathlib.Path(sys.argv[1])
for _ in range(200):
    try:
        with l.lease(entry):
            with open(entry, "x"): pass
            time.sleep(0.001)
            entry.unlink()
    except l.BusyError:
        time.sleep(0.001)
    dead = l.lease_path(entry)
    try:  # leave the lease of a dead process behind, as a kill would
        with open(dead, "x") as file:
            file.write('{"host": "%s", "pid": 999999999}' % l.socket.gethostname())
    except FileExistsError: pass
"""


@pytest.mark.slow
def test_a_dead_lease_is_taken_over_by_one_process_only(tmp_path: Path) -> None:
    # each holder creates a file that must not exist: two holders at once would fail
    command = [sys.executable, "-c", CONTENDER, str(tmp_path / "entry")]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    for child in children:
        _, err = child.communicate()
        assert child.returncode == 0, err.decode()


def test_a_lease_of_another_host_lapses_with_its_heartbeat(tmp_path: Path) -> None:
    path = leases.lease_path(tmp_path / "e.h5")
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    assert not leases.lapsed(path)
    os.utime(path, (0, time.time() - leases.LAPSE_S - 1))
    assert leases.lapsed(path)


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from test_store import fill, make_tiles
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
    for _ in range(12):
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


def test_a_newer_entry_is_not_misread(store: Store) -> None:
    key = fill(store, make_tiles(5))
    with h5py.File(store.features.path(key), "r+") as file:
        file.attrs["format"] = 2
    with pytest.raises(DataError, match="update pathcli"):
        store.features[key]
