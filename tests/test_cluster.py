"""Many processes at one list of slides: shards, what is busy, and each slide once."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic
from conftest import Run
from entries import make_tiles

from pathcli.cli.options import shard_of
from pathcli.encoders import build_encoder, embedding
from pathcli.encoders.embedding import Embedder, embed
from pathcli.encoders.reading import Reader
from pathcli.errors import BusyError, DataError, UsageError
from pathcli.slides.discovery import Found
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store, zarr_writer
from pathcli.store.lease import lease_name
from pathcli.store.turns import Turns
from pathcli.types import Key, silent

SPEC = tile_spec(32, 0.5)
WORKERS = Path(__file__).parent.parent / "benchmarks" / "workers.py"
BUSY = BusyError("s: being written by process 7 on lab; run the same command again")


def slides(folder: Path, n: int) -> list[Path]:
    return [
        synthetic.slide(
            folder / f"s{i}.svs", synthetic.picture(400, 300, (64, 64, 200, 200), seed=i)
        )
        for i in range(n)
    ]


# --- whose turn --------------------------------------------------------------------------


def test_turns_keep_the_order_given_until_something_is_busy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pathcli.store.turns.POLL_S", 0.05)
    orders = []
    for _ in range(3):
        turns = Turns(range(100))
        taken = [turns.take() for _ in range(10)]
        assert taken == list(range(10))
        turns.busy(9, BUSY)
        orders.append([turns.take() for _ in range(90)])
        assert sorted(orders[-1]) == list(range(10, 100))  # type: ignore[type-var]
        assert turns.take() == 9  # last, and waited for
        assert turns.take() is None
    assert orders[0] != orders[1] != orders[2] != list(range(10, 100))


def test_turns_that_are_stopped_wake_who_waits() -> None:
    turns = Turns(["a"])
    assert turns.take_ahead(2) is None
    job = turns.take_ahead(1)
    assert job == "a"
    turns.busy("a", BUSY)
    threading.Timer(0.1, turns.stop).start()
    begun = time.monotonic()
    assert turns.take() is None
    assert time.monotonic() - begun < 2


def test_a_busy_slide_is_not_prepared_and_a_free_one_is(
    tmp_path: Path, store: Store, fake: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = slides(tmp_path, 2)
    keys = [embed(p, build_encoder("fake"), store=store, spec=SPEC).key for p in paths]
    for key in keys:
        store.features.path(key).unlink()
    read = []
    monkeypatch.setattr(
        embedding, "Reader", lambda *a, **k: read.append(a[0].name) or Reader(*a, **k)
    )
    ready = Embedder(build_encoder("fake"), store)
    jobs: list[tuple[Path, dict[str, Any]]] = [(p, {"spec": SPEC}) for p in paths]
    with store.features.lock(keys[0]):
        ready.expect(jobs)
        with pytest.raises(BusyError, match="being written by process"):
            ready(paths[0], spec=SPEC)
        ready.expect([jobs[1], jobs[0]])
        assert ready(paths[1], spec=SPEC).encoded
    assert ready(paths[0], spec=SPEC).encoded  # found busy ahead, free by its turn
    ready.close()
    assert [Path(name).name for name in read] == ["s1.svs", "s0.svs"]


HOLDS = """
import sys, time
from pathcli.store import Store
from pathcli.types import Key
store = Store(sys.argv[1])
with store.features.lock(Key(sys.argv[2], 0.5, sys.argv[3], "fake-000000000000")):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_slide_of_a_living_process_is_waited_for_and_retaken_when_it_is_killed(
    tmp_path: Path, store: Store, fake: type, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    paths = slides(tmp_path, 3)
    key = embed(paths[0], build_encoder("fake"), store=Store(), spec=SPEC).key
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(store.root), key.item, key.tiles], stdout=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    threading.Timer(4, holder.kill).start()
    how = ("--encoder", "fake", "--size", 32, "--mpp", 0.5, "--store", store.root, "--json")
    with caplog.at_level("INFO", "pathcli"):
        code, out, _ = run("embed", *paths, *how)
    holder.communicate()
    said = json.loads(out)
    assert (code, said["failures"]) == (0, [])
    assert [Path(s["path"]).name for s in said["slides"]] == ["s0.svs", "s1.svs", "s2.svs"]
    assert all(s["encoded"] == s["tiles"] for s in said["slides"])
    done = [text.split("-")[0] for text in caplog.messages if text.startswith("embedded ")]
    assert sorted(done[:2]) == ["embedded s1", "embedded s2"]
    assert done[2:] == ["embedded s0"]
    (waited,) = [text for text in caplog.messages if text.startswith("waiting for ")]
    assert str(holder.pid) in waited
    assert "again" not in waited


@pytest.mark.slow
@pytest.mark.skipif(not WORKERS.is_file(), reason="no benchmarks here")
def test_processes_at_one_list_do_each_slide_once_and_resume_that_of_one_that_is_killed() -> None:
    how = ["--processes", "2", "--slides", "5", "--seconds", "0.1", "--kill"]
    command = [sys.executable, str(WORKERS), *how]
    told = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert told["exit_codes"] == [-9, 0]
    assert (told["in_the_store"], told["left_over"], told["log_lines"]) == (5, [], 5)
    assert told["encoded_by_several"] == 0
    assert told["encoded_by_one_process"] == 4  # the killed one could not tell of its first
    assert list(told["resumed"].values()) == [[192, 320]]


# --- shards ------------------------------------------------------------------------------


