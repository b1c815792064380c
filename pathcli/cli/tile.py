"""`pathcli tile`: slides in, tiles in the store and overviews on disk out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.slides.discovery import Found
    from pathcli.types import Progress

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def tile(
    slides: o.Slides,
    size: o.Size = 224,
    mpp: o.Mpp = 0.5,
    step: o.Step = None,
    tissue: o.Tissue = "otsu",
    min_tissue: o.MinTissue = 0.5,
    slide_mpp: o.SlideMpp = None,
    overview: o.Overview = True,
    geojson: o.GeoJSON = False,
    out: o.Out = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Cut slides into tiles on tissue, and show where.

    A tile covers size x mpp micrometres, whatever the slide's own resolution.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415
    from pathcli.slides.tiling import summary, tile_spec  # noqa: PLC0415
    from pathcli.slides.tiling import tile as cut  # noqa: PLC0415

    o.check(slide_mpp)
    spec = o.spec_of(tile_spec(), size, mpp, step, tissue, min_tissue)
    opened = o.open_store(store)

    def work(found: Found, progress: Progress) -> dict[str, Any]:
        del progress
        given, source = resolution(found, slide_mpp)
        return summary(
            cut(
                found.path,
                spec=spec,
                store=opened,
                mpp=given,
                mpp_source=source,
                out=out,
                overview=overview,
                geojson=geojson,
            )
        )

    batch = run_batch(discover(slides), work, out)
    rows = [row_of(r) for r in batch.results]
    if overview and batch.results and not json:
        show.say(f"overviews are in {out}")
    finish(batch, rows, as_json=json, out=out)


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
