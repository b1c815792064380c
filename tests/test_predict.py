"""A trained run on slides: the same numbers as in training, pictures, and every refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import synthetic
import torch
from cohorts import RING, Contrast, asap, fitted, lines, paint, quick, table
from conftest import Run as Cli
from PIL import Image
from shapely.geometry import shape

from pathcli import registry
from pathcli.errors import DataError, ResourceError
from pathcli.mil.bags import Bags, look_up
from pathcli.mil.predict import Predictor, lesion_metrics, predict
from pathcli.mil.tables import read_labels
from pathcli.mil.task import load_head, predict_bags
from pathcli.recipe import load_recipe
from pathcli.runs import Run, read_run, train
from pathcli.slides.annotations import read_lesions
from pathcli.store import Store
from pathcli.types import NOTICE, TileSpec


@pytest.fixture(scope="module")
def _trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ABMIL on eight painted slides, their store and labels, and a slide to come."""
    home = tmp_path_factory.mktemp("trained")
    (home / "slides").mkdir()
    rows = []
    for i in range(8):
        paint(home / "slides" / f"s{i}.tif", RING if i % 2 else None, seed=i)
        rows.append((f"p{i}", f"s{i}", ("normal", "tumor")[i % 2]))
    (home / "lesions").mkdir()
    for name in ("s1", "s3", "new"):
        asap(home / "lesions" / f"{name}.xml", RING)
    paint(home / "new.tif", RING, seed=50)
    paint(home / "healthy.tif", seed=51)
    given = [
        f"data.labels={table(home / 'labels.csv', rows)}",
        f"data.slides={home / 'slides'}",
        "data.val=0.3",
        *quick(epochs=40),
        "train.choose=null",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.BUILTIN["encoder"], "fake", "cohorts:Contrast")
        train(load_recipe("mil-abmil", given), out=home / "runs", store=Store(home / "store"))
    return home


@pytest.fixture
def home(_trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry.BUILTIN["encoder"], "fake", "cohorts:Contrast")
    monkeypatch.setattr(Contrast, "passes", 0)
    return _trained


@pytest.fixture
def trained(home: Path) -> Run:
    return read_run(home / "runs" / "mil-abmil" / "seed-1")


def arguments(home: Path, *slides: Path, out: Path) -> list[object]:
    run = home / "runs" / "mil-abmil" / "seed-1"
    return ["predict", run, *slides, "--store", home / "store", "--out", out]


# --- numbers -----------------------------------------------------------------------------


def test_probabilities_are_those_of_the_stored_bag_and_nothing_is_encoded_again(
    home: Path, trained: Run, tmp_path: Path
) -> None:
    store = Store(home / "store")
    spec = TileSpec.from_json(trained.facts["tiles"])
    cohort = look_up(read_labels(home / "labels.csv"), store, trained.facts["encoder"], spec)
    ready = Predictor(trained, store, out=tmp_path / "out")
    for said in predict_bags(load_head(trained), Bags(cohort, ["s0", "s1"]), torch.device("cpu")):
        shown = ready(home / "slides" / f"{said.bag.name}.tif")
        assert shown.encoded == 0
        assert shown.tiles == len(said.attention)
        np.testing.assert_allclose(list(shown.probabilities.values()), said.probabilities)
        assert list(shown.probabilities) == ["normal", "tumor"]
        assert shown.prediction == ["normal", "tumor"][said.probabilities.argmax()]
    assert Contrast.passes == 0


