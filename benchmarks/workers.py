"""Several `pathcli embed` over one list of slides and one store: each slide is done once.

The slides are painted, and the encoder takes its time and is the mean colour. With --kill one
of the processes is killed in the middle of its second slide, which another then completes.
One line is printed: how many slides had their tiles encoded by how many processes, and how
many tiles were read for nothing because another process was faster.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

SIDE, TILE, BATCH = (640, 512), 32, 16
TILES = SIDE[0] * SIDE[1] // TILE**2
PASSES = TILES // BATCH


class Mean:
    """The mean colour, at so many seconds a batch; may kill its own process."""

    name, id, input_px, row_shape = "mean", "mean-000000000000", TILE, (3,)
    native_source = "this script"
    passes = 0

    def __init__(self, *, tokens: bool = False, precision: str = "float32") -> None:
        """Know what a tile is."""
        from pathcli.slides.tiling import tile_spec  # noqa: PLC0415

        self.tokens, self.precision = tokens, precision
        self.native = tile_spec(TILE, 0.5, tissue="none")

    def load(self, device: str) -> None:
        """Have no weights."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return float32 [b, 3]."""
        Mean.passes += 1
        if Mean.passes == int(os.environ.get("DIES_AT", "0")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(float(os.environ["SECONDS_A_BATCH"]))
        return images.float().mean(dim=(1, 2))


def child(arguments: list[str]) -> None:
    """Run the command line with this encoder; tell how many tiles were read."""
    from pathcli import registry  # noqa: PLC0415
    from pathcli.cli import main  # noqa: PLC0415
    from pathcli.encoders.reading import SlideRows  # noqa: PLC0415

    registry.BUILTIN["encoder"]["mean"] = "workers:Mean"
    real, read = SlideRows.read, [0]

    def counted(self: SlideRows, row: int) -> Any:  # noqa: ANN401 - as it is
        read[0] += 1
        return real(self, row)

    SlideRows.read = counted  # type: ignore[method-assign]
    try:
        main(arguments)
    finally:
        sys.stderr.write(f"read {read[0]}\n")


def paint(folder: Path, n: int) -> None:
    """Write small tiled TIFF files, each of its own noise."""
    import numpy as np  # noqa: PLC0415
    import tifffile  # noqa: PLC0415

    folder.mkdir()
    for i in range(n):
        pixels = np.random.default_rng(i).integers(60, 200, (SIDE[1], SIDE[0], 3), np.uint8)
        tifffile.imwrite(
            folder / f"s{i:03}.svs", pixels, tile=(256, 256), photometric="rgb", metadata=None
        )


def start(folder: Path, number: int, *, dies: bool, seconds: float) -> subprocess.Popen[str]:
    """Begin one process."""
    how = ["embed", str(folder / "slides"), "--encoder", "mean", "--slide-mpp", "0.5", "--json"]
    how += ["--tissue", "none", "--batch", str(BATCH), "--workers", "1", "--device", "cpu"]
    how += ["--store", str(folder / "store"), "--out", str(folder / f"out{number}")]
    env = {"OMP_NUM_THREADS": "1", "SECONDS_A_BATCH": str(seconds)}
    env |= {"DIES_AT": str(PASSES * 3 // 2)} if dies else {}
    command = [sys.executable, __file__, "--child", *how]
    with (folder / f"log{number}").open("w") as log:
        return subprocess.Popen(  # noqa: S603 - this very script
            command, env=os.environ | env, stdout=subprocess.PIPE, stderr=log, text=True
        )


def told(folder: Path, outputs: list[str], codes: list[int]) -> dict[str, Any]:
    """Return what the processes said, together."""
    slides = [s for out in outputs if out for s in json.loads(out)["slides"]]
    by = Counter(s["item"] for s in slides if s["encoded"])
    logs = [path.read_text() for path in sorted(folder.glob("log*"))]
    read = sum(int(log.rpartition("read ")[2]) for log in logs if "\nread " in log)
    encoded = sum(s["encoded"] for s in slides)
    kept = [path.name for path in (folder / "store" / "features").rglob("*") if path.is_file()]
    return {
        "exit_codes": codes,
        "in_the_store": sum(name.endswith(".h5") for name in kept),
        "left_over": [name for name in kept if not name.endswith(".h5")],
        "encoded_by_one_process": sum(n == 1 for n in by.values()),
        "encoded_by_several": sum(n > 1 for n in by.values()),
        "resumed": {
            s["item"]: [s["encoded"], s["tiles"]] for s in slides if 0 < s["encoded"] < s["tiles"]
        },
        "each_process": [
            sum(s["encoded"] > 0 for s in json.loads(out)["slides"]) if out else None
            for out in outputs
        ],
        "log_lines": sum(log.count("\nembedded ") for log in logs),
        "waited": sum(log.count("\nwaiting for ") for log in logs),
        "tiles_encoded": encoded,
        "tiles_read_for_nothing": read - encoded,
    }


def main() -> None:
    """Run the processes and print the line."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--slides", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=0.1, help="of a batch")
    parser.add_argument("--kill", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paint(folder / "slides", given.slides)
        begun = time.perf_counter()
        started = [
            start(folder, i, dies=given.kill and i == 0, seconds=given.seconds)
            for i in range(given.processes)
        ]
        outputs = [process.communicate()[0] for process in started]
        line = {
            "benchmark": "workers",
            "processes": given.processes,
            "slides": given.slides,
            "killed": given.kill,
            "seconds": round(time.perf_counter() - begun, 1),
            **told(folder, outputs, [process.returncode for process in started]),
        }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
