"""The whole river on one slide: tiles, features, a map of look-alike tissue, and a report."""

from __future__ import annotations

import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.encoders import build_encoder
from pathcli.encoders.embedding import Embedder, EmbedRun, embed_summary
from pathcli.errors import DataError
from pathcli.evals.demo_ask import asked
from pathcli.report import Picture, Section, html_page, json_text, metric, pairs, versions
from pathcli.slides import discover, open_slide
from pathcli.slides.overlay import PALETTE, draw_labels, draw_tiles
from pathcli.slides.tiling import read_tile, tile_spec
from pathcli.slides.tissue import find_tissue
from pathcli.store.files import write_bytes
from pathcli.types import Report, Tiles, TileStatus
from pathcli.weights import card, fetch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pathcli.store import Store
    from pathcli.types import ByteArray, Encoder, Progress, Slide

CLUSTERS = 5
EXAMPLES = 8
LEAD = (
    "A slide was cut into tiles, an encoder turned each tile into numbers, and tiles with "
    "alike numbers share a colour. The groups are found without labels: they follow the look "
    "of the tissue and name nothing."
)


def demo(
    slide: Path | str | None = None,
    *,
    out: Path | str = "pathcli-demo",
    store: Store | None = None,
    encoder: str = "lite0",
    mpp: float | None = None,
    ask: bool = True,
    patches: Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Report:
    """Tile, embed and map one slide; write `report.html` and `demo.json` into `out`.

    Args:
        slide: a slide of one's own (default: a CC0 H&E slide, fetched once).
        out: folder of the report, made if need be.
        store: where tiles and features are kept (default: the user's store).
        encoder: as `build_encoder` takes it.
        mpp: um per level-0 pixel where the slide's header has none.
        ask: ask clover-mini about the slide, too.
        patches: a folder of images to ask it about.
        device: as `embed` takes it.
        progress: called with (tiles done, tiles in all).

    Raises:
        DataError: not a slide, or fewer than two tiles on it.
        ResourceError: slide or weights are neither here nor to be had.
    """
    clock = [("start", time.perf_counter())]
    path = fetch("demo-slide") if slide is None else _one_slide(slide)
    source = card("demo-slide") if slide is None else None
    built = build_encoder(encoder)
    native = built.native
    spec = tile_spec(native.size_px, native.mpp, step_px=max(1, native.size_px // 2))
    embedder = Embedder(built, store, device=device)
    clock.append(("fetch slide and weights", time.perf_counter()))
    run = embedder(path, spec=spec, mpp=mpp, progress=progress)
    clock.append(("tile and embed", time.perf_counter()))
    if run.tiles - run.unreadable < 2:  # noqa: PLR2004 - a map needs two
        why = "; ".join(["a map needs two tiles", *run.warnings])
        msg = f"{path}: nothing to map ({run.tiles} tiles): {why}"
        raise DataError(msg)
    features = embedder.store.features[run.key]
    labels, order = cluster(features.values, features.status)
    clock.append(("cluster", time.perf_counter()))
    sections = _pictures(path, run, labels, order)
    clock.append(("draw", time.perf_counter()))
    if ask:
        sections += asked(path, embedder.store, patches, mpp=mpp, device=device)
        clock.append(("ask", time.perf_counter()))
    report = _report(run, built, labels, clock, source.what if source else "the user's own")
    given = {"--slide": slide, "--encoder": encoder, "--slide-mpp": mpp, "--out": out}
    shown = [f"{name} {value}" for name, value in given.items() if value is not None]
    sections += _tables(run, report, " ".join(["pathcli demo", *shown]))
    page = html_page(report.title, LEAD, sections)
    write_bytes(Path(out) / "demo.json", json_text(report).encode(), lambda _: None, "--out")
    write_bytes(Path(out) / "report.html", page.encode(), lambda _: None, "--out")
    return report


def _one_slide(slide: Path | str) -> Path | str:
    """Return the one slide that a path or folder means.

    Raises:
        DataError: a folder of several slides, or of none.
    """
    found = discover([str(slide)])
    if len(found) > 1:
        msg = f"{slide}: {len(found)} slides; name one slide"
        raise DataError(msg)
    return found[0].checked().path


def cluster(
    values: NDArray[np.float16], status: ByteArray, clusters: int = CLUSTERS
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group tiles by k-means on unit-length features, seed 0.

    Returns:
        labels int [n], 0 the largest group and -1 for unreadable tiles; and the tiles int
        [n] from nearest to farthest from their group's centre.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415

    good = np.flatnonzero(status == TileStatus.OK)
    x = values[good].astype(np.float32).reshape(len(good), -1)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-12
    count = min(clusters, max(2, len(good) // 4))  # a group of one tile shows nothing
    found = KMeans(count, n_init=10, random_state=0).fit(x)
    rank = np.argsort(np.argsort(-np.bincount(found.labels_, minlength=found.n_clusters)))
    labels = np.full(len(values), -1)
    labels[good] = rank[found.labels_]
    distance = np.full(len(values), np.inf)
    distance[good] = np.linalg.norm(x - found.cluster_centers_[found.labels_], axis=1)
    return labels, np.argsort(distance, kind="stable")


def _pictures(
    path: Path | str, run: EmbedRun, labels: NDArray[np.int64], order: NDArray[np.int64]
) -> list[Section]:
    """Draw overview, map and one strip of typical tiles per group."""
    with closing(open_slide(path)) as slide:
        tiles = run.tiling.tiles
        tissue = find_tissue(slide, tiles.spec, tiles.slide_mpp)
        seen = labels >= 0
        shown = Tiles(**{**vars(tiles), "xy": tiles.xy[seen], "status": tiles.status[seen]})
        overview = Picture(
            draw_tiles(slide, tiles, tissue),
            f"{len(tiles)} tiles of {tiles.spec.size_um:g} um, half overlapping, on "
            f"{tiles.tissue_share:.0%} tissue (green outline).",
        )
        mapped = Picture(
            draw_labels(slide, shown, labels[seen].tolist(), tissue),
            "The same tiles coloured by group.",
        )
        strips = [
            Picture(
                _strip(slide, tiles, [i for i in order if labels[i] == group]),
                f"group {group + 1}: {int((labels == group).sum())} tiles, most typical first",
                PALETTE[group % len(PALETTE)],
                strip=True,
            )
            for group in range(labels.max() + 1)
        ]
    return [
        Section("What was cut, and what looks alike", pictures=[overview, mapped]),
        Section("Typical tiles of each group", pictures=strips),
    ]


def _strip(slide: Slide, tiles: Tiles, ranked: list[int]) -> ByteArray:
    """Return the first tiles of `ranked` that do not overlap, side by side."""
    picked: list[int] = []
    for i in ranked:
        apart = [np.abs(tiles.xy[i] - tiles.xy[j]).max() >= tiles.side0 for j in picked]
        if len(picked) < EXAMPLES and all(apart):
            picked.append(i)
    shape = (tiles.spec.size_px, 8, 3)
    parts: list[ByteArray] = []
    for i in picked:
        x, y = tiles.xy[i].tolist()
        parts += [
            read_tile(slide, (x, y), tiles.spec, tiles.slide_mpp),
            np.full(shape, 255, np.uint8),
        ]
    missing = EXAMPLES - len(picked)
    blank = np.full((shape[0], missing * (tiles.spec.size_px + 8), 3), 255, np.uint8)
    return np.concatenate([*parts, blank], axis=1)


def _report(
    run: EmbedRun,
    encoder: Encoder,
    labels: NDArray[np.int64],
    clock: list[tuple[str, float]],
    source: str,
) -> Report:
    tiles = run.tiling.tiles
    seconds = {name: round(b - a, 2) for (_, a), (name, b) in pairwise(clock)}
    counts = np.bincount(labels[labels >= 0]).tolist()
    return Report(
        title=f"pathcli demo: {tiles.item}",
        metrics={
            "tiles": metric(len(tiles)),
            "tissue_share": metric(round(tiles.tissue_share, 4)),
            "groups": metric(len(counts)),
        },
        rows=tuple({"group": i + 1, "tiles": c} for i, c in enumerate(counts)),
        provenance={
            "slide": source,
            "run": embed_summary(run),
            "native_tiles_from": encoder.native_source,
            "store_keys": {
                "tiles": run.key.tiles,
                "encoder": run.key.encoder,
                "item": run.key.stem,
            },
            "seconds": seconds,
            "versions": versions(),
        },
    )


def _tables(run: EmbedRun, report: Report, command: str) -> list[Section]:
    known: dict[str, Any] = dict(report.provenance)
    tiles = run.tiling.tiles
    facts = {
        "slide": known["slide"],
        "size": f"{tiles.width} x {tiles.height} px",
        "resolution": f"{tiles.slide_mpp:g} um per pixel ({run.tiling.mpp_source})",
        "reader": run.tiling.reader,
        "tiles": f"{len(tiles)} of {tiles.spec.size_px} px at {tiles.spec.mpp:g} um per pixel",
        "tissue": f"{tiles.tissue_share:.0%} of the scan, by {tiles.spec.tissue}",
        "features": f"{run.tiles} x {run.row_shape[0]}, {run.encoded} computed now",
        "encoder": run.key.encoder,
        "groups": f"{len(report.rows)} by k-means (seed 0) on features of unit length",
        "date": time.strftime("%Y-%m-%d"),
    }
    timing = [{"part": name, "seconds": value} for name, value in known["seconds"].items()]
    keys = {**known["store_keys"], **known["versions"]}
    warnings = [Section("Mind this", rows=[{"warning": w} for w in run.warnings])]
    return [
        *(warnings if run.warnings else []),
        Section("The slide and how it was read", rows=pairs(facts)),
        Section("Where the time went", rows=timing),
        Section("To repeat it", code=command, rows=pairs(keys)),
    ]
