"""What a store costs against a raw `.npy` file: a slide written, a bag read, rows picked.

`n` rows of float16. `write` is filling and publishing an entry in batches of 64 rows, against
`np.save`, both down to the disk (fsync). `whole` is reading the entry with its tiles, against
`np.load` of the features alone; `first` is the same of an entry that this process has not read
before (it is touched, so that nothing known of it counts). `picked` are 512 random rows, in the
order of the file, against a mapped `.npy`; the entry is opened anew each time, as the file is.
Each round measures both one after the other; medians of the ratios count, `_cpu_x` being those
of processor time, which other work on the machine does not change. Files are in the page cache
when they are read, as reading put them there.
Prints one JSON line for each store and width.

    python benchmarks/store.py [--n 20000] [--dims 512,1024] [--rounds 15] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.slides.tiling import tile_spec
from pathcli.store import Store
from pathcli.types import Key, Tiles

if TYPE_CHECKING:
    from collections.abc import Callable

ENCODER, BATCH, PICKED = "random-000000000000", 64, 512


class Case:
    """One store and the `.npy` file of the same features."""

    def __init__(self, folder: Path, kind: str, n: int, dim: int) -> None:
        """Make tiles and features."""
        rng = np.random.default_rng(0)
        self.store = Store(folder / (f"{dim}.zarr" if kind == "zarr" else f"{dim}-{kind}"))
        xy = np.stack([np.arange(n) % 100 * 224, np.arange(n) // 100 * 224], 1).astype(np.int32)
        self.status = np.zeros(n, np.uint8)
        self.tiles = Tiles("slide-00000000", xy, self.status, tile_spec(), 0.5, 22400, 90000, 1.0)
        self.key = Key(self.tiles.item, 0.5, self.tiles.spec.digest, ENCODER)
        self.values = rng.standard_normal((n, dim), np.float32).astype(np.float16)
        self.rows = np.sort(rng.choice(n, min(PICKED, n), replace=False))
        self.npy = folder / f"{dim}.npy"

    def write(self) -> None:
        """Fill and publish the entry."""
        self.store.features.remove(self.key)
        with self.store.features.writer(self.tiles, ENCODER, self.values.shape[1:]) as writer:
            writer.begin(0)
            for at in range(0, len(self.values), BATCH):
                writer.write(self.values[at : at + BATCH], self.status[at : at + BATCH])

    def write_npy(self) -> None:
        """Save the features, down to the disk."""
        self.npy.unlink(missing_ok=True)
        with self.npy.open("wb") as file:
            np.save(file, self.values)
            file.flush()
            os.fsync(file.fileno())

    def cool(self) -> None:
        """Have the page cache forget both, so that how they were written plays no part."""
        os.sync()
        for file in (self.npy, *(f for f in Path(self.store.root).rglob("*") if f.is_file())):
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def whole(self) -> Any:  # noqa: ANN401 - an array
        """Read the bag."""
        return self.store.features[self.key].values

    def first(self) -> Any:  # noqa: ANN401 - an array
        """Read the bag as if for the first time."""
        os.utime(self.store.features.path(self.key))
        return self.whole()

    def whole_npy(self) -> Any:  # noqa: ANN401 - an array
        """Read the features alone."""
        return np.load(self.npy)

    first_npy = whole_npy

    def picked(self) -> Any:  # noqa: ANN401 - an array
        """Read some rows of the bag."""
        return np.array(self.store.features.mapped(self.key).values[self.rows])

    def picked_npy(self) -> Any:  # noqa: ANN401 - an array
        """Read the same rows of the file."""
        return np.array(np.load(self.npy, mmap_mode="r")[self.rows])


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Return how long one call takes, by the clock and of the processor."""
    start, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - used


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Return ratios to the `.npy` file, and milliseconds of both."""
    found: dict[str, Any] = {}
    for name in ("write", "first", "whole", "picked"):
        ours, theirs = getattr(case, name), getattr(case, f"{name}_npy")
        ours()
        theirs()
        if name != "write" and not np.array_equal(ours(), theirs()):
            msg = f"{name}: not what was written"
            raise SystemExit(msg)
        pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
        found[f"{name}_x"] = round(statistics.median(a[0] / b[0] for a, b in pairs), 2)
        found[f"{name}_cpu_x"] = round(statistics.median(a[1] / b[1] for a, b in pairs), 2)
        found[f"{name}_ms"] = round(1000 * statistics.median(a[0] for a, _ in pairs), 2)
        found[f"{name}_npy_ms"] = round(1000 * statistics.median(b[0] for _, b in pairs), 2)
        if name == "write":
            case.cool()
    return found


def main() -> None:
    """Measure and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--dims", default="512,1024")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    given = parser.parse_args()
    for dim in map(int, given.dims.split(",")):
        for kind in ("hdf5", "zarr"):
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                case = Case(Path(folder), kind, given.n, dim)
                facts = {"store": kind, "n": given.n, "dim": dim, "machine": platform.machine()}
                print(json.dumps(facts | measured(case, given.rounds)), flush=True)


if __name__ == "__main__":
    main()
