"""What a store promises, wherever it is: the same tests for HDF5, Zarr, S3 and memory."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

import h5py
import numpy as np
import places
import pytest
from entries import D, fill, make_tiles, rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathcli.errors import BusyError, DataError, ResourceError
from pathcli.store import Store, zarr_writer
from pathcli.store import lease as leases
from pathcli.store.entries import key_of
from pathcli.store.files import part_path
from pathcli.store.place import PROBE
from pathcli.types import Key, Tiles

few = settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def _s3() -> Iterator[None]:
    with places.s3_server():
        yield


@pytest.fixture(params=places.KINDS)
def there(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store that is not there yet."""
    monkeypatch.setattr(zarr_writer, "CHUNK_ROWS", 128)
    if request.param == "s3":
        request.getfixturevalue("_s3")
    return places.address(request.param, tmp_path)


@pytest.fixture
def anywhere(there: str) -> Store:
    return Store(there)


def key_for(tiles: Tiles, encoder: str = "enc-1") -> Key:
    return Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, encoder)


def interrupted(store: Store, tiles: Tiles, batch: int, stop: int) -> Key:
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, batch, stop)
    return key_for(tiles)


def put(
    store: Store,
    tiles: Tiles,
    values: np.ndarray,
    status: np.ndarray,
    encoder: str = "enc-1",
    *,
    stopped: bool = False,
) -> Key:
    """Write rows from the first on in one piece; `stopped` before the entry is published."""
    writer = store.features.writer(tiles, encoder, values.shape[1:])
    with suppress(KeyboardInterrupt), writer:
        writer.begin(0)
        writer.write(values, status)
        if stopped:
            raise KeyboardInterrupt
    return key_for(tiles, encoder)


def spoil(store: Store, key: Key, row: int, *, begun: bool = False) -> None:
    """Turn one bit of one feature round, where it is kept."""
    if isinstance(store.backend, places.Zarr):
        name = f"{store.features.name(key)}/features/c.{row // places.block(store)}.0"
        data = bytearray(store.place.read(name))
        data[row % places.block(store) * D * 2] ^= 1
        store.place.write(name, bytes(data))
        return
    path = store.features.path(key)
    with h5py.File(part_path(path) if begun else path, "r+") as file:
        file["features"][row, 0] += 1


# --- entries -----------------------------------------------------------------------------


@few
@given(n=st.integers(0, 300), mpp=st.floats(0.05, 20).map(lambda v: float(f"{v:.6g}")))
def test_tiles_come_back_as_they_were_put(anywhere: Store, n: int, mpp: float) -> None:
    tiles = make_tiles(n, "Fall_7_β-01234567", mpp)
    anywhere.tiles[tiles.key] = tiles
    back = anywhere.tiles[tiles.key]
    assert np.array_equal(back.xy, tiles.xy)
    assert np.array_equal(back.status, tiles.status)
    assert (back.xy.dtype, back.status.dtype) == (np.int32, np.uint8)
    assert back.key == tiles.key == anywhere.tiles.verify(tiles.key)
    assert (back.width, back.height, back.warnings) == (10_000, 9_000, ("careful",))
    assert key_of(anywhere.tiles.name(tiles.key)) == tiles.key
    assert tiles.key in anywhere.tiles
    assert tiles.key in list(anywhere.tiles)


