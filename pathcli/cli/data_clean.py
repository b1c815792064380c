"""`pathcli data clean`: images and captions without what is no human pathology."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.curation.clean import Cleaned, Judges
    from pathcli.curation.judges import ByLanguage, ByLexicon, ByVision, ImageJudge, TextJudge
    from pathcli.store.responses import Responses

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
    device: o.Device = "auto",
    workers: o.Workers = 2,
    json: o.Json = False,
) -> None:
    """Keep the pairs of human pathology, and say of each other one why it was dropped.

    Out go captions that are short or about animals, images that are no pathology, and copies.
    Writes kept.jsonl, dropped.csv, report.html, report.json and provenance.json. Models that are
    asked cost time or money: --agree N has them judge a sample of what the cheap way saw.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation import clean as c  # noqa: PLC0415
    from pathcli.curation import clean_report as r  # noqa: PLC0415
    from pathcli.data.formats import Source  # noqa: PLC0415
    from pathcli.store.responses import Responses  # noqa: PLC0415

    o.check(None, device)
    kept = Responses(out / "responses.jsonl")
    dear = (_language(llm, device) if llm else None, _vision(vlm, device, kept) if vlm else None)
    judges = _judges((_lexicon(texts), _cheap(encoder, checkpoint, device)), dear, agree)
    how: dict[str, Any] = {"min_words": min_words, "copies": copies, "distance": distance}
    how["seed"] = seed
    settings = {"pairs": str(pairs), "format": layout, "agree": agree, **how}
    with show.progress(1, unit="rows") as start:
        done = c.clean(
            Source(pairs, o.folder(images)),
            out,
            judges,
            layout=layout,
            workers=workers,
            progress=start(1, pairs.name),
            **how,
        )
    command = shlex.join(["pathcli", *sys.argv[1:]])
    _tell(done, r.write_report(done, r.facts(judges, settings), command), json=json)


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


def _tell(done: Cleaned, page: Path, *, json: bool) -> None:
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
    show.say(f"{done.path}; what was dropped, and why: {page}")


def _vision(name: str, device: str, kept: Responses) -> ByVision:
    from pathcli.curation.judges import ByVision  # noqa: PLC0415
    from pathcli.vlm.responders import open_responder  # noqa: PLC0415

    return ByVision(open_responder(name, device=device), kept)


def _language(name: str, device: str) -> ByLanguage:
    from pathcli.curation.judges import ByLanguage  # noqa: PLC0415
    from pathcli.curation.models import open_model  # noqa: PLC0415

    return ByLanguage(open_model(name, store=o.open_store(None), device=device))


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
