"""What is true of Zarr and of stores elsewhere alone: layout, faults, commands, slides."""

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import places
import pytest
import zarr
from cohorts import put, values
from conftest import Run, open_slide
from entries import D, fill, make_tiles, rows
from fakes import Colours
from test_bags import cohort

from pathcli.encoders.search import search
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.mil.bags import Bags
from pathcli.slides.tiling import tile_spec
from pathcli.store import Store, remote, zarr_writer
from pathcli.store.remote import RemotePlace
from pathcli.types import Key


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with places.s3_server() as address:
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Store:
    return Store(tmp_path / "features.zarr")


# --- layout ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zarr", "s3"])
def test_zarr_reads_what_was_written(kind: str, tmp_path: Path, s3: str) -> None:
    store = Store(places.address(kind, tmp_path))
    tiles = make_tiles(1500)
    tiles.status[7] = 1
    values = rows(0, 1500)
    values[7] = np.nan
    with store.features.writer(tiles, "enc-1-int8", (D,)) as writer:
        writer.begin(0)
        writer.write(values, tiles.status)
    key = Key(tiles.item, 0.25, tiles.spec.digest, "enc-1-int8")
    group = zarr.open_group(f"{store.root}/{store.features.name(key)}", mode="r")
    assert group.metadata.zarr_format == 3
    assert sorted(group.array_keys()) == ["coords", "features", "scales", "status"]
    assert np.array_equal(group["coords"][:], tiles.xy)
    assert np.array_equal(group["status"][:], tiles.status)
    back = group["features"][:] * group["scales"][:][:, None]
    assert np.array_equal(back.astype(np.float16), store.features[key].values, equal_nan=True)
    assert group["features"].chunks == (zarr_writer.CHUNK_ROWS, D)
    assert group.attrs["encoder"] == group["features"].attrs["encoder"] == "enc-1-int8"
    assert json.loads(group.attrs["spec"])["size_px"] == 224
    assert group["coords"].attrs["patch_size_level0"] == 448
    assert group["coords"].attrs["overlap"] == 0


def test_attributes_are_those_of_hdf5(folder: Store, store: Store) -> None:
    import h5py

    tiles = make_tiles(20)
    keys = [fill(each, tiles) for each in (folder, store)]
    group = zarr.open_group(folder.features.path(keys[0]), mode="r")
    with h5py.File(store.features.path(keys[1])) as file:
        assert dict(group.attrs) == {name: _plain(file.attrs[name]) for name in file.attrs}
        for name in ("coords", "features"):
            told = {key: _plain(value) for key, value in file[name].attrs.items()}
            told.pop("crc32", None)
            assert dict(group[name].attrs) == told


def _plain(value: object) -> object:
    return value.item() if isinstance(value, np.generic) else value


def test_chunks_of_zeros_are_written_too(folder: Store) -> None:
    tiles = make_tiles(10)
    with folder.features.writer(tiles, "enc-1", (D,)) as writer:
        writer.begin(0)
        writer.write(np.zeros((10, D), np.float16), np.zeros(10, np.uint8))
    key = next(iter(folder.features))
    assert (folder.features.path(key) / "features" / "c.0.0").stat().st_size == 10 * D * 2 + 4
    assert folder.features.verify(key) == key


