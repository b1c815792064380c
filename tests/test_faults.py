"""Disks, permissions, clocks and names as a cluster has them: one line, and nothing lost."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from pathcli.store import Store
from pathcli.store.lease import lease_name
from pathcli.store.place import LocalPlace

Run = Callable[..., tuple[int, str, str]]
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534
ENCODER = "fake"
MOUNT, UNMOUNT = ("/usr/bin/env", "mount"), ("/usr/bin/env", "umount", "--lazy")


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something on a folder for the length of a block; skip where that is not allowed."""
    if not ROOT:
        pytest.skip("only root may mount")
    done = subprocess.run([*MOUNT, *options, str(folder)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"no mount here: {done.stderr.decode()[:100]}")
    try:
        yield folder
    finally:
        subprocess.run([*UNMOUNT, str(folder)], check=True)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    (tmp_path / "small").mkdir()
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "none") as folder:
        yield folder


def remount(disk: Path, options: str) -> None:
    subprocess.run([*MOUNT, "-o", f"remount,{options}", str(disk)], check=True)


def the_error(result: tuple[int, str, str], code: int) -> str:
    """Return the one line a command ended with, or of its one slide that failed."""
    assert result[0] == code, result
    told = [line for line in result[2].splitlines() if "error: " in line or "failed" in line]
    assert len(told) == 1, result
    assert "Traceback" not in result[2]
    return told[0]


def states(run: Run, store: object) -> dict[str, int]:
    """Return what `store verify` counts."""
    counts: dict[str, int] = json.loads(run("store", "verify", "--store", store, "--json")[1])[
        "counts"
    ]
    return counts


def same(left: Store, right: Store) -> None:
    """Two stores hold the same features."""
    assert list(left.features) == list(right.features)
    for key in left.features:
        assert (np.asarray(left.features[key].values) == right.features[key].values).all()


def embed(run: Run, slide: Path, store: object) -> tuple[int, str, str]:
    return run("embed", slide, "--encoder", ENCODER, "--size", "16", "--store", store)


# --- a full disk -------------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["store", "store.zarr"])
def test_a_full_disk_is_one_line_and_the_rerun_finishes(
    small: Path, slide_path: Path, run: Run, name: str
) -> None:
    store = small / name
    assert run("embed", slide_path, "--encoder", ENCODER, "--store", store)[0] == 0
    first = states(run, store)
    ballast = small / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(1 << 20))
    told = the_error(embed(run, slide_path, store), 5)
    assert "disk full" in told
    assert "--store" in told
    assert states(run, store) == first
    assert run("store", "du", "--store", store)[0] == 0
    assert run("store", "prune", "--store", store)[0] == 0
    ballast.unlink()
    remount(small, "size=20m")
    assert embed(run, slide_path, store)[0] == 0
    assert set(states(run, store)) == {"ok"}


