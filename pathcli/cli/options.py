"""The options that several commands share, and the values they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathcli.store import Store
    from pathcli.types import TileSpec

Slides = Annotated[
    list[str],
    typer.Argument(help="Slides, folders, globs, addresses, or a CSV with the header wsi[,mpp]."),
]
Size = Annotated[int | None, typer.Option("--size", help="Side of a tile in pixels.", min=1)]
Mpp = Annotated[float | None, typer.Option("--mpp", help="Micrometres per pixel of a tile.")]
Step = Annotated[
    int | None, typer.Option("--step", help="Pixels from tile to tile [default: --size].", min=1)
]
Tissue = Annotated[str, typer.Option("--tissue", help="Tissue method: otsu, hsv or none.")]
MinTissue = Annotated[
    float, typer.Option("--min-tissue", help="Least share of tissue in a tile, 0 to 1.")
]
SlideMpp = Annotated[
    float | None,
    typer.Option("--slide-mpp", help="Micrometres per pixel of the scan, over its header's."),
]
Overview = Annotated[
    bool, typer.Option("--overview/--no-overview", help="Draw scan, tissue and tiles as PNG.")
]
GeoJSON = Annotated[bool, typer.Option("--geojson", help="Write the tissue for QuPath.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for pictures and failures.csv.")]
StoreRoot = Annotated[
    Path | None,
    typer.Option("--store", help="The store [default: $PATHCLI_STORE, else the user's cache]."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Encoder = Annotated[
    str,
    typer.Option("--encoder", help="Encoder: a name, open_clip:ARCH, hf:FOLDER or timm:NAME."),
]
Checkpoint = Annotated[
    Path | None, typer.Option("--checkpoint", help="Weights to use instead of the published.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]

OUT = Path("pathcli-out")


def open_store(root: Path | None) -> Store:
    """Open the store an option names."""
    from pathcli.store import Store  # noqa: PLC0415

    return Store(root)


def spec_of(
    native: TileSpec,
    size: int | None,
    mpp: float | None,
    step: int | None,
    tissue: str,
    min_tissue: float,
) -> TileSpec:
    """Return the specification the options ask for, `native` filling what they leave open."""
    from pathcli.slides.tiling import tile_spec  # noqa: PLC0415

    return tile_spec(
        size or native.size_px,
        native.mpp if mpp is None else mpp,
        step_px=step,
        tissue=tissue,
        min_tissue=min_tissue,
    )
