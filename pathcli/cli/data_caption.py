"""`pathcli data caption` and `pathcli data corrupt`: captions of patches, and wrong ones."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Callable

    from pathcli.curation.caption.pipeline import Agents
    from pathcli.curation.caption.texts import Reports
    from pathcli.curation.models import Opened, Unfamiliar
    from pathcli.encoders.embedding import Embedder
    from pathcli.endpoints import Budget as Purse
    from pathcli.store import Store

NONE, FIRST_SENTENCES = "none", "first-sentences"

Cancer = Annotated[
    str,
    typer.Option(
        "--cancer",
        help="Whose attributes to look for: a TCGA project (luad), or what is common to all.",
        metavar="NAME|any",
    ),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--reports",
        help="Reports: a table with wsi_id and report, or a folder of SLIDE.txt.",
        metavar="FILE|DIR",
    ),
]
_LANGUAGE = "smollm2-135m, hf:ID, a run folder, or an endpoint's address."
Prompt = Annotated[
    str,
    typer.Option(
        "--prompt",
        help=f"Names attributes and reads reports: {_LANGUAGE}",
        metavar="MODEL|none",
    ),
]
Describe = Annotated[
    str,
    typer.Option(
        "--describe",
        help="Describes patches: clover-mini, a run folder, hf:ID, or an endpoint's address.",
        metavar="MODEL",
    ),
]
Revise = Annotated[
    str,
    typer.Option(
        "--revise",
        help="Corrects descriptions by operations: such a model, too.",
        metavar="MODEL|none",
    ),
]
Summarise = Annotated[
    str,
    typer.Option(
        "--summarise",
        help=f"Shortens to 77 tokens: {_LANGUAGE}",
        metavar=f"MODEL|none|{FIRST_SENTENCES}",
    ),
]
Top = Annotated[
    int,
    typer.Option("--top", help="Patches of a slide by attributes, and by its report.", min=0),
]
Diverse = Annotated[
    int, typer.Option("--diverse", help="Patches of a slide from k-means clusters.", min=0)
]
Duplicates = Annotated[
    float,
    typer.Option(
        "--duplicates",
        help="Cosine from which a patch is left out for one like it; 1 for never.",
        min=0,
        max=1,
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of every draw.", min=0)]
Strange = Annotated[
    str,
    typer.Option(
        "--unfamiliar",
        help="Captions of patches outside what a model was trained on: keep marks them.",
        metavar="drop|keep",
    ),
]
Requests = Annotated[
    int, typer.Option("--workers", help="Threads that read tiles; requests at once.", min=1)
]


def caption(
    slides: o.Slides,
    cancer: Cancer = "any",
    reports: ReportFile = None,
    prompt: Prompt = NONE,
    describe: Describe = o.SHIPPED,
    revise: Revise = NONE,
    summarise: Summarise = NONE,
    unfamiliar: Strange = "drop",
    encoder: o.Encoder = "mini-clip",
    checkpoint: o.Checkpoint = None,
    top: Top = 64,
    diverse: Diverse = 256,
    duplicates: Duplicates = 0.88,
    seed: Seed = 1,
    tissue: o.Tissue = "otsu",
    min_tissue: o.MinTissue = 0.5,
    slide_mpp: o.SlideMpp = None,
    budget: o.Usd = None,
    price: o.Price = None,
    workers: Requests = 4,
    device: o.Device = "auto",
    store: o.StoreRoot = None,
    out: o.Folder = o.OUT / "captions",
    json: o.Json = False,
) -> None:
    """Choose patches of slides and have models caption them (PathGen).

    Writes captions.json in PathGen's form, traces.jsonl with what each agent was given and said,
    dropped.csv, and a page. Features and answers are kept: the same command again goes on.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.zeroshot import check_out  # noqa: PLC0415
    from pathcli.curation.caption.pipeline import Captioner, caption_slides  # noqa: PLC0415
    from pathcli.curation.caption.retriever import Retriever  # noqa: PLC0415
    from pathcli.curation.caption.select import Choice, patch_spec  # noqa: PLC0415

    o.check(slide_mpp, device)
    check_out(out)
    kept, places = o.open_store(store), _places(slides, slide_mpp)
    spent: list[Purse] = []
    limits: dict[str, Any] = {"store": kept, "budget": budget, "price": price, "workers": workers}
    limits |= {"device": device, "among": spent, "unfamiliar": _strange(unfamiliar)}

    def agent(name: str) -> Opened | None:
        return _open(name, **limits)

    team = _team(agent, describe, revise, summarise)
    retriever = Retriever(
        _embedder(encoder, checkpoint, kept, device, workers),
        choice=Choice(top=top, diverse=diverse, duplicates=duplicates, seed=seed),
        cancer=cancer,
        reports=_reports(reports),
        prompt=agent(prompt),
        spec=patch_spec(tissue, min_tissue),
    )
    line = shlex.join(["pathcli", *sys.argv[1:]])
    with show.progress(len(places)) as start:
        done = caption_slides(places, Captioner(retriever, team), out, command=line, started=start)
    _tell(done, retriever.slides, spent, json=json)


