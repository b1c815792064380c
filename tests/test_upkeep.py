import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import places
import pytest
from entries import fill, make_tiles

from pathcli.errors import DataError
from pathcli.store import Store, upkeep
from pathcli.store.files import part_path
from pathcli.store.lease import lease_name
from pathcli.store.place import LocalPlace
from pathcli.store.units import usage
from pathcli.types import Key, Tiles

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("place", ["features", "coords", "status", "block_crc32"])
def test_one_changed_value_is_found(store: Store, place: str) -> None:
    key = fill(store, make_tiles(300))
    with h5py.File(store.features.path(key), "r+") as file:
        file[place][1] = 1 - np.asarray(file[place][1]).astype(file[place].dtype)
    assert [f.state for f in upkeep.verify(store) if f.name.endswith(".h5")] == ["broken"]


@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_a_truncated_entry_is_broken_and_pruned(store: Store, keep: int) -> None:
    key = fill(store, make_tiles(900))
    path = store.features.path(key)
    os.truncate(path, keep)
    with pytest.raises(DataError, match="damaged"):
        store.features[key]
    assert [r.name for r in upkeep.prune(store, dry_run=True)] == [store.features.name(key)]
    assert path.exists()
    upkeep.prune(store)
    assert not path.exists()


def test_verify_names_pending_stale_and_foreign_files(store: Store) -> None:
    tiles = make_tiles(500)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, stop=100)
    foreign = store.root / "notes.txt"
    foreign.write_text("mine")
    states = {Path(f.name).name: f.state for f in upkeep.verify(store)}
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


def test_a_newer_entry_is_not_misread(store: Store) -> None:
    key = fill(store, make_tiles(5))
    with h5py.File(store.features.path(key), "r+") as file:
        file.attrs["format"] = 2
    with pytest.raises(DataError, match="update pathcli"):
        store.features[key]


def test_prune_leaves_files_of_others_and_of_later_versions(store: Store) -> None:
    key = fill(store, make_tiles(5))
    newer = store.features.path(key)
    with h5py.File(newer, "r+") as file:
        file.attrs["format"] = 2
    folder = newer.parent
    with h5py.File(folder / "TCGA-AA-0001.h5", "w") as file:
        file["features"] = np.zeros(3)
    (folder / "._x-00000000@0.5.h5").write_bytes(b"finder")
    states = {Path(f.name).name: f.state for f in upkeep.verify(store)}
    assert states == {
        newer.name: "newer",
        "TCGA-AA-0001.h5": "foreign",
        "._x-00000000@0.5.h5": "foreign",
    }
    assert upkeep.prune(store) == []
    assert [k.item for k in store.features] == ["a-00000000"]


def test_an_entry_the_system_refuses_is_not_broken(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, make_tiles(5))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(h5py, "File", refuse)
    assert [f.state for f in upkeep.verify(store)] == ["unreadable"]
    assert upkeep.prune(store) == []


def test_a_spec_of_a_later_version_is_not_broken(store: Store) -> None:
    path = store.features.path(fill(store, make_tiles(5)))
    with h5py.File(path, "r+") as file:
        spec = json.loads(file.attrs["spec"]) | {"invented_later": 1}
        file.attrs["spec"] = json.dumps(spec)
    assert [f.state for f in upkeep.verify(store)] == ["newer"]


def test_prune_keeps_what_is_being_written(store: Store) -> None:
    tiles = make_tiles(500)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, stop=300)
    key = Key(tiles.item, 0.25, tiles.spec.digest, "enc-1")
    part = part_path(store.features.path(key))
    os.utime(part, (0, 0))
    (removal,) = upkeep.prune(store, dry_run=True)
    with store.features.lock(key):
        assert not upkeep._remove(store, removal)
        assert part.exists()
    assert upkeep._remove(store, removal)
    assert not part.exists()


# --- the same over every backend ---------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with places.s3_server() as at:
        yield at


@pytest.fixture(params=places.KINDS)
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        request.getfixturevalue("server")
    return Store(places.address(request.param, tmp_path))


