"""`pathcli demo`: one slide in, a report to look at out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathcli.cli import options as o

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def demo(
    slide: Annotated[
        Path | None, typer.Option("--slide", help="A slide of yours [default: a CC0 slide].")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the report.")] = Path(
        "pathcli-demo"
    ),
    encoder: o.Encoder = "lite0",
    slide_mpp: o.SlideMpp = None,
    ask: Annotated[
        bool, typer.Option("--ask/--no-ask", help="Ask the embedded clover-mini about it, too.")
    ] = True,
    patches: Annotated[
        Path | None, typer.Option("--patches", help="A folder of patches to ask about.")
    ] = None,
    device: o.Device = "auto",
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Take one slide all the way: tiles, features, a map, a report."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals.demo import demo as show_river  # noqa: PLC0415
    from pathcli.evals.demo_ask import shown  # noqa: PLC0415
    from pathcli.report import as_json  # noqa: PLC0415

    o.check(slide_mpp, device)
    if (images := o.folder(patches)) and ask:
        shown(images)  # what is wrong with them is said before the slide is worked on
    with show.progress(1) as start:
        report = show_river(
            slide,
            out=out,
            store=o.open_store(store),
            encoder=encoder,
            mpp=slide_mpp,
            ask=ask,
            patches=images,
            device=device,
            progress=start(1, slide.name if slide else "demo slide"),
        )
    if json:
        show.as_json(as_json(report) | {"report": str(out / "report.html")})
        return
    run = report.provenance["run"]
    show.table([{"what": k, "seconds": v} for k, v in report.provenance["seconds"].items()])
    for text in run["warnings"]:
        show.warn(text)
    show.say(
        f"{run['tiles']} tiles on {run['tissue_share']:.0%} tissue; open {out / 'report.html'}"
    )
