"""Several devices, a process each: here two processes on the CPU."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
from conftest import Run

from pathcli.encoders.embedding import Embedder
from pathcli.encoders.fleet import Fleet, devices_of
from pathcli.errors import BusyError, PathcliError, ResourceError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store

SPEC = tile_spec(32, 0.5)


def slides(folder: Path, n: int) -> list[Path]:
    return [
        synthetic.slide(
            folder / f"s{i}.svs", synthetic.picture(700, 500, (64, 64, 500, 400), seed=i)
        )
        for i in range(n)
    ]


class Dies(fakes.MeanColour):
    """Its process is killed at the first batch that is white."""

    def encode(self, images: Any) -> Any:
        if images.float().mean() > 252:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(images)


def test_two_processes_give_what_one_gives_and_faults_in_their_place(
    tmp_path: Path, store: Store, run: Run, fake: type
) -> None:
    paths = slides(tmp_path, 3)
    (tmp_path / "s1a.svs").write_bytes(b"no slide" * 99)
    how = ("--encoder", "fake", "--size", 32, "--mpp", 0.5, "--json")
    asked = [*paths[:2], tmp_path / "s1a.svs", paths[2]]
    code, out, _ = run("embed", *asked, *how, "--store", store.root, "--device", "cpu,cpu")
    said = json.loads(out)
    assert code == 3
    assert [Path(s["path"]).name for s in said["slides"]] == ["s0.svs", "s1.svs", "s2.svs"]
    assert [Path(f["path"]).name for f in said["failures"]] == ["s1a.svs"]
    assert fake.passes == 0  # type: ignore[attr-defined]  # nothing was encoded in this process
    alone = Embedder(fakes.MeanColour(), Store())
    for path in paths:
        key = alone(path, spec=SPEC).key
        assert np.array_equal(store.features[key].values, alone.store.features[key].values)


@pytest.mark.slow
def test_a_process_that_dies_costs_one_slide(tmp_path: Path, store: Store) -> None:
    paths = slides(tmp_path, 3)
    synthetic.slide(paths[0], np.full((300, 300, 3), 255, np.uint8))
    how = {"spec": tile_spec(32, 0.5, tissue="none")}
    fleet = Fleet(Dies(), store, devices=["cpu"])
    fleet.expect([(p, how) for p in paths])
    with pytest.raises(ResourceError, match=r"s0\.svs: the process on cpu died"):
        fleet(paths[0], **how)
    assert all(fleet(p, **how).encoded for p in paths[1:])
    fleet.close()


class Here:
    """A hand whose slides are embedded by a function."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def embed(self, job: Any, after: Any) -> Any:
        return self.work(job, after)

    def close(self) -> None:
        pass


