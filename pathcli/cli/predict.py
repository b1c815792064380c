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
    run: Annotated[Path, typer.Argument(help="Folder of one finished run.")],
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
    (upper row) and least attended tiles. Features in the store are not computed again. With
    --lesions also how well attention finds them.
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
        return as_row(results[-1])

    done = run_batch(discover(slides), work, out)
    write_predictions(out / "predictions.csv", results)
    rows = [
        {"slide": Path(r["path"]).name, "prediction": r["prediction"], **r["probabilities"]}
        | {"tiles": r["tiles"], "heatmap": r["files"]["heatmap"]}
        for r in done.results
    ]
    if done.results:
        show.say(f"{NOTICE} {out / 'predictions.csv'}")
    finish(done, rows, as_json=json, out=out, more=_lesions(results) if lesions else {})


def one_run(folder: Path) -> Any:  # noqa: ANN401 - heavy to import
    """Return the run in a folder.

    Raises:
        UsageError: there are several; all are named.
        ResourceError: there is none.
    """
    from pathcli.runs import find_runs, read_run  # noqa: PLC0415
    from pathcli.types import UsageError  # noqa: PLC0415

    if not (folder / "recipe.yaml").is_file() and folder.is_dir():
        inside = find_runs(folder)
        if len(inside) == 1:
            return inside[0]
        if inside:
            names = ", ".join(str(r.folder) for r in inside[:4])
            msg = f"{folder} holds {len(inside)} runs, name one: {names}"
            raise UsageError(msg)
    return read_run(folder)


def _lesions(results: list[Predicted]) -> dict[str, Any]:
    """Return the metrics against known lesions, in the form all metrics have."""
    from pathcli.cli import show  # noqa: PLC0415
    from pathcli.mil.predict import lesion_metrics  # noqa: PLC0415
    from pathcli.report import metric  # noqa: PLC0415

    area, curve = lesion_metrics(results)
    metrics = {}
    if area is not None:
        n = sum(r.attention_in_lesion is not None for r in results)
        metrics["attention_in_lesion_auroc"] = metric(round(area, 4), n=n)
        show.say(f"attention in lesions: AUROC {area:.3f}, mean of {n} slides")
    if curve is not None:
        metrics["froc"] = metric(round(curve.score, 4), n=curve.lesions)
        show.say(f"FROC score {curve.score:.3f}: {curve.lesions} lesions, {curve.slides} slides")
    return {"metrics": metrics}