def put(store: Store, tiles: Tiles, encoder: str = "enc-1", width: int = 5) -> Key:
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, encoder)
    with store.features.lock(key), store.features.writer(tiles, encoder, (width,)) as writer:
        writer.begin(0)
        n = len(tiles)
        writer.write(np.ones((n, width), np.float16), np.zeros(n, np.uint8))
    return key


def a_file_of(store: Store, key: Key) -> str:
    """Return the name of a file that holds features."""
    name = store.features.name(key)
    return name if store.place.exists(name) else f"{name}/features/c.0.0"


def found(store: Store) -> dict[str, tuple[str, str, str]]:
    seen = [f for f in upkeep.verify(store) if f.state != "ok"]
    return {f.name: (f.state, f.detail, f.mend) for f in seen}


def later(store: Store, monkeypatch: pytest.MonkeyPatch, hours: float = 2) -> None:
    now = store.place.now()
    monkeypatch.setattr(type(store.place), "now", lambda _: now + 3600 * hours)


def test_a_whole_store_has_nothing_to_mend_and_says_what_takes_its_space(any_store: Store) -> None:
    store, tiles = any_store, make_tiles(300)
    store.tiles[tiles.key] = tiles
    keys = [put(store, tiles), put(store, make_tiles(10, "b-00000001")), put(store, tiles, "e-2")]
    responses = LocalPlace(store.local)
    responses.write("responses/ab12.jsonl", b'{"key": "k", "text": "t"}\n')
    responses.write("evaluations.jsonl", b"{}\n")
    store.place.write("slides/a-00000000.json", b'{"item": "a"}')
    assert found(store) == {}
    used = {(u.kind.partition(",")[0], u.encoder): u for u in usage(store)}
    assert {k: u.count for k, u in used.items()} == {
        ("features", "enc-1"): 2,
        ("features", "e-2"): 1,
        ("tiles", None): 1,
        ("slides", None): 1,
        ("responses", None): 1,
        ("evaluations", None): 1,
        ("store", None): 1,
    }
    assert used["features", "enc-1"].size == sum(map(store.features.size, keys[:2]))
    assert used["features", "enc-1"].tiles == tiles.spec.digest
    assert used["responses", None].size == 26
    assert [u.size for u in usage(store)] == sorted((u.size for u in usage(store)), reverse=True)


def test_every_finding_says_what_mends_it(any_store: Store) -> None:
    store, tiles = any_store, make_tiles(300)
    cut, good = put(store, tiles), put(store, make_tiles(10, "b-00000001"))
    card = {"last_seen": "/data/case 7/a.svs"}
    store.place.write("slides/a-00000000.json", json.dumps(card).encode())
    victim = a_file_of(store, cut)
    store.place.write(victim, store.place.read(victim)[:-100])
    store.place.write("notes.txt", b"mine")
    store.place.write(f"features/enc-1/{tiles.spec.digest}/readme.md", b"mine")
    seen = found(store)
    state, detail, mend = seen.pop(store.features.name(cut))
    assert (state, "damaged entry" in detail, "run:" in detail) == ("broken", True, False)
    again = f"pathcli embed '/data/case 7/a.svs' --encoder enc --store {store.root}"
    assert mend == f"pathcli store prune --store {store.root} && {again}"
    assert {state for state, _, _ in seen.values()} == {"foreign"}
    assert len(seen) == 2
    assert [(r.name, r.why) for r in upkeep.prune(store)] == [(store.features.name(cut), "broken")]
    assert set(found(store)) == set(seen)
    assert list(store.features) == [good]


def test_the_usual_store_needs_no_option_in_what_mends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store()
    key = put(store, make_tiles(5))
    os.truncate(store.features.path(key), 100)
    again = "pathcli embed SLIDE --encoder enc"
    assert found(store)[store.features.name(key)][2] == f"pathcli store prune && {again}"


