"""`pathcli probe`: linear probes and few-shot curves of an encoder, with intervals and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pathcli.cli import options as o
from pathcli.cli.zeroshot import (
    Batch,
    Data,
    Dataset,
    Labels,
    Workers,
    check_out,
    tell,
)

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Test = Annotated[
    Path | None,
    typer.Option("--test", help="Folder to test on, where it is another one.", metavar="DIR"),
]
Method = Annotated[
    str, typer.Option("--method", help="How it is learnt.", metavar="adamw|logistic|ridge")
]
Shots = Annotated[
    str, typer.Option("--shots", help="Images a class: 1,2,4,8,16,32,64,128,256,all.")
]
Draws = Annotated[int, typer.Option("--draws", help="Random draws of each number.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Of draws, batches and drawn sides.", min=0)]


@app.command()
def probe(
    dataset: Dataset,
    data: Data = None,
    labels: Labels = None,
    test: Test = None,
    encoder: o.Encoder = "lite0",
    checkpoint: o.Checkpoint = None,
    method: Method = "adamw",
    shots: Shots = "all",
    draws: Draws = 5,
    seed: Seed = 0,
    device: o.Device = "auto",
    batch: Batch = 32,
    workers: Workers = 2,
    out: o.ReportFolder = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Learn classes from an encoder's features of images, and test on other groups.

    The set's own split is used where it has one, else groups are drawn. Few-shot numbers are
    means over random draws. Writes report.html, report.json and predictions.csv.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.evals.probe import parse_shots  # noqa: PLC0415
    from pathcli.evals.probe import probe as run  # noqa: PLC0415
    from pathcli.evals.probe_report import level_section, level_table  # noqa: PLC0415

    o.check(None, device)
    numbers = parse_shots(shots)
    built = build_encoder(encoder, checkpoint=checkpoint)
    check_out(out)
    with show.progress(0, unit="steps") as start:
        probed = run(
            dataset,
            built,
            data=data,
            labels=labels,
            test=test,
            method=method,
            shots=numbers,
            draws=draws,
            seed=seed,
            store=o.open_store(store),
            device=device,
            batch=batch,
            workers=workers,
            progress=lambda name: start(0, name),
        )
    tables, extra = {}, []
    if any(level.shots for level in probed.levels):
        tables["mean over draws [95 % interval], sd of draws"] = level_table(probed.levels)
        extra = [level_section(probed.levels)]
    tell("probe", probed.scored, out, tables, extra, json=json)
