"""The options that several commands share, and the values they stand for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathcli.endpoints import Price as TokenPrice
    from pathcli.slides.discovery import Found
    from pathcli.store import Store
    from pathcli.types import TileSpec

log = logging.getLogger("pathcli")

Slides = Annotated[
    list[str],
    typer.Argument(help="Slides, folders, globs, addresses, or a CSV with the header wsi[,mpp]."),
]
Size = Annotated[
    int | None,
    typer.Option("--size", help="Side of a tile in pixels.", metavar="PX", min=1, max=8192),
]
Mpp = Annotated[
    float | None, typer.Option("--mpp", help="Micrometres per pixel of a tile.", metavar="UM")
]
Step = Annotated[
    int | None,
    typer.Option("--step", help="From tile to tile [default: --size].", metavar="PX", min=1),
]
Tissue = Annotated[
    str,
    typer.Option(
        "--tissue",
        help="Tissue method; hsv also with one of CLAM's presets, as in hsv:tcga.",
        metavar="otsu|hsv|hsv:PRESET|auto|none",
    ),
]
MinTissue = Annotated[
    float, typer.Option("--min-tissue", help="Least share of tissue in a tile.", metavar="0-1")
]
Roi = Annotated[
    Path | None,
    typer.Option(
        "--roi",
        help="Only inside these polygons: GeoJSON, ASAP or Aperio XML, or a folder of them.",
        metavar="FILE|DIR",
    ),
]
Drop = Annotated[
    str,
    typer.Option("--drop", help="Leave out tiles that are ...", metavar="blur,pen,dark,white"),
]
Shard = Annotated[
    str | None,
    typer.Option(
        "--shard", help="Only part I of N of the slides, as 3/8, for arrays of jobs.", metavar="I/N"
    ),
]
SlideMpp = Annotated[
    float | None,
    typer.Option(
        "--slide-mpp", help="Micrometres per pixel of the scan, over its header's.", metavar="UM"
    ),
]
Overview = Annotated[
    bool, typer.Option("--overview/--no-overview", help="Draw scan, tissue and tiles as PNG.")
]
GeoJSON = Annotated[bool, typer.Option("--geojson", help="Write the tissue for QuPath.")]
Out = Annotated[
    Path, typer.Option("--out", help="Folder for pictures and failures.csv.", metavar="DIR")
]
StoreRoot = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="The store [default: $PATHCLI_STORE, else the user's cache].",
        metavar="DIR|URL",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Encoder = Annotated[
    str,
    typer.Option(
        "--encoder", help="A name, open_clip:ARCH, hf:FOLDER or timm:NAME.", metavar="NAME"
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--checkpoint", help="Weights to use instead of the published.", metavar="FILE"),
]
Device = Annotated[
    str, typer.Option("--device", help="Where to compute.", metavar="auto|cpu|cuda[:N]|mps")
]

Precision = Annotated[
    str, typer.Option("--precision", help="float32, bfloat16 or float16 arithmetic.")
]
Batch = Annotated[int, typer.Option("--batch", help="Tiles per forward pass.", min=1)]
Workers = Annotated[int, typer.Option("--workers", help="Threads that read.", min=1)]
MaxBadTiles = Annotated[
    float,
    typer.Option(
        "--max-bad-tiles", help="Share of unreadable tiles a slide may have.", min=0, max=1
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", help="Folder of the images or slides [default: beside the file].", metavar="DIR"
    ),
]
Format = Annotated[
    str, typer.Option("--format", help="Layout, where it is not told by its columns.")
]

Runs = Annotated[Path, typer.Option("--out", help="Folder of run folders.", metavar="DIR")]
Folder = Annotated[Path, typer.Option("--out", help="Folder to write to.", metavar="DIR")]
ReportFolder = Annotated[
    Path, typer.Option("--out", help="Folder of the report's folder.", metavar="DIR")
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="clover-mini, a run or converted folder, hf:ID, or an endpoint's address.",
        metavar="NAME|RUN|hf:ID|URL",
    ),
]
Load = Annotated[
    str,
    typer.Option(
        "--load",
        help="Numbers of the language model.",
        metavar="auto|float32|bfloat16|float16|8bit|4bit",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", help="Most tokens of an answer [default: the model's].", min=1),
]

Usd = Annotated[
    float | None,
    typer.Option(
        "--budget",
        help="Most to spend at endpoints; then it stops, and goes on another time.",
        metavar="USD",
        min=0,
    ),
]
Price = Annotated[
    str | None,
    typer.Option(
        "--price", help="USD per million tokens read, and written.", metavar="READ,WRITTEN"
    ),
]

SHIPPED = "clover-mini"
OUT = Path("pathcli-out")
RUNS = Path("runs")


def price_of(text: str | None) -> TokenPrice | None:
    """Return the price an option tells, None for none.

    Raises:
        UsageError: it is not two numbers from 0 up.
    """
    from pathcli.endpoints import Price  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415

    if text is None:
        return None
    try:
        read, written = map(float, text.split(","))
        return Price(read, written)
    except (ValueError, UsageError):
        msg = f"--price is two numbers in USD per million tokens, as 0.15,0.6, not {text!r}"
        raise UsageError(msg) from None


def open_store(root: Path | str | None, *, create: bool = True) -> Store:
    """Open the store an option names; commands that only read do not make one."""
    from pathcli.store import Store  # noqa: PLC0415

    if str(root).startswith("memory://"):
        log.warning("%s ends with this command; a folder or s3:// lasts", root)
    return Store(root, create=create or root is None)


def shard_of(text: str | None, slides: list[Found]) -> list[Found]:
    """Return the part of the slides that `--shard` asks for; the parts together are all of them.

    It depends on the slides' names alone, not on the order in which they were found.

    Raises:
        UsageError: it is not I/N with I from 1 to N.
    """
    import re  # noqa: PLC0415

    from pathcli.errors import UsageError  # noqa: PLC0415

    if text is None:
        return slides
    told = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    part, parts = (int(told[1]), int(told[2])) if told else (0, 0)
    if not 1 <= part <= parts:
        msg = (
            f"--shard is I/N with I from 1 to N, as 3/8, not {text!r}; in a SLURM array from 0 on "
            "it is $((SLURM_ARRAY_TASK_ID+1))/$SLURM_ARRAY_TASK_COUNT"
        )
        raise UsageError(msg)
    chosen = set(sorted(slides, key=lambda s: (str(s.path), s.mpp or 0))[part - 1 :: parts])
    return [slide for slide in slides if slide in chosen]


def folder(path: Path | None) -> Path | None:
    """Return a folder an option names.

    Raises:
        ResourceError: there is none.
    """
    from pathcli.errors import ResourceError  # noqa: PLC0415

    if path is not None and not path.is_dir():
        msg = f"{path}: no such folder"
        raise ResourceError(msg)
    return path


def check(slide_mpp: float | None, device: str = "auto") -> None:
    """Refuse values that no slide and no machine could have.

    Raises:
        UsageError: a resolution outside what scans have, or no name of a device.
    """
    import re  # noqa: PLC0415

    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.types import MPP_RANGE  # noqa: PLC0415

    if slide_mpp is not None and not MPP_RANGE[0] <= slide_mpp <= MPP_RANGE[1]:
        msg = f"--slide-mpp {slide_mpp:g} is outside {MPP_RANGE[0]:g}-{MPP_RANGE[1]:g} um per pixel"
        raise UsageError(msg)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        msg = f"--device is auto, cpu, cuda, cuda:N or mps, not {device!r}"
        raise UsageError(msg)


def spec_of(
    native: TileSpec,
    size: int | None,
    mpp: float | None,
    step: int | None,
    tissue: str,
    min_tissue: float,
    drop: str = "",
) -> TileSpec:
    """Return the specification the options ask for, `native` filling what they leave open.

    Raises:
        UsageError: an unknown tissue method or flag, or numbers that cannot be tiled.
    """
    from pathcli.slides.tiling import tile_spec  # noqa: PLC0415

    return tile_spec(
        size or native.size_px,
        native.mpp if mpp is None else mpp,
        step_px=step,
        tissue=tissue,
        min_tissue=min_tissue,
        drop=tuple(name.strip() for name in drop.split(",") if name.strip()),
    )


def roi_of(given: Path | None, slide: str, slides: int = 1) -> Path | None:
    """Return the file of a slide's region of interest: `--roi` itself, or one of its folder.

    Args:
        given: the option, a file or a folder that holds one file per slide, named by its stem.
        slide: the slide's path or address.
        slides: how many slides the command has; a file belongs to one.

    Raises:
        UsageError: one file for several slides.
        ResourceError: there is no such file or folder.
        DataError: the folder has no file for this slide, or several.
    """
    from pathcli.slides.roi import roi_file  # noqa: PLC0415

    return None if given is None else roi_file(given, slide, slides)
