"""Several devices, a process each: here two processes on the CPU."""

import errno
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
from conftest import Run

from pathcli.encoders.embedding import Embedder
from pathcli.encoders.fleet import Fleet, devices_of
from pathcli.errors import PathcliError, ResourceError, UsageError
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


def test_an_interrupted_process_begins_with_no_further_slide(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def interrupted(job: Any, after: Any) -> None:
        begun.append((job[0], after and after[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr("pathcli.encoders.fleet._embed", interrupted)
    monkeypatch.setattr(Fleet, "_pool", lambda *_: ThreadPoolExecutor(1))
    fleet = Fleet(fakes.MeanColour(), store, devices=["cpu"])
    fleet.expect([("s0.svs", {}), ("s1.svs", {}), ("s2.svs", {})])
    with pytest.raises(KeyboardInterrupt):
        fleet("s0.svs")
    for thread in fleet._threads:  # ends by itself, before anyone closes
        thread.join()
    assert begun == [("s0.svs", "s1.svs")]


def test_a_process_that_cannot_be_started_is_told(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(Fleet, "_pool", none_left)
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
