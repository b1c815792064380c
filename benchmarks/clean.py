"""Rows a second and memory of `pathcli data clean`, without a network: rule, lexicon, copies.

Makes a table of ROWS small JPEG files (one in twenty a copy of another, one in twenty recompressed,
one in fifty about mice, one in fifty short), cleans it and prints one JSON line. Memory is the
process's resident set after a tenth of the rows, and its peak: in between lies what grows.

    python benchmarks/clean.py [--rows 100000] [--folder DIR] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from pathcli.curation.clean import Judges, clean
from pathcli.curation.judges import ByColour, ByLexicon
from pathcli.data.formats import Source

PX, EVERY = 64, 20
STAINS = np.array([130, 160, 80])  # what haematoxylin takes away from white
SAID = "A section of the colon with crooked glands and crowded dark nuclei, number {}, at low power"


def image(number: int) -> np.ndarray:
    """Return blobs in the colours of haematoxylin and eosin, uint8 RGB."""
    rng = np.random.default_rng(number)
    small = rng.normal(0, 6, (10, 10, 3)) + rng.uniform(0, 1, (10, 10, 1)) * STAINS
    whole = cv2.resize(235 - small, (PX, PX), interpolation=cv2.INTER_CUBIC)
    return np.asarray(whole.clip(0, 255), np.uint8)


def build(folder: Path, rows: int) -> Path:
    """Write images and pairs.jsonl, unless they are there."""
    table = folder / "pairs.jsonl"
    if table.is_file():
        return table
    lines = []
    for number in range(rows):
        place = folder / f"{number // 1000:04}"
        place.mkdir(parents=True, exist_ok=True)
        kind = number % EVERY
        shown = image(number - kind if kind in {1, 2} else number)[..., ::-1]
        quality = [cv2.IMWRITE_JPEG_QUALITY, 70 if kind == 2 else 90]
        path = place / f"{number:07}.jpg"
        path.write_bytes(cv2.imencode(".jpg", shown, quality)[1].tobytes())
        said = "Colon." if number % 50 == 7 else SAID.format(number)
        said += " in mice" * (number % 50 == 9)
        lines.append(json.dumps({"image": f"{place.name}/{path.name}", "caption": said}))
    table.write_text("\n".join(lines))
    return table


def resident_mb() -> float:
    """Return the resident set now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        table = build(given.folder or Path(made), given.rows)
        early: list[float] = []

        def step(done: int, of: int) -> None:
            del of
            if not early and done >= given.rows // 10:
                early.append(resident_mb())

        judges = Judges(texts=ByLexicon(), images=ByColour())
        start, cpu = time.perf_counter(), time.process_time()
        out = Path(made) / "out"
        done = clean(Source(table), out, judges, min_words=10, workers=given.workers, progress=step)
        seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    line = {
        "benchmark": "clean",
        "rows": done.rows,
        "kept": done.kept,
        "dropped": dict(done.dropped),
        "rows_per_second": round(done.rows / seconds, 1),
        "rows_per_cpu_second": round(done.rows / busy, 1),
        "resident_mb_after_a_tenth": round(early[0], 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
        "image_px": PX,
        "workers": given.workers,
        "machine": platform.machine(),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
