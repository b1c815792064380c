"""`pathcli models`: what can be fetched, what is here, fetching, bundling, converting others'."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.cards import Card
    from pathcli.manifests import Bundled

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name that `models list` prints.")]
Names = Annotated[
    list[str] | None,
    typer.Argument(help="Names that `models list` prints, or hf:OWNER/NAME of the hub."),
]
OfRecipe = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="Also all that a recipe or a run names.", metavar="NAME|FILE|RUN"
    ),
]
Bundle = Annotated[Path, typer.Argument(help="A folder that `models bundle` wrote.")]
Source = Annotated[Path, typer.Argument(help="Folder or file of LLaVA's, LAVIS' or xtuner's.")]
Converted = Annotated[Path, typer.Argument(help="Folder to write, not there yet.")]
Tower = Annotated[
    str | None,
    typer.Option("--encoder", help="Vision tower, where it is not known.", metavar="NAME"),
]
Language = Annotated[
    str | None,
    typer.Option("--language", help="Language model, where there is none.", metavar="NAME|FOLDER"),
]


@app.callback()
def root() -> None:
    """List, describe, fetch and bundle downloads, and convert published models."""


@app.command("list")
def list_models(json: o.Json = False) -> None:
    """List what pathcli knows how to fetch, and what is here already."""
    from pathcli.cards import CARDS  # noqa: PLC0415
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.weights import find  # noqa: PLC0415

    rows = [
        {"name": name, "here": bool(find(name)), "licence": c.licence, **_split(c.what)}
        for name, c in CARDS.items()
    ]
    if json:
        show.as_json({"models": rows})
        return
    show.table([row | {"here": "yes" if row["here"] else "no"} for row in rows])
    show.say("also: open_clip:ARCH and pallava-plip with --checkpoint FILE, hf:FOLDER, timm:NAME")


def _split(what: str) -> dict[str, str]:
    kind, _, words = what.partition(": ")
    return {"kind": kind, "what": words}


@app.command()
def info(name: Name, json: o.Json = False) -> None:
    """Say where a model comes from, its licence, and how it is used."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.weights import find  # noqa: PLC0415

    value = _describe(name, _card(name), find(name))
    if json:
        show.as_json(value)
    else:
        show.table([{"what": k, "value": str(v)} for k, v in value.items()])


def _describe(name: str, found: Any, path: Any) -> dict[str, Any]:  # noqa: ANN401 - a Card and a Path
    from dataclasses import asdict  # noqa: PLC0415

    from pathcli.registry import names  # noqa: PLC0415

    value = {"name": name, **_split(found.what), "licence": found.licence}
    value |= {"from": type(found.source).__name__.lower(), **asdict(found.source)}
    value["here"] = str(path) if path else f"no; run: pathcli models pull {name}"
    if path and name.partition(":")[0] in names("encoder"):
        from pathcli.encoders import build_encoder  # noqa: PLC0415

        encoder = build_encoder(name)
        native = f"{encoder.native.size_px} px at {encoder.native.mpp:g} um per pixel"
        value |= {"encoder id": encoder.id, "tiles": f"{native} ({encoder.native_source})"}
        if limit := getattr(encoder, "text_limit", None):
            value["texts"] = f"up to {limit} tokens"
    return value


@app.command()
def pull(name: Name, json: o.Json = False) -> None:
    """Fetch a model, check its digest and keep it; nothing is done if it is here."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.weights import fetch  # noqa: PLC0415

    licence = _card(name).licence
    path = fetch(name)
    if json:
        show.as_json({"name": name, "path": str(path), "licence": licence})
    else:
        show.say(f"{name}: {path} ({licence})")


@app.command()
def bundle(
    names: Names = None, *, out: o.Folder, recipe: OfRecipe = None, json: o.Json = False
) -> None:
    """Copy downloads that are here, and their parts, into one folder for another machine."""
    from pathcli.bundles import bundle as bundle_  # noqa: PLC0415
    from pathcli.bundles import recipe_models  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.recipe import load_recipe  # noqa: PLC0415

    wanted = list(names or [])
    if recipe:
        run = Path(recipe).expanduser() / "recipe.yaml"
        wanted += recipe_models(load_recipe(run if run.is_file() else recipe))
    if not wanted:
        msg = f"the recipe {recipe} names no download" if recipe else "give NAMES, or --recipe"
        raise UsageError(msg)
    _tell(bundle_(wanted, out), out, f"there, run: pathcli models unpack {out.name}", json=json)
    if recipe and not json:
        from pathcli.cli import show  # noqa: PLC0415

        show.say("not in it: data, runs and checkpoints of your own")


@app.command()
def unpack(folder: Bundle, json: o.Json = False) -> None:
    """Put what a bundle holds where pathcli looks for it, all or nothing."""
    from pathcli.bundles import unpack as unpack_  # noqa: PLC0415

    _tell(unpack_(folder), folder, "see: pathcli models list", json=json)


def _tell(models: list[Bundled], folder: Path, then: str, *, json: bool) -> None:
    from pathcli.cli import show  # noqa: PLC0415

    rows: list[dict[str, Any]] = [
        {
            "name": model.name,
            "state": "ships with pathcli" if model.state == "shipped" else model.state,
            "files": len(model.files),
            "MB": round(model.size / 1e6, 1),
            "licence": model.licence,
        }
        for model in models
    ]
    if json:
        show.as_json({"folder": str(folder), "models": rows})
        return
    show.table(rows)
    files = {file for model in models for file in model.files}
    size = sum(file.bytes for file in files) / 1e6
    show.say(f"{folder}: models: {len(rows)}, files: {len(files)}, {size:.1f} MB; {then}")


@app.command()
def convert(
    source: Source,
    out: Converted,
    encoder: Tower = None,
    checkpoint: o.Checkpoint = None,
    language: Language = None,
    json: o.Json = False,
) -> None:
    """Make a published vision-language checkpoint one that `ask` reads.

    Of PathGen-LLaVA, Quilt-LLaVA, LLaVA-Med v1.5 and others in LLaVA's own layout, of LAVIS'
    CLOVER and BLIP-2, and of PA-LLaVA. Models in transformers' form need no converting.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.vlm.convert import convert as convert_  # noqa: PLC0415

    made = convert_(source, out, encoder=encoder, checkpoint=checkpoint, language=language)
    if json:
        found = {"layout": made.layout, "folder": str(made.folder), "parts": list(made.rows)}
        show.as_json(found | {"next": made.command})
        return
    show.table(made.rows)
    show.say(f"{made.folder}: encoder, prompt and language model are said in its recipe.yaml")
    show.say(f"next: {made.command}")


def _card(name: str) -> Card:
    """Return what is known of a download.

    Raises:
        UsageError: there is none of this name, or it is an encoder of the user's own weights.
    """
    from pathcli.cards import CARDS  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.registry import names  # noqa: PLC0415
    from pathcli.weights import card  # noqa: PLC0415

    if name not in CARDS and name.partition(":")[0] in names("encoder"):
        msg = (
            f"{name}: an encoder for which pathcli fetches nothing; embed, zeroshot, probe and "
            "search take it with weights of your own (--checkpoint FILE, or hf:FOLDER)"
        )
        raise UsageError(msg)
    return card(name)
