"""Show what `pathcli` does when it is killed, and with slides that are damaged.

    python benchmarks/faults.py [--encoder mini-clip] [--side 5120]

Painted slides, a real encoder, and the command line as anyone would type it. `embed` is killed
(SIGKILL) once blocks of the slide are on disk, and run again; its datasets are compared with
those of one worker and of two, uninterrupted. Then one file tile of a slide is overwritten
with noise, and the last quarter of another is cut off. Commands, their exit codes and every
line they print are shown; the script ends with 1 if datasets differ.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import synthetic

from pathcli.slides.readers import open_slide
from pathcli.store import Store

BATCH = 16


def pathcli(folder: Path, *words: str, told: bool = True) -> tuple[int, str]:
    """Run a command in `folder`, show it, and return its code and what it printed."""
    shown = [word.removeprefix(f"{folder}/") for word in words]
    print(f"$ pathcli {' '.join(shown)}")
    command = [sys.executable, "-m", "pathcli", *words]
    done = subprocess.run(  # noqa: S603 - this very program
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    lines = (done.stderr + (done.stdout if told else "")).replace(f"{folder}/", "").splitlines()
    for line in lines:
        print(f"    {line}")
    print(f"    exit code {done.returncode}")
    return done.returncode, done.stdout


def killed(folder: Path, store: Path, words: list[str]) -> None:
    """Run `embed` and kill it when two blocks are on disk; show what they hold."""
    print(f"$ pathcli {' '.join(words)} --store {store.name} &")
    command = [sys.executable, "-m", "pathcli", *words, "--store", str(store)]
    with subprocess.Popen(  # noqa: S603 - likewise
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and blocks(store)[0] < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done, of = blocks(store)
    print(f"    killed by signal {-process.returncode}; {done} of {of} blocks are on disk")
    print(f"    finished entries: {len(Store(store).features)}")


def blocks(store: Path) -> tuple[int, int]:
    """Return how many blocks of an entry being filled are journalled, and how many it has."""
    for part in store.glob("features/*/*/*.part"):
        try:
            with h5py.File(part, "r", locking=False) as file:
                journal = file["block_crc32"][:]
        except (OSError, KeyError):  # it is being made
            continue
        return int(np.count_nonzero(journal)), len(journal)
    return 0, 0


def datasets(store: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the one entry of features."""
    (path,) = store.glob("features/*/*/*.h5")
    with h5py.File(path) as file:
        return {name: file[name][:] for name in ("coords", "status", "features")}


def interruptions(folder: Path, slide: Path, encoder: str) -> bool:
    """Kill and resume; compare with runs of one and of two workers."""
    words = ["embed", slide.name, "--encoder", encoder, "--no-overview", "--batch", str(BATCH)]
    stores = {name: folder / f"store-{name}" for name in ("killed", "one", "two")}
    killed(folder, stores["killed"], words)
    for name, more in (("killed", ()), ("one", ("--workers", "1")), ("two", ("--workers", "2"))):
        _, text = pathcli(folder, *words, *more, "--json", "--store", str(stores[name]), told=False)
        (row,) = json.loads(text)["slides"]
        print(f"    tiles {row['tiles']}, encoded in this run {row['encoded']}")
    found = {name: datasets(store) for name, store in stores.items()}
    same = True
    for name in ("killed", "two"):
        equal = {k: a.tobytes() == found["one"][k].tobytes() for k, a in found[name].items()}
        print(f"{name} and resumed" if name == "killed" else "two workers", "= one worker:", equal)
        same &= all(equal.values())
    return same


def damaged(folder: Path, whole: Path, encoder: str) -> None:
    """Tile and embed a slide with one corrupt file tile, and one with a truncated tail."""
    corrupt, cut = folder / "corrupt-tile.svs", folder / "cut-tail.svs"
    for path in (corrupt, cut):
        path.write_bytes(whole.read_bytes())
    with closing(open_slide(whole)) as slide:
        across = -(-slide.info.width // synthetic.TILE)
        down = -(-slide.info.height // synthetic.TILE)
    synthetic.break_tile(corrupt, down // 2 * across + across // 2)
    synthetic.cut_tail(cut)
    how = ["--encoder", encoder, "--no-overview", "--store", str(folder / "store-damaged")]
    pathcli(folder, "tile", corrupt.name, "--no-overview", *how[3:])
    pathcli(folder, "embed", corrupt.name, *how)
    pathcli(folder, "embed", corrupt.name, *how, "--max-bad-tiles", "0.0001")
    pathcli(folder, "tile", cut.name, "--no-overview", *how[3:])
    pathcli(folder, "embed", cut.name, *how)
    pathcli(folder, "embed", whole.name, corrupt.name, cut.name, *how, "--out", "out")
    with (folder / "out" / "failures.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.reader(file):
            print(f"    failures.csv: {row}")


def main() -> int:
    """Run everything in a folder of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="mini-clip")
    parser.add_argument("--side", type=int, default=5120, help="of the painted slide, in pixels")
    given: Any = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        side = given.side
        painted = synthetic.picture(side, side, (100, 100, side - 200, side - 200))
        whole = synthetic.slide(folder / "whole.svs", painted)
        same = interruptions(folder, whole, given.encoder)
        damaged(folder, whole, given.encoder)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
