"""`pathcli data convert`, `check` and `review`: files of images and texts, whatever their form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.data.writers import Form, Written

PARTIAL = 3

Layout = Annotated[
    str, typer.Option("--format", help="Layout, where it is not told by its columns.")
]
Input = Annotated[
    Path, typer.Argument(help="A table, a folder or tar shards.", metavar="IN", show_default=False)
]
WriteImages = Annotated[
    Path | None,
    typer.Option(
        "--write-images",
        help="Write squares of slides and images of archives as files here.",
        metavar="DIR",
    ),
]


def convert(
    path: Input,
    out: Annotated[
        Path,
        typer.Argument(help="The file, or for webdataset a .tar or folder.", metavar="OUT"),
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="The form of OUT.",
            metavar="llava|clover|pallava|pathgen|csv|jsonl|parquet|webdataset",
        ),
    ],
    layout: Layout = "auto",
    images: o.Images = None,
    write_images: WriteImages = None,
    question: Annotated[
        str | None,
        typer.Option(
            "--question", help="Write captions as answers to this question.", metavar="TEXT"
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(
            "--choices",
            help="IN are labelled images: write questions with choices, in a set's published words "
            "or of the classes they have.",
            metavar="own|bach|oscc|colonpath|SET",
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a file of images and texts in another form.

    What the form cannot hold is counted in warnings; where rows are left out the exit code is 3.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.data.writers import convert as run  # noqa: PLC0415

    form: Any = to  # any text; another is refused
    given: dict[str, Any] = {"images": o.folder(images), "write_images": write_images}
    given["question"] = question
    if choices is None:
        done = run(path, out, form, layout=layout, **given)
    else:
        done = _asked(path, out, form, choices, layout=layout, **given)
    for line in done.told():
        show.warn(line)
    told = _told(done)
    if json:
        show.as_json(told)
    else:
        show.table([{what: told[what] for what in ("file", "form", "rows")}])
    if told["left_out"]:
        raise typer.Exit(PARTIAL)


def _asked(
    path: Path, out: Path, form: Form, choices: str, *, layout: str, **given: Path | str | None
) -> Written:
    """Write labelled images as questions with choices.

    Raises:
        UsageError: options for what is no set of labelled images.
    """
    from pathcli.data.writers import write_samples  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.evals import choices as c  # noqa: PLC0415

    if layout != "auto" or any(given.values()):
        msg = "--choices reads labelled images: leave out --format, --question, --images and "
        raise UsageError(msg + "--write-images")
    found = c.choices(choices, path)
    done = write_samples(found.samples, out, form)
    done.unread, done.warnings = found.dropped, list(found.warnings)
    done.examples = dict.fromkeys(found.dropped, str(path)) | done.examples
    return done


def _told(done: Written) -> dict[str, Any]:
    """Return what was written as plain values."""
    return {
        "file": str(done.path),
        "form": done.form,
        "rows": done.rows,
        "left_out": dict(done.unread) | dict(done.left),
        "notes": dict(done.notes),
        "warnings": done.told(),
    }


def check(
    files: Annotated[
        list[Path], typer.Argument(help="Tables, folders or tar shards; each may be a split.")
    ],
    layout: Layout = "auto",
    images: o.Images = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Headers of images alone: nothing is decoded.")
    ] = False,
    workers: Annotated[int, typer.Option("--workers", help="Threads that decode.", min=1)] = 4,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for findings.csv.", metavar="DIR")
    ] = o.OUT,
    json: o.Json = False,
) -> None:
    """Look for faults: missing and broken images, empty or double rows, leaks between splits.

    Splits are the column `split` of a file, or the files. Faults are listed in findings.csv, and
    the exit code is 4.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.check import check_files, write_findings  # noqa: PLC0415
    from pathcli.errors import DataError  # noqa: PLC0415

    with show.progress(1, unit="rows") as start:
        done = check_files(
            files,
            images=o.folder(images),
            layout=layout,
            fast=fast,
            workers=workers,
            progress=start(1, files[0].name),
        )
    listed = out / "findings.csv"
    write_findings(done.findings, listed)
    counts = done.counts()
    if json:
        told = {"files": done.files, "splits": done.splits, "faults": counts}
        show.as_json(told | {"findings": len(done.findings), "csv": str(listed), "fast": fast})
    else:
        show.table([{k: v for k, v in each.items() if k != "warnings"} for each in done.files])
        show.table(counts)
        show.say(f"{len(done.findings)} findings: {listed}" if counts else "no fault was found")
    if fast:
        show.warn("--fast: images were neither decoded nor compared")
    if counts:
        raise typer.Exit(DataError.exit_code)


def review(
    path: Input,
    out: Annotated[
        Path, typer.Option("--out", help="The page, or the file reviewed.", metavar="FILE")
    ],
    apply: Annotated[
        Path | None,
        typer.Option("--apply", help="Apply what the page exported.", metavar="FILE"),
    ] = None,
    sample: Annotated[
        int, typer.Option("--sample", help="Records drawn at random; 0 for all.", min=0)
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Of the draw.", min=0)] = 0,
    layout: Layout = "auto",
    images: o.Images = None,
    write_images: WriteImages = None,
    json: o.Json = False,
) -> None:
    """Write a page to keep, drop or edit records by hand, or apply what it exported.

    The page needs nothing beside itself. Decisions go into the file that --apply reads; records
    without a decision stay.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.review import apply_review, write_review  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415

    folder = o.folder(images)
    if apply is not None:
        done = apply_review(
            path, apply, out, layout=layout, images=folder, write_images=write_images
        )
        told = _told(done.written) | {"decisions": dict(done.counts)}
        warnings = told["warnings"]
        row = {"file": told["file"], "rows": told["rows"]} | dict(done.counts)
    else:
        if out.suffix.lower() not in {".html", ".htm"}:
            msg = f"{out}: a page is called .html; to apply decisions, give --apply"
            raise UsageError(msg)
        with show.progress(1, unit="records") as start:
            step = start(1, path.name)
            told = write_review(
                path,
                out,
                layout=layout,
                images=folder,
                sample=sample or None,
                seed=seed,
                progress=step,
            )
        warnings = [f"{count} rows not read: {why}" for why, count in told["not_read"].items()]
        row = {what: told[what] for what in ("page", "records", "of", "broken_images")}
    for line in warnings:
        show.warn(line)
    if json:
        show.as_json(told)
    else:
        show.table([row])
