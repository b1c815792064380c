"""`pathcli data instruct`: questions and answers to train on, made of captions."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.curation.instruct import Made, Settings
    from pathcli.curation.models import Opened
    from pathcli.data.formats import Source
    from pathcli.store import Store

OUT = Path("pathcli-out/instruct")

Captions = Annotated[
    Path,
    typer.Argument(
        help="Images and captions: CSV, JSON, JSONL, Parquet, tar shards, a folder; or PathGen's."
    ),
]
LanguageModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Writes the pairs: smollm2-135m, hf:ID, a folder, or an endpoint's address.",
        metavar="NAME|hf:ID|URL",
    ),
]
Kinds = Annotated[
    str,
    typer.Option(
        "--kinds",
        help="Pairs a model writes, and a question to which the caption is the answer.",
        metavar="generated,template",
    ),
]
Questions = Annotated[
    str,
    typer.Option(
        "--questions", help="Of templates: describe, describe-in-detail, or a YAML file of yours."
    ),
]
Reply = Annotated[
    str,
    typer.Option(
        "--reply",
        help="How pairs are written; auto takes JSON of endpoints.",
        metavar="auto|lines|json",
    ),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Most tokens of a reply.", min=1)]
Temperature = Annotated[
    float,
    typer.Option("--temperature", help="1 as CLOVER; 0 for the likeliest words.", min=0, max=2),
]
Limit = Annotated[int | None, typer.Option("--limit", help="The first N captions alone.", min=1)]
Seed = Annotated[int, typer.Option("--seed", help="Of the questions that are drawn.", min=0)]
Workers = Annotated[int, typer.Option("--workers", help="Requests at once.", min=1)]
Rpm = Annotated[
    float | None, typer.Option("--rpm", help="Most requests a minute.", metavar="N", min=0.001)
]
Tpm = Annotated[
    float | None, typer.Option("--tpm", help="Most tokens a minute.", metavar="N", min=1)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Ask nothing: say what it would ask and cost.")
]


def instruct(
    captions: Captions,
    images: o.Images = None,
    layout: o.Format = "auto",
    model: LanguageModel = None,
    kinds: Kinds = "generated,template",
    questions: Questions = "describe-in-detail",
    reply: Reply = "auto",
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 1.0,
    limit: Limit = None,
    seed: Seed = 0,
    workers: Workers = 4,
    rpm: Rpm = None,
    tpm: Tpm = None,
    budget: o.Usd = None,
    price: o.Price = None,
    dry_run: DryRun = False,
    device: o.Device = "auto",
    store: o.StoreRoot = None,
    out: o.Folder = OUT,
    json: o.Json = False,
) -> None:
    """Make questions and answers of captions, to train on (CLOVER).

    Writes clover.json, llava.json, dropped.csv with what was left out and why, and a report.
    Answers are kept: the same command again goes on, and pays for nothing twice.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.zeroshot import check_out  # noqa: PLC0415
    from pathcli.curation import instruct as i  # noqa: PLC0415
    from pathcli.curation.report import given  # noqa: PLC0415
    from pathcli.data.formats import Source  # noqa: PLC0415

    o.check(None, device)
    check_out(out)
    settings = _settings(kinds, reply, model, questions, max_tokens, temperature, seed, limit)
    opened = None
    if model:
        limits: dict[str, Any] = {"budget": budget, "rpm": rpm, "tpm": tpm, "price": price}
        opened = _opened(model, o.open_store(store), workers, device, **limits)
    source = Source(captions, o.folder(images))
    if dry_run:
        _estimate(source, out, layout, settings, opened, json=json)
        return
    read = given(captions, source.images, layout)
    with show.progress(1, unit="captions") as start:
        made = i.instruct(
            source, out, opened, settings, layout=layout, progress=start(1, captions.name)
        )
    _tell(made, settings, opened, read | {"format": made.layout}, json=json)


def _opened(
    name: str,
    store: Store,
    workers: int,
    device: str,
    *,
    budget: float | None,
    rpm: float | None,
    tpm: float | None,
    price: str | None,
) -> Opened:
    """Return the model of a name.

    Raises:
        UsageError: options of endpoints for a model of this machine.
    """
    from pathcli.curation.models import open_model  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.llm_http import Pace  # noqa: PLC0415

    limits = (budget, price, rpm, tpm)
    if any(limit is not None for limit in limits) and not name.startswith("http"):
        msg = "--budget, --price, --rpm and --tpm are for endpoints; --model is none"
        raise UsageError(msg)
    return open_model(
        name,
        store=store,
        budget=budget,
        workers=workers,
        price=o.price_of(price),
        pace=Pace(requests=rpm, tokens=tpm),
        device=device,
    )


