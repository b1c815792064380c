"""A trained run and slides in; probabilities, heatmaps and the tiles that mattered out."""

from __future__ import annotations

import csv
import io
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pathcli.device import pick_device
from pathcli.encoders.embedding import Embedder
from pathcli.errors import DataError
from pathcli.metrics.froc import auc_in_lesion, froc
from pathcli.metrics.statistics import bootstrap
from pathcli.mil.heatmap import draw_heatmap, extreme_tiles, strip, write_attention_geojson
from pathcli.mil.imported import Imports, is_imported, is_placed
from pathcli.mil.lesions import detections, evaluation_lesions, inside
from pathcli.mil.outcome_charts import write_survival
from pathcli.mil.outcome_task import TASK, say, scope
from pathcli.mil.task import load_head, read_bags, run_encoder, softmax
from pathcli.runs import read_run
from pathcli.slides.annotations import read_lesions
from pathcli.slides.overlay import save_png
from pathcli.slides.readers import open_slide
from pathcli.store import Store
from pathcli.store.files import disk_errors, write_bytes
from pathcli.types import NOTICE, Bag, TileSpec, TileStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.metrics.froc import Detections
    from pathcli.metrics.statistics import Interval
    from pathcli.mil.outcome_task import Said
    from pathcli.runs import Run
    from pathcli.types import Encoder, Features, Progress, Slide, Tiles

TILES_SHOWN = 10


@dataclass(frozen=True)
class Predicted:
    """What a run says of one slide, and where it wrote what it shows.

    `probabilities` has one number per class; a run of an outcome has `said` and `scope`
    instead. `attention_in_lesion` is an AUROC over tiles where lesions are known, `candidates`
    what FROC counts there.
    """

    path: str
    item: str
    tiles: int
    encoded: int
    prediction: str
    probabilities: dict[str, float]
    files: dict[str, str]
    warnings: tuple[str, ...]
    attention_in_lesion: float | None = None
    candidates: Detections | None = None
    said: Said | None = None
    scope: str = ""

    @property
    def numbers(self) -> dict[str, Any]:
        """What is said, by name: a probability a class, or the value or risk and its company."""
        if self.said is None:
            return {f"p_{name}": round(p, 6) for name, p in self.probabilities.items()}
        if not self.said.group:
            return {"value": round(self.said.value, 6), "unit": self.said.unit}
        more = {"group": self.said.group, "median": self.said.median, "unit": self.said.unit}
        return {"risk": round(self.said.value, 6), **more}


