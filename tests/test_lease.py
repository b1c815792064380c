import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pathcli.errors import BusyError, ResourceError
from pathcli.store import lease as leases
from pathcli.store.place import LocalPlace

ENTRY, LEASE = "e.h5", "e.h5.lease"


@pytest.fixture
def place(tmp_path: Path) -> LocalPlace:
    return LocalPlace(tmp_path)


def test_a_lease_keeps_a_second_writer_out_and_is_released(place: LocalPlace) -> None:
    with leases.lease(place, ENTRY):
        owner = json.loads(place.read(LEASE))
        assert owner["pid"] == os.getpid()
        with pytest.raises(BusyError, match=str(os.getpid())), leases.lease(place, ENTRY):
            pass
    with leases.lease(place, ENTRY):
        pass
    assert place.names() == []


TAKE = """
import sys, pathlib, time, pathcli.store.lease as l
from pathcli.store.place import LocalPlace
l._take(LocalPlace(pathlib.Path(sys.argv[1])), "e.h5.lease"); print('x', flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_the_lease_of_a_dead_process_is_taken_over(place: LocalPlace) -> None:
    subprocess.run([sys.executable, "-c", TAKE, place.root, "0"], check=True)
    with leases.lease(place, ENTRY):
        pass


CONTENDER = """
import json, sys, pathlib, time, pathcli.store.lease as l
from pathcli.store.place import LocalPlace
place = LocalPlace(pathlib.Path(sys.argv[1]))
for _ in range(200):
    try:
        with l.lease(place, "e.h5"):
            place.create("held", b"")
            time.sleep(0.001)
            place.remove("held")
    except l.BusyError:
        time.sleep(0.001)
    try:  # leave the lease of a dead process behind, as a kill would
        place.create("e.h5.lease", json.dumps(l._me() | {"pid": 999999999}).encode())
    except FileExistsError: pass
"""


@pytest.mark.slow
def test_a_dead_lease_is_taken_over_by_one_process_only(place: LocalPlace) -> None:
    # each holder creates a file that must not exist: two holders at once would fail
    command = [sys.executable, "-c", CONTENDER, place.root]
    children = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(4)]
    for child in children:
        _, err = child.communicate()
        assert child.returncode == 0, err.decode()


def test_a_lease_of_another_host_lapses_with_its_heartbeat(place: LocalPlace) -> None:
    place.write(LEASE, json.dumps({"machine": "elsewhere", "pid": 1}).encode())
    assert not leases.lapsed(place, LEASE)
    os.utime(place.path(LEASE), (0, time.time() - leases.LAPSE_S - 1))
    assert leases.lapsed(place, LEASE)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_process_that_nobody_reaped_holds_nothing(place: LocalPlace) -> None:
    command = [sys.executable, "-c", TAKE, place.root, "60"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    with pytest.raises(BusyError), leases.lease(place, ENTRY):
        pass
    child.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # dead, but its parent has not asked
    with leases.lease(place, ENTRY) as held:
        assert held()
    child.communicate()


def test_a_lease_that_was_taken_over_says_so(place: LocalPlace) -> None:
    with leases.lease(place, ENTRY) as held:
        assert held()
        place.write(LEASE, b'{"machine": "other", "pid": 1}')
        assert not held()
    assert place.exists(LEASE)  # the successor's is left alone


def test_an_unwritable_place_is_one_line(
    place: LocalPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ResourceError, match="disk full"), leases.lease(place, ENTRY):
        pass


def test_a_heartbeat_ahead_of_the_clock_is_over_when_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = LocalPlace(tmp_path)
    place.write("e.lease", json.dumps({"machine": "elsewhere", "pid": 1}).encode())
    ahead = time.time() + 3600
    os.utime(tmp_path / "e.lease", (ahead, ahead))
    start = time.monotonic()
    monkeypatch.setattr(leases.time, "monotonic", lambda: start)
    assert not leases.lapsed(place, "e.lease")
    monkeypatch.setattr(leases.time, "monotonic", lambda: start + leases.LAPSE_S + 1)
    os.utime(tmp_path / "e.lease", (ahead + 10, ahead + 10))  # it beats
    assert not leases.lapsed(place, "e.lease")
    monkeypatch.setattr(leases.time, "monotonic", lambda: start + 2 * leases.LAPSE_S + 2)
    assert leases.lapsed(place, "e.lease")


def test_a_lease_that_could_not_be_given_back_does_not_keep_its_own_process_out(
    place: LocalPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, leases.lease(place, ENTRY):
        patch.setattr(LocalPlace, "read", refuse)
    assert place.exists(LEASE)
    with leases.lease(place, ENTRY) as held:
        assert held()


def test_a_lease_that_cannot_be_read_now_is_somebodys(
    place: LocalPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.write(LEASE, json.dumps({"machine": "elsewhere", "pid": 1}).encode())
    before = time.time() - leases.BIRTH_S - 5
    os.utime(place.path(LEASE), (before, before))
    monkeypatch.setattr(LocalPlace, "read", refuse)
    assert not leases.lapsed(place, LEASE)
    with pytest.raises(BusyError, match="elsewhere"), leases.lease(place, ENTRY):
        pass


def refuse(*_: object) -> bytes:
    msg = "away for a moment"
    raise ResourceError(msg)
