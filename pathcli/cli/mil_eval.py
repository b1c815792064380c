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
    --train trains: --set outcome.column=COLUMN a value, outcome.time and outcome.event survival.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals import mil_outcome_train as of_outcome  # noqa: PLC0415
    from pathcli.evals.mil import mil_eval as evaluate  # noqa: PLC0415
    from pathcli.evals.mil import target_of  # noqa: PLC0415
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
    sets = settings or ()
    given |= {"train_missing": train, "settings": sets}
    learnt = sets if train else ()
    of_outcome.refuse_unclear(benchmark, learnt)
    said, classes = of_outcome.columns_of(learnt), of_outcome.of_classes(learnt)
    if said or (not classes and asks_for_outcome(benchmark, runs, head, encoder)):
        if said:  # a table has several outcomes, each with a report of its own
            folder = out / f"mil-eval-{Path(benchmark).stem}-{of_outcome.plain_name(*said)}"
        refuse_of_classes(labels, settings, train=train)
        with show.progress(0, unit="steps") as start:
            outcome = outcome_eval(benchmark, progress=lambda name: start(0, name), **given)
        _print(outcome, folder, json=json)
        return
    if train:
        of_outcome.refuse_unsaid(benchmark, sets)
    if target := target_of(learnt):
        folder = folder.with_name(f"{folder.name}-{of_outcome.plain_name(target)}")
    given |= {"labels": labels, "specificity": specificity}
    with show.progress(0, unit="steps") as start:
        found = evaluate(benchmark, progress=lambda name: start(0, name), **given)
    _print(found, folder, json=json)


def refuse_of_classes(labels: Path | None, settings: list[str] | None, *, train: bool) -> None:
    """Refuse options that only classes have, or that need --train.

    Raises:
        UsageError: there is one.
    """
    from pathcli.errors import UsageError  # noqa: PLC0415

    if labels:
        msg = "--labels: not for runs of a value or of survival; their table is the argument"
        raise UsageError(msg)
    if settings and not train:
        msg = "--set changes what --train trains; give both, or neither"
        raise UsageError(msg)


def _print(found: Evaluation | OutcomeEvaluation, folder: Path, *, json: bool) -> None:
    """Measure, write the report's files, and print what they say."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals import mil_outcome_report as of_outcome  # noqa: PLC0415
    from pathcli.evals import mil_report as of_classes  # noqa: PLC0415
    from pathcli.evals.mil import Evaluation  # noqa: PLC0415
    from pathcli.evals.mil_outcome_scores import measure_outcomes  # noqa: PLC0415
    from pathcli.report import as_json  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    numbers: Measurements | OutcomeMeasurements
    command = shlex.join(["pathcli", *sys.argv[1:]])
    if isinstance(found, Evaluation):
        numbers = of_classes.measure_evaluation(found)
        report = of_classes.mil_report(found, numbers)
        page = of_classes.write_evaluation(folder, found, numbers, report, command)
        rows = of_classes.metric_rows(found, numbers)
        title, by = "mean over seeds [95 % interval], sd over seeds", ", AUROC"
    else:
        numbers = measure_outcomes(found)
        report = of_outcome.outcome_report(found, numbers)
        page = of_outcome.write_outcomes(folder, found, numbers, report, command)
        rows = of_outcome.outcome_rows(found, numbers)
        title, by = f"{found.what}: mean over seeds [95 % interval]", ""
    _warn(found, page)
    if json:
        show.as_json(as_json(report) | {"report": str(page)})
        return
    show.table(rows, title=title)
    show.table(_compared(numbers), title=f"heads against each other{by}")
    positive = report.provenance.get("positive_class")
    show.say(f"{NOTICE}" + (f" Positive is {positive}." if positive else "") + f" Open {page}")


def _warn(found: Evaluation | OutcomeEvaluation, page: Path) -> None:
    """Print what of an evaluation has to be minded."""
    from pathcli.cli import show  # noqa: PLC0415

    for text in found.warnings:
        show.warn(text)
    for scores in found.heads:
        if scores.cohort.missing:
            of = f"{len(scores.cohort.missing)} of {len(scores.cohort.table.rows)} slides"
            show.warn(f"{scores.name}: {of} have no features; {page} names them")


def _compared(numbers: Measurements | OutcomeMeasurements) -> list[dict[str, Any]]:
    """Return a row a pair of heads, numbers rounded."""
    return [
        {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        for row in numbers.pairs
    ]
