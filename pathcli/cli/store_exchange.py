"""`pathcli store export` and `import`: the features of slides as other tools keep them."""

from __future__ import annotations

import json as js
import re
import shlex
from functools import cache
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pathcli.slides.discovery import Found
    from pathcli.store.peers import Export, Import
    from pathcli.store.peers.parcel import Known
    from pathcli.types import Progress

Form = Annotated[
    str,
    typer.Option("--format", help="Whose files.", metavar="trident|clam|stamp|acmil|zarr|geojson"),
]

Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="Table of labels, for ACMIL's file.", metavar="FILE"),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        "--scores",
        help="CSV slide,x,y,... of measurements, for GeoJSON [default: norm, components].",
        metavar="FILE",
    ),
]


def export(
    out: Annotated[Path, typer.Argument(help="Folder to write to.", metavar="OUT")],
    form: Form,
    slides: Annotated[
        list[str] | None,
        typer.Argument(help="Items or names of slides [default: all].", metavar="SLIDES"),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Its id, where the store has several.")
    ] = None,
    tiles: Annotated[
        str | None,
        typer.Option("--tiles", help="Digest of the tiles, where there are several."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there already.")
    ] = False,
    labels: Labels = None,
    scores: Scores = None,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Write features of the store as another tool's files.

    Each file is written whole or not at all, none is replaced unasked, and tiles that could not
    be read are left out. An import knows files again that nobody changed.
    """
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.slides.discovery import Found  # noqa: PLC0415
    from pathcli.store.peers import Export  # noqa: PLC0415

    for option, given, of in (("--labels", labels, "acmil"), ("--scores", scores, "geojson")):
        if given is not None and form != of:
            msg = f"{option} belongs to --format {of}"
            raise UsageError(msg)
    if re.match(r"\w{2,}:/", str(out)):
        msg = f"{out}: other tools' files are written to a folder of this machine, no address"
        raise UsageError(msg)
    ready = Export(
        o.open_store(store, create=False),
        form,
        out,
        slides or (),
        encoder=encoder,
        tiles=tiles,
        overwrite=overwrite,
        labels=_classes(labels),
        scores=scores,
    )
    with ready:
        work = _one_by_one(ready)
        batch = run_batch([Found(name) for name in ready.names], work, None)
    rows = [_row(result) | {"left out": result["dropped"]} for result in batch.results]
    finish(batch, rows, as_json=json, out=None, more={"format": form, "out": str(out)})


def import_(
    path: Annotated[
        Path, typer.Argument(help="A folder of files, or one.", metavar="IN", show_default=False)
    ],
    form: Form,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="What to call the encoder [default: as the files do]."),
    ] = None,
    slides: Annotated[
        Path | None,
        typer.Option(
            "--slides",
            help="Folder or list of the slides, for what the files do not say of them.",
            metavar="DIR|CSV",
        ),
    ] = None,
    mpp: Annotated[
        float | None,
        typer.Option("--mpp", help="Micrometres per level-0 pixel of the slides.", metavar="UM"),
    ] = None,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Read another tool's features into the store.

    What the files say is kept, and what they do not know is marked: the encoder has no digest,
    and is called NAME-imported. Files that `export` wrote come back as they were, but for
    GeoJSON, which holds measurements, not features.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.slides.discovery import Found  # noqa: PLC0415
    from pathcli.store.peers import Import  # noqa: PLC0415

    o.check(mpp)
    ready = Import(
        o.open_store(store),
        form,
        path,
        encoder=encoder,
        mpp=mpp,
        slide=None if slides is None else known_slides(slides),
    )
    batch = run_batch([Found(name) for name in ready.names], _one_by_one(ready), None)
    rows = [_row(result) | {"restored": result["restored"]} for result in batch.results]
    recipes = sorted({text for result in batch.results if (text := how_to_train(result))})
    if not json:
        for text in recipes:
            show.say(f"train on them with: {text}")
    finish(batch, rows, as_json=json, out=None, more={"format": form, "train": recipes})


def _one_by_one(ready: Export | Import) -> Callable[[Found, Progress], dict[str, Any]]:
    """Return the work of a batch: one slide by its name."""

    def work(found: Found, progress: Progress) -> dict[str, Any]:
        progress(0, 1)
        done = ready(str(found.path))
        progress(1, 1)
        return done

    return work


def _row(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of the table that both commands print."""
    return {
        "slide": result["slide"],
        "item": result["item"],
        "encoder": result["encoder"],
        "tiles": result["tiles"],
        "length": result["length"],
        "written": "yes" if result["written"] else "was there",
    }


def how_to_train(result: Mapping[str, Any]) -> str:
    """Return the command that trains on imported features, "" for pathcli's own."""
    from pathcli.store.peers.parcel import IMPORTED  # noqa: PLC0415

    spec, encoder = result["spec"], str(result["encoder"])
    if not encoder.endswith(IMPORTED):
        return ""
    names = ("size_px", "mpp", "step_px", "tissue", "min_tissue", "drop")
    tiles = {name: spec[name] for name in names if spec[name] != []} | spec["tissue_params"]
    return shlex.join(
        [
            *("pathcli", "train", "--recipe", "mil-abmil", "--set", "data.labels=labels.csv"),
            *("--set", f"encoder={js.dumps({'kind': 'imported', 'id': encoder})}"),
            *("--set", f"tiles={js.dumps(tiles)}"),
        ]
    )


def _classes(labels: Path | None) -> dict[str, int] | None:
    """Return the class index of the slides of a table."""
    from pathcli.mil.tables import read_labels  # noqa: PLC0415

    if labels is None:
        return None
    table = read_labels(labels)
    return {row.slide: table.index(row) for row in table.rows if row.label is not None}


def known_slides(place: Path) -> Callable[[str], Known | None]:
    """Return what looks up slides of a folder or a list by name; each is opened once, when asked.

    Raises:
        ResourceError: there is no such folder or list.
        DataError: it names no slide.
    """
    from contextlib import closing  # noqa: PLC0415

    from pathcli.errors import DataError, ResourceError  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415
    from pathcli.slides.readers import open_slide  # noqa: PLC0415
    from pathcli.store.peers.parcel import Known  # noqa: PLC0415
    from pathcli.types import MPP_RANGE  # noqa: PLC0415

    if not place.exists():
        msg = f"{place}: no such folder or list of slides"
        raise ResourceError(msg)
    files: dict[str, list[Found]] = {}
    for found in discover([str(place)]):
        files.setdefault(PurePath(str(found.checked().path)).stem, []).append(found)

    @cache
    def look_up(name: str) -> Known | None:
        mine = files.get(name, [])
        if len(mine) > 1:
            named = " and ".join(str(found.path) for found in mine[:2])
            more = f" and {len(mine) - 2} more" * (len(mine) > 2)  # noqa: PLR2004 - two are shown
            msg = (
                f"{name}: {named}{more} have this name; import what belongs to each from a folder "
                "of its own, with --slides that folder's slides, or a list (CSV, header wsi)"
            )
            raise DataError(msg)
        if not mine:
            return None
        with closing(open_slide(mine[0].path)) as slide:
            info = slide.info
        mpp = mine[0].mpp or info.mpp
        usable = mpp is not None and MPP_RANGE[0] <= mpp <= MPP_RANGE[1]
        return Known(info, float(f"{mpp:.6g}") if usable else None, str(mine[0].path))

    return look_up
