import pickle
import shutil
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from fakes import MeanColour
from PIL import Image

from pathcli.data.images import read_image
from pathcli.encoders import imageset
from pathcli.encoders.augment import Augment
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.imageset import embed_images
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.store import Store, upkeep
from pathcli.store.int8 import as_int8
from pathcli.vlm.connectors import Mlp
from pathcli.vlm.scale_invariant import ScaleInvariant
from pathcli.vlm.tokens import CacheSettings, TokenCache, refuse_unless_still

T, D = 4, 96


class Patches(MeanColour):
    """An encoder of 4 tokens: the quarters of an image, their mean colour times fixed weights."""

    loads = 0

    def load(self, device: str) -> None:
        super().load(device)
        self.loads += 1
        weights = np.random.default_rng(5).standard_normal((3, D))
        self.weights, self.row_shape = torch.from_numpy(weights).float() / 64, (T, D)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        type(self).passes += 1
        quarters = images.float().unflatten(1, (2, 32)).unflatten(3, (2, 32)).mean((2, 4))
        return quarters.flatten(1, 2) @ self.weights


@pytest.fixture
def images(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """Nine images of 64 px."""
    paths = [str(tmp_path / f"{i}.png") for i in range(9)]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    return paths


def cache(refs: list[str], store: Store, tokens: str = "float16") -> TokenCache:
    kept = TokenCache(refs, Patches(), store, CacheSettings(tokens=tokens), "cpu")  # type: ignore[arg-type]
    kept.fill(lambda done, of: None)
    return kept


def expected(path: str) -> np.ndarray:
    encoder = Patches()
    encoder.load("cpu")
    return encoder.encode(torch.from_numpy(read_image(path))[None])[0].numpy()


def test_each_image_has_its_own_tokens_mapped_not_read(
    images: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imageset, "SHARD", 4)  # three entries
    kept = cache(images[::-1] + images[:2], store)
    for path in images:
        tokens = kept[path]
        assert tokens.dtype == np.float16
        assert np.array_equal(tokens, expected(path).astype(np.float16))
    assert kept.row_shape == (T, D)
    assert kept.bytes(10) == 10 * T * D * 2
    mapped = kept._mapped
    assert mapped is not None
    assert all(isinstance(mapped.entry(i).values, np.memmap) for i in range(3))


def test_the_store_is_shared_with_every_other_command(images: list[str], store: Store) -> None:
    embed_images(images, Embedder(Patches(), store))
    before = Patches.passes
    encoder = Patches()
    kept = TokenCache(images, encoder, store, CacheSettings(tokens="float16"), "cpu")
    assert kept.fill(lambda done, of: None) == 0
    assert (Patches.passes, encoder.loads) == (before, 0)
    assert len(store.features) == 1


def _sum(kept: TokenCache, path: str) -> float:
    return float(kept[path].astype(np.float64).sum())


def test_other_processes_read_the_same(images: list[str], store: Store) -> None:
    kept = cache(images, store)
    kept[images[0]]  # has mapped its file
    assert len(pickle.dumps(kept)) < 10_000
    with get_context("spawn").Pool(1) as pool:
        there = pool.starmap(_sum, [(kept, path) for path in images])
    assert there == [_sum(kept, path) for path in images]


def test_unreadable_images_have_no_tokens(images: list[str], store: Store) -> None:
    Path(images[2]).write_bytes(b"no image")
    Path(images[5]).unlink()
    kept = cache(images, store)
    assert [path in kept for path in images] == [i not in {2, 5} for i in range(9)]
    assert "never seen.png" not in kept
    with pytest.raises(DataError, match=r"2\.png"):
        kept[images[2]]


def test_int8_is_another_entry_of_half_the_size_close_to_float16(
    images: list[str], store: Store
) -> None:
    Path(images[2]).write_bytes(b"no image")
    half, whole = cache(images, store), cache(images, store, "int8")
    keys = {str(key.encoder): key for key in store.features}
    assert sorted(keys) == ["fake-000000000000", "fake-000000000000-int8"]
    for path in images[:2] + images[3:]:
        a, b = (kept[path].astype(np.float64) for kept in (half, whole))
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        assert cosine.min() > 0.999
        assert np.abs(a - b).max() <= np.abs(a).max() / 127 / 2 + 2e-3
        assert not np.array_equal(a, b)
    assert images[2] not in whole
    with h5py.File(store.features.path(keys["fake-000000000000-int8"])) as file:
        stored = file["features"].id.get_storage_size() + file["scales"].id.get_storage_size()
    assert stored == whole.bytes(9) == 9 * (T * D + 4 * T)
    assert {finding.state for finding in upkeep.verify(store)} == {"ok"}
    values = store.features[keys["fake-000000000000-int8"]].values  # as any reader has them
    assert values.dtype == np.float16
    assert np.isnan(values).all((1, 2)).sum() == 1


def test_a_damaged_scale_is_found(images: list[str], store: Store) -> None:
    cache(images, store, "int8")
    (key,) = store.features
    with h5py.File(store.features.path(key), "r+") as file:
        file["scales"][3, 1] = 7
    assert [f.state for f in upkeep.verify(store)] == ["broken", "ok"]


def test_a_killed_int8_run_is_resumed(
    images: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathcli.store import hdf5

    monkeypatch.setattr(hdf5, "BLOCK_ROWS", 2)
    whole, encode, calls = cache(images, store, "int8"), Patches.encode, []
    elsewhere = Store(store.root.parent / "again")
    kept = TokenCache(images, Patches(), elsewhere, CacheSettings(tokens="int8"), "cpu")
    assert kept._embedder is not None
    kept._embedder.batch = 2

    def dies(self: Patches, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(Patches, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        kept.fill(lambda done, of: None)
    assert kept.fill(lambda done, of: None) == 9 - 4
    assert all(np.array_equal(kept[path], whole[path]) for path in images)


def test_int8_keeps_vectors_of_any_size() -> None:
    values = np.array([[1e-6, 6e-8], [0, 0], [60000, -30000], [np.nan, np.nan]], np.float16)
    whole, scales = as_int8(values)
    assert whole.tolist() == [[127, 7], [0, 0], [127, -64], [0, 0]]
    assert np.allclose(scales[:3] * 127, [values[0, 0], 0, values[2, 0]])
    assert np.isnan(scales[3])


def test_what_does_not_fit_is_refused_with_numbers(
    images: list[str], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = 9 * T * D * 2
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000_000 + need - 1)
    )
    with pytest.raises(ResourceError, match=r"4 x 96 float16 is 0\.00 MB an image.*1 GB are free"):
        cache(images, store)
    assert len(store.features) == 0
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000_000 + need)
    )
    monkeypatch.setattr("pathcli.store.hdf5.require_space", lambda path, size: None)
    assert images[0] in cache(images, store)


def test_the_size_of_the_papers_tokens() -> None:
    assert CacheSettings(tokens="float16").row_bytes((257, 1408)) == 723_712  # 0.72 MB
    assert CacheSettings(tokens="int8").row_bytes((257, 1408)) == 362_884


@pytest.mark.parametrize("frame", ["pad", "squash"])
def test_frames_other_than_the_centre_are_refused(frame: str) -> None:
    with pytest.raises(UsageError, match="Mlp sees another part"):
        refuse_unless_still(Augment(), partial(Mlp, frame=frame))


def test_still_centre_squares_are_allowed_and_nothing_else() -> None:
    refuse_unless_still(Augment(), partial(Mlp, frame="centre"))
    refuse_unless_still(Augment(), Mlp(8, 8, frame="centre"))
    with pytest.raises(UsageError, match="augment"):
        refuse_unless_still(Augment(turns=True), partial(Mlp, frame="centre"))
    with pytest.raises(UsageError, match=r"ScaleInvariant sees \d views"):
        refuse_unless_still(Augment(), partial(ScaleInvariant))
