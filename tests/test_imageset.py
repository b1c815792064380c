import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathcli.data.images import cell, read_image
from pathcli.encoders import build_encoder, imageset
from pathcli.encoders.embedding import Embedder
from pathcli.encoders.imageset import centre_square, embed_images, image_digest
from pathcli.errors import BusyError, DataError
from pathcli.store import Store, upkeep
from pathcli.types import WHOLE, Member, Region


@pytest.fixture
def images(tmp_path: Path, rng: np.random.Generator) -> list[str]:
    """Twenty images of 64 px, each of one colour, named in an order that is not their content's."""
    folder = tmp_path / "images"
    folder.mkdir()
    paths = []
    for i, colour in enumerate(rng.integers(0, 255, (20, 3), np.uint8)):
        path = folder / f"{i}.png"
        Image.fromarray(np.full((64, 64, 3), colour, np.uint8)).save(path)
        paths.append(str(path))
    return paths


@pytest.fixture
def embedder(fake: type, store: Store) -> Embedder:
    return Embedder(build_encoder("fake"), store, batch=4)


def colours(paths: list[str]) -> np.ndarray:
    return np.array([read_image(path)[0, 0] for path in paths])


def test_features_come_in_the_order_asked_for(images: list[str], embedder: Embedder) -> None:
    found = embed_images(images, embedder)
    assert found.values.dtype == np.float16
    assert np.array_equal(found.values, colours(images))
    assert found.readable.all()
    assert (found.encoded, found.copies) == (20, 0)
    back = embed_images(images[::-1], embedder)
    assert np.array_equal(back.values, found.values[::-1])
    assert (back.encoded, back.keys) == (0, found.keys)


def test_a_set_is_named_by_content_not_by_paths(
    images: list[str], embedder: Embedder, tmp_path: Path
) -> None:
    first = embed_images(images, embedder)
    moved = (tmp_path / "images").rename(tmp_path / "elsewhere")
    again = embed_images([str(moved / Path(path).name) for path in images], embedder)
    assert (again.keys, again.encoded) == (first.keys, 0)
    digests = sorted(
        hashlib.sha256((moved / Path(path).name).read_bytes()).hexdigest() for path in images
    )
    name = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert first.keys[0].item.endswith(name[:8])
    assert first.keys[0].tiles == WHOLE.digest
    other = embed_images([str(moved / Path(path).name) for path in images[1:]], embedder)
    assert other.keys != first.keys


def test_broken_and_missing_images_are_marked(images: list[str], embedder: Embedder) -> None:
    Path(images[3]).write_bytes(b"no image")
    Path(images[7]).unlink()
    found = embed_images(images, embedder)
    assert np.flatnonzero(~found.readable).tolist() == [3, 7]
    assert np.isnan(found.values[[3, 7]]).all()
    kept = np.flatnonzero(found.readable)
    assert np.array_equal(found.values[kept], colours([images[i] for i in kept]))
    assert np.array_equal(embed_images(images, embedder).readable, found.readable)
    assert {f.state for f in upkeep.verify(embedder.store)} == {"ok"}


def test_copies_are_encoded_once_and_counted(images: list[str], embedder: Embedder) -> None:
    Path(images[5]).write_bytes(Path(images[2]).read_bytes())
    found = embed_images(images, embedder)
    assert (found.encoded, found.copies) == (19, 1)
    assert np.array_equal(found.values[5], found.values[2])


def test_large_sets_are_sharded(
    images: list[str], embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imageset, "SHARD", 8)
    told = []
    found = embed_images(images, embedder, lambda done, of: told.append((done, of)))
    assert [embedder.store.features.shape(key)[0] for key in found.keys] == [(3,)] * 3
    assert [len(embedder.store.features[key].values) for key in found.keys] == [8, 8, 4]
    assert np.array_equal(found.values, colours(images))
    assert told[-1] == (20, 20)
    assert told == sorted(told)


def test_an_interrupted_set_is_resumed(
    tmp_path: Path, embedder: Embedder, rng: np.random.Generator
) -> None:
    paths = []
    for i in range(200):
        path = tmp_path / f"{i}.bmp"
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(path)
        paths.append(str(path))

    def stop(done: int, of: int) -> None:
        if done >= 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_images(paths, embedder, stop)
    assert {f.state for f in upkeep.verify(embedder.store)} == {"pending"}
    found = embed_images(paths, embedder)
    assert found.encoded == 200 - 128  # one block of 128 rows was whole
    whole = embed_images(paths, Embedder(embedder.encoder, Store()))
    assert np.array_equal(found.values, whole.values)