class Predictor:
    """A trained run, ready for one slide after another."""

    def __init__(
        self,
        run: Run,
        store: Store | None = None,
        *,
        encoder: Encoder | None = None,
        device: str = "auto",
        out: Path = Path("pathcli-out"),
        lesions: Path | None = None,
    ) -> None:
        """Read the head; the encoder is loaded only where features are not in the store.

        Args:
            run: a finished run of the task `mil` or `mil-outcome`.
            store: where features are found or put (default: the user's store).
            encoder: the run's encoder, if its recipe cannot name it here.
            device: auto, cpu, cuda, cuda:1 or mps.
            out: folder of what is written.
            lesions: folder with `<slide>.xml`, `.json` or `.geojson`.

        Raises:
            DataError: the encoder is not the one whose features the run was trained on.
            ResourceError: weights or the device are not here.
        """
        self.run, self.out, self.lesions = run, out, lesions
        self.device = pick_device(device)
        self.head = load_head(run, self.device)
        self.spec = TileSpec.from_json(run.facts["tiles"])
        built = run_encoder(run, encoder)
        kept = store or Store()
        self.embedder = Embedder(built, kept, device=self.device)
        self.imports = (
            Imports(kept, built.id, self.spec, run.facts["dim"]) if is_imported(built.id) else None
        )

    def __call__(
        self,
        path: Path | str,
        *,
        mpp: float | None = None,
        mpp_source: str = "given",
        progress: Progress | None = None,
    ) -> Predicted:
        """Predict one slide, and draw where the head looked.

        Raises:
            DataError: not a slide, no usable resolution, no tile on tissue; of a run on imported
                features, none that fit were imported for it.
            ResourceError: no weights, no space.
        """
        how = {"mpp": mpp, "mpp_source": mpp_source, "progress": progress}
        cut, features, encoded, warnings = self._features(path, how)
        tiles = replace(cut, status=features.status)
        bags = [_bag(features)]
        _, logits, attention = next(read_bags(self.head, bags, torch.device(self.device)))
        with closing(open_slide(path)) as slide:
            lesions = self._lesions(path, slide)
            files = self._draw(slide, tiles, attention, lesions or [])
        if not files:
            lesions = None  # nobody knows where the tiles end
        shown = Predicted(
            path=str(path),
            item=tiles.item,
            tiles=len(tiles),
            encoded=encoded,
            prediction="",
            probabilities={},
            files=files,
            warnings=(*warnings, *self._scope(tiles.item, lesions)),
        )
        shown = self._of_outcome(shown, logits) if self.outcome else self._of_class(shown, logits)
        if lesions is None:
            return shown
        shown = replace(shown, attention_in_lesion=_in_lesion(tiles, attention, lesions))
        if self.outcome:  # no class has lesions, so none is said to be found
            return shown
        positive = 1 - next(iter(shown.probabilities.values()))  # the first class has no lesion
        return replace(shown, candidates=_candidates(tiles, attention * positive, lesions))

    def _features(
        self, path: Path | str, how: Mapping[str, Any]
    ) -> tuple[Tiles, Features, int, Sequence[str]]:
        """Return a slide's tiles and features, how many are new, and what to say of them."""
        if self.imports:
            with closing(open_slide(path)) as slide:
                tiles, features, told = self.imports(slide.info)
            mpp = how["mpp"]
            if mpp is not None and f"{mpp:.6g}" != f"{tiles.slide_mpp:.6g}":
                told.append(f"{mpp:g} um per pixel is not used: the imported tiles are cut already")
            return tiles, features, 0, told
        made = self.embedder(path, spec=self.spec, **how)
        if made.tiles == made.unreadable:
            msg = f"{path}: no tile to predict from; pathcli tile {path} shows why"
            raise DataError(msg)
        features = self.embedder.store.features.mapped(made.key)
        return made.tiling.tiles, features, made.encoded, made.warnings

    @property
    def outcome(self) -> bool:
        """Tell whether the run has learnt an outcome, and not classes."""
        return self.run.recipe.task == TASK

    def _of_class(self, shown: Predicted, logits: NDArray[np.float64]) -> Predicted:
        found = softmax(logits)
        chances = {c: float(p) for c, p in zip(self.run.facts["classes"], found, strict=True)}
        best = max(chances, key=lambda name: chances[name])
        return replace(shown, prediction=best, probabilities=chances)

    def _of_outcome(self, shown: Predicted, logits: NDArray[np.float64]) -> Predicted:
        """Return the value or risk, with a picture of the survival curve."""
        said = say(self.run, logits)
        files = dict(shown.files)
        if said.curve:
            files["survival"] = str(self.out / f"{shown.item}.survival.svg")
            write_survival(Path(files["survival"]), said)
        return replace(
            shown,
            prediction=said.text,
            said=said,
            scope=scope(self.run),
            files=files,
            warnings=(*shown.warnings, *said.warnings),
        )

    def _scope(self, item: str, lesions: list[Any] | None) -> list[str]:
        scope, facts = [], self.run.facts
        learnt = [*facts["split"]["train"], *facts["split"]["val"]]
        items = [facts["store"][s].rpartition("@")[0] for s in learnt if s in facts["store"]]
        # what was imported without the slide is known by its name
        part = 0 if self.imports else 2
        if item.rpartition("-")[part] in {known.rpartition("-")[part] for known in items}:
            scope += ["the run has learnt from this slide: what it says here is no test of it"]
        slides = [slide for slide in facts["split"]["train"] if slide in facts["store"]]
        if facts["bag"] == "patient" and len(slides) > len(facts["train"]):
            scope += [
                "the run was trained on patients with all their slides; here a slide is alone"
            ]
        if lesions == []:
            scope += [
                f"no lesion is known in {self.lesions}: FROC counts the slide as free of them"
            ]
        return scope

    def _lesions(self, path: Path | str, slide: Slide) -> list[Any] | None:
        """Return the slide's lesions in level-0 px, an empty list for a slide without a file."""
        if self.lesions is None:
            return None
        # the annotations' own form says whether they count from the bounds
        for suffix in (".xml", ".json", ".geojson"):
            file = self.lesions / f"{Path(str(path)).stem}{suffix}"
            if file.is_file():
                return read_lesions(file, slide.info.bounds)
        return []

    def _draw(
        self, slide: Slide, tiles: Tiles, attention: NDArray[np.float32], lesions: list[Any]
    ) -> dict[str, str]:
        if not is_placed(tiles.spec):
            return {}
        name = tiles.item
        files = {
            "heatmap": self.out / f"{name}.heatmap.png",
            "geojson": self.out / f"{name}.attention.geojson",
            "tiles": self.out / f"{name}.tiles.png",
        }
        save_png(files["heatmap"], draw_heatmap(slide, tiles, attention, lesions=lesions))
        write_attention_geojson(files["geojson"], tiles, attention, slide.info.bounds)
        most, least = extreme_tiles(slide, tiles, attention, TILES_SHOWN)
        rows = [
            strip([tile.pixels for tile in part], TILES_SHOWN) for part in (most, least) if part
        ]
        save_png(files["tiles"], _stack(rows))
        return {kind: str(path) for kind, path in files.items()}


