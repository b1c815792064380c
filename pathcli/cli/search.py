"""`pathcli search`: slides and a text in, the tiles nearest to the text out."""

from __future__ import annotations

import os.path
import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o
from pathcli.cli.zeroshot import check_out

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.cli.batch import Batch
    from pathcli.encoders.search import Compared, Searcher
    from pathcli.slides.discovery import Found
    from pathcli.types import Progress, TileSpec

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Unlike = Annotated[
    list[str] | None,
    typer.Option("--not", help="A text that must not fit; repeatable.", metavar="TEXT"),
]
Top = Annotated[int, typer.Option("--top", help="Tiles to find.", min=1)]
Duplicates = Annotated[
    float,
    typer.Option(
        "--duplicates",
        help="Cosine from which a tile is passed over for a better one; 1 for never.",
        min=0,
        max=1,
    ),
]


@app.command()
def search(
    slides: o.Slides,
    text: Annotated[str, typer.Argument(help='What to look for, in quotes: "tumour nests".')],
    unlike: Unlike = None,
    top: Top = 20,
    duplicates: Duplicates = 0.88,
    encoder: o.Encoder = "mini-clip",
    checkpoint: o.Checkpoint = None,
    precision: o.Precision = "float32",
    device: o.Device = "auto",
    batch: o.Batch = 32,
    workers: o.Workers = 2,
    max_bad_tiles: o.MaxBadTiles = 0.01,
    size: o.Size = None,
    mpp: o.Mpp = None,
    step: o.Step = None,
    tissue: o.Tissue = "otsu",
    min_tissue: o.MinTissue = 0.5,
    slide_mpp: o.SlideMpp = None,
    out: o.Out = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Find the tiles of slides that a text describes best.

    Features in the store are not computed again. Writes a page with the tiles found, a table,
    and for each slide a similarity map and the tiles for QuPath.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.embed import native_line  # noqa: PLC0415
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415
    from pathcli.encoders.search import Searcher  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415

    o.check(slide_mpp, device)
    if os.path.exists(text):  # noqa: PTH110 - Path.exists raises where a text is too long for it
        msg = f"the last argument is the text to search for, but {text} is a file; add the text"
        raise UsageError(msg)
    check_out(out)
    built = build_encoder(encoder, checkpoint=checkpoint, precision=precision)
    spec = o.spec_of(built.native, size, mpp, step, tissue, min_tissue)
    if size is None and mpp is None:
        show.say(native_line(built.name, spec, built.native_source))
    embedder = Embedder(
        built,
        o.open_store(store),
        device=device,
        batch=batch,
        workers=workers,
        max_bad_tiles=max_bad_tiles,
    )
    ready = Searcher(text, embedder, negatives=unlike or (), top=top, duplicates=duplicates)
    _search_all(discover(slides), ready, spec, slide_mpp, out, json=json)


def _search_all(
    found: list[Found],
    ready: Searcher,
    spec: TileSpec,
    slide_mpp: float | None,
    out: Path,
    *,
    json: bool,
) -> None:
    """Compare slide after slide, rank and draw; exit with the batch's code."""
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.cli.tile import resolution  # noqa: PLC0415
    from pathcli.encoders.embedding import embed_summary  # noqa: PLC0415

    compared: list[Compared] = []

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        mpp, source = resolution(slide, slide_mpp)
        one = ready(slide.path, spec=spec, mpp=mpp, mpp_source=source, progress=progress)
        compared.append(one)
        return embed_summary(one.run)

    done = run_batch(found, work, out)
    rows, more = _show(ready, compared, done, out, json=json) if compared else ([], {})
    finish(done, rows, as_json=json, out=out, more=more)


def _show(
    ready: Searcher, compared: list[Compared], done: Batch, out: Path, *, json: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write what was found; return the table's rows and what `--json` adds."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals.search import (  # noqa: PLC0415
        folder_name,
        hit_rows,
        shown_rows,
        write_found,
    )
    from pathcli.types import NOTICE  # noqa: PLC0415

    found = ready.rank(compared)
    command = shlex.join(["pathcli", *sys.argv[1:]])
    written = write_found(out / folder_name(found), found, command)
    by_key = dict(zip((slide.run.key for slide in found.slides), written.files, strict=True))
    for result, one in zip(done.results, compared, strict=True):
        result["files"] = by_key[one.run.key]
    warnings = [*found.warnings, *written.unseen]
    for text in warnings:
        show.warn(text)
    if not json:
        show.say(f"{NOTICE} Open {written.page}")
    more = {"text": found.text, "not": list(found.negatives), "tiles": hit_rows(found)}
    more |= {"warnings": warnings, "report": str(written.page), "notice": NOTICE}
    return shown_rows(found), more