def test_nan_where_no_tile_is_unreadable_is_found(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tiles = any_store, make_tiles(300)
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, "enc-1")
    values = np.ones((300, 5), np.float16)
    values[7, 3] = np.nan
    with monkeypatch.context() as unchecked:
        unchecked.setattr(np, "isfinite", lambda _: np.True_)
        unchecked.setattr("pathcli.store.hdf5.verify_features", lambda _: key)
        unchecked.setattr("pathcli.store.zarr_writer.missing", lambda v: np.zeros(len(v), bool))
        with store.features.writer(tiles, "enc-1", (5,)) as writer:
            writer.begin(0)
            writer.write(values, np.zeros(300, np.uint8))
    ((state, detail, _),) = found(store).values()
    assert state == "broken"
    assert "NaN where no tile is unreadable in 1 of" in detail
    assert len(upkeep.prune(store)) == 1


def test_entries_of_another_encoder_are_found(any_store: Store) -> None:
    store, tiles = any_store, make_tiles(30)
    put(store, tiles, "enc-2")
    for file in list(store.place.list("features/enc-2")):
        store.place.write(file.name.replace("enc-2", "enc-1"), store.place.read(file.name))
    for n in range(3):
        put(store, make_tiles(5, f"b-0000000{n}"))
    odd = put(store, make_tiles(5, "c-00000000"), width=7)
    seen = found(store)
    state, detail, mend = seen.pop(store.features.name(Key("a-00000000", 0.25, odd.tiles, "enc-1")))
    assert (state, mend.startswith("pathcli store prune --store ")) == ("broken", True)
    assert f"says it is the entry of enc-2/{odd.tiles}/a-00000000@0.25" in detail
    assert seen == {
        store.features.name(odd): (
            "mixed",
            "rows of (7,) beside 3 entries of (5,): of another encoder",
            f"pathcli store prune --store {store.root} --encoder enc-1, then embed again",
        )
    }
    assert len(upkeep.prune(store)) == 1  # which of the shapes is right, nobody knows
    assert odd in store.features


def test_a_killed_run_is_pending_then_stale_by_the_clock_of_the_place(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tiles = any_store, make_tiles(500)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, stop=300)
    (name,) = found(store)
    assert found(store)[name][0] == "pending"
    assert "pathcli embed SLIDE --encoder enc" in found(store)[name][2]
    monkeypatch.setattr("time.time", lambda: 4e9)  # this machine's own clock is wrong
    assert found(store)[name][0] == "pending"
    assert upkeep.prune(store) == []
    later(store, monkeypatch)
    assert found(store)[name][:2] == ("stale", "untouched for 2 h")
    assert [r.name for r in upkeep.prune(store)] == [name]
    assert found(store) == {}
    assert {f.name for f in store.place.list()} == {"store.json"}


def test_the_lease_of_a_dead_host_is_stale_and_of_a_living_one_is_not(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, tiles = any_store, make_tiles(500)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, stop=300)
    key = Key(tiles.item, 0.25, tiles.spec.digest, "enc-1")
    holder = lease_name(store.features.name(key))
    store.place.write(holder, json.dumps({"machine": "elsewhere", "pid": 1}).encode())
    assert [(s, d) for s, d, _ in found(store).values()] == [("pending", "being written")]
    assert upkeep.prune(store) == []
    later(store, monkeypatch)
    assert {s for s, _, _ in found(store).values()} == {"stale"}
    assert holder in {r.name for r in upkeep.prune(store)}
    assert found(store) == {}