@pytest.mark.parametrize("name", ["store", "store.zarr"])
def test_a_disk_that_others_fill_meanwhile_leaves_what_can_be_resumed(
    small: Path, slide_path: Path, run: Run, fake: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = fake.encode

    def filling(self: object, images: object) -> object:
        if fake.passes == 1:
            (small / "ballast").touch()
            with pytest.raises(OSError, match="No space left"):
                (small / "ballast").write_bytes(bytes(1 << 20))
        return plain(self, images)

    monkeypatch.setattr(fake, "encode", filling)
    monkeypatch.setattr("pathcli.store.zarr_writer.CHUNK_ROWS", 64)
    arguments = ("--encoder", ENCODER, "--size", "16", "--batch", "64", "--store", small / name)
    told = run("embed", slide_path, *arguments)
    if name == "store":  # HDF5 has its space from the beginning
        assert told[0] == 0
    else:
        assert "disk full" in the_error(told, 5)
        assert set(states(run, small / name)) <= {"ok", "pending"}
        assert list(Store(small / name).features) == []
    (small / "ballast").unlink()
    monkeypatch.setattr(fake, "encode", plain)
    assert run("embed", slide_path, *arguments)[0] == 0
    assert set(states(run, small / name)) == {"ok"}
    assert embed(run, slide_path, "elsewhere")[0] == 0
    same(Store(small / name), Store("elsewhere"))


# --- what may not be written or read -----------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["store", "store.zarr"])
def test_a_read_only_store_serves_what_it_has(
    tmp_path: Path, slide_path: Path, run: Run, name: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    store = disk / name
    assert embed(run, slide_path, store)[0] == 0
    before = states(run, store)
    with mounted(disk, "--bind", str(disk)):
        remount(disk, "ro,bind")
        assert embed(run, slide_path, store)[0] == 0  # from the store
        assert states(run, store) == before
        assert run("store", "info", "--store", store)[0] == 0
        assert (
            run("store", "prune", "--encoder", "fake-000000000000", "--dry-run", "--store", store)[
                0
            ]
            == 0
        )
        told = the_error(
            run("store", "prune", "--encoder", "fake-000000000000", "--store", store), 5
        )
        assert "no permission to write" in told
        told = the_error(run("embed", slide_path, "--encoder", ENCODER, "--store", store), 5)
        assert "no permission to write" in told
        assert "--store" in told
    assert states(run, store) == before


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter: those of pytest are its user's alone."""
    folder = Path(tempfile.mkdtemp(prefix="pathcli-everybody-"))
    folder.chmod(0o755)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)
    shutil.rmtree(folder)


@contextmanager
def somebody_else(store: Path) -> Iterator[None]:
    """Be a user who may read a store and not write it."""
    if ROOT:
        os.seteuid(NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)
        return
    folders = [store, *(p for p in store.rglob("*") if p.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        yield
    finally:
        for folder in folders:
            folder.chmod(0o755)


@pytest.mark.skipif(os.name != "posix", reason="needs users as POSIX has them")
@pytest.mark.usefixtures("fake")
def test_a_store_of_another_user_is_read_and_not_written(
    open_folder: Path, slide_path: Path, run: Run
) -> None:
    slide = Path(shutil.copy(slide_path, open_folder / "a.svs"))
    store, out = open_folder / "store", open_folder / "out"
    out.mkdir()
    out.chmod(0o777)
    assert embed(run, slide, store)[0] == 0
    before = states(run, store)
    entry = next(store.rglob("features/*/*/*.h5"))
    with somebody_else(store):
        assert embed(run, slide, store)[0] == 0
        assert states(run, store) == before
        told = the_error(run("embed", slide, "--encoder", ENCODER, "--store", store), 5)
        assert "no permission to write" in told
        told = the_error(run("tile", slide, "--store", open_folder / "new"), 5)
        assert "no permission to write" in told
    entry.chmod(0)
    if ROOT:
        with somebody_else(store):
            assert states(run, store)["unreadable"] == 1
            assert run("store", "verify", "--store", store)[0] == 5
            assert run("store", "prune", "--store", store)[0] == 0
    entry.chmod(0o644)
    entry.parent.chmod(0)
    if ROOT:  # what is in a folder that may not be read is not just missing
        with somebody_else(store):
            told = the_error(run("store", "verify", "--store", store), 5)
            assert f"{entry.parent}: cannot be read now" in told
    entry.parent.chmod(0o755)
    assert states(run, store) == before


# --- clocks and names --------------------------------------------------------------------


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("hours", [-1, 1])
def test_a_lease_of_a_host_with_a_wrong_clock(
    tmp_path: Path, slide_path: Path, run: Run, hours: int
) -> None:
    assert embed(run, slide_path, "store")[0] == 0
    store = Store("store")
    (key,) = store.features
    entry = store.features.path(key)
    entry.unlink()
    holder = Path("store", lease_name(store.features.name(key)))
    holder.write_text(json.dumps({"machine": "elsewhere", "pid": 1}))
    then = LocalPlace(Path("store")).now() + 3600 * hours
    os.utime(holder, (then, then))
    if hours < 0:  # a heartbeat an hour old: taken over
        assert embed(run, slide_path, "store")[0] == 0
        assert states(run, "store") == {"ok": 3}
        return
    told = json.loads(run("store", "verify", "--store", "store", "--json")[1])["findings"]
    assert [f["state"] for f in told] == ["pending"]
    assert "60 min ahead of the store's clock" in told[0]["detail"]
    assert told[0]["mend"] == f"if nobody runs it: rm {holder}"
    holder.unlink()
    assert embed(run, slide_path, "store")[0] == 0
    assert states(run, "store") == {"ok": 3}


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("name", ["st ore", "st ore.zarr"])
def test_spaces_and_unicode_in_every_path(
    tmp_path: Path, slide_path: Path, run: Run, name: str
) -> None:
    folder = tmp_path / "Größe und Übung" / "数据 100% [a]*{b}"
    folder.mkdir(parents=True)
    slide = Path(shutil.copy(slide_path, folder / "Präparat nr. 1.svs"))
    store = folder / name
    assert embed(run, slide, store)[0] == 0
    assert set(states(run, store)) == {"ok"}
    listed = json.loads(run("store", "list", "--store", store, "--json")[1])["entries"]
    assert [e["kind"] for e in listed] == ["tiles", "features"]
    assert listed[0]["item"].startswith("Präparat_nr._1-")
    assert run("store", "info", listed[0]["item"], "--store", store)[0] == 0
    key = next(iter(Store(store).features))
    file = next(f.name for f in Store(store).place.list("features") if f.size > 500)
    path = store / file
    path.write_bytes(path.read_bytes()[:-1])
    told = json.loads(run("store", "verify", "--store", store, "--json")[1])["findings"]
    at = f"--store '{store}'"
    again = f"pathcli embed '{slide}' --encoder fake {at}"
    assert told[0]["mend"] == f"pathcli store prune {at} && {again}"
    assert run("store", "prune", "--store", store)[0] == 0
    assert embed(run, slide, store)[0] == 0
    assert set(states(run, store)) == {"ok"}
    assert key in Store(store).features