@few
@given(
    n=st.integers(1, 4 * 128 + 3),
    stop=st.integers(0, 4 * 128),
    batches=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_an_interrupted_entry_is_resumed_to_the_same_rows_anywhere(
    anywhere: Store, n: int, stop: int, batches: tuple[int, int]
) -> None:
    tiles = make_tiles(n, f"i{time.monotonic_ns()}-00000000")
    key = key_for(tiles)
    try:
        fill(anywhere, tiles, batches[0], stop)
    except KeyboardInterrupt:
        assert key not in anywhere.features
        assert anywhere.features.begun(key)
        fill(anywhere, tiles, batches[1])
    assert not anywhere.features.begun(key)
    assert np.array_equal(anywhere.features[key].values, rows(0, n))
    assert anywhere.features.verify(key) == key


def test_at_most_one_block_is_lost_anywhere(anywhere: Store) -> None:
    tiles = make_tiles(1000)
    interrupted(anywhere, tiles, 50, 600)
    assert anywhere.features.writer(tiles, "enc-1", (D,)).resumed == 600 // 128 * 128


def test_a_damaged_block_of_an_interrupted_run_is_done_again(anywhere: Store) -> None:
    tiles = make_tiles(1000)
    key = interrupted(anywhere, tiles, 50, 600)
    spoil(anywhere, key, 128 + 1, begun=True)
    assert anywhere.features.writer(tiles, "enc-1", (D,)).resumed == 128
    fill(anywhere, tiles)
    assert np.array_equal(anywhere.features[key].values, rows(0, 1000))


def test_what_a_run_of_other_tiles_left_is_not_resumed(anywhere: Store) -> None:
    tiles = make_tiles(1000)
    interrupted(anywhere, tiles, 50, 600)
    tiles.xy[0, 0] += 1
    assert anywhere.features.writer(tiles, "enc-1", (D,)).resumed == 0
    assert anywhere.features.writer(tiles, "enc-1", (D + 1,)).resumed == 0


def test_a_run_that_wrote_all_is_only_published_anywhere(anywhere: Store) -> None:
    tiles = make_tiles(200)
    put(anywhere, tiles, rows(0, 200), np.zeros(200, np.uint8), stopped=True)
    with anywhere.features.writer(tiles, "enc-1", (D,)) as again:
        assert again.resumed == 200
    assert anywhere.features.verify(key_for(tiles)) == key_for(tiles)


def test_an_entry_with_rows_missing_is_not_published(anywhere: Store) -> None:
    tiles = make_tiles(300)
    with pytest.raises(DataError):
        put(anywhere, tiles, rows(0, 200), np.zeros(200, np.uint8))
    assert key_for(tiles) not in anywhere.features


@pytest.mark.parametrize("encoder", ["enc-1", "enc-1-int8"])
def test_unreadable_tiles_are_nan_exactly_where_status_says_anywhere(
    anywhere: Store, encoder: str
) -> None:
    tiles = make_tiles(300)
    values, status = rows(0, 300), np.zeros(300, np.uint8)
    values[131], status[131] = np.nan, 1
    put(anywhere, tiles, values[:270], status[:270], encoder, stopped=True)
    with anywhere.features.writer(tiles, encoder, (D,)) as writer:
        assert (writer.resumed, writer.resumed_bad) == (256, 1)
        writer.begin(250)
        writer.write(values[250:], status[250:])
    key = key_for(tiles, encoder)
    back = anywhere.features[key]
    assert np.array_equal(np.isnan(back.values).all(1), status == 1)
    assert np.array_equal(back.status, status)
    assert np.abs(back.values - values)[status == 0].max() <= (97 / 254 if "int8" in encoder else 0)
    assert anywhere.features.shape(key) == ((D,), 1)
    assert anywhere.features.verify(key) == key
    mapped = anywhere.features.mapped(key)
    for index in (3, -1, slice(5, 290), slice(None), [299, 0, 131], status == 0, slice(9, 2, -3)):
        assert np.array_equal(np.array(mapped.values[index]), back.values[index], equal_nan=True)
    assert mapped.values.shape == (300, D)


def test_tokens_keep_their_shape_anywhere(anywhere: Store) -> None:
    tiles, values = make_tiles(5), np.arange(5 * 3 * 4).reshape(5, 3, 4).astype(np.float16)
    for encoder in ("enc-1", "enc-1-int8"):
        key = put(anywhere, tiles, values, np.zeros(5, np.uint8), encoder)
        mapped = anywhere.features.mapped(key).values
        assert np.allclose(np.array(mapped[3]), values[3], atol=0.2)
        assert anywhere.features.shape(key) == ((3, 4), 0)
        assert anywhere.features.verify(key) == key


def test_a_value_beyond_float16_is_refused_anywhere(anywhere: Store) -> None:
    with pytest.raises(DataError, match="float16"):
        put(anywhere, make_tiles(2), np.full((2, D), np.inf, np.float16), np.zeros(2, np.uint8))
    assert not list(anywhere.features)


def test_what_is_thrown_away_leaves_nothing(anywhere: Store) -> None:
    tiles = make_tiles(300)
    interrupted(anywhere, tiles, 50, 250)
    anywhere.features.writer(tiles, "enc-1", (D,)).discard()
    assert not anywhere.features.begun(key_for(tiles))
    assert [file.name for file in anywhere.place.list()] == ["store.json"]


def test_verify_finds_a_flipped_bit(anywhere: Store) -> None:
    key = fill(anywhere, make_tiles(300))
    assert anywhere.features.verify(key) == key
    spoil(anywhere, key, 200)
    with pytest.raises(DataError, match="1 of 3 blocks"):
        anywhere.features.verify(key)


def test_numbers_where_status_says_there_are_none_are_not_published(anywhere: Store) -> None:
    tiles, status = make_tiles(10), np.zeros(10, np.uint8)
    status[4] = 1
    with pytest.raises(DataError):
        put(anywhere, tiles, rows(0, 10), status)
    assert not list(anywhere.features)


def test_entries_are_listed_measured_and_removed(anywhere: Store) -> None:
    began = anywhere.place.now()
    keys = [fill(anywhere, make_tiles(n, f"s{n}-00000000")) for n in (3, 4)]
    interrupted(anywhere, make_tiles(300, "s5-00000000"), 50, 200)
    tiles = make_tiles(4, "s4-00000000")
    anywhere.tiles[tiles.key] = tiles
    assert list(anywhere.features) == keys == anywhere.features.having("enc-1", keys[0].tiles)
    assert (len(anywhere.features), len(anywhere.tiles)) == (2, 1)
    assert anywhere.features.having("enc-2", keys[0].tiles) == []
    assert 100 < anywhere.features.size(keys[0]) < 30_000
    assert began - 2 <= anywhere.features.time(keys[0]) <= anywhere.place.now() + 2
    anywhere.features.remove(keys[0])
    anywhere.features.remove(keys[0])
    assert list(anywhere.features) == [keys[1]]
    for asked in (
        anywhere.features.__getitem__,
        anywhere.features.mapped,
        anywhere.features.size,
        anywhere.features.shape,
        anywhere.features.time,
        anywhere.features.verify,
    ):
        with pytest.raises(KeyError):
            asked(keys[0])
    assert tiles.key in anywhere.tiles


def test_a_store_is_known_again_and_by_other_processes(anywhere: Store, there: str) -> None:
    key = fill(anywhere, make_tiles(300))
    for again in (Store(there), deepcopy(anywhere), Store(there, create=False)):
        assert np.array_equal(again.features[key].values, rows(0, 300))
    assert str(anywhere.root) == there


def test_a_store_is_not_made_by_those_who_read(there: str) -> None:
    with pytest.raises(ResourceError, match="no store here"):
        Store(there, create=False)


def test_a_store_of_a_later_pathcli_is_refused(anywhere: Store, there: str) -> None:
    anywhere.place.write("store.json", b'{"format": 99}')
    with pytest.raises(DataError, match="update pathcli"):
        Store(there)
    anywhere.place.write("store.json", b"garbage")
    with pytest.raises(DataError, match="damaged"):
        Store(there)
    anywhere.place.remove("store.json")
    anywhere.place.write("notes.txt", b"")
    with pytest.raises(DataError, match="not empty"):
        Store(there)


def test_a_new_store_is_opened_by_many_at_once(there: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: Store(there), range(16)))
    assert {str(store.root) for store in stores} == {there}