def test_prune_by_age_and_encoder_counts_in_the_days_of_the_place(
    any_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = any_store
    keys = [put(store, make_tiles(9)), put(store, make_tiles(9), "e-2")]
    assert upkeep.prune(store, older_than_days=1) == []
    later(store, monkeypatch, hours=49)
    assert upkeep.prune(store, older_than_days=3) == []
    old = upkeep.prune(store, older_than_days=2, dry_run=True)
    assert {r.name for r in old} == {store.features.name(key) for key in keys}
    assert set(store.features) == set(keys)
    (gone,) = upkeep.prune(store, older_than_days=2, encoder="e-2")
    assert (gone.name, gone.why) == (store.features.name(keys[1]), "by request")
    assert list(store.features) == keys[:1]


def test_a_file_of_others_inside_a_zarr_entry_keeps_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.zarr")
    key = put(store, make_tiles(9))
    note = f"{store.features.name(key)}/features/notes.txt"
    store.place.write(note, b"mine")
    assert found(store)[note][0] == "foreign"
    assert upkeep.prune(store, encoder="enc-1") == []
    assert store.place.read(note) == b"mine"
    assert key in store.features


@pytest.mark.parametrize("ahead_h", [1, -1])
def test_the_time_of_a_host_with_a_wrong_clock_harms_nothing(store: Store, ahead_h: int) -> None:
    tiles = make_tiles(500)
    with pytest.raises(KeyboardInterrupt):
        fill(store, tiles, stop=300)
    key = Key(tiles.item, 0.25, tiles.spec.digest, "enc-1")
    holder = store.root / lease_name(store.features.name(key))
    holder.write_text(json.dumps({"machine": "elsewhere", "pid": 1}))
    part = part_path(store.features.path(key))
    then = store.place.now() + 3600 * ahead_h
    for path in (holder, part):
        os.utime(path, (then, then))
    state, detail, mend = found(store)[part.relative_to(store.root).as_posix()]
    if ahead_h > 0:  # it may well be alive: left alone, and said how to end it
        assert state == "pending"
        assert "60 min ahead of the store's clock" in detail
        assert mend == f"if nobody runs it: rm {holder}"
        assert upkeep.prune(store) == []
        holder.unlink()
        assert found(store)[part.relative_to(store.root).as_posix()][0] == "stale"
    else:
        assert (state, detail) == ("stale", "untouched for 60 min")
    assert len(upkeep.prune(store)) == 2 if ahead_h < 0 else 1
    fill(store, tiles)
    assert found(store) == {}


def test_torn_lines_and_cards_are_told_apart(store: Store) -> None:
    store.place.write("responses/ab.jsonl", b'{"key": "k", "text": "t"}\n\n{"key": "k2", "te\n')
    store.place.write("slides/a-00000000.json", b'{"item": ')
    seen = found(store)
    assert seen["responses/ab.jsonl"][0] == "torn"
    assert "1; readers pass over them" in seen["responses/ab.jsonl"][1]
    assert seen["slides/a-00000000.json"][0] == "broken"
    assert [r.name for r in upkeep.prune(store)] == ["slides/a-00000000.json"]


def test_the_commands_say_it_over_any_backend(any_store: Store, run: Run) -> None:
    store = any_store
    key = put(store, make_tiles(300))
    where = ("--store", str(store.root))
    listed = json.loads(run("store", "list", *where, "--json")[1])["entries"]
    assert [(e["kind"], e["item"], e["encoder"]) for e in listed] == [
        ("features", "a-00000000", "enc-1")
    ]
    told = json.loads(run("store", "info", *where, "--json")[1])
    assert (told["feature entries"], told["features of enc-1"]) == (1, 1)
    assert ("free GB" in told) == isinstance(store.place, LocalPlace)
    code, out, _ = run("store", "du", *where, "--json")
    uses = json.loads(out)["uses"]
    assert (code, uses[0]["kind"], uses[0]["count"]) == (0, "features", 1)
    assert run("store", "verify", *where)[0] == 0
    victim = a_file_of(store, key)
    store.place.write(victim, store.place.read(victim)[:-1])
    code, out, err = run("store", "verify", *where)
    assert (code, "mend" in out, "1 broken" in err) == (4, True, True)
    code, out, err = run("store", "prune", *where, "--dry-run")
    assert (code, "would be removed: 1" in err) == (0, True)
    assert run("store", "prune", *where)[0] == 0
    assert run("store", "verify", *where)[0] == 0
    assert key not in store.features
