"""What a slide was answered in; its tiles as a picture, a table and objects for QuPath out."""

from __future__ import annotations

import csv
import io
import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pathcli.data.images import read_image
from pathcli.device import pick_device
from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError, UsageError
from pathcli.evals.tile_sheet import MARK, sheet
from pathcli.mil.task import load_head, predict_bags, run_encoder
from pathcli.report import versions
from pathcli.runs import git_commit, read_run
from pathcli.slides.geojson import feature, save_features, square
from pathcli.slides.overlay import save_png
from pathcli.slides.readers import open_slide, public_name
from pathcli.store.files import write_bytes
from pathcli.types import NOTICE, Bag, Region, TileSpec, TileStatus
from pathcli.vlm.slide_tiles import Attention

if TYPE_CHECKING:
    from pathlib import Path

    from pathcli.runs import Run
    from pathcli.store import Store
    from pathcli.types import ByteArray, Progress
    from pathcli.vlm.slide import Read, SlideAnswer

_PLAIN = (0, 114, 178)
_YES_NO = {"yes", "no"}


def write_evidence(folder: Path, answer: SlideAnswer) -> dict[str, str]:
    """Write what an answer rests on; return where, by name.

    `sheet.png` shows the tiles with their rank, answer and probability, `tiles.geojson` has them
    as annotations for QuPath, `tiles.csv` as a table, `answer.json` is all there is to say.

    Raises:
        DataError: the slide cannot be read again.
        ResourceError: the disk is full, or the folder may not be written.
    """
    names = {"sheet": "sheet.png", "geojson": "tiles.geojson"}
    names |= {"table": "tiles.csv", "answer": "answer.json"}
    files = {kind: folder / name for kind, name in names.items()}
    save_png(files["sheet"], evidence_sheet(answer))
    with closing(open_slide(answer.slide)) as slide:
        bounds = slide.info.bounds
    ranked = enumerate(answer.tiles, 1)
    save_features(files["geojson"], [_object(rank, tile, bounds) for rank, tile in ranked])
    for kind, text in (("table", _csv(answer)), ("answer", _json(answer))):
        data = text.encode("utf-8", "backslashreplace")
        write_bytes(files[kind], data, lambda _: None, "--out")
    return {kind: str(path) for kind, path in files.items()}


def evidence_sheet(answer: SlideAnswer) -> ByteArray:
    """Return the tiles an answer rests on as one picture, unfamiliar ones framed.

    Above them stand question, answer, slide, model and the notice: a picture travels alone.

    Raises:
        DataError: the slide cannot be read again.
    """
    pixels = [read_image(Region(answer.slide, (t.x0, t.y0), t.side0)) for t in answer.tiles]
    captions = [_caption(rank, tile) for rank, tile in enumerate(answer.tiles, 1)]
    said = f"no answer: {answer.text}" if answer.abstained else answer.text
    asked = f"{PurePosixPath(public_name(answer.slide)).name}: {answer.question}"
    return sheet(pixels, captions, [asked, f"{answer.model}: {said}", NOTICE])


def tile_rows(answer: SlideAnswer) -> list[dict[str, Any]]:
    """Return a row a tile, plain values; `x0` and `y0` are its level-0 corner."""
    rows = []
    for rank, tile in enumerate(answer.tiles, 1):
        row = {"rank": rank} | asdict(tile)
        for name in ("similarity", "probability", "attention"):
            row[name] = None if row[name] is None else round(row[name], 6)
        row["chances"] = " ".join(f"{chance:.6f}" for chance in tile.chances)
        rows.append(row)
    return rows


def answer_json(answer: SlideAnswer) -> dict[str, Any]:
    """Return an answer as plain JSON values; `answer` holds the answer's text alone."""
    return {
        "question": answer.question,
        "answer": "" if answer.abstained else answer.text,
        "confidence": answer.confidence,
        "abstained": answer.abstained,
        "why": answer.text if answer.abstained else None,
        "rule": answer.rule,
        "scores": {name: round(share, 6) for name, share in answer.scores.items()},
        "slide": answer.slide,
        "evidence": tile_rows(answer),
        "model": answer.model,
        "encoder": answer.encoder,
        "about": answer.about,
        "scope": answer.scope,
        "warnings": list(answer.warnings),
        "seconds": {part: round(took, 3) for part, took in answer.seconds.items()},
        "notice": NOTICE,
    }