def test_an_interrupted_process_begins_with_no_further_slide(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def interrupted(job: Any, after: Any) -> None:
        begun.append((job[0], after and after[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Fleet, "_hire", lambda *_: Here(interrupted))
    fleet = Fleet(fakes.MeanColour(), store, devices=["cpu"])
    fleet.expect([("s0.svs", {}), ("s1.svs", {}), ("s2.svs", {})])
    with pytest.raises(KeyboardInterrupt):
        fleet("s0.svs")
    for thread in fleet._threads:  # ends by itself, before anyone closes
        thread.join()
    assert begun == [("s0.svs", "s1.svs")]


def test_a_busy_slide_comes_last_and_is_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun: list[str] = []

    def work(job: Any, after: Any) -> Any:
        begun.append(job[0])
        if begun.count(job[0]) < 3 and job[0] == "s0.svs":
            msg = "s0: being written by process 7 on lab; run the same command again"
            raise BusyError(msg)
        return SimpleNamespace(tiles=5, path=job[0])

    monkeypatch.setattr("pathcli.store.turns.POLL_S", 0.05)
    monkeypatch.setattr(Fleet, "_hire", lambda *_: Here(work))
    fleet = Fleet(fakes.MeanColour(), store, devices=["cpu"])
    names = [f"s{i}.svs" for i in range(4)]
    fleet.expect([(n, {}) for n in names])
    with caplog.at_level("INFO", "pathcli"):
        assert [fleet(n).path for n in names] == names  # type: ignore[attr-defined]
    fleet.close()
    assert sorted(begun[:4]) == names
    assert begun[4:] == ["s0.svs", "s0.svs"]
    assert caplog.messages == ["waiting for s0: being written by process 7 on lab"]


def test_where_one_process_cannot_be_had_the_others_do_its_part(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hire(_: Fleet, place: str) -> Here:
        if place == "cpu":
            msg = "no room"
            raise ResourceError(msg)
        return Here(lambda job, _: SimpleNamespace(tiles=1, path=job[0]))

    monkeypatch.setattr("pathcli.encoders.fleet.pick_device", str)
    monkeypatch.setattr(Fleet, "_hire", hire)
    names = [f"s{i}.svs" for i in range(6)]
    fleet = Fleet(fakes.MeanColour(), store, devices=["cpu", "mps"])
    fleet.expect([(n, {}) for n in names])
    assert [fleet(n).path for n in names] == names  # type: ignore[attr-defined]
    fleet.close()
    alone = Fleet(fakes.MeanColour(), store, devices=["cpu", "cpu"])
    alone.expect([(n, {}) for n in names])
    for name in names:
        with pytest.raises(ResourceError, match="no room"):
            alone(name)
    alone.close()


INTERRUPTED = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
sys.path.insert(0, sys.argv[1])
from pathcli import registry
registry.BUILTIN["encoder"]["fake"] = "fakes:Slow"
from pathcli.cli import main
if __name__ == "__main__":
    main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
@pytest.mark.parametrize("when", ["it starts", "it encodes"])
def test_ctrl_c_ends_the_command_in_one_line_whatever_its_processes_do(
    tmp_path: Path, store: Store, when: str
) -> None:
    paths = slides(tmp_path, 3)
    script = tmp_path / "interrupted.py"
    script.write_text(INTERRUPTED)
    how = ["--encoder", "fake", "--size", "32", "--mpp", "0.5", "--batch", "4"]
    where = ["--device", "cpu,cpu", "--store", str(store.root)]
    here = str(Path(__file__).parent)
    child = subprocess.Popen(
        [sys.executable, str(script), here, "embed", *map(str, paths), *how, *where],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        if when == "it encodes":
            while not list(Path(store.root).rglob("*.h5.part")) and time.monotonic() < deadline:
                time.sleep(0.1)
        else:
            while len(children(child.pid)) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)  # the tracker and two processes
            time.sleep(0.5)
        begun = time.monotonic()
        os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):  # it has ended, as it should
            os.killpg(child.pid, signal.SIGKILL)
    assert time.monotonic() - begun < 20
    assert child.returncode == 130
    assert "interrupted; what was finished is kept" in err
    assert "Traceback" not in err
    assert not list(Path(store.root).rglob("*.lease"))


def test_a_signal_between_a_writer_s_start_and_its_block_ends_the_process() -> None:
    code = "from pathcli.encoders.writing import Writing; Writing(None).__enter__(); exit(3)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 3


def children(pid: int) -> list[str]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [child for file in threads for child in file.read_text().split()]


def test_a_process_that_cannot_be_started_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Fleet, "_hire", none_left)
    fleet = Fleet(fakes.MeanColour(), store, devices=["cpu"])
    fleet.expect([("s0.svs", {}), ("s1.svs", {})])
    for _, future in fleet._begun:
        assert "too many open files" in str(future.exception(timeout=20))
    fleet.close()


def test_the_list_of_devices_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_of("cpu") == ["cpu"]
    assert devices_of("cuda:0,cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(UsageError, match="names cuda:0 twice"):
        devices_of("cuda:0,cuda:0")
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match="no GPU is here"):
        devices_of("cuda:all")
    with pytest.raises(PathcliError, match="cuda:8 is not here"):
        Fleet(fakes.MeanColour(), Store(), devices=["cpu", "cuda:8"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert devices_of("cuda:all") == ["cuda:0", "cuda:1", "cuda:2"]


def test_processes_that_share_no_memory_are_refused_a_store_in_it() -> None:
    with pytest.raises(UsageError, match="share no memory"):
        Fleet(fakes.MeanColour(), Store("memory://fleet"), devices=["cpu", "cpu"])
