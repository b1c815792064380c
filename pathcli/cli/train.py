"""`pathcli train`: a recipe in, run folders out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pathcli.cli import options as o
from pathcli.cli.recipes import Settings

if TYPE_CHECKING:
    from pathcli.recipe import Recipe
    from pathcli.runs import Run

app = typer.Typer(rich_markup_mode=None, add_completion=False)

COLUMNS = {
    *("seed", "lr", "chosen", "epoch", "auroc", "macro_f1", "balanced_accuracy"),
    *("r2", "spearman", "mae", "c_index"),
    *("image_to_text_r1", "text_to_image_r1", "itm_accuracy", "loss"),
}
"""What the table of runs shows; --json has all."""


@app.command()
def train(
    recipe: Annotated[
        str, typer.Option("--recipe", help="A shipped recipe's name, or a file.", metavar="NAME")
    ],
    settings: Settings = None,
    out: o.Runs = o.RUNS,
    device: o.Device = "auto",
    store: o.StoreRoot = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only estimate weights, tokens, memory and hours."),
    ] = False,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu", help="What --dry-run reckons with [default: a100-80g].", metavar="[Nx]NAME"
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Train what a recipe describes, one run for every seed.

    Finished runs are kept, a stopped one goes on. Epoch and learning rate are chosen on
    validation data; the test split is never read here.
    """
    from pathcli import processes  # noqa: PLC0415
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.recipe import load_recipe  # noqa: PLC0415
    from pathcli.runs import train as train_all  # noqa: PLC0415

    o.check(None, device)
    known = load_recipe(recipe, settings or ())
    if dry_run or gpu is not None:
        estimate(known, gpu, store, dry_run=dry_run, json=json)
        return
    kept = o.open_store(store)
    with show.progress(0, unit="steps") as start:
        runs = train_all(
            known, out=out, store=kept, device=device, progress=lambda name: start(0, name)
        )
    first = not processes.rank()
    processes.leave()
    if first:
        tell(runs, out / known.name, json=json)


def tell(runs: list[Run], folder: Path, *, json: bool) -> None:
    """Print how the runs of a recipe went, and what to do next."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.runs import chosen  # noqa: PLC0415

    best = chosen(runs)
    rows = [
        {
            "run": str(run.folder),
            "seed": run.seed,
            "lr": run.recipe.values["train"]["lr"],
            **({"chosen": "yes" if run in best else ""} if len(best) < len(runs) else {}),
            "epoch": run.provenance["chosen_epoch"],
            **{name: round(value, 4) for name, value in run.metrics.items()},
            "seconds": run.provenance["seconds"],
        }
        for run in runs
    ]
    if missing := runs[0].facts.get("missing"):
        names = ", ".join([*missing][:3]) + (", ..." if len(missing) > 3 else "")  # noqa: PLR2004
        why = next(iter(missing.values()))
        show.warn(f"{len(missing)} slides are not used ({names}: {why}); report.html has all")
    for text in dict.fromkeys(w for run in runs for w in run.facts.get("warnings", ())):
        show.warn(text)
    if json:
        show.as_json({"runs": rows})
    else:
        show.table(
            [{k: str(v) if k == "lr" else v for k, v in r.items() if k in COLUMNS} for r in rows],
            title=f"{folder}: on the validation split, at the chosen epoch",
        )
        show.say("each run has a report.html" + next_command(best[0], folder))


def estimate(
    recipe: Recipe, gpu: str | None, store: str | None, *, dry_run: bool, json: bool
) -> None:
    """Print what training a recipe would take; nothing is loaded, and no store made."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.vlm.plan import plan, table  # noqa: PLC0415

    if not dry_run:
        msg = "--gpu belongs to --dry-run; where training runs is said by --device"
        raise UsageError(msg)
    found = plan(recipe, gpu or "a100-80g", store)
    if json:
        show.as_json(found.to_json())
        return
    show.table(table(found), title=f"{recipe.name} on {found.gpu}: an estimate, of one seed")
    for note in found.notes:
        show.say(note)


def next_command(run: Run, folder: Path) -> str:
    """Return the sentence that says how to test what was trained, where a command does."""
    values = run.recipe.values
    if "model" in values:
        encoder = run.facts["model"].get("encoder", values["model"]["kind"])
        weights = str(run.folder / "weights.safetensors")
        given = ["pathcli", "zeroshot", "DATASET", "--encoder", encoder, "--checkpoint", weights]
        return f"; measure one with: {shlex.join(given)}"
    if values["task"] == "mil-outcome":
        labels = str(values["data"]["labels"])
        given = ["pathcli", "mil-eval", labels, "--runs", str(folder)]
        return f"; test the chosen ones with: {shlex.join(given)}"
    if values["task"] != "mil":
        return ""
    data = values["data"]
    what = data["benchmark"] or data["labels"]
    given = ["pathcli", "mil-eval", str(what), "--head", values["head"]["kind"]]
    if data["benchmark"] and data["labels"]:
        given += ["--labels", data["labels"]]
    return f"; test the chosen ones with: {shlex.join([*given, '--runs', str(folder)])}"
