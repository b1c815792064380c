"""`pathcli data clean`: images and captions without what is no human pathology."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.curation.clean import Cleaned, Judges
    from pathcli.curation.judges import ByLexicon, ImageJudge, TextJudge
    from pathcli.curation.models import Opened
    from pathcli.data.formats import Source
    from pathcli.endpoints import Budget

Pairs = Annotated[
    Path,
    typer.Argument(
        help="Images and captions: CSV, JSON, JSONL, Parquet, tar shards, a folder; or a "
        "published set's table.",
    ),
]
Words = Annotated[
    int, typer.Option("--min-words", help="Least words of a caption; 0 for any.", min=0)
]
Texts = Annotated[
    str,
    typer.Option(
        "--texts", help="Captions about animals: by the lexicon.", metavar="lexicon|none|FILE"
    ),
]
Llm = Annotated[
    str | None,
    typer.Option(
        "--llm", help="A language model judges captions.", metavar="NAME|RUN|hf:ID|http://..."
    ),
]
Encoder = Annotated[
    str,
    typer.Option(
        "--encoder",
        help="No pathology: by the rule of colours, or by an image-text encoder.",
        metavar="rule|none|NAME",
    ),
]
Vlm = Annotated[
    str | None,
    typer.Option(
        "--vlm", help="A vision-language model judges images.", metavar="RUN|hf:ID|http://..."
    ),
]
Copies = Annotated[
    str,
    typer.Option("--copies", help="What may not come twice.", metavar="image|pair|none"),
]
Distance = Annotated[
    int, typer.Option("--distance", help="Bits of 64 in which near copies differ.", min=0)
]
Agree = Annotated[
    int,
    typer.Option(
        "--agree",
        help="The models judge only N drawn at random, and agreement is reported.",
        metavar="N",
        min=0,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of what is drawn.", min=0)]
Workers = Annotated[
    int, typer.Option("--workers", help="Threads that read images; requests at once.", min=1)
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Ask nothing: say what it would ask and cost.")
]
OUT = Path("pathcli-out/clean")


def clean(
    pairs: Pairs,
    images: o.Images = None,
    layout: o.Format = "auto",
    out: o.Folder = OUT,
    min_words: Words = 20,
    texts: Texts = "lexicon",
    llm: Llm = None,
    encoder: Encoder = "rule",
    checkpoint: o.Checkpoint = None,
    vlm: Vlm = None,
    copies: Copies = "image",
    distance: Distance = 4,
    agree: Agree = 0,
    seed: Seed = 0,
    budget: o.Usd = None,
    price: o.Price = None,
    dry_run: DryRun = False,
    device: o.Device = "auto",
    workers: Workers = 4,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Keep the pairs of human pathology, and say of each other one why it was dropped.

    Out go captions that are short or about animals, images that are no pathology, and copies.
    Writes kept.jsonl, dropped.csv, report.html, report.json and provenance.json. Models that are
    asked cost time or money: --agree N has them judge a sample of what the cheap way saw. Their
    answers are kept: the same command again goes on.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation import clean as c  # noqa: PLC0415
    from pathcli.curation import clean_report as r  # noqa: PLC0415
    from pathcli.curation.report import given  # noqa: PLC0415
    from pathcli.data.formats import Source  # noqa: PLC0415
    from pathcli.endpoints import spent  # noqa: PLC0415

    o.check(None, device)
    purses: list[Budget] = []
    limits: dict[str, Any] = {"store": store, "budget": budget, "price": price, "device": device}
    models = _models(llm, vlm, **limits, workers=workers, among=purses)
    cheap = _lexicon(texts), _cheap(encoder, checkpoint, device)
    how: dict[str, Any] = {"min_words": min_words, "copies": copies, "distance": distance}
    how |= {"seed": seed, "layout": layout}
    source = Source(pairs, o.folder(images))
    if dry_run:
        _estimate(source, cheap, models, agree, how, json=json)
        return
    judges = _judges(cheap, _dear(*models), agree)
    read = given(pairs, source.images, layout)
    with show.progress(1, unit="rows") as start:
        told = start(1, pairs.name)
        done = c.clean(source, out, judges, workers=workers, progress=told, **how)
    asked = [model.budget for model in models if model]
    done.spent = spent(asked) if asked else {}
    command = shlex.join(["pathcli", *sys.argv[1:]])
    facts = r.facts(judges, how | {"agree": agree}, read | {"format": done.layout})
    _tell(done, r.write_report(done, facts, command), asked, json=json)


def _models(
    llm: str | None,
    vlm: str | None,
    *,
    store: Any,  # noqa: ANN401 - whatever names a store
    budget: float | None,
    price: str | None,
    workers: int,
    device: str,
    among: list[Budget],
) -> tuple[Opened | None, Opened | None]:
    """Return the models of captions and of images.

    Raises:
        UsageError: money, and no endpoint.
    """
    from pathcli.curation.models import open_model  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415

    named = [name for name in (llm, vlm) if name]
    if (budget is not None or price) and not any(name.startswith("http") for name in named):
        msg = "--budget and --price are for endpoints; neither --llm nor --vlm is one"
        raise UsageError(msg)
    kept = o.open_store(store) if named else None

    def opened(name: str | None) -> Opened | None:
        return name and open_model(  # type: ignore[return-value]  # "" is none
            name,
            store=kept,
            budget=budget,
            price=o.price_of(price),
            workers=workers,
            device=device,
            among=among,
            unfamiliar="keep",
        )

    return opened(llm), opened(vlm)


def _dear(
    llm: Any,  # noqa: ANN401 - a Model, or what stands for one
    vlm: Any,  # noqa: ANN401
) -> tuple[TextJudge | None, ImageJudge | None]:
    from pathcli.curation.judges import ByLanguage, ByVision  # noqa: PLC0415

    return ByLanguage(llm) if llm else None, ByVision(vlm) if vlm else None


def _estimate(
    source: Source,
    cheap: tuple[TextJudge | None, ImageJudge | None],
    models: tuple[Opened | None, Opened | None],
    agree: int,
    how: dict[str, Any],
    *,
    json: bool,
) -> None:
    """Say what a run would ask and cost at most."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.clean import rehearse  # noqa: PLC0415
    from pathcli.curation.models import Unasked  # noqa: PLC0415

    unasked = [Unasked(model, 4) if model else None for model in models]
    told: dict[str, Any] = {"rows": rehearse(source, _judges(cheap, _dear(*unasked), agree), **how)}
    found = {what: each for what, each in zip(("texts", "images"), unasked, strict=True) if each}
    told |= {what: asdict(each.estimate) for what, each in found.items()}
    if json:
        show.as_json(told)
        return
    rows = [{"of": what} | told[what] for what in found]
    show.table(rows, title=f"{told['rows']} rows; what would be asked, at most")
    if any(each and each.price is None and "#" in each.name for each in models):
        show.say("a price is not known: give --price READ,WRITTEN")