def test_a_new_slide_is_encoded_once_by_as_many_tiles_as_it_has(
    home: Path, trained: Run, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    first = predict(trained.folder, home / "new.tif", store=store, out=tmp_path / "out")
    again = predict(trained, home / "new.tif", store=store, out=tmp_path / "out")
    assert (first.encoded, again.encoded) == (first.tiles, 0)
    assert first.tiles > 80
    assert first.probabilities == again.probabilities
    assert first.prediction == "tumor"


def test_attention_lies_on_the_lesion_of_a_slide_never_seen(
    home: Path, trained: Run, tmp_path: Path
) -> None:
    ready = Predictor(
        trained, Store(home / "store"), out=tmp_path / "out", lesions=home / "lesions"
    )
    shown = [ready(home / name) for name in ("new.tif", "healthy.tif")]
    assert shown[0].attention_in_lesion is not None
    assert shown[0].attention_in_lesion > 0.9
    assert shown[1].attention_in_lesion is None
    assert shown[1].candidates is not None
    assert (shown[1].candidates.hits == -1).all()
    first = shown[0].candidates
    assert first is not None
    assert first.hits[first.scores.argmax()] == 0
    metrics = lesion_metrics(shown)
    assert metrics["attention_in_lesion_auroc"].value == shown[0].attention_in_lesion
    assert metrics["attention_in_lesion_auroc"].n == 1
    assert metrics["froc"].n == 2
    assert metrics["froc"].value == 1


def test_a_lesion_of_isolated_tumour_cells_is_none_that_froc_counts(
    home: Path, trained: Run, tmp_path: Path
) -> None:
    asap(tmp_path / "new.xml", [(400, 300), (600, 300), (600, 500), (400, 500)])
    store = Store(home / "store")
    shown = predict(trained, home / "new.tif", store=store, out=tmp_path, lesions=tmp_path)
    assert shown.candidates is not None
    assert shown.candidates.ignored == {0}
    assert set(lesion_metrics([shown])) == {"attention_in_lesion_auroc"}


@pytest.mark.data
def test_attention_finds_a_lesion_of_camelyon16s_own_shape(
    home: Path, trained: Run, data: Path, tmp_path: Path
) -> None:
    drawn = read_lesions(data / "camelyon16" / "annotations" / "tumor_010.xml")
    largest = max(drawn, key=lambda polygon: polygon.area)
    ring = fitted(np.array(largest.exterior.coords), RING)
    paint(tmp_path / "tumor_010.tif", ring.tolist(), seed=60)
    asap(tmp_path / "tumor_010.xml", ring.tolist())
    shown = predict(
        trained,
        tmp_path / "tumor_010.tif",
        store=Store(tmp_path / "store"),
        out=tmp_path / "out",
        lesions=tmp_path,
    )
    assert shown.attention_in_lesion is not None
    assert shown.attention_in_lesion > 0.9


# --- what is written ---------------------------------------------------------------------


def test_heatmap_attention_and_tiles_are_written_and_hold_what_they_say(
    home: Path, trained: Run, tmp_path: Path
) -> None:
    shown = predict(trained, home / "new.tif", store=Store(home / "store"), out=tmp_path / "out")
    heat, plain = (np.asarray(Image.open(shown.files[kind])) for kind in ("heatmap", "tiles"))
    assert heat.shape[2] == plain.shape[2] == 3
    assert heat.std() > 5
    assert plain.std() > 5
    found = json.loads(Path(shown.files["geojson"]).read_text())
    features = found["features"] if isinstance(found, dict) else found
    assert len(features) == shown.tiles
    values = [
        next(v for k, v in f["properties"]["measurements"].items() if "percentile" not in k.lower())
        for f in features
    ]
    centre = shape(features[int(np.argmax(values))]["geometry"]).centroid
    (x0, y0), (x1, y1) = RING[0], RING[2]
    assert x0 <= centre.x <= x1
    assert y0 <= centre.y <= y1


def test_the_command_line_writes_a_row_a_slide_and_says_the_notice(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    slides = [home / "slides" / "s1.tif", home / "healthy.tif"]
    given = arguments(home, *slides, out=tmp_path / "out")
    code, out, err = run(*given, "--lesions", home / "lesions", "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["slides"][0]["notice"] == NOTICE
    assert [row["prediction"] for row in said["slides"]] == ["tumor", "normal"]
    assert said["metrics"]["attention_in_lesion_auroc"]["value"] > 0.9
    assert set(said["metrics"]["froc"]) == {"value", "low", "high", "n"}
    rows = lines(tmp_path / "out" / "predictions.csv")
    assert [row["wsi"] for row in rows] == [str(path) for path in slides]
    for row, slide in zip(rows, said["slides"], strict=True):
        assert float(row["p_tumor"]) == pytest.approx(slide["probabilities"]["tumor"], abs=1e-6)
        assert row["note"] == NOTICE
    code, out, err = run(*given)
    assert code == 0
    assert "heatmap" in out
    assert NOTICE in out + err


# --- what is refused ---------------------------------------------------------------------


def test_a_slide_without_tissue_fails_and_the_batch_goes_on(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    blank = synthetic.slide(tmp_path / "blank.tif", np.full((600, 600, 3), 244, np.uint8))
    (tmp_path / "text.svs").write_text("no slide")
    slides = (blank, tmp_path / "text.svs", home / "healthy.tif")
    code, _, err = run(*arguments(home, *slides, out=tmp_path / "out"))
    assert code == 3
    assert "blank.tif: no tile to predict from" in err
    rows = lines(tmp_path / "out" / "failures.csv")
    assert [(Path(r["wsi"]).name, r["exit_code"]) for r in rows] == [
        ("blank.tif", "4"),
        ("text.svs", "4"),
    ]
    said = lines(tmp_path / "out" / "predictions.csv")
    assert [Path(row["wsi"]).name for row in said] == ["healthy.tif"]
    code, _, err = run(*arguments(home, blank, out=tmp_path / "out"))
    assert code == 4
    assert not (tmp_path / "out" / "predictions.csv").exists(), "of the earlier run"


def test_an_encoder_of_other_weights_is_refused(
    home: Path, trained: Run, run: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Contrast, "id", "fake-111111111111")
    with pytest.raises(DataError, match=r"fake-000000000000, here is fake-111111111111"):
        Predictor(trained, Store(home / "store"))
    code, _, err = run(*arguments(home, home / "new.tif", out=tmp_path / "out"))
    assert (code, len(err.splitlines())) == (4, 1)


def test_weights_that_are_damaged_or_gone_are_named(home: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(home / "runs" / "mil-abmil" / "seed-1", tmp_path / "copy"))
    weights = copy / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"weights\.safetensors"):
        Predictor(read_run(copy), Store(home / "store"))
    weights.unlink()
    with pytest.raises(ResourceError, match=r"weights\.safetensors"):
        Predictor(read_run(copy), Store(home / "store"))


def test_a_folder_of_several_seeds_names_them_and_one_of_rates_takes_the_best(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    one = home / "runs" / "mil-abmil" / "seed-1"
    for seed in (1, 2):
        copy = Path(shutil.copytree(one, tmp_path / "runs" / f"seed-{seed}"))
        recipe = copy / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace("seed: 1", f"seed: {seed}"))
    given = arguments(home, home / "new.tif", out=tmp_path / "out")
    given[1] = tmp_path / "runs"
    code, _, err = run(*given)
    assert code == 2
    assert str(tmp_path / "runs" / "seed-1") in err
    assert str(tmp_path / "runs" / "seed-2") in err
    shutil.rmtree(tmp_path / "runs" / "seed-2")
    code, _, err = run(*given)
    assert code == 0, err


@pytest.mark.parametrize("kind", ["nothing", "empty", "file"])
def test_a_run_that_is_none_is_named_in_one_line(
    home: Path, run: Cli, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "place"
    if kind == "empty":
        place.mkdir()
    elif kind == "file":
        place.write_text("")
    given = arguments(home, home / "new.tif", out=tmp_path / "out")
    given[1] = place
    code, _, err = run(*given)
    assert (code, len(err.splitlines())) == (5, 1)
    assert str(place) in err


def test_a_folder_of_lesions_that_is_not_there_is_refused(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    given = arguments(home, home / "new.tif", out=tmp_path / "out")
    code, _, err = run(*given, "--lesions", tmp_path / "none")
    assert code == 5
    assert "no such folder" in err


@pytest.mark.parametrize("several", [True, False])
def test_a_run_on_patients_of_several_slides_warns_that_a_slide_is_alone(
    home: Path, trained: Run, tmp_path: Path, *, several: bool
) -> None:
    names = [f"patient of {slide}" for slide in trained.facts["split"]["train"]]
    facts = {**trained.facts, "bag": "patient", "train": names[several:]}
    patient = Run(trained.folder, trained.recipe, trained.metrics, {"facts": facts})
    shown = Predictor(patient, Store(home / "store"), out=tmp_path)(home / "new.tif")
    assert any("a slide is alone" in text for text in shown.warnings) == several


def test_a_slide_that_was_learnt_from_is_no_test(home: Path, trained: Run, tmp_path: Path) -> None:
    ready = Predictor(trained, Store(home / "store"), out=tmp_path)
    split = trained.facts["split"]
    learnt, held = (
        next(p for p in sorted(home.rglob("*.tif")) if p.stem in split[part])
        for part in ("train", "test")
    )
    said = "the run has learnt from this slide"
    assert any(said in text for text in ready(learnt).warnings)
    assert not any(said in text for text in ready(held).warnings)
