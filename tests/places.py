"""Places of a store for tests: a folder as HDF5 or Zarr, an S3 server on loopback, memory."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from pathcli.store import Store
from pathcli.store.zarr import Zarr

KINDS = ("hdf5", "zarr", "s3", "memory")


@cache
def _server() -> str:
    """Start the one server of this process; fsspec keeps connections to it open until the end."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _running.append(server)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


_running: list[object] = []


@contextmanager
def s3_server() -> Iterator[str]:
    """Serve S3 on loopback with a bucket `bucket`, known by the environment; yield its address."""
    import fsspec

    told = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": _server(),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        files = fsspec.filesystem("s3", use_listings_cache=False)
        if not files.exists("bucket"):
            files.mkdir("bucket")
        yield _server()


def address(kind: str, folder: Path) -> str:
    """Return the address of a new store of one kind."""
    name = uuid.uuid4().hex
    return {
        "hdf5": str(folder / name),
        "zarr": str(folder / f"{name}.zarr"),
        "s3": f"s3://bucket/{name}",
        "memory": f"memory://{name}",
    }[kind]


def block(store: Store) -> int:
    """Return how many rows an interrupted run of many rows may lose."""
    from pathcli.store import hdf5, zarr_writer

    return zarr_writer.CHUNK_ROWS if isinstance(store.backend, Zarr) else hdf5.BLOCK_ROWS
