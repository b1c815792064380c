import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import synthetic
from conftest import TISSUE_BOX

from pathcli.device import pick_device
from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder, embed
from pathcli.errors import BusyError, DataError, ResourceError
from pathcli.slides import direct, readers, tiling
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store, upkeep

SPEC = tile_spec(32, 0.5)


@pytest.fixture
def encoder(fake: type) -> object:
    return build_encoder("fake")


def test_features_are_those_of_the_tiles(slide_path: Path, store: Store, encoder: object) -> None:
    run = embed(slide_path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]
    features = store.features[run.key]
    slide = readers.open_slide(slide_path)
    expected = [
        tiling.read_tile(slide, (x, y), SPEC, 0.5).mean((0, 1)) for x, y in features.xy.tolist()
    ]
    slide.close()
    assert run.encoded == run.tiles == len(features.xy) > 200
    assert np.abs(features.values - np.array(expected)).max() < 0.2
    x, y, w, h = TISSUE_BOX
    assert (
        (features.xy + 16 >= (x - 16, y - 16)) & (features.xy + 16 <= (x + w + 16, y + h + 16))
    ).all()


def test_a_second_run_takes_no_forward_pass(
    slide_path: Path, store: Store, encoder: object, fake: type
) -> None:
    first = embed(slide_path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]
    passes = fake.passes  # type: ignore[attr-defined]
    assert passes > 0
    second = embed(slide_path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]
    assert fake.passes == passes  # type: ignore[attr-defined]
    assert (second.encoded, second.key) == (0, first.key)
    other = embed(slide_path, encoder, store=store, spec=tile_spec(32, 0.5, min_tissue=0.9))  # type: ignore[arg-type]
    assert other.encoded > 0
    ready = Embedder(encoder, store)  # type: ignore[arg-type]
    assert ready(slide_path, spec=SPEC, mpp=0.25).encoded > 0
    assert len(store.features) == 3


def test_workers_do_not_change_a_byte(slide_path: Path, tmp_path: Path, encoder: object) -> None:
    found = []
    for workers in (1, 4):
        kept = Store(tmp_path / f"s{workers}")
        run = embed(slide_path, encoder, store=kept, spec=SPEC, workers=workers, batch=7)  # type: ignore[arg-type]
        found.append(kept.features[run.key])
    assert np.array_equal(found[0].xy, found[1].xy)
    assert np.array_equal(found[0].values, found[1].values)


