"""`pathcli zeroshot`: a data set's classes told by text, with intervals and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pathcli.evals.patch_scores import Scored
    from pathcli.report import Section

    Tables = Mapping[str, Sequence[Mapping[str, Any]]]

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Dataset = Annotated[
    str,
    typer.Argument(
        help="A known set (lc-lung, crc-100k, pcam...), a .yaml of your own, or a folder or table."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of the images, in the set's own layout.", metavar="DIR"),
]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels", help="Table image,label[,group][,split] to use instead.", metavar="FILE"
    ),
]
Split = Annotated[
    str | None,
    typer.Option("--split", help="Part to score, or all [default: as the set's file says]."),
]
Ensemble = Annotated[
    bool, typer.Option("--ensemble", help="All synonyms x templates, not one text a class.")
]
Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="Another text for a class; repeatable.", metavar="CLASS=TEXT"),
]
Template = Annotated[
    str | None,
    typer.Option("--template", help="Another template; {} is where the class goes.", metavar="TXT"),
]
Batch = Annotated[int, typer.Option("--batch", help="Images per forward pass.", min=1)]
Workers = Annotated[int, typer.Option("--workers", help="Threads that read.", min=1)]
_SHOWN, _WIDTH = 3, 160


@app.command()
def zeroshot(
    dataset: Dataset,
    data: Data = None,
    labels: Labels = None,
    split: Split = None,
    encoder: o.Encoder = "mini-clip",
    checkpoint: o.Checkpoint = None,
    ensemble: Ensemble = False,
    prompt: Prompt = None,
    template: Template = None,
    device: o.Device = "auto",
    batch: Batch = 32,
    workers: Workers = 2,
    out: o.ReportFolder = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Tell the classes of labelled images by text alone, and measure how well.

    Images are read from the set's own layout, from labels.csv (image,label[,group][,split]) or
    from class folders. Writes report.html, report.json and predictions.csv.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415
    from pathcli.evals.zeroshot import zeroshot as score  # noqa: PLC0415

    o.check(None, device)
    built = build_encoder(encoder, checkpoint=checkpoint)
    check_out(out)
    with show.progress(1, unit="images") as start:
        scored = score(
            dataset,
            Embedder(built, o.open_store(store), device=device, batch=batch, workers=workers),
            data=data,
            labels=labels,
            split=split,
            ensemble=ensemble,
            prompts=prompt or (),
            template=template,
            progress=start(1, dataset),
        )
    tell("zeroshot", scored, out, {"what the classes are called": _asked(scored)}, json=json)


def check_out(out: Path) -> None:
    """Refuse a folder that cannot be written before the work, not after it.

    Raises:
        UsageError: a file is where a folder is needed.
        ResourceError: it may not be written.
    """
    import os  # noqa: PLC0415

    from pathcli.errors import ResourceError, UsageError  # noqa: PLC0415

    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        msg = f"{there}: a file is where a folder is needed; give another folder with --out"
        raise UsageError(msg)
    if not os.access(there, os.W_OK | os.X_OK):
        msg = f"{there}: no permission to write; give another folder with --out"
        raise ResourceError(msg)


def tell(
    command: str,
    scored: Scored,
    out: Path,
    first: Tables,
    extra: Sequence[Section] = (),
    *,
    json: bool,
) -> None:
    """Measure, write the report's files below `out`, print the tables `first` and the numbers."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals.patch_report import (  # noqa: PLC0415
        abstention_text,
        class_rows,
        folder_name,
        metric_rows,
        patch_report,
        write_patches,
    )
    from pathcli.evals.patch_scores import measure_patches  # noqa: PLC0415
    from pathcli.report import as_json  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    numbers = measure_patches(scored)
    folder = out / folder_name(command, scored)
    page = write_patches(folder, scored, numbers, shlex.join(["pathcli", *sys.argv[1:]]), extra)
    for text in scored.warnings:
        show.warn(text)
    for why, n in scored.dropped.items():
        show.warn(f"left out: {n} ({why})")
    if json:
        show.as_json(as_json(patch_report(scored, numbers)) | {"report": str(page)})
        return
    show.say(f"{scored.title}. {scored.lead}")
    for title, rows in first.items():
        show.table(rows, title=title)
    show.table(metric_rows(scored, numbers), title="on these images [95 % interval]")
    show.table(class_rows(scored, numbers), title="class by class")
    if told := abstention_text(scored, numbers):
        show.say(told)
    show.table(scored.published, title="published elsewhere, not comparable")
    show.say(f"{NOTICE} Open {page}")


def _asked(scored: Scored) -> list[dict[str, Any]]:
    """Return a row a class: what it is called, the first texts of many."""
    from textwrap import shorten  # noqa: PLC0415

    return [
        {
            "class": name,
            "texts": len(texts),
            "such as": shorten(" | ".join(texts[:_SHOWN]), _WIDTH, placeholder="..."),
        }
        for name, texts in scored.texts.items()
    ]