def _settings(
    kinds: str,
    reply: str,
    model: str | None,
    questions: str,
    max_tokens: int,
    temperature: float,
    seed: int,
    limit: int | None,
) -> Settings:
    """Return what the options ask for.

    Raises:
        UsageError: they do not go together.
    """
    from pathcli.curation.instruct import Settings  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.vlm.templates import read_questions  # noqa: PLC0415

    wanted = tuple(name.strip() for name in kinds.split(",") if name.strip())
    if "generated" in wanted and not model:
        msg = "who writes the pairs? --model smollm2-135m, hf:ID, http://HOST/v1#NAME; without a "
        raise UsageError(msg + "model: --kinds template")
    if model and "generated" not in wanted:
        msg = "--kinds template asks no model: leave out --model"
        raise UsageError(msg)
    if reply not in {"auto", "lines", "json"}:
        msg = f"--reply is auto, lines or json, not {reply!r}"
        raise UsageError(msg)
    read_questions(questions)
    auto = "json" if (model or "").startswith("http") else "lines"
    return Settings(
        kinds=wanted,  # type: ignore[arg-type]  # checked there
        form=auto if reply == "auto" else reply,  # type: ignore[arg-type]  # checked above
        questions=questions,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        limit=limit,
    )


def _estimate(
    source: Source,
    out: Path,
    layout: str,
    settings: Settings,
    model: Opened | None,
    *,
    json: bool,
) -> None:
    """Say what a run would ask and cost."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation import instruct as i  # noqa: PLC0415
    from pathcli.curation.models import estimate  # noqa: PLC0415

    found = i.captions(source, out, layout, settings.limit)
    if model is None:
        told: dict[str, Any] = {"requests": 0, "captions": sum(1 for _ in found)}
    else:
        said = (i.conversation(given.text, settings.form) for given in found)
        told = asdict(estimate(model, said, written=i.WRITTEN, **i.asking(settings)))
    if json:
        show.as_json(told)
        return
    what = {"kept": "answers there already", "read": "tokens read, about"}
    what |= {"written": "tokens written, about", "most": "tokens written, at most"}
    what |= {"usd": "USD, about", "usd_most": "USD, at most"}
    rows = [{"what": what.get(name, name), "value": value} for name, value in told.items()]
    show.table(rows)
    if model and model.price is None and "#" in model.name:
        show.say("its price is not known: give --price READ,WRITTEN")


def _tell(
    made: Made,
    settings: Settings,
    model: Opened | None,
    read: dict[str, Any],
    *,
    json: bool,
) -> None:
    """Write the report beside what was made, and print the numbers."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.instruct import facts  # noqa: PLC0415
    from pathcli.curation.report import write_report  # noqa: PLC0415
    from pathcli.endpoints import spent  # noqa: PLC0415
    from pathcli.report import versions  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    told: dict[str, Any] = dict(made.unread)
    provenance: dict[str, Any] = {**read, **facts(settings)}
    if model:
        told |= spent([model.budget])
        provenance |= {"model": model.name, "model_digest": model.digest}
    provenance["versions"] = versions()
    kept = made.data.kept.total()
    page = write_report(
        made.out,
        "Instructions",
        f"{kept:,} questions and answers of {made.data.captions:,} captions.",
        made.data,
        provenance,
        told=told,
        command=shlex.join(["pathcli", *sys.argv[1:]]),
    )
    for text in made.warnings:
        show.warn(text)
    if json:
        show.as_json({**made.data.summary(), **told, "report": str(page)})
        return
    rows = [{"what": f"kept, {kind}", "pairs": n} for kind, n in made.data.kept.items()]
    for kind, each in made.data.dropped.items():
        rows += [{"what": f"{kind}: {why}", "pairs": n} for why, n in each.most_common()]
    show.table(rows)
    for why, count in made.unread.items():
        show.warn(f"{count} rows not read: {why}")
    if model:
        show.say(f"spent: {model.budget}")
    show.say(f"{NOTICE} Open {page}")
