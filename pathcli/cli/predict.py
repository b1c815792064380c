"""`pathcli predict`: a trained run and slides in, predictions and heatmaps out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pathcli.cli import options as o

if TYPE_CHECKING:
    from pathcli.mil.predict import Predicted
    from pathcli.slides.discovery import Found
    from pathcli.types import Progress

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of one seed's finished run.")],
    slides: o.Slides,
    lesions: Annotated[
        Path | None,
        typer.Option("--lesions", help="Folder of SLIDE.xml|json|geojson: known lesions."),
    ] = None,
    slide_mpp: o.SlideMpp = None,
    device: o.Device = "auto",
    out: o.Out = o.OUT,
    store: o.StoreRoot = None,
    json: o.Json = False,
) -> None:
    """Say what a trained run makes of slides, and where it looked.

    Writes predictions.csv and for each slide a heatmap, attention for QuPath, and the most
    (upper row) and least attended tiles; of survival also the curve. Features in the store are
    not computed again; a run on imported ones finds those of the slides there. With --lesions
    also how well attention finds them.
    """
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.cli.batch import finish, run_batch  # noqa: PLC0415
    from pathcli.cli.tile import resolution  # noqa: PLC0415
    from pathcli.mil.predict import Predictor, as_row, write_predictions  # noqa: PLC0415
    from pathcli.slides.discovery import discover  # noqa: PLC0415
    from pathcli.types import NOTICE  # noqa: PLC0415

    o.check(slide_mpp, device)
    ready = Predictor(
        one_run(run), o.open_store(store), device=device, out=out, lesions=o.folder(lesions)
    )
    results: list[Predicted] = []

    def work(slide: Found, progress: Progress) -> dict[str, Any]:
        mpp, source = resolution(slide, slide_mpp)
        results.append(ready(slide.path, mpp=mpp, mpp_source=source, progress=progress))
        write_predictions(out / "predictions.csv", results)  # what is done stays, whatever comes
        return as_row(results[-1])

    done = run_batch(discover(slides), work, out)
    write_predictions(out / "predictions.csv", results)
    rows = [
        {"slide": Path(r["path"]).name, "prediction": r["prediction"], **r["probabilities"]}
        | {"tiles": r["tiles"], "heatmap": r["files"].get("heatmap", "none")}
        for r in done.results
    ]
    if done.results:
        show.say(
            f"{results[0].scope}. " * bool(results[0].scope) + f"{NOTICE} {out / 'predictions.csv'}"
        )
    finish(done, rows, as_json=json, out=out, more=_lesions(results) if lesions else {})


def one_run(folder: Path) -> Any:  # noqa: ANN401 - heavy to import
    """Return the run in a folder; of several learning rates the one best on validation.

    Raises:
        UsageError: there are several seeds or recipes; the best of each is named.
        ResourceError: there is none.
    """
    from pathcli.errors import UsageError  # noqa: PLC0415
    from pathcli.runs import chosen, find_runs, read_run  # noqa: PLC0415

    if (folder / "recipe.yaml").is_file() or not folder.is_dir():
        return read_run(folder)
    inside = find_runs(folder)
    by_recipe = {
        r.recipe.name: [x for x in inside if x.recipe.name == r.recipe.name] for r in inside
    }
    best = [run for runs in by_recipe.values() for run in chosen(runs)]
    if len(best) > 1:
        names = ", ".join(str(r.folder) for r in best[:5])
        msg = f"{folder} holds several seeds or recipes, name one run: {names}"
        raise UsageError(msg)
    return best[0] if best else read_run(folder)


def _lesions(results: list[Predicted]) -> dict[str, Any]:
    """Return the metrics against known lesions, in the form all metrics have."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.mil.predict import lesion_metrics  # noqa: PLC0415
    from pathcli.report import metric  # noqa: PLC0415

    metrics = {}
    for name, found in lesion_metrics(results).items():
        low, high = (round(v, 4) if v == v else None for v in (found.low, found.high))  # noqa: PLR0124 - not NaN
        metrics[name] = metric(round(found.value, 4), low, high, found.n)
        between = f"[{found.low:.3f}, {found.high:.3f}]" if low is not None else "(no interval)"
        show.say(f"{name}: {found.value:.3f} {between}, {found.n} slides")
    return {"metrics": metrics}
