"""The stages of embedding beside each other: readers, encoder, writer, and the next slide."""

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
import synthetic

from pathcli.encoders.embedding import Embedder, EmbedRun
from pathcli.encoders.reading import AHEAD, Reader, SlideRows
from pathcli.encoders.writing import WAITING
from pathcli.errors import DataError, ResourceError
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store, upkeep
from pathcli.store.hdf5 import FeatureWriter

SPEC = tile_spec(32, 0.5)
HOW = {"spec": SPEC}
WAIT_S = 20


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Three slides of other content."""
    made = []
    for i in range(3):
        picture = synthetic.picture(700, 500, (64, 64, 500, 400), seed=i)
        made.append(synthetic.slide(tmp_path / f"s{i}.svs", picture))
    return made


@pytest.fixture
def read_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the slides that rows were read of, in order of reading."""
    seen: list[str] = []
    real = SlideRows.read

    def read(self: SlideRows, row: int) -> np.ndarray:
        seen.append(Path(self.name).name)
        return real(self, row)

    monkeypatch.setattr(SlideRows, "read", read)
    return seen


class Fits(fakes.MeanColour):
    """Has memory for `most` images at once."""

    most = 5
    sizes: list[int]

    def __init__(self, words: str = "DefaultCPUAllocator: can't allocate memory") -> None:
        super().__init__()
        self.words, self.sizes = words, []

    def encode(self, images: Any) -> Any:
        self.sizes.append(len(images))
        if len(images) > self.most:
            raise RuntimeError(self.words)
        return super().encode(images)


def values(store: Store, run: EmbedRun) -> np.ndarray:
    return store.features[run.key].values


# --- the next slide ----------------------------------------------------------------------


def test_the_next_slide_is_read_while_one_is_encoded(
    three: list[Path], store: Store, read_of: list[str]
) -> None:
    class Waits(fakes.MeanColour):
        def encode(self, images: Any) -> Any:
            for _ in range(WAIT_S * 100):
                if "s1.svs" in read_of:
                    break
                threading.Event().wait(0.01)
            assert "s1.svs" in read_of
            return super().encode(images)

    ready = Embedder(Waits(), store)
    ready.expect([(p, HOW) for p in three[:2]])
    runs = [ready(p, **HOW) for p in three[:2]]
    plain = Embedder(fakes.MeanColour(), Store())
    for path, run in zip(three, runs, strict=False):
        assert np.array_equal(values(store, run), values(plain.store, plain(path, **HOW)))


def test_what_the_store_has_is_not_read_again(
    three: list[Path], store: Store, read_of: list[str]
) -> None:
    Embedder(fakes.MeanColour(), store)(three[1], **HOW)
    read_of.clear()
    ready = Embedder(fakes.MeanColour(), store)
    ready.expect([(p, HOW) for p in three])
    assert [ready(p, **HOW).encoded > 0 for p in three] == [True, False, True]
    assert set(read_of) == {"s0.svs", "s2.svs"}


def test_faults_are_told_in_turn_and_once(three: list[Path], store: Store) -> None:
    three[1].write_bytes(b"no slide" * 99)
    ready = Embedder(fakes.MeanColour(), store)
    ready.expect([(p, HOW) for p in three])
    assert ready(three[0], **HOW).encoded
    with pytest.raises(DataError, match=r"s1\.svs: not a slide"):
        ready(three[1], **HOW)
    assert ready(three[2], **HOW).encoded
    assert len(store.features) == 2


def test_a_slide_that_fails_leaves_the_prepared_one_whole(three: list[Path], store: Store) -> None:
    for index in range(4):
        synthetic.break_tile(three[0], index)
    ready = Embedder(fakes.MeanColour(), store)
    ready.expect([(p, HOW) for p in three[:2]])
    with pytest.raises(DataError, match="--max-bad-tiles"):
        ready(three[0], **HOW)
    run = ready(three[1], **HOW)
    assert (run.unreadable, len(store.features)) == (0, 1)
    assert np.isfinite(values(store, run)).all()


def test_slides_may_be_asked_for_otherwise_than_was_said(three: list[Path], store: Store) -> None:
    ready = Embedder(fakes.MeanColour(), store)
    ready.expect([(p, HOW) for p in three])
    small = tile_spec(16, 1.0)
    for path, spec in ((three[2], small), (three[0], SPEC), (three[2], SPEC), (three[1], SPEC)):
        assert ready(path, spec=spec).encoded
    ready.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("reader")]


def test_a_prepared_slide_that_nobody_wants_is_let_go(three: list[Path], store: Store) -> None:
    ready = Embedder(fakes.MeanColour(), store)
    ready.expect([(p, HOW) for p in three])
    ready(three[0], **HOW)
    ready.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("reader")]
    assert ready(three[1], **HOW).encoded


def test_a_slide_that_was_begun_before_is_prepared_and_resumed(
    three: list[Path], store: Store
) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 136:
            raise KeyboardInterrupt

    first = Embedder(fakes.MeanColour(), store, batch=8)
    with pytest.raises(KeyboardInterrupt):
        first(three[1], progress=stop, **HOW)
    ready = Embedder(fakes.MeanColour(), store, batch=8)
    ready.expect([(p, HOW) for p in three[:2]])
    ready(three[0], **HOW)
    run = ready(three[1], **HOW)
    assert run.encoded == run.tiles - 128
    whole = Embedder(fakes.MeanColour(), Store(), batch=8)
    assert np.array_equal(values(store, run), values(whole.store, whole(three[1], **HOW)))


