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
            file.write(l.json.dumps(l._me() | {"pid": 999999999}))
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
    path.write_text(json.dumps({"machine": "elsewhere", "pid": 1}))
    assert not leases.lapsed(path)
    os.utime(path, (0, time.time() - leases.LAPSE_S - 1))
    assert leases.lapsed(path)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_killed_process_that_nobody_reaped_holds_nothing(tmp_path: Path) -> None:
    entry = tmp_path / "e.h5"
    code = (
        "import sys, pathlib, time, pathcli.store.lease as l\n"
        "l._take(pathlib.Path(sys.argv[1])); print('x', flush=True); time.sleep(60)"
    )
    path = str(leases.lease_path(entry))
    child = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert child.stdout
    child.stdout.readline()
    with pytest.raises(BusyError), leases.lease(entry):
        pass
    child.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # dead, but its parent has not asked
    with leases.lease(entry) as held:
        assert held()
    child.communicate()


def test_a_lease_that_was_taken_over_says_so(tmp_path: Path) -> None:
    entry = tmp_path / "e.h5"
    with leases.lease(entry) as held:
        assert held()
        leases.lease_path(entry).write_text('{"machine": "other", "pid": 1}')
        assert not held()
    assert leases.lease_path(entry).exists()  # the successor's is left alone


def test_an_unwritable_place_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ResourceError, match="disk full"), leases.lease(tmp_path / "e.h5"):
        pass
