"""`pathcli mil-eval`: trained heads on test slides, with intervals and a report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o
from pathcli.cli.recipes import Settings

if TYPE_CHECKING:
    from pathcli.evals.mil import Evaluation
    from pathcli.evals.mil_outcome import OutcomeEvaluation
    from pathcli.evals.mil_outcome_scores import OutcomeMeasurements
    from pathcli.evals.mil_report import Measurements

app = typer.Typer(rich_markup_mode=None, add_completion=False)


Benchmark = Annotated[
    str, typer.Argument(help="camelyon16, camelyon17, bracs, or a table of labels.")
]
Slides = Annotated[
    Path | None,
    typer.Option("--slides", help="Slides, where features are not in the store.", metavar="DIR"),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help="The benchmark's label table, where it is not ours to ship."),
]
Encoder = Annotated[
    str | None, typer.Option("--encoder", help="Only runs on features of this encoder.")
]
Heads = Annotated[
    list[str] | None,
    typer.Option("--head", help="A head; repeatable [default: all that have runs]."),
]
RunFolder = Annotated[Path, typer.Option("--runs", help="Folder of run folders.", metavar="DIR")]
Train = Annotated[bool, typer.Option("--train", help="Train the heads that have no finished run.")]
Specificity = Annotated[
    float, typer.Option("--specificity", help="At which sensitivity is stated.", min=0, max=1)
]
AllowLeak = Annotated[
    bool, typer.Option("--allow-leak", help="Only warn of patients that were trained on.")
]


@app.command()
def mil_eval(
    benchmark: Benchmark,
    slides: Slides = None,
    labels: Labels = None,
    encoder: Encoder = None,
    head: Heads = None,
    runs: RunFolder = o.RUNS,
    train: Train = False,
    settings: Settings = None,
    specificity: Specificity = 0.9,  # as in the library
    allow_leak: AllowLeak = False,
    device: o.Device = "auto",
    out: o.ReportFolder = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Evaluate trained heads on a benchmark or on labels of your own.

    With labels the runs were trained on, their own test split is used; with other labels it
    is an external validation on all slides. Runs of mil-regression or mil-survival are tested
    on their columns. Writes report.html, report.json and predictions.csv. --set changes what
    --train trains.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals.mil import mil_eval as evaluate  # noqa: PLC0415
    from pathcli.evals.mil_outcome import asks_for_outcome, outcome_eval  # noqa: PLC0415
    from pathcli.registry import resolve  # noqa: PLC0415

    o.check(None, device)
    for name in head or ():
        resolve("head", name)
    if encoder:
        resolve("encoder", encoder)
    given: dict[str, Any] = {"runs": runs, "heads": head, "encoder": encoder, "slides": slides}
    given |= {"allow_leak": allow_leak, "store": o.open_store(store), "device": device}
    folder = out / f"mil-eval-{Path(benchmark).stem}"
    if asks_for_outcome(benchmark, runs, head, encoder):
        refuse_of_classes(labels, settings, train=train)
        with show.progress(0, unit="steps") as start:
            outcome = outcome_eval(benchmark, progress=lambda name: start(0, name), **given)
        _print_outcome(outcome, folder, json=json)
        return
    with show.progress(0, unit="steps") as start:
        found = evaluate(
            benchmark,
            labels=labels,
            train_missing=train,
            settings=settings or (),
            specificity=specificity,
            progress=lambda name: start(0, name),
            **given,
        )
    _print(found, folder, json=json)


def refuse_of_classes(labels: Path | None, settings: list[str] | None, *, train: bool) -> None:
    """Refuse options that only classes have.

    Raises:
        UsageError: there is one.
    """
    from pathcli.errors import UsageError  # noqa: PLC0415

    given = {"--labels": labels, "--train": train, "--set": settings}
    if wrong := [name for name, value in given.items() if value]:
        msg = f"{', '.join(wrong)}: not for runs of a value or of survival; train these with: "
        raise UsageError(msg + "pathcli train --recipe mil-regression (or mil-survival)")


def _print_outcome(found: OutcomeEvaluation, folder: Path, *, json: bool) -> None:
    """Measure, write the report's files, and print what they say."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals.mil_outcome_report import (  # noqa: PLC0415
        outcome_report,
        outcome_rows,
        write_outcomes,
    )
    from pathcli.evals.mil_outcome_scores import measure_outcomes  # noqa: PLC0415
    from pathcli.report import as_json  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    numbers = measure_outcomes(found)
    report = outcome_report(found, numbers)
    command = shlex.join(["pathcli", *sys.argv[1:]])
    page = write_outcomes(folder, found, numbers, report, command)
    _warn(found, page)
    if json:
        show.as_json(as_json(report) | {"report": str(page)})
        return
    show.table(outcome_rows(found, numbers), title=f"{found.what}: mean over seeds [95 % interval]")
    show.table(_compared(numbers), title="heads against each other")
    show.say(f"{NOTICE} Open {page}")


def _warn(found: Evaluation | OutcomeEvaluation, page: Path) -> None:
    """Print what of an evaluation has to be minded."""
    from pathcli.cli import show  # noqa: PLC0415

    for text in found.warnings:
        show.warn(text)
    for scores in found.heads:
        if scores.cohort.missing:
            of = f"{len(scores.cohort.missing)} of {len(scores.cohort.table.rows)} slides"
            show.warn(f"{scores.name}: {of} have no features; {page} names them")


def _print(found: Evaluation, folder: Path, *, json: bool) -> None:
    """Measure, write the report's files, and print what they say."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals.mil_report import (  # noqa: PLC0415
        measure_evaluation,
        metric_rows,
        mil_report,
        write_evaluation,
    )
    from pathcli.report import as_json  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    numbers = measure_evaluation(found)
    report = mil_report(found, numbers)
    command = shlex.join(["pathcli", *sys.argv[1:]])
    page = write_evaluation(folder, found, numbers, report, command)
    _warn(found, page)
    if json:
        show.as_json(as_json(report) | {"report": str(page)})
        return
    show.table(metric_rows(found, numbers), title="mean over seeds [95 % interval], sd over seeds")
    show.table(_compared(numbers), title="heads against each other, AUROC")
    say = report.provenance["positive_class"]
    show.say(f"{NOTICE}" + (f" Positive is {say}." if say else "") + f" Open {page}")


def _compared(numbers: Measurements | OutcomeMeasurements) -> list[dict[str, Any]]:
    """Return a row a pair of heads, numbers rounded."""
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in numbers.pairs
    ]
