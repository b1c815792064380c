"""A cluster of two nodes on this machine; a worker is killed midway."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from conftest import Run
from tiny_workers import DIES, Convolved

from pathcli import registry
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.ray_engine import RayCrew, _told
from pathcli.errors import BusyError, ResourceError, UsageError
from pathcli.store import Store

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture
def dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "dies"
    file.touch()
    monkeypatch.setenv(DIES, str(file))
    return file


@pytest.fixture
def cluster(dies: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # what the nodes have
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
    nodes.add_node(**SMALL)
    yield nodes
    nodes.shutdown()


@pytest.fixture
def slides(tmp_path: Path) -> list[Path]:
    return [
        synthetic.slide(
            tmp_path / f"s{i}.svs", synthetic.picture(600, 400, (0, 0, 500, 400), seed=i)
        )
        for i in range(5)
    ]


def test_a_cluster_gives_what_one_process_gives_also_where_a_worker_is_killed(
    cluster: Any,
    slides: list[Path],
    store: Store,
    dies: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "pathcli")
    monkeypatch.setitem(registry.BUILTIN["encoder"], "convolved", "tiny_workers:Convolved")
    seen = []
    monkeypatch.setattr(
        RayCrew, "_look", lambda self, real=RayCrew._look: seen.append(real(self)) or seen[-1]
    )
    how = ("--encoder", "convolved", "--batch", 64, "--workers", 1, "--tissue", "none", "--json")
    where = ("--engine", "ray", "--address", cluster.address, "--store", store.root)
    code, out, err = run("embed", *slides, *how, *where)
    said = json.loads(out)  # and nothing else
    assert (code, said["failures"]) == (0, [])
    assert [s["path"] for s in said["slides"]] == [str(p) for p in slides]
    assert not dies.exists()  # one did die
    encoded = [s["encoded"] for s in said["slides"]]
    assert sum(s["tiles"] - n for s, n in zip(said["slides"], encoded, strict=True)) == 128
    assert sum(text.startswith("embedded s") for text in caplog.messages) == 5
    assert len(err.splitlines()) == 6  # which tiles, and one line a slide
    assert any(of == said["slides"][0]["tiles"] for at in seen for _, of in at.values())
    assert not list(Path(store.root).rglob("*.lease"))
    assert not list(Path(store.root).rglob("*.part"))
    alone = Embedder(Convolved(), Store(), batch=64)
    for path in slides:
        key = alone(path).key
        ours, theirs = alone.store.features[key], store.features[key]
        assert np.array_equal(ours.values, theirs.values)
        assert np.array_equal(ours.xy, theirs.xy)
        assert np.array_equal(ours.status, theirs.status)


def test_a_ray_that_is_started_here_is_stopped_and_faults_come_in_their_place(
    slides: list[Path], store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    import ray

    (tmp_path / "no.svs").write_bytes(b"no slide" * 99)
    crew = RayCrew(Convolved(), store, workers=1)
    crew.expect([(path, {}) for path in (tmp_path / "no.svs", slides[0])])
    with pytest.raises(Exception, match=r"no\.svs"):
        crew(tmp_path / "no.svs")
    run = crew(slides[0])
    crew.close()
    assert run.key in store.features
    assert not ray.is_initialized()


def test_what_cannot_be_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["encoder"], "convolved", "tiny_workers:Convolved")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    how = ("embed", "x.svs", "--encoder", "convolved")
    for options, said in {
        ("--engine", "ray", "--address", "127.0.0.1:9"): "no Ray cluster answers",
        ("--engine", "ray", "--device", "cpu,cpu"): "finds the devices itself",
        ("--address", "auto"): "give --engine ray too",
        ("--engine", "dask"): "local or ray",
    }.items():
        code, out, err = run(*how, *options)
        assert (code != 0, said in err, out) == (True, True, "")
        assert err.count("error:") == 1
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run(*how, "--engine", "ray")
    assert (code, "pip install 'pathcli[ray]'" in err) == (5, True)


def test_errors_of_a_worker_are_those_of_the_library() -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    cause = BusyError("s0: being written by process 7")
    assert _told(RayTaskError("embed", "Traceback ...", cause)) is cause
    text = "ModuleNotFoundError: No module named 'pathcli'"
    error = _told(RayTaskError("__init__", text, ModuleNotFoundError(text)))
    assert "install the same on every node" in str(error)
    assert "died" in str(_told(ActorDiedError()))
    assert isinstance(_told(ActorDiedError()), ResourceError)
    with pytest.raises(UsageError, match="finds the devices itself"):
        RayCrew(Convolved(), device="cuda:1")