def _judges(
    cheap: tuple[TextJudge | None, ImageJudge | None],
    dear: tuple[TextJudge | None, ImageJudge | None],
    agree: int,
) -> Judges:
    """Return who decides: dear models where they are named, unless they only see a sample.

    Raises:
        UsageError: a sample, and no model that sees it.
    """
    from pathcli.curation.clean import Judges  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415

    if not agree:
        return Judges(texts=dear[0] or cheap[0], images=dear[1] or cheap[1])
    if not any(dear):
        msg = "--agree compares with --vlm or --llm: name one"
        raise UsageError(msg)
    return Judges(*cheap, *dear, agree=agree)


def _tell(done: Cleaned, page: Path, asked: list[Budget], *, json: bool) -> None:
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation import clean_report as r  # noqa: PLC0415

    if json:
        show.as_json(r.summary(done) | {"report": str(page)})
        return
    for text in done.warnings:
        show.warn(text)
    total = done.kept + done.dropped.total()
    rows = [("kept", done.kept), *done.dropped.most_common()]
    show.table([{"what": name, "pairs": n, "share": n / max(total, 1)} for name, n in rows])
    for what, found in done.agreements.items():
        show.table(found.rows(), title=f"cheap against dear, {what} [95 % interval]")
    for each in asked:
        show.say(f"spent: {each}")
    show.say(f"{done.path}; what was dropped, and why: {page}")


def _lexicon(name: str) -> ByLexicon | None:
    from pathcli.curation.judges import ByLexicon  # noqa: PLC0415
    from pathcli.curation.species import read_lexicon  # noqa: PLC0415

    if name == "none":
        return None
    return ByLexicon() if name == "lexicon" else ByLexicon(read_lexicon(Path(name)))


def _cheap(name: str, checkpoint: Path | None, device: str) -> ImageJudge | None:
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.judges import ByColour, ByEncoder  # noqa: PLC0415
    from pathcli.device import pick_device  # noqa: PLC0415
    from pathcli.encoders.build import build_encoder, text_encoder  # noqa: PLC0415

    if name in {"rule", "none"}:
        return ByColour() if name == "rule" else None
    built = text_encoder(build_encoder(name, checkpoint=checkpoint))
    if built.name == "mini-clip" and checkpoint is None:
        show.warn(
            "mini-clip knows lung and colon alone: here it drops about a quarter of all tissue"
        )
    built.load(pick_device(device))
    return ByEncoder(built)