def test_shards_are_all_slides_each_once_in_whatever_order_they_were_found(
    rng: np.random.Generator,
) -> None:
    found = [Found(Path(f"case {i}.svs")) for i in range(23)]
    parts = [shard_of(f"{i}/5", found) for i in range(1, 6)]
    assert sorted(str(s.path) for part in parts for s in part) == sorted(str(s.path) for s in found)
    assert {len(part) for part in parts} == {4, 5}
    shuffled = [found[i] for i in rng.permutation(23)]
    assert set(shard_of("2/5", shuffled)) == set(parts[1])
    assert shard_of("2/5", shuffled) == [s for s in shuffled if s in set(parts[1])]
    assert shard_of("9/24", found[:3]) == []
    assert shard_of(None, found) == found


class Plain:
    """Rows without a slide, of which those in `bad` cannot be read."""

    name, side, max_bad = "rows", 4, 0.01

    def __init__(self, bad: Iterable[int] = ()) -> None:
        self.bad = set(bad)

    def read(self, row: int) -> np.ndarray:
        if row in self.bad:
            msg = "bad"
            raise DataError(msg)
        return np.full((4, 4, 3), row % 251, np.uint8)

    def gone(self, row: int) -> bool:
        return row < 0


class Hooked(fakes.MeanColour):
    """Does something before its fifth batch."""

    def __init__(self, hook: Callable[[], object]) -> None:
        super().__init__()
        self.hook, self.batches = hook, 0

    def encode(self, images: Any) -> Any:
        self.batches += 1
        if self.batches == 5:
            self.hook()
        return super().encode(images)


@pytest.mark.parametrize("root", ["store", "store.zarr"])
def test_one_that_lost_its_lease_touches_nothing_of_its_successor(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "HEARTBEAT_S", 0)
    store, tiles = Store(tmp_path / root), make_tiles(1000)
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, fakes.MeanColour.id)

    def taken_over() -> None:
        store.place.remove(lease_name(store.features.name(key)))
        successor = Embedder(fakes.MeanColour(), store, device="cpu", batch=64)
        successor.fill(Plain(), tiles, key, silent)

    sleeper = Embedder(Hooked(taken_over), store, device="cpu", batch=32)
    with pytest.raises(BusyError, match="taken this over"):
        sleeper.fill(Plain(range(300, 1000)), tiles, key, silent)  # its disk is gone, too
    assert store.features.verify(key) == key
    assert not store.features[key].status.any()
    assert np.array_equal(store.features[key].values[:, 0], np.arange(1000) % 251)


@pytest.mark.parametrize("root", ["store", "store.zarr"])
def test_unreadable_rows_that_are_read_again_are_counted_once(
    tmp_path: Path, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr_writer, "CHUNK_ROWS", 128)
    store, tiles = Store(tmp_path / root), make_tiles(1000)
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, fakes.MeanColour.id)

    def stop() -> None:
        raise KeyboardInterrupt

    rows = Plain(range(116, 126))  # as many as are allowed
    with pytest.raises(KeyboardInterrupt):
        Embedder(Hooked(stop), store, device="cpu", batch=32).fill(rows, tiles, key, silent)
    again = Embedder(fakes.MeanColour(), store, device="cpu", batch=100)  # from row 100 on
    assert again.fill(rows, tiles, key, silent) == 900
    assert store.features.shape(key) == ((3,), 10)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", "1/4/2", ""])
def test_a_shard_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard is I/N with I from 1 to N") as caught:
        shard_of(text, [])
    assert "\n" not in str(caught.value)


def test_embed_takes_a_shard_and_keeps_its_failures_apart(
    tmp_path: Path, run: Run, fake: type
) -> None:
    slides(tmp_path, 3)
    (tmp_path / "s1a.svs").write_bytes(b"no slide" * 99)
    how = ("--encoder", "fake", "--size", 32, "--mpp", 0.5, "--json")
    names = []
    for part in (1, 2):
        code, out, _ = run("embed", tmp_path, *how, "--shard", f"{part}/2")
        names.append([Path(s["path"]).name for s in json.loads(out)["slides"]])
        assert code == (3 if part == 1 else 0)
    assert names == [["s0.svs"], ["s1.svs", "s2.svs"]]
    assert "s1a.svs" in Path("pathcli-out/failures-1-of-2.csv").read_text()
    assert not Path("pathcli-out/failures-2-of-2.csv").exists()
    code, out, err = run("embed", tmp_path, *how, "--shard", "3/2")
    assert (code, err.count("--shard is I/N")) == (2, 1)


# --- memory ------------------------------------------------------------------------------


class White:
    name, side, max_bad = "white", 8, 0.0

    def read(self, row: int) -> Any:
        return np.full((8, 8, 3), 255, np.uint8)

    def gone(self, row: int) -> bool:
        return False


def test_memory_that_cannot_be_pinned_is_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    real, asked = torch.empty, []

    def empty(*shape: Any, pin_memory: bool = False, **how: Any) -> Any:
        asked.append(pin_memory)
        if pin_memory:
            msg = "CUDA error: out of memory"
            raise RuntimeError(msg)
        return real(*shape, **how)

    monkeypatch.setattr(torch, "empty", empty)
    reader = Reader(White(), 40, batch=8, workers=1, pinned=True)
    batches = list(reader)
    reader.close()
    assert [int(b.pixels.min()) for b in batches] == [255] * 5
    assert asked == [True] + [False] * 5
    assert len(caplog.messages) == 1


def test_no_memory_at_all_is_told_as_such(
    slide_path: Path, run: Run, fake: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def empty(*_: Any, **__: Any) -> Any:
        msg = "[enforce fail] DefaultCPUAllocator: can't allocate memory"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch, "empty", empty)
    code, _, err = run("embed", slide_path, "--encoder", "fake")
    assert (code, "out of memory" in err) == (5, True)