def attending(folder: Path) -> Run:
    """Return a finished run that says where it looks.

    Raises:
        UsageError: it is of another task.
        ResourceError: there is none, or it is unfinished.
        DataError: its files are damaged.
    """
    run = read_run(folder)
    if run.recipe.task != "mil":
        msg = f"--attend: {folder} is a run of the task {run.recipe.task}; name one of the task mil"
        raise UsageError(msg)
    return run


def attention_of(
    folder: Path,
    path: Path | str,
    *,
    store: Store | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **tiling: Any,  # noqa: ANN401 - what `Embedder` takes
) -> Attention:
    """Return where a finished run of the task `mil` looks on a slide.

    Args:
        folder: the run's.
        path: the slide.
        store: where its features are found or put (default: the user's store).
        device: auto, cpu, cuda, cuda:1 or mps.
        progress: called with (tiles embedded, tiles in all).
        tiling: `mpp` and `mpp_source`, as `tile` takes them.

    Raises:
        UsageError: the run is of another task.
        DataError: not a slide, no tile on it, or another encoder than the run's.
        ResourceError: no run, no weights, no space.
    """
    run, here = attending(folder), pick_device(device)
    embedder = Embedder(run_encoder(run), store, device=here)
    spec = TileSpec.from_json(run.facts["tiles"])
    made = embedder(path, spec=spec, progress=progress, **tiling)
    if made.tiles == made.unreadable:
        msg = f"{path}: no tile to attend to; pathcli tile {path} shows why"
        raise DataError(msg)
    features = embedder.store.features.mapped(made.key)
    good, name = features.status == TileStatus.OK, made.key.item
    blank = np.zeros(int(good.sum()), np.int32)
    bag = Bag(name, name, None, (name,), features.values[good], features.xy[good], blank)
    said = next(predict_bags(load_head(run, here), [bag], torch.device(here)))
    return Attention(replace(made.tiling.tiles, status=features.status), said.attention)


def _caption(rank: int, tile: Read) -> list[str]:
    """Return the lines below a tile; the last marks what was not read."""
    chance = "" if tile.probability is None else f"{tile.probability:.2f}"
    if tile.answer in _YES_NO:
        said = f"{rank}   {tile.answer}" + (f", P(yes) {chance}" if chance else "")
    else:
        said = f"{rank}   {tile.answer or 'not read'}" + (f", P {chance}" if chance else "")
    lines = [said, f"{tile.chosen}, cosine {tile.similarity:.3f}", f"x {tile.x0}, y {tile.y0}"]
    return lines if tile.familiar is not False else [*lines, "unfamiliar"]


def _object(rank: int, tile: Read, bounds: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return a tile as an annotation that QuPath lists by rank, classified by its answer."""
    said = tile.answer or "not read"
    measured: dict[str, float] = {"rank": rank, "similarity": round(tile.similarity, 6)}
    for name in ("probability", "attention", "familiar"):
        value = getattr(tile, name)
        measured |= {} if value is None else {name: round(float(value), 6)}
    against = tile.answer == "no" or not tile.answer
    looks = {"name": said[:60], "color": list(_PLAIN if against else MARK)}
    more = {"name": f"{rank}: {said[:60]}", "classification": looks, "measurements": measured}
    ring = square(np.array((tile.x0, tile.y0)), tile.side0)
    return feature([ring], bounds, "annotation", more)


def _csv(answer: SlideAnswer) -> str:
    text = io.StringIO()
    rows = tile_rows(answer)
    writer = csv.DictWriter(text, [*rows[0], "note"])
    writer.writeheader()
    writer.writerows(row | {"note": NOTICE} for row in rows)
    return text.getvalue()


def _json(answer: SlideAnswer) -> str:
    known = answer_json(answer) | {"git": git_commit(), "versions": versions()}
    return json.dumps(known, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