def test_a_missing_chunk_is_found(folder: Store) -> None:
    key = fill(folder, make_tiles(3000))
    (folder.features.path(key) / "features" / "c.1.0").unlink()
    with pytest.raises(DataError, match="1 of 3 blocks"):
        folder.features.verify(key)
    with pytest.raises(DataError, match=r"a chunk is missing.*store prune"):
        folder.features[key]
    (folder.features.path(key) / "zarr.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        folder.features[key]


def test_an_entry_of_other_codecs_is_not_misread(folder: Store) -> None:
    key = fill(folder, make_tiles(30))
    path = folder.features.path(key) / "zarr.json"
    path.write_text(path.read_text().replace('"crc32c"', '"gzip"'))
    with pytest.raises(DataError, match="gzip"):
        folder.features[key]


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from entries import fill, make_tiles
from pathcli.store import Store
import pathcli.store.zarr_writer as w
w.CHUNK_ROWS = 64
slow = w.ZarrWriter.write
def write(self, *a):
    time.sleep(0.002); slow(self, *a)
w.ZarrWriter.write = write
store, tiles = Store(sys.argv[1]), make_tiles(3000)
print("go", flush=True)
fill(store, tiles, 50)
"""


@pytest.mark.slow
def test_a_killed_writer_of_zarr_leaves_only_what_is_resumed(
    folder: Store, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zarr_writer, "CHUNK_ROWS", 64)
    tiles, reached = make_tiles(3000), [0]
    key = Key(tiles.item, tiles.slide_mpp, tiles.spec.digest, "enc-1")
    for _ in range(4):
        command = [sys.executable, "-c", WRITER, str(folder.root), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout
            child.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.4))
            child.send_signal(signal.SIGKILL)
        if key in folder.features:
            break
        reached.append(folder.features.writer(tiles, "enc-1", (D,)).resumed)
    assert reached == sorted(reached)
    if key not in folder.features:
        fill(folder, tiles)
    assert np.array_equal(folder.features[key].values, rows(0, 3000))
    assert folder.features.verify(key) == key


# --- faults ------------------------------------------------------------------------------


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have fsspec make a connection anew, which it would not where the options are the same."""
    monkeypatch.setitem(remote._S3, "user_agent_extra", uuid.uuid4().hex)


def test_a_missing_bucket_is_one_line(s3: str) -> None:
    with pytest.raises(ResourceError, match=r"s3://no-such-bucket/x: cannot be written.*--store"):
        Store("s3://no-such-bucket/x")
    with pytest.raises(ResourceError, match="no store here"):
        Store("s3://no-such-bucket/x", create=False)


@pytest.mark.usefixtures("unconnected")
def test_wrong_credentials_are_one_line(s3: str) -> None:
    def require(actions: float) -> None:
        server = http.client.HTTPConnection(s3.removeprefix("http://"), timeout=10)
        server.request("POST", "/moto-api/reset-auth", body=str(actions))
        assert server.getresponse().status == 200
        server.close()

    require(0)
    try:
        with pytest.raises(ResourceError, match=r"no permission.*credentials in the environment"):
            Store("s3://bucket/private")
    finally:
        require(float("inf"))


@pytest.mark.usefixtures("unconnected")
def test_no_credentials_are_one_line(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(ResourceError, match="credentials"):
        Store("s3://bucket/private")


@pytest.mark.usefixtures("unconnected")
def test_a_server_that_is_away_is_one_line_and_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    start = time.monotonic()
    with pytest.raises(ResourceError, match="cannot be reached"):
        Store("s3://bucket/x")
    assert time.monotonic() - start < 20


def test_an_address_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(ResourceError, match=r"pip install 'pathcli\[remote\]'"):
        Store("s3://bucket/x")


@pytest.mark.parametrize("url", ["s3://key:secret@bucket/x", "s3://bucket/x?sig=1", "s3://"])
def test_an_address_holds_no_secret(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        Store(url)
    assert "secret" not in str(caught.value)
    assert "sig" not in str(caught.value)
    with pytest.raises(UsageError, match="not an address"):
        Store("nowhere://x")


def test_a_place_that_overwrites_what_is_there_takes_no_lease(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = RemotePlace("memory://overwriting")
    files = place._files[0]
    real = type(files).pipe_file
    monkeypatch.setattr(
        type(files), "pipe_file", lambda self, path, data, mode="": real(self, path, data)
    )
    with pytest.raises(ResourceError, match="no conditional writes"):
        place.create("x", b"")


def test_an_answer_lost_on_the_way_does_not_lock_oneself_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pathcli.store.lease import lease

    place = RemotePlace("memory://lost")
    real = place.create

    def created_but_told_not(name: str, data: bytes) -> None:
        real(name, data)
        raise FileExistsError(name)

    monkeypatch.setattr(place, "create", created_but_told_not)
    with lease(place, "x") as held:
        assert held()


# --- commands ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zarr", "s3"])
def test_embedding_gives_the_same_wherever_it_goes(
    kind: str, run: Run, fake: type, slide_path: Path, tmp_path: Path, s3: str
) -> None:
    at = [places.address(each, tmp_path) for each in ("hdf5", kind)]
    asked = ("embed", slide_path, "--encoder", "fake", "--mpp", "0.5", "--store")
    for root in at:
        code, _, err = run(*asked, root)
        assert code == 0, err
    plain, other = (Store(root) for root in at)
    (key,) = plain.features
    assert list(other.features) == [key]
    assert list(other.tiles) == list(plain.tiles)
    one, two = plain.features[key], other.features[key]
    for name in ("values", "xy", "status"):
        assert np.array_equal(getattr(one, name), getattr(two, name), equal_nan=True)
    assert other.slides() == plain.slides()
    code, out, err = run(*asked, at[1])
    assert code == 0, err
    assert "from the store" in out


@pytest.mark.parametrize("kind", ["zarr", "s3"])
def test_bags_and_search_read_from_it(
    kind: str, store: Store, slide_path: Path, tmp_path: Path, s3: str
) -> None:
    other = Store(places.address(kind, tmp_path))
    rows = [("p", "a", 0), ("q", "b", 1), ("q", "c", 1)]
    for each in (store, other):
        for n, (_, slide, _) in enumerate(rows, start=4):
            put(each, slide, values(n, seed=n), bad=[1] if slide == "b" else [])
    pairs = [Bags(cohort(tmp_path, s, *rows), "abc", "patient") for s in (store, other)]
    for near, far in zip(*pairs, strict=True):
        assert (near.name, near.slides) == (far.name, far.slides)
        assert np.array_equal(near.features, far.features)
        assert np.array_equal(near.xy, far.xy)
        assert isinstance(far.features, np.ndarray)
    spec = tile_spec(64, 0.5)
    found = [
        search([slide_path], "red", Colours(), store=s, spec=spec).hits for s in (store, other)
    ]
    assert found[0] == found[1]
    assert found[0]


# --- slides ------------------------------------------------------------------------------


@pytest.fixture
def website(slide_path: Path) -> Iterator[str]:
    class Ranged(SimpleHTTPRequestHandler):
        """Serves byte ranges, as any web server does and Python's does not."""

        def do_GET(self) -> None:
            data = Path(self.translate_path(self.path)).read_bytes()
            asked = self.headers.get("Range")
            start, stop = 0, len(data)
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last or stop) + 1, stop)
            self.send_response(206 if asked else 200)
            self.send_header("Content-Length", str(stop - start))
            self.send_header("Accept-Ranges", "bytes")
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(data[start:stop])

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Ranged, directory=str(slide_path.parent))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/{slide_path.name}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_a_slide_is_read_from_an_address(
    kind: str, request: pytest.FixtureRequest, slide_path: Path, s3: str
) -> None:
    if kind == "s3":
        address = f"s3://bucket/slides/{slide_path.name}"
        fsspec.filesystem("s3").put_file(str(slide_path), address)
    else:
        address = request.getfixturevalue("website")
    far, near = open_slide(address), open_slide(slide_path)
    assert (far.info.width, far.info.height) == (near.info.width, near.info.height)
    assert np.array_equal(far.read((300, 200), 0, (64, 64)), near.read((300, 200), 0, (64, 64)))
