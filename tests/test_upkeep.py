import json
import os

import h5py
import numpy as np
import pytest
from entries import fill, make_tiles

from pathcli.errors import DataError
from pathcli.store import Store, upkeep
from pathcli.store.files import part_path
from pathcli.types import Key


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
    states = {f.path.name: f.state for f in upkeep.verify(store)}
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
    removal = upkeep.Removal(part, "stale", 1)
    with store.features.lock(key):
        assert not upkeep._remove(store, removal)
        assert part.exists()
    assert upkeep._remove(store, removal)
    assert not part.exists()
