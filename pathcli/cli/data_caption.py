"""`pathcli data caption` and `pathcli data corrupt`: captions of patches, and wrong ones."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from collections.abc import Callable

    from pathcli.curation.caption.pipeline import Agents
    from pathcli.curation.caption.texts import Reports
    from pathcli.curation.models import Model
    from pathcli.data.writers import Form
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
    from pathcli.encoders import build_encoder  # noqa: PLC0415
    from pathcli.encoders.embedding import Embedder  # noqa: PLC0415

    o.check(slide_mpp, device)
    check_out(out)
    choice = Choice(top=top, diverse=diverse, duplicates=duplicates, seed=seed)
    kept, places = o.open_store(store), _places(slides, slide_mpp)
    spent: list[Purse] = []
    agent = partial(
        _open, store=kept, budget=budget, price=price, workers=workers, device=device, among=spent
    )
    team = _team(agent, describe, revise, summarise)
    built = build_encoder(encoder, checkpoint=checkpoint)
    retriever = Retriever(
        Embedder(built, kept, device=device, workers=workers),
        choice=choice,
        cancer=cancer,
        reports=_reports(reports),
        prompt=agent(prompt),
        spec=patch_spec(tissue, min_tissue),
    )
    line = shlex.join(["pathcli", *sys.argv[1:]])
    with show.progress(len(places)) as start:
        done = caption_slides(places, Captioner(retriever, team), out, command=line, started=start)
    _tell(done, retriever.slides, spent, json=json)


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
    agent: Callable[[str], Model | None], describe: str, revise: str, summarise: str
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


def _tell(done: dict[str, Any], slides: list[Any], spent: list[Purse], *, json: bool) -> None:
    from pathcli.cli import show  # noqa: PLC0415

    for one in slides:
        for text in (*one.warnings, one.fault):
            if text:
                show.warn(f"{one.path}: {text}")
    if not done["captions"]:
        show.warn("no caption was made; dropped.csv says why")
    if json:
        told = {"requests": sum(each.requests for each in spent)}
        told |= {"tokens_read": sum(each.read for each in spent)}
        told |= {"tokens_written": sum(each.written for each in spent)}
        show.as_json(done | told | {"usd": round(sum(each.usd for each in spent), 6)})
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
) -> Model | None:
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
    """
    from collections import Counter  # noqa: PLC0415
    from itertools import chain  # noqa: PLC0415

    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.curation.caption.corrupt import corrupted  # noqa: PLC0415
    from pathcli.data.formats import Source, samples  # noqa: PLC0415
    from pathcli.data.writers import write_samples  # noqa: PLC0415
    from pathcli.errors import DataError  # noqa: PLC0415
    from pathcli.types import Region  # noqa: PLC0415

    dropped = Counter[str]()
    source = Source(captions, o.folder(images))
    kept = o.open_store(store)
    maker = _open(model, store=kept, budget=budget, price=price, workers=workers)
    given = samples(source), lambda _, why: dropped.update([why])
    found = corrupted(*given, model=maker, untouched=untouched, seed=seed)
    first = next(found, None)
    if first is None:
        why = next(iter(dropped), "there is none")
        msg = f"{captions}: no caption could be spoilt: {why}"
        raise DataError(msg)
    form: Form = "pathgen" if isinstance(first.images[0], Region) else "llava"
    done = write_samples(chain([first], found), out, form, root=images)
    done.unread, done.examples = source.dropped, source.examples | done.examples
    for line in done.told():
        show.warn(line)
    facts = {"written": done.rows, "not spoilt": dropped.total(), "out": str(out)}
    if json:
        show.as_json(facts | {"reasons": dict(dropped), "not read": dict(done.unread)})
    else:
        lost = "".join(f"; {why}: {n}" for why, n in dropped.most_common())
        show.say(f"{done.rows} captions in {out}; {dropped.total()} could not be made wrong{lost}")