def predict(
    run: Run | Path,
    path: Path | str,
    *,
    store: Store | None = None,
    device: str = "auto",
    out: Path = Path("pathcli-out"),
    lesions: Path | None = None,
    progress: Progress | None = None,
) -> Predicted:
    """Predict one slide with a finished run; for several slides keep one `Predictor`.

    Raises:
        DataError: not a slide, no tile on tissue, or another encoder than the run's.
        ResourceError: no run, no weights, no space.
    """
    known = read_run(run) if isinstance(run, Path) else run
    ready = Predictor(known, store, device=device, out=out, lesions=lesions)
    return ready(path, progress=progress)


def _bag(features: Features) -> Bag:
    good = features.status == TileStatus.OK
    values = features.values if good.all() else features.values[good]
    name = features.key.item
    blank = np.zeros(len(values), np.int32)
    return Bag(name, name, None, (name,), values, features.xy[good], blank)


def _stack(rows: list[Any]) -> Any:  # noqa: ANN401 - pictures
    """Return rows of tiles one above the other, white between and beside them."""
    width = max(row.shape[1] for row in rows)
    parts: list[Any] = []
    for row in rows:
        parts += [np.pad(row, ((0, 12), (0, width - row.shape[1]), (0, 0)), constant_values=255)]
    return np.concatenate(parts)[:-12]


def _in_lesion(tiles: Tiles, attention: NDArray[np.float32], lesions: list[Any]) -> float | None:
    good = tiles.status == TileStatus.OK
    if not lesions:
        return None
    area = auc_in_lesion(attention, inside(tiles, lesions)[good])
    return None if np.isnan(area) else area


def _candidates(tiles: Tiles, score: NDArray[np.float32], lesions: list[Any]) -> Detections:
    """Return FROC's candidates; attention times probability and tile count compares slides."""
    merged, ignored = evaluation_lesions(lesions, tiles.slide_mpp) if lesions else ([], ())
    return detections(tiles, score * len(score), merged, ignored)


def lesion_metrics(results: Sequence[Predicted]) -> dict[str, Interval]:
    """Return attention-in-lesion AUROC (mean of slides with lesions) and the FROC score.

    Intervals are bootstrapped over slides; a metric that no slide defines is left out.
    """
    areas = [r.attention_in_lesion for r in results if r.attention_in_lesion is not None]
    found = [r.candidates for r in results if r.candidates is not None]
    metrics = {}
    if areas:
        values = np.array(areas)
        metrics["attention_in_lesion_auroc"] = bootstrap(
            lambda rows: float(values[rows].mean()), range(len(areas))
        )
    if any(slide.lesions > len(slide.ignored) for slide in found):
        metrics["froc"] = bootstrap(
            lambda rows: froc([found[i] for i in rows]).score,
            range(len(found)),
            strata=[int(slide.lesions > 0) for slide in found],
        )
    return metrics


def write_predictions(path: Path, results: Sequence[Predicted]) -> None:
    """Write `predictions.csv`: a row a slide, with its `numbers`; without any, remove it.

    Raises:
        ResourceError: the disk is full, or the folder may not be written.
    """
    if not results:
        with disk_errors(path, "--out"):
            path.unlink(missing_ok=True)  # of an earlier run
        return
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["wsi", "item", "prediction", *results[0].numbers, "tiles", "note"])
    for r in results:
        numbers = [f"{x:.6f}" if isinstance(x, float) else x for x in r.numbers.values()]
        writer.writerow([r.path, r.item, r.prediction, *numbers, r.tiles, NOTICE])
    write_bytes(path, text.getvalue().encode("utf-8", "backslashreplace"), lambda _: None, "--out")


def as_row(result: Predicted) -> dict[str, Any]:
    """Return one prediction as plain JSON values."""
    more: dict[str, Any] = {}
    if result.said:
        curve = [[round(t, 6), round(s, 6)] for t, s in result.said.curve]
        more = {**result.numbers, "scope": result.scope}
        more |= {"survival": curve} if curve else {}
    return {
        "path": result.path,
        "item": result.item,
        "prediction": result.prediction,
        "probabilities": {c: round(p, 6) for c, p in result.probabilities.items()},
        **more,
        "tiles": result.tiles,
        "encoded": result.encoded,
        "attention_in_lesion": result.attention_in_lesion,
        "files": result.files,
        "warnings": list(result.warnings),
        "notice": NOTICE,
    }