def _embedder(
    name: str, checkpoint: Path | None, store: Store, device: str, workers: int
) -> Embedder:
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415

    return Embedder(
        build_encoder(name, checkpoint=checkpoint), store, device=device, workers=workers
    )


def _places(slides: list[str], slide_mpp: float | None) -> list[Any]:
    """Return each slide's path and resolution, and who gave that."""
    from pathcli.cli.tile import resolution  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415

    found = [slide.checked() for slide in discover(slides)]
    return [(slide.path, *resolution(slide, slide_mpp)) for slide in found]


def _reports(path: Path | None) -> Reports | None:
    from pathcli.curation.caption.texts import Reports  # noqa: PLC0415

    return Reports.read(path) if path else None


def _team(
    agent: Callable[[str], Opened | None], describe: str, revise: str, summarise: str
) -> Agents:
    """Return the agents, each opened by its name.

    Raises:
        UsageError: nobody describes.
    """
    from pathcli.curation.caption.pipeline import Agents  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415

    describer = agent(describe)
    if describer is None:
        msg = "--describe names the model that describes patches; there is no caption without"
        raise UsageError(msg)
    by_rule = summarise == FIRST_SENTENCES
    return Agents(
        describe=describer,
        revise=agent(revise),
        summarise="first-sentences" if by_rule else agent(summarise),
    )


def _strange(text: str) -> Unfamiliar:
    """Return what becomes of answers about pictures that a model does not know.

    Raises:
        UsageError: neither keep nor drop.
    """
    from pathcli.errors import UsageError  # noqa: PLC0415

    if text not in {"keep", "drop"}:
        msg = f"--unfamiliar is keep or drop, not {text!r}"
        raise UsageError(msg)
    return "keep" if text == "keep" else "drop"


def _tell(done: dict[str, Any], slides: list[Any], spent: list[Purse], *, json: bool) -> None:
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.endpoints import spent as paid  # noqa: PLC0415

    for one in slides:
        for text in (*one.warnings, one.fault):
            if text:
                show.warn(f"{one.path}: {text}")
    if not done["captions"]:
        show.warn("no caption was made; dropped.csv says why (--unfamiliar keep drops fewer)")
    for what, n in done["agents"].items():
        if what.startswith("captions "):
            show.warn(f"{n} {what}: each is marked; train on none of them unread")
    if json:
        show.as_json(done | paid(spent))
        return
    flat = {name: done[name] for name in ("slides", "patches", "captions")}
    rows = flat | {f"dropped: {why}": n for why, n in done["dropped"].items()} | done["agents"]
    show.table([{"what": what, "n": n} for what, n in rows.items()])
    for each in spent:
        show.say(f"spent at an endpoint: {each}")
    show.say(f"{done['notice']} Open {done['report']}")


def _open(
    name: str,
    *,
    store: Store,
    budget: float | None,
    price: str | None,
    workers: int,
    device: str = "auto",
    among: list[Purse] | None = None,
    unfamiliar: Unfamiliar = "drop",
) -> Opened | None:
    """Return an agent, None for none."""
    if name == NONE:
        return None
    from pathcli.curation.models import open_model  # noqa: PLC0415

    return open_model(
        name,
        store=store,
        budget=budget,
        price=o.price_of(price),
        workers=workers,
        device=device,
        among=among,
        unfamiliar=unfamiliar,
    )


def corrupt(
    captions: Annotated[
        Path, typer.Argument(help="Images and captions: a table, a folder, tar shards.")
    ],
    out: Annotated[Path, typer.Argument(help="The JSON file to write.", metavar="OUT")],
    images: Annotated[
        Path | None,
        typer.Option("--images", help="Folder of images or slides.", metavar="DIR"),
    ] = None,
    model: Annotated[
        str,
        typer.Option("--model", help=f"Makes the mistakes: {_LANGUAGE}", metavar="MODEL|none"),
    ] = NONE,
    untouched: Annotated[
        float, typer.Option("--untouched", help="Share of captions left right.", min=0, max=1)
    ] = 0.15,
    seed: Seed = 1,
    budget: o.Usd = None,
    price: o.Price = None,
    workers: Requests = 4,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Make captions wrong on purpose, with the operations that mend them (PathGen).

    What the recipe pathgen-revise learns from: image, wrong caption, and as the answer a JSON
    list of operations that give back the right one exactly. Squares of slides stay positions.
    Beside OUT lie what was dropped, a report and provenance.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.caption.corrupt_file import corrupt_file  # noqa: PLC0415
    from pathcli.data.formats import Source  # noqa: PLC0415

    kept = o.open_store(store)
    maker = _open(model, store=kept, budget=budget, price=price, workers=workers)
    told, done = corrupt_file(
        Source(captions, o.folder(images)),
        out,
        model=maker,
        untouched=untouched,
        seed=seed,
        command=shlex.join(["pathcli", *sys.argv[1:]]),
    )
    for line in done.told():
        show.warn(line)
    if json:
        show.as_json(told)
        return
    lost = "".join(f"; {why}: {n}" for why, n in told["reasons"].items())
    count = told["not spoilt"]
    show.say(f"{done.rows} captions in {out}; {count} could not be made wrong{lost}")
    if maker:
        show.say(f"spent: {maker.budget}")
    show.say(f"{told['notice']} Open {told['report']}")
