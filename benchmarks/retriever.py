"""Rank the patches of a large slide by texts, as `pathcli data caption` does; prints one JSON line.

python benchmarks/retriever.py [--patches 100000] [--prompts 20] [--width 768] [--top 64]

`matrix_s` is the time of the cosines of all patches with all texts, features being float16 as
the store maps them; `rank_s` that of scores and their order; `spread_s` that of k-means with
k = ceil(sqrt(n)); `distinct_s` that of near-duplicates among all that were proposed. The best of
three. Features are drawn around 500 centres; nothing is read from disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import numpy as np

from pathcli.curation.caption.select import best, spread
from pathcli.encoders.search import cosines, distinct, unit
from pathcli.types import Features, Key

TIMES = 3


def drawn(n: int, width: int) -> Features:
    """Return features of `n` patches around centres, float16."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(500, width)).astype(np.float32)
    values = np.empty((n, width), np.float16)
    for start in range(0, n, 10_000):
        rows = min(10_000, n - start)
        noise = rng.normal(size=(rows, width)).astype(np.float32)
        values[start : start + rows] = centres[rng.integers(500, size=rows)] + 0.7 * noise
    xy, status = np.zeros((n, 2), np.int32), np.zeros(n, np.uint8)
    return Features(Key("drawn-00000000", 0.25, "t", "e"), values, xy, status)


def least(work: Callable[[], object], times: int = TIMES) -> float:
    """Return the shortest time of a few, in seconds."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for name, value in (("patches", 100_000), ("prompts", 20), ("width", 768), ("top", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = parser.parse_args()
    features = drawn(given.patches, given.width)
    texts = unit(np.random.default_rng(1).normal(size=(given.prompts, given.width)))
    near = cosines(features, texts)

    def rank() -> list[int]:
        return [*best(near.max(1), given.top), *best(near.sum(1), given.top)]

    proposed = np.array([*rank(), *spread(features.values, 256, 1)], np.intp)

    def kept() -> object:
        return distinct(proposed, lambda rows: unit(features.values[rows]), len(proposed), 0.88)

    found = {
        "matrix_s": least(lambda: cosines(features, texts)),
        "rank_s": least(rank),
        "spread_s": least(lambda: spread(features.values, 256, 1), 1),
        "distinct_s": least(kept),
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = vars(given) | {name: round(value, 3) for name, value in found.items()}
    print(json.dumps(line | {"peak_mb": round(peak)}))


if __name__ == "__main__":
    main()
