"""`pathcli embed`: slides in, features in the store out."""

from __future__ import annotations

import logging
from contextlib import closing, suppress
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o
from pathcli.errors import PathcliError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pathcli.cli.batch import Batch
    from pathcli.encoders.embedding import Embedder
    from pathcli.encoders.fleet import Crew
    from pathcli.slides.discovery import Found
    from pathcli.store import Store
    from pathcli.types import Encoder, Progress, TileSpec

log = logging.getLogger("pathcli")

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Tokens = Annotated[
    bool, typer.Option("--tokens", help="Keep one vector per image patch, not per tile.")
]
Devices = Annotated[
    str,
    typer.Option(
        "--device",
        help="Where to compute; several get a process each.",
        metavar="auto|cpu|cuda[:N],...|cuda:all|mps",
    ),
]
Compiled = Annotated[
    bool, typer.Option("--compile", help="Translate the network by torch.compile first.")
]
Engine = Annotated[
    str,
    typer.Option("--engine", help="Who runs the work: this machine, or Ray.", metavar="local|ray"),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ray's cluster; auto is the one this machine is in [default: Ray here alone].",
        metavar="auto|HOST:PORT",
    ),
]


@app.command()
def embed(
    slides: o.Slides,
    encoder: o.Encoder = "lite0",
    checkpoint: o.Checkpoint = None,
    tokens: Tokens = False,
    precision: o.Precision = "float32",
    device: Devices = "auto",
    compiled: Compiled = False,
    engine: Engine = "local",
    address: Address = None,
    shard: o.Shard = None,
    batch: o.Batch = 32,
    workers: o.Workers = 2,
    max_bad_tiles: o.MaxBadTiles = 0.01,
    size: o.Size = None,
    mpp: o.Mpp = None,
    step: o.Step = None,
    tissue: o.Tissue = "otsu",
    min_tissue: o.MinTissue = 0.5,
    roi: o.Roi = None,
    drop: o.Drop = "",
    slide_mpp: o.SlideMpp = None,
    overview: o.Overview = False,
    geojson: o.GeoJSON = False,
    out: o.Out = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Turn the tiles of slides into features, kept in the store.

    Slides not yet tiled are tiled first; what the store has is not computed again. Without
    --size and --mpp the encoder's own tile is used.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish  # noqa: PLC0415
    from pathcli.cli.tile import row_of  # noqa: PLC0415
    from pathcli.device import share_cores  # noqa: PLC0415

    share_cores()  # before torch is imported
    from pathcli.encoders import build_encoder  # noqa: PLC0415

    _check(slide_mpp, device, engine, address)
    mine = _slides(slides, roi, shard)
    built = build_encoder(encoder, checkpoint=checkpoint, tokens=tokens, precision=precision)
    spec = o.spec_of(built.native, size, mpp, step, tissue, min_tissue, drop)
    if size is None and mpp is None:
        show.say(native_line(built.name, spec, built.native_source))
    _ = built.id  # weights that are not here fail the command once, not every slide
    kept = o.open_store(store)
    how: dict[str, Any] = {"address": address} if engine == "ray" else {}
    how |= {"batch": batch, "workers": workers, "compiled": compiled}
    how["max_bad_tiles"] = max_bad_tiles
    tiling = {"spec": spec, "out": out, "overview": overview, "geojson": geojson}
    listed = f"failures-{shard.replace('/', '-of-')}.csv" if shard else "failures.csv"
    with closing(_engine(engine, device, built, kept, how)) as ready:
        done = _embed_all(mine, ready, _tiling(slide_mpp, roi, tiling), out, listed)
    rows = [row_of(r) | features_of(r) for r in done.results]
    if done.results and not json:
        show.say(f"features are in {kept.root}; see: pathcli store list --store {kept.root}")
    finish(done, rows, as_json=json, out=out)


def _slides(named: list[str], roi: Path | None, shard: str | None) -> list[Found]:
    """Return the slides that are this command's part.

    Raises:
        UsageError: there are none, or not one region for each of all.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415
    from pathcli.slides.roi import check_rois  # noqa: PLC0415

    found = discover(named)
    if roi:
        check_rois(roi, [slide.path for slide in found])
    mine = o.shard_of(shard, found)
    if not mine:
        show.say(f"--shard {shard}: none of the {len(found)} slides is in this part")
    return mine


def _tiling(
    slide_mpp: float | None, roi: Path | None, fixed: dict[str, Any]
) -> Callable[[Found], dict[str, Any]]:
    """Return what says of a slide how it is cut."""
    from pathcli.cli.tile import resolution  # noqa: PLC0415

    @cache
    def tiling(slide: Found) -> dict[str, Any]:
        mpp, source = resolution(slide, slide_mpp)
        own = o.roi_of(roi, str(slide.path))
        return {"mpp": mpp, "mpp_source": source, "roi": own, **fixed}

    return tiling


def _check(slide_mpp: float | None, device: str, engine: str, address: str | None) -> None:
    """Refuse values that no slide, machine or engine could have.

    Raises:
        UsageError: one is given.
    """
    from pathcli.errors import UsageError  # noqa: PLC0415

    if engine not in {"local", "ray"}:
        msg = f"--engine is local or ray, not {engine!r}"
        raise UsageError(msg)
    if address is not None and engine != "ray":
        msg = "--address is that of a Ray cluster: give --engine ray too"
        raise UsageError(msg)
    for name in [] if device == "cuda:all" else device.split(","):
        o.check(slide_mpp, name.strip())
    o.check(slide_mpp)


def _engine(
    engine: str, device: str, encoder: Encoder, store: Store, how: dict[str, Any]
) -> Embedder | Crew:
    """Return what embeds: one process, one for each device, or a cluster."""
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415
    from pathcli.encoders.fleet import Fleet, devices_of  # noqa: PLC0415

    if engine == "ray":
        from pathcli.encoders.ray_engine import RayCrew  # noqa: PLC0415

        return RayCrew(encoder, store, device=device, **how)
    devices = devices_of(device)
    if len(devices) == 1:
        return Embedder(encoder, store, device=devices[0], **how)
    return Fleet(encoder, store, devices=devices, **how)


def _embed_all(
    slides: list[Found],
    ready: Embedder | Crew,
    tiling: Callable[[Found], dict[str, Any]],
    out: Path,
    listed: str,
) -> Batch:
    """Embed slide after slide; return what became of each."""
    from pathcli.cli.batch import run_batch  # noqa: PLC0415
    from pathcli.encoders.embedding import embed_summary  # noqa: PLC0415

    def jobs(slides: list[Found]) -> Iterator[tuple[Path | str, dict[str, Any]]]:
        for slide in slides:
            with suppress(PathcliError):  # said when it is this slide's turn
                yield slide.checked().path, tiling(slide)

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        run = ready(slide.path, progress=progress, **tiling(slide))
        if run.encoded:
            log.info("embedded %s (%d tiles)", run.key.item, run.tiles)
        return embed_summary(run)

    return run_batch(
        slides, work, out, expect=lambda slides: ready.expect(jobs(slides)), listed=listed
    )


def native_line(name: str, spec: TileSpec, source: str) -> str:
    """Return the sentence that says which tiles are used and why."""
    return f"{name}: tiles of {spec.size_px} px at {spec.mpp:g} um per pixel ({source})"


def features_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return the columns `embed` adds to a row."""
    shape = " x ".join(str(n) for n in [result["tiles"], *result["row_shape"]])
    done = f"{result['encoded']} encoded" if result["encoded"] else "from the store"
    return {
        "features": shape if result["tiles"] else "none",
        "work": done if result["tiles"] else "no tile",
        "tiles/s": result["tiles_per_second"],
    }