# --- leases ------------------------------------------------------------------------------


def test_a_lease_has_one_holder_anywhere(anywhere: Store) -> None:
    key = key_for(make_tiles(1))
    with anywhere.features.lock(key) as held:
        assert held()
        with pytest.raises(BusyError, match="being written"), anywhere.features.lock(key):
            pass
    with anywhere.features.lock(key):
        pass
    assert [file.name for file in anywhere.place.list()] == ["store.json"]


def test_of_many_who_create_a_file_one_succeeds(anywhere: Store) -> None:
    def create(i: int) -> int | None:
        try:
            anywhere.place.create("one", str(i).encode())
        except FileExistsError:
            return None
        return i

    if anywhere.place.root.startswith("memory"):
        won = [i for i in range(8) if create(i) is not None]  # it is of one process, one at a time
    else:
        with ThreadPoolExecutor(8) as pool:
            won = [i for i in pool.map(create, range(8)) if i is not None]
    assert len(won) == 1
    assert anywhere.place.read("one") == str(won[0]).encode()


def test_the_lease_of_the_dead_is_taken_over_anywhere(anywhere: Store) -> None:
    dead = leases._me() | {"pid": 999_999_999}
    anywhere.place.create("x.lease", json.dumps(dead).encode())
    with leases.lease(anywhere.place, "x") as held:
        assert held()
    assert not anywhere.place.exists("x.lease")


def test_a_lease_of_elsewhere_lapses_by_the_clock_of_the_place(
    anywhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = anywhere.place
    place.create("x.lease", b'{"machine": "elsewhere", "pid": 1}')
    monkeypatch.setattr(time, "time", lambda: 0.0)  # this machine's own clock is far behind
    assert not leases.lapsed(place, "x.lease")
    with pytest.raises(BusyError), leases.lease(place, "x"):
        pass
    monkeypatch.setattr(leases, "LAPSE_S", -2)
    assert leases.lapsed(place, "x.lease")
    with leases.lease(place, "x") as held:
        assert held()


def test_a_heartbeat_renews_the_lease_anywhere(
    anywhere: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.2)
    with leases.lease(anywhere.place, "x") as held:
        first = anywhere.place.stat("x.lease").mtime
        deadline = time.monotonic() + 5
        while anywhere.place.stat("x.lease").mtime == first and time.monotonic() < deadline:
            time.sleep(0.1)
        assert anywhere.place.stat("x.lease").mtime > first
        assert held()
    with pytest.raises(FileNotFoundError):  # somebody late does not make it anew
        anywhere.place.touch("x.lease")
    assert not anywhere.place.exists("x.lease")


def test_a_lease_that_was_taken_over_says_so_anywhere(anywhere: Store) -> None:
    with leases.lease(anywhere.place, "x") as held:
        anywhere.place.write("x.lease", b'{"machine": "other", "pid": 1}')
        assert not held()
    assert anywhere.place.exists("x.lease")


def test_looking_leaves_no_probe(anywhere: Store) -> None:
    anywhere.place.now()
    assert not [name for name in anywhere.place.names() if name.startswith(PROBE)]
