"""`pathcli recipes`: what can be trained, how, and whether a recipe of yours is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pathcli.cli import options as o

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="List, show, copy and check the recipes that `train` follows.",
)

Name = Annotated[str, typer.Argument(help="A shipped recipe's name, or a file ending in .yaml.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="section.key=value, over the recipe's; repeatable.", metavar="K=V"),
]


@app.command("list")
def list_(json: o.Json = False) -> None:
    """List the shipped recipes."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.recipe import list_recipes  # noqa: PLC0415

    rows = [{"name": r.name, "task": r.task, "summary": r.summary} for r in list_recipes()]
    if json:
        show.as_json(rows)
    else:
        show.table(rows)


@app.command("show")
def show_(name: Name, settings: Settings = None, json: o.Json = False) -> None:
    """Print a recipe with its comments, or with --set or --json its values."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.recipe import load_recipe  # noqa: PLC0415

    recipe = load_recipe(name, settings or ())
    if json:
        show.as_json(dict(recipe.values))
    else:
        typer.echo(recipe.to_yaml() if settings else recipe.text, nl=False)


@app.command()
def copy(
    name: Name,
    to: Annotated[Path | None, typer.Argument(help="The new file [default: NAME.yaml].")] = None,
    json: o.Json = False,
) -> None:
    """Copy a recipe, comments and all, to change it."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.recipe import load_recipe  # noqa: PLC0415

    recipe = load_recipe(name)
    path = to or Path(f"{recipe.name}.yaml")
    path = path / f"{recipe.name}.yaml" if path.is_dir() else path
    if path.suffix not in {".yaml", ".yml"}:
        msg = f"{path}: a recipe's file ends in .yaml"
        raise UsageError(msg)
    if path.exists():
        msg = f"{path} is there already; give another name"
        raise UsageError(msg)
    from pathcli.store.files import write_bytes  # noqa: PLC0415

    write_bytes(path, recipe.text.encode(), lambda _: None, "another file")
    if json:
        show.as_json({"path": str(path)})
    else:
        show.say(f"written; change it and run: pathcli train --recipe {path}")


@app.command()
def check(
    name: Name,
    settings: Settings = None,
    batch: Annotated[
        bool, typer.Option("--batch", help="Also read the data and take one step on the CPU.")
    ] = False,
    show_sample: Annotated[
        bool, typer.Option("--show-sample", help="Also print a sample, with what of it is learnt.")
    ] = False,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Check a recipe: all faults at once, and what it still asks you for; exit 4 on faults."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.recipe import check_recipe, load_recipe  # noqa: PLC0415

    recipe = load_recipe(name, settings or ())
    found = check_recipe(recipe)
    tried: dict[str, Any] = {}
    sample: list[tuple[str, str]] = []
    if (batch or show_sample) and not found.faults:
        from pathcli import runs  # noqa: PLC0415

        if show_sample:
            sample = runs.sample_view(recipe)
        if batch:
            tried = runs.try_batch(recipe, store=o.open_store(store))
    if json:
        known = {"name": recipe.name, "faults": list(found.faults), "asked": list(found.asked)}
        pieces = [{"role": role, "text": text} for role, text in sample]
        show.as_json(known | {"batch": tried, "sample": pieces})
    else:
        for fault in found.faults:
            show.error(fault)
        for path in found.asked:
            show.say(f"asks for {path}{recipe.meant(path)}: give --set {path}=...")
        if not found.faults:
            show.say(f"{recipe.name}: every key and value is right")
        show.table([{"what": k, "value": v} for k, v in tried.items()])
        show.sample(sample)
    if found.faults:
        raise typer.Exit(4)
