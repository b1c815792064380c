"""`pathcli tile`: slides in, tiles in the store, overviews and pixels on disk out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Callable

    from pathcli.slides.discovery import Found
    from pathcli.slides.pixel_layouts import Layout
    from pathcli.slides.plan import SlidePlan, Wanted
    from pathcli.store import Store
    from pathcli.types import Progress, TileSpec

app = typer.Typer(rich_markup_mode=None, add_completion=False)

SavePixels = Annotated[
    str | None,
    typer.Option(
        "--save-pixels", help="Also write the tiles' pixels.", metavar="zarr|webdataset|png"
    ),
]
PixelsOut = Annotated[
    Path | None,
    typer.Option("--pixels-out", help="Where pixels go [default: OUT/pixels].", metavar="DIR"),
]
PixelsFormat = Annotated[
    str,
    typer.Option(
        "--pixels-format", help="Images in WebDataset shards.", metavar="png|jpeg:QUALITY"
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would take, and write nothing.")
]
Tiling = dict[str, Any]
"""A slide's own arguments of `tile`: `mpp`, `mpp_source`, `roi`."""


@app.command()
def tile(
    slides: o.Slides,
    size: o.Size = 224,
    mpp: o.Mpp = 0.5,
    step: o.Step = None,
    tissue: o.Tissue = "otsu",
    min_tissue: o.MinTissue = 0.5,
    roi: o.Roi = None,
    drop: o.Drop = "",
    slide_mpp: o.SlideMpp = None,
    shard: o.Shard = None,
    save_pixels: SavePixels = None,
    pixels_out: PixelsOut = None,
    pixels_format: PixelsFormat = "png",
    max_bad_tiles: o.MaxBadTiles = 0.01,
    workers: o.Workers = 2,
    dry_run: DryRun = False,
    overview: o.Overview = True,
    geojson: o.GeoJSON = False,
    out: o.Out = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Cut slides into tiles on tissue, and show where.

    A tile covers size x mpp micrometres, whatever the slide's own resolution.
    """
    from pathcli.slides.discovery import discover  # noqa: PLC0415
    from pathcli.slides.plan import Wanted, unwritten_store  # noqa: PLC0415
    from pathcli.slides.roi import check_rois  # noqa: PLC0415
    from pathcli.slides.tiling import tile_spec  # noqa: PLC0415

    o.check(slide_mpp)
    spec = o.spec_of(tile_spec(), size, mpp, step, tissue, min_tissue, drop)
    layout = _layout(save_pixels, pixels_out, pixels_format)
    wanted = Wanted(layout, pixels_out or out / "pixels", workers=workers)
    found = discover(slides)
    if roi:
        check_rois(roi, [slide.path for slide in found])
    mine = o.shard_of(shard, found)

    def tiling(slide: Found) -> Tiling:
        given, source = resolution(slide, slide_mpp)
        own = o.roi_of(roi, str(slide.path))
        return {"mpp": given, "mpp_source": source, "roi": own}

    if dry_run:
        plan_all(mine, spec, wanted, unwritten_store(store), tiling, json=json)
    else:
        drawn = {"out": out, "overview": overview, "geojson": geojson}
        fixed = {"spec": spec, "store": o.open_store(store), **drawn}
        listed = f"failures-{shard.replace('/', '-of-')}.csv" if shard else "failures.csv"
        _tile_all(mine, fixed, tiling, wanted, max_bad_tiles, listed=listed, json=json)


def _layout(kind: str | None, out: Path | None, codec: str) -> Layout | None:
    """Return how pixels are to be kept.

    Raises:
        UsageError: options of pixels without pixels, or an unknown kind or codec.
    """
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.slides.pixel_layouts import Layout  # noqa: PLC0415

    if kind is not None:
        return Layout(kind, codec)
    if out is not None or codec != "png":
        msg = f"{'--pixels-format' if out is None else '--pixels-out'} needs --save-pixels KIND"
        raise UsageError(msg)
    return None


def _tile_all(
    found: list[Found],
    fixed: dict[str, Any],
    tiling: Callable[[Found], Tiling],
    wanted: Wanted,
    max_bad: float,
    *,
    listed: str,
    json: bool,
) -> None:
    """Tile slide after slide; print rows and failures, and exit with the batch's code."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.slides.pixels import save_pixels  # noqa: PLC0415
    from pathcli.slides.tiling import summary  # noqa: PLC0415
    from pathcli.slides.tiling import tile as cut  # noqa: PLC0415

    layout, below = wanted.layout, wanted.out

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        run = cut(slide.path, **fixed, **tiling(slide))
        told = summary(run)
        if layout and below:
            pixels = save_pixels(
                slide.path,
                run.tiles,
                below,
                layout,
                workers=wanted.workers,
                max_bad_tiles=max_bad,
                progress=progress,
            )
            told |= {"pixels": pixels.to_json()}
            told["warnings"] += pixels.warnings
        return told

    batch = run_batch(found, work, fixed["out"], listed=listed)
    rows = [row_of(r) | saved_of(r) for r in batch.results]
    if batch.results and not json:
        if fixed["overview"]:
            show.say(f"overviews are in {fixed['out']}")
        if layout:
            show.say(f"pixels are in {below}")
    finish(batch, rows, as_json=json, out=fixed["out"])


def plan_all(
    found: list[Found],
    spec: TileSpec,
    wanted: Wanted,
    store: Store,
    tiling: Callable[[Found], Tiling],
    *,
    json: bool,
) -> None:
    """Print what the slides would take, one after another and together; write nothing."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.slides.plan import NoResolutionError, plan, totals  # noqa: PLC0415

    plans: list[SlidePlan] = []
    unknown: list[str] = []

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        del progress
        try:
            plans.append(plan(slide.path, spec, store, wanted, **tiling(slide)))
        except NoResolutionError as error:
            unknown.append(str(error))
            raise
        return plans[-1].to_json()

    batch = run_batch(found, work, None)
    told = totals(plans, store, wanted) | {
        "without_resolution": len(unknown),
        "other_failures": len(batch.failures) - len(unknown),
    }
    rows = [_planned(result) for result in batch.results]
    if not json:
        for line in _sentences(told):
            show.say(line)
    finish(batch, rows, as_json=json, out=None, more={"plan": told})


def resolution(found: Found, option: float | None) -> tuple[float | None, str]:
    """Return the resolution given for a slide, and by whom: its CSV before the option."""
    if found.mpp is not None:
        return found.mpp, "csv"
    return option, "--slide-mpp"


def row_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return the table row that `tile` and `embed` share."""
    return {
        "slide": result["item"],
        "pixels": f"{result['width']} x {result['height']}",
        "um/px": f"{result['mpp']:g} {result['mpp_source']}",
        "tissue": f"{result['tissue_share']:.0%}",
        "tiles": result["tiles"],
        "seconds": result["seconds"],
    }


def saved_of(result: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that saved pixels add to a row."""
    saved = result.get("pixels")
    if not saved:
        return {}
    size = "there already" if saved["cached"] else _size(saved["bytes"])
    seconds = round(result["seconds"] + saved["seconds"], 3)
    return {"seconds": seconds, "saved": f"{saved['tiles']:,} as {saved['kind']}", "on disk": size}


def _planned(result: dict[str, Any]) -> dict[str, Any]:
    """Return the table row of a dry run."""
    row = row_of(result)
    del row["seconds"]
    there = ", ".join(result["there"]) or "-"
    takes = {"time": _time(result["seconds"]), "disk": _size(result["bytes"])}
    return row | {"reader": result["reader"], "there already": there} | takes


def _sentences(told: dict[str, Any]) -> list[str]:
    """Return the whole of a dry run in words."""
    parts = ", ".join(f"{name} {_size(size)}" for name, size in told["bytes_of"].items())
    free = ", ".join(f"{_size(size)} free for {name}" for name, size in told["free_bytes"].items())
    memory = f"; memory about {_size(told['memory_bytes'])}" if told["memory_bytes"] else ""
    slides = (
        f"{told['slides']} slides, {told['tiles']:,} tiles; the store has the tiles of "
        f"{told['in_store']}; {told['without_resolution']} more have no usable resolution, "
        f"{told['other_failures']} fail otherwise"
    )
    lines = [
        slides,
        f"about {_time(told['seconds'])} with {told['workers']} workers ({told['measured']})",
        f"disk: {_size(told['bytes'])} ({parts}); {free}{memory}",
    ]
    if told["bytes"] > min(told["free_bytes"].values()):
        lines.append("this does not fit on the disk")
    return lines


def _time(seconds: float) -> str:
    if seconds < 60:  # noqa: PLR2004 - a minute
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"  # noqa: PLR2004


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:  # noqa: PLR2004 - of the next unit
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