def test_another_writer_is_respected(images: list[str], embedder: Embedder) -> None:
    key = embed_images(images, embedder).keys[0]
    embedder.store.features.remove(key)
    with embedder.store.features.lock(key), pytest.raises(BusyError):
        embed_images(images, embedder)


def test_an_image_that_vanishes_midway_is_an_error(
    images: list[str], embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(ref: str) -> np.ndarray:
        Path(ref).unlink(missing_ok=True)
        msg = f"{ref}: no such file"
        raise DataError(msg)

    monkeypatch.setattr(imageset, "read_image", gone)
    with pytest.raises(DataError, match="no such file"):
        embed_images(images, embedder)
    assert not list(embedder.store.features)


def test_a_set_without_images_is_an_error(tmp_path: Path, embedder: Embedder) -> None:
    with pytest.raises(DataError, match="none of 1 images can be read"):
        embed_images([str(tmp_path / "absent.png")], embedder)


def test_a_set_of_broken_images_is_an_error(images: list[str], embedder: Embedder) -> None:
    for i, path in enumerate(images):
        Path(path).write_bytes(b"no image %d" % i)
    with pytest.raises(DataError, match=r"none of 20 images can be read; the first is .*0\.png"):
        embed_images(images, embedder)


def test_cells_of_a_parquet_file_are_told_apart(tmp_path: Path, embedder: Embedder) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install pyarrow")
    from pyarrow import parquet

    rows = []
    for grey in (50, 10, 90):
        memory = io.BytesIO()
        Image.fromarray(np.full((64, 64, 3), grey, np.uint8)).save(memory, "PNG")
        rows.append({"image": {"bytes": memory.getvalue(), "path": f"{grey}.png"}})
    path = tmp_path / "hub.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    found = embed_images([cell(str(path), "image", row) for row in range(3)], embedder)
    assert found.copies == 0
    assert found.values[:, 0].tolist() == [50, 10, 90]


def test_the_central_square_is_what_is_seen() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    assert (centre_square(wide, 64) == 200).all()
    assert (centre_square(wide.transpose(1, 0, 2), 32) == 200).all()


def test_resizing_is_that_of_pillow(rng: np.random.Generator) -> None:
    smooth = np.kron(rng.integers(0, 255, (10, 10, 3)), np.ones((30, 30, 1))).astype(np.uint8)
    ours = centre_square(smooth, 224).astype(int)
    theirs = np.asarray(Image.fromarray(smooth).resize((224, 224), Image.Resampling.BICUBIC))
    assert np.abs(ours - theirs).max() <= 1


def test_regions_and_members_of_archives_are_images_too(
    slide_path: Path, tmp_path: Path, embedder: Embedder
) -> None:
    memory = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), (10, 20, 30), np.uint8)).save(memory, "PNG")
    archive = tmp_path / "a.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(memory.getvalue())
        tar.addfile(info, io.BytesIO(memory.getvalue()))
    with tarfile.open(archive) as tar:
        member = tar.getmember("x.png")
    refs = [
        Member(str(archive), member.offset_data, member.size, "x.png"),
        Region(str(slide_path), (300, 300), 64),
        Region(str(slide_path), (0, 0), 64),
    ]
    found = embed_images(refs, embedder)
    assert found.values[0].tolist() == [10, 20, 30]
    expected = read_image(refs[1]).mean((0, 1))
    assert np.abs(found.values[1] - expected).max() < 0.2
    assert len({image_digest(ref) for ref in refs}) == 3
    assert image_digest(refs[0]) == hashlib.sha256(memory.getvalue()).hexdigest()


def test_store_commands_accept_image_sets(
    images: list[str], embedder: Embedder, run: object
) -> None:
    item = embed_images(images, embedder).keys[0].item
    root = embedder.store.root
    for command in (["verify"], ["list"], ["info"], ["info", item]):
        code, out, _ = run("store", *command, "--store", root, "--json")  # type: ignore[operator]
        assert code == 0, command
        if command in (["list"], ["info", item]):
            assert item in out
    assert embedder.store.slides()[item]["width"] == 20
