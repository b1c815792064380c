"""`pathcli vqa-eval`: a model's answers to questions about images, measured by named rules."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pathcli.endpoints import Budget
    from pathcli.evals.vqa_scores import Outcome
    from pathcli.vlm.responders import Responder

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Dataset = Annotated[
    str,
    typer.Argument(
        help="A known set (pathvqa, quilt-vqa, pathmmu, bach...), or a table of your own: JSONL, "
        "JSON, CSV of question, answer, image[, options, type, id, group]."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of a known set, or its table.", metavar="PATH"),
]
Images = Annotated[
    Path | None,
    typer.Option("--images", help="Folder of the images [default: the set's own].", metavar="DIR"),
]
Split = Annotated[
    str | None, typer.Option("--split", help="Part of a set: for pathmmu test, test_tiny or val.")
]
Limit = Annotated[int | None, typer.Option("--limit", help="The first N questions alone.", min=1)]
Missing = Annotated[
    float,
    typer.Option("--missing", help="Share of images that may be missing.", min=0, max=1),
]
PromptName = Annotated[
    str | None,
    typer.Option("--prompt", help="Words to ask in: plain, clover, quilt, pathmmu, pa-llava..."),
]
Predictions = Annotated[
    Path | None,
    typer.Option(
        "--predictions",
        help="Answers of any model {id, prediction}: no model runs.",
        metavar="FILE",
    ),
]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", help="Another model's answers, to compare with.", metavar="FILE"),
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge", help="A language model marks open answers, 1-10.", metavar="http://HOST/v1#NAME"
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        "--tokens",
        help="Recall by a language model's tokens too (PA-LLaVA's): a hub's ID or folder.",
        metavar="MODEL",
    ),
]
Permute = Annotated[
    int, typer.Option("--permute", help="Orders of options that are asked.", metavar="N", min=1)
]
Blind = Annotated[bool, typer.Option("--blind", help="Ask once more with other images.")]


@app.command()
def vqa_eval(
    dataset: Dataset,
    model: o.Model = "clover-mini",
    data: Data = None,
    images: Images = None,
    split: Split = None,
    limit: Limit = None,
    missing: Missing = 0.01,
    prompt: PromptName = None,
    predictions: Predictions = None,
    compare: Compare = None,
    permute: Permute = 1,
    blind: Blind = False,
    judge: Judge = None,
    budget: o.Usd = None,
    price: o.Price = None,
    tokens: Tokens = None,
    device: o.Device = "auto",
    load: o.Load = "auto",
    out: o.ReportFolder = o.OUT,
    json: o.Json = False,
) -> None:
    """Measure answers to questions about images, by rules that state what they count.

    Answers are kept in responses.jsonl: an interrupted run goes on, and nothing is asked twice.
    Writes report.html, metrics.json and predictions.jsonl.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.zeroshot import check_out  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.evals.vqa import evaluate  # noqa: PLC0415
    from pathcli.evals.vqa_data import read_questions  # noqa: PLC0415

    o.check(None, device)
    if predictions and (permute > 1 or blind or prompt):
        msg = "--predictions are what a model said: --permute, --blind and --prompt ask one"
        raise UsageError(msg)
    check_out(out)
    spending = _budget(budget, price, paid := _endpoints(None if predictions else model, judge))
    whole = read_questions(dataset, data=data, images=images, split=split)
    with show.progress(1, unit="answers") as start:
        outcome = evaluate(
            whole,
            limit=limit,
            missing=missing,
            model=None if predictions else lambda: _model(model, device, load, out, spending),
            responses=out / "responses.jsonl",
            prompt=prompt,
            permute=permute,
            blind=blind,
            predictions=predictions,
            rival=compare,
            judged_by=judge,
            budget=spending,
            tokens_of=tokens,
            progress=start(1, dataset),
        )
    _tell(outcome, out, json=json)
    if paid:
        show.say(f"spent: {spending}")


def _endpoints(*named: str | None) -> list[str]:
    return [one for one in named if one and one.startswith("http")]


def _budget(usd: float | None, price: str | None, paid: Sequence[str]) -> Budget:
    """Return what may be spent at the endpoints `paid`.

    Raises:
        UsageError: there is none, a price that is not two numbers, or money without one.
    """
    from pathcli.endpoints import Budget  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415

    if (usd is not None or price) and not paid:
        msg = "--budget and --price are for endpoints; neither --model nor --judge is one"
        raise UsageError(msg)
    if price is None and usd is not None:
        msg = "--budget needs --price READ,WRITTEN, USD per million tokens, as --price 0.15,0.6"
        raise UsageError(msg)
    return Budget(usd=usd, price=o.price_of(price))


def _model(name: str, device: str, load: str, out: Path, budget: Budget) -> Responder:
    from pathcli.store.responses import Responses  # noqa: PLC0415
    from pathcli.vlm.responders import open_responder  # noqa: PLC0415

    kept = Responses(out / "requests.jsonl") if name.startswith("http") else None
    return open_responder(name, device=device, load=load, kept=kept, budget=budget)


def _tell(outcome: Outcome, out: Path, *, json: bool) -> None:
    """Write the report's files below `out`, and print the numbers."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.evals import vqa_report as r  # noqa: PLC0415
    from pathcli.report import as_json  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    asked = outcome.ours.asked
    command = shlex.join(["pathcli", *sys.argv[1:]])
    page = r.write_vqa(out / r.folder_name(outcome), outcome, command)
    for text in asked.warnings:
        show.warn(text)
    for why, n in asked.dropped.items():
        show.warn(f"left out: {n} ({why})")
    if json:
        show.as_json(as_json(r.vqa_report(outcome)) | {"report": str(page)})
        return
    counts = ", ".join(f"{what}: {n:,}" for what, n in outcome.ours.counts().items())
    show.say(f"{outcome.ours.model} on {asked.card.title or asked.name}; {counts}")
    show.table(r.rule_rows(outcome), title="by rule [95 % interval]")
    show.table(r.type_rows(outcome), title="type by type")
    show.table(r.table_rows(r.baseline_rows(outcome)), title="knowing no image")
    show.table(r.difference_rows(outcome), title="against another model")
    show.table(r.published_rows(outcome), title="as published, another model and protocol")
    show.say(f"{NOTICE} Every rule is spelt out in {page}")