def test_an_interrupted_run_goes_on_where_it_stopped(
    slide_path: Path, store: Store, encoder: object, fake: type
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(slide_path, encoder, store=store, spec=SPEC, batch=8, progress=stop)  # type: ignore[arg-type]
    assert {f.state for f in upkeep.verify(store)} == {"ok", "pending"}
    run = embed(slide_path, encoder, store=store, spec=SPEC, batch=8)  # type: ignore[arg-type]
    assert run.encoded == run.tiles - 128  # one block of 128 rows was whole
    whole = embed(slide_path, encoder, store=Store(), spec=SPEC, batch=8)  # type: ignore[arg-type]
    assert np.array_equal(store.features[run.key].values, Store().features[whole.key].values)


def test_unreadable_tiles_are_recorded_never_white(
    slide_path: Path, store: Store, encoder: object
) -> None:
    synthetic.break_tile(slide_path, 8)  # x 512..767, y 256..511
    ready = Embedder(encoder, store, max_bad_tiles=1)  # type: ignore[arg-type]
    run = ready(slide_path, spec=tile_spec(32, 0.5, tissue="none"))
    features = store.features[run.key]
    bad = features.xy[features.status == 1]
    assert run.unreadable == len(bad) > 0
    assert ((bad + 32 > (512, 256)) & (bad < (768, 512))).all()
    assert np.isnan(features.values[features.status == 1]).all()
    assert np.isfinite(features.values[features.status == 0]).all()
    assert {f.state for f in upkeep.verify(store)} == {"ok"}


def test_too_many_unreadable_tiles_fail_the_slide(
    slide_path: Path, store: Store, encoder: object
) -> None:
    synthetic.break_tile(slide_path, 8)
    with pytest.raises(DataError, match="--max-bad-tiles"):
        embed(slide_path, encoder, store=store, spec=tile_spec(32, 0.5, tissue="none"))  # type: ignore[arg-type]
    assert not list(store.features)


def test_the_limit_of_bad_tiles_holds_for_every_later_run(
    slide_path: Path, store: Store, encoder: object, tmp_path: Path
) -> None:
    whole = slide_path.read_bytes()
    synthetic.break_tile(slide_path, 8)
    spec = tile_spec(32, 0.5, tissue="none")
    for _ in range(3):
        with pytest.raises(DataError, match="more than"):
            embed(slide_path, encoder, store=store, spec=spec, batch=8)  # type: ignore[arg-type]
    lenient = Embedder(encoder, store, max_bad_tiles=1)  # type: ignore[arg-type]
    assert any("cannot be read" in w for w in lenient(slide_path, spec=spec).warnings)
    with pytest.raises(DataError, match="more than"):
        embed(slide_path, encoder, store=store, spec=spec)  # type: ignore[arg-type]
    # a repaired copy is read anew, not resumed on top of what the damaged one left
    other = Store(tmp_path / "other")
    with pytest.raises(DataError):
        embed(slide_path, encoder, store=other, spec=spec, batch=8)  # type: ignore[arg-type]
    slide_path.write_bytes(whole)
    assert embed(slide_path, encoder, store=other, spec=spec).unreadable == 0  # type: ignore[arg-type]


def test_a_slide_that_vanishes_midway_is_named(
    slide_path: Path, store: Store, encoder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = direct.DirectReader.read

    def vanish(self: direct.DirectReader, *args: object) -> np.ndarray:
        if threading.current_thread().name.startswith("reader"):
            Path(self.path).unlink(missing_ok=True)
            msg = f"{self.path}: the file is gone"
            raise DataError(msg)
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(direct.DirectReader, "read", vanish)
    with pytest.raises(DataError, match="the file is gone"):
        embed(slide_path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]
    assert not list(store.features)


def test_a_slide_without_tiles_is_no_failure(tmp_path: Path, store: Store, encoder: object) -> None:
    path = synthetic.slide(tmp_path / "glass.svs", synthetic.picture(900, 900, (0, 0, 0, 0)))
    run = embed(path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]
    assert (run.tiles, run.encoded) == (0, 0)
    assert run.warnings
    assert len(store.tiles) == 1
    assert not list(store.features)


def test_a_slide_that_cannot_be_reached_loses_no_finished_block(
    slide_path: Path, store: Store, encoder: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tiling.read_tile
    seen = []

    def vanish(slide: object, xy: tuple[int, int], *how: object) -> np.ndarray:
        seen.append(xy)
        if len(seen) > 260:
            if slide_path.exists():
                slide_path.rename(slide_path.with_suffix(".away"))
            msg = "gone"
            raise DataError(msg)
        return real(slide, xy, *how)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr("pathcli.encoders.reading.read_tile", vanish)
        with pytest.raises(DataError, match="gone"):
            embed(slide_path, encoder, store=store, spec=SPEC, batch=8, workers=1)  # type: ignore[arg-type]
    slide_path.with_suffix(".away").rename(slide_path)
    run = embed(slide_path, encoder, store=store, spec=SPEC, batch=8)  # type: ignore[arg-type]
    assert run.encoded == run.tiles - 256  # two blocks were whole


def test_small_tiles_bring_a_warning(slide_path: Path, store: Store, encoder: object) -> None:
    run = embed(slide_path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]
    assert any("enlarged" in w for w in run.warnings)
    assert not embed(slide_path, encoder, store=store).warnings  # type: ignore[arg-type]


def test_two_processes_do_not_write_one_entry(
    slide_path: Path, store: Store, encoder: object
) -> None:
    key = embed(slide_path, encoder, store=store, spec=SPEC).key  # type: ignore[arg-type]
    store.features.path(key).unlink()
    with (
        store.features.lock(key),
        pytest.raises(BusyError, match="being written by process"),
    ):
        embed(slide_path, encoder, store=store, spec=SPEC)  # type: ignore[arg-type]


def test_an_absent_device_is_named() -> None:
    with pytest.raises(ResourceError, match="there is: auto, cpu"):
        pick_device("cuda:99")


CHILD = """
import sys
sys.path.insert(0, sys.argv[3])
from pathcli import registry
registry.BUILTIN["encoder"]["fake"] = "fakes:MeanColour"
from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import embed
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
import time
def slow(done, total):
    print(done, flush=True); time.sleep(0.01)
spec, store = tile_spec(32, 0.5), Store(sys.argv[2])
embed(sys.argv[1], build_encoder("fake"), store=store, spec=spec, batch=8, progress=slow)
"""


@pytest.mark.slow
def test_a_killed_embed_is_completed_by_the_next(
    slide_path: Path, store: Store, encoder: object, rng: np.random.Generator
) -> None:
    here = str(Path(__file__).parent)
    for _ in range(4):
        command = [sys.executable, "-c", CHILD, str(slide_path), str(store.root), here]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout
        child.stdout.readline()
        time.sleep(rng.uniform(0, 0.35))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert {f.state for f in upkeep.verify(store)} <= {"ok", "pending", "stale"}
    run = embed(slide_path, encoder, store=store, spec=SPEC, batch=8)  # type: ignore[arg-type]
    whole = embed(slide_path, encoder, store=Store(), spec=SPEC, batch=8)  # type: ignore[arg-type]
    assert np.array_equal(store.features[run.key].values, Store().features[whole.key].values)


@pytest.mark.gpu
@pytest.mark.usefixtures("lite0")
def test_a_gpu_gives_the_features_of_the_cpu(slide_path: Path, tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    values = []
    for device in ("cpu", "cuda"):
        kept = Store(tmp_path / device)
        spec = tile_spec(256, 0.4)  # resized on the device
        run = embed(slide_path, build_encoder("lite0"), store=kept, spec=spec, device=device)
        values.append(kept.features[run.key].values.astype(np.float32))
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in values)
    assert (a * b).sum(1).min() > 0.999
