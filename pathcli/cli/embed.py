"""`pathcli embed`: slides in, features in the store out."""

from __future__ import annotations

from contextlib import closing, suppress
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o
from pathcli.errors import PathcliError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pathcli.encoders.embedding import Embedder
    from pathcli.encoders.fleet import Fleet
    from pathcli.slides.discovery import Found
    from pathcli.types import Progress, TileSpec

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


@app.command()
def embed(
    slides: o.Slides,
    encoder: o.Encoder = "lite0",
    checkpoint: o.Checkpoint = None,
    tokens: Tokens = False,
    precision: o.Precision = "float32",
    device: Devices = "auto",
    compiled: Compiled = False,
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
    from pathcli.device import share_cores  # noqa: PLC0415

    share_cores()  # before torch is imported
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415
    from pathcli.encoders.fleet import Fleet, devices_of  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415

    devices = devices_of(device)
    for name in devices:
        o.check(slide_mpp, name)
    built = build_encoder(encoder, checkpoint=checkpoint, tokens=tokens, precision=precision)
    spec = o.spec_of(built.native, size, mpp, step, tissue, min_tissue, drop)
    if size is None and mpp is None:
        show.say(native_line(built.name, spec, built.native_source))
    _ = built.id  # weights that are not here fail the command once, not every slide
    kept = o.open_store(store)
    how: dict[str, Any] = {"batch": batch, "workers": workers, "compiled": compiled}
    how["max_bad_tiles"] = max_bad_tiles
    ready = (
        Embedder(built, kept, device=device, **how)
        if len(devices) == 1
        else Fleet(built, kept, devices=devices, **how)
    )
    tiling = {"spec": spec, "out": out, "overview": overview, "geojson": geojson}
    with closing(ready):
        _embed_all(discover(slides), ready, slide_mpp, roi, tiling, json=json)


def _embed_all(
    found: list[Found],
    ready: Embedder | Fleet,
    slide_mpp: float | None,
    roi: Path | None,
    tiling: dict[str, Any],
    *,
    json: bool,
) -> None:
    """Embed slide after slide; print rows and failures, and exit with the batch's code."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.cli.tile import resolution, row_of  # noqa: PLC0415
    from pathcli.encoders.embedding import embed_summary  # noqa: PLC0415

    @cache
    def how(slide: Found) -> dict[str, Any]:
        mpp, source = resolution(slide, slide_mpp)
        own = o.roi_of(roi, str(slide.path), len(found))
        return {"mpp": mpp, "mpp_source": source, "roi": own, **tiling}

    def expected() -> Iterator[tuple[Path | str, dict[str, Any]]]:
        for slide in found:
            with suppress(PathcliError):  # said when it is this slide's turn
                yield slide.checked().path, how(slide)

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        return embed_summary(ready(slide.path, progress=progress, **how(slide)))

    ready.expect(expected())
    done = run_batch(found, work, tiling["out"])
    rows = [row_of(r) | features_of(r) for r in done.results]
    if done.results and not json:
        show.say(f"features are in {ready.store.root}; see: pathcli store info ITEM")
    finish(done, rows, as_json=json, out=tiling["out"])


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