# --- memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried to", "can't allocate memory"])
def test_a_batch_that_is_too_large_is_halved_until_it_fits(
    slide_path: Path, store: Store, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Fits(words)
    with caplog.at_level(logging.WARNING, "pathcli"):
        ready = Embedder(encoder, store, batch=32)
        run = ready(slide_path, **HOW)
    whole = Embedder(fakes.MeanColour(), Store())
    ours, theirs = (
        v.astype(np.float64)
        for v in (values(store, run), values(whole.store, whole(slide_path, **HOW)))
    )
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert ((ours * theirs).sum(1) / lengths).min() >= 0.99999
    assert encoder.sizes[:4] == [32, 16, 8, 4]
    assert set(encoder.sizes[4:]) <= {4, run.tiles % 32 % 4}  # it does not try again
    assert [r.getMessage() for r in caplog.records] == [
        "cpu is out of memory at --batch 32: going on with 4"
    ]


def test_a_single_tile_that_does_not_fit_is_a_resource_error(
    slide_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fits, "most", 0)
    with pytest.raises(ResourceError, match="out of memory with a single tile"):
        Embedder(Fits(), store)(slide_path, **HOW)
    assert not list(store.features)


def test_a_short_batch_of_a_compiled_encoder_is_halved_from_its_full_size(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch, "compile", lambda encode, **_: encode)
    encoder = Fits()
    ready = Embedder(encoder, store, device="cpu", batch=32, compiled=True)
    ready.load()
    pixels = torch.full((1, 4, 4, 3), 7, dtype=torch.uint8)
    assert ready._passes(pixels).tolist() == [[7, 7, 7]]
    assert encoder.sizes == [32, 16, 8, 4]  # a compiled pass is filled up, however few tiles


def test_another_runtime_error_is_not_taken_for_want_of_memory(
    slide_path: Path, store: Store
) -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Embedder(Fits("shapes do not match"), store)(slide_path, **HOW)


def test_readers_stay_a_few_batches_ahead(slide_path: Path) -> None:
    class Counted:
        name, side, max_bad = "counted", 4, 1.0
        read_rows = 0

        def read(self, row: int) -> np.ndarray:
            Counted.read_rows += 1
            return np.full((4, 4, 3), row % 251, np.uint8)

        def gone(self, row: int) -> bool:
            return False

    reader = Reader(Counted(), 1000, first=4, batch=4, workers=2)
    for i, batch in enumerate(reader):
        assert batch.start == 4 + 4 * i
        assert batch.pixels[:, 0, 0, 0].tolist() == [
            r % 251 for r in range(batch.start, min(batch.start + 4, 1000))
        ]
        assert Counted.read_rows <= 4 * (i + 2 + 2 + AHEAD)
    reader.close()
    assert Counted.read_rows == 996


# --- the writer --------------------------------------------------------------------------


def test_a_slow_disk_does_not_stop_the_encoder(
    slide_path: Path, store: Store, fake: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ahead = FeatureWriter.write, []

    def slow(self: FeatureWriter, *what: Any) -> None:
        if not ahead:
            for _ in range(WAIT_S * 100):
                if fake.passes > WAITING:  # type: ignore[attr-defined]
                    break
                threading.Event().wait(0.01)
            ahead.append(fake.passes)  # type: ignore[attr-defined]
        real(self, *what)

    monkeypatch.setattr(FeatureWriter, "write", slow)
    Embedder(fakes.MeanColour(), store, batch=8)(slide_path, **HOW)
    assert ahead[0] > WAITING  # batches were encoded while the first was being written


def test_what_the_writer_finds_is_raised(
    slide_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wild(fakes.MeanColour):
        def encode(self, images: Any) -> Any:
            return super().encode(images) * (1e6 if self.passes > 4 else 1)

    with pytest.raises(DataError, match="not finite in float16"):
        Embedder(Wild(), store, batch=8)(slide_path, **HOW)
    assert not list((store.root / "features").rglob("*.part"))  # of bad weights nothing is kept

    def full(self: FeatureWriter, *what: Any) -> None:
        msg = "no space left"
        raise ResourceError(msg)

    monkeypatch.setattr(FeatureWriter, "write", full)
    with pytest.raises(ResourceError, match="no space left"):
        Embedder(fakes.MeanColour(), store)(slide_path, **HOW)
    assert not list(store.features)
    assert {f.state for f in upkeep.verify(store)} <= {"ok", "pending"}


# --- translated --------------------------------------------------------------------------


class Even(fakes.MeanColour):
    """Does not count its passes: each number would be compiled anew."""

    def encode(self, images: Any) -> Any:
        return images.float().mean(dim=(1, 2))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_a_compiled_encoder_gives_the_same_features(slide_path: Path, store: Store) -> None:
    from torch._inductor import config

    ready = Embedder(Even(), store, batch=50, compiled=True)
    plain = Embedder(Even(), Store(), batch=50)
    quick = {"compile_threads": 1, "cpp_cache_precompile_headers": False, "cpp.vec_isa_ok": False}
    with config.patch(quick):  # a fifth of the time: no helpers, no trials of the compiler
        ours = ready(slide_path, **HOW)
    theirs = plain(slide_path, **HOW)
    assert ours.tiles % 50  # the last batch is shorter
    found = values(store, ours).astype(np.float32)
    assert np.allclose(found, values(plain.store, theirs), atol=0.13)  # a float16 step at 200


@pytest.mark.slow
def test_what_cannot_be_compiled_is_told(slide_path: Path, store: Store) -> None:
    from torch._dynamo.exc import InternalTorchDynamoError

    class Odd(Even):
        def encode(self, images: Any) -> Any:
            msg = "no such graph"
            raise InternalTorchDynamoError(msg)

    with pytest.raises(ResourceError, match=r"cannot be compiled here .*; leave --compile out"):
        Embedder(Odd(), store, compiled=True)(slide_path, **HOW)
