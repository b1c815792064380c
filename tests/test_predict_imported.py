"""A run on features that another tool made, on slides whose features it made, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import pytest
from cohorts import RING, Contrast, lines, paint, quick, table
from conftest import Run as Cli

from pathcli.cli.store_exchange import known_slides
from pathcli.encoders.embedding import Embedder
from pathcli.mil.predict import Predictor
from pathcli.recipe import load_recipe
from pathcli.runs import Run, read_run, train
from pathcli.store import Store
from pathcli.store.peers import Export, Import
from pathcli.store.peers.parcel import RECORD, UNKNOWN

ENCODER = "uni_v1-imported"


def foreign(source: Store, job: Path) -> None:
    """Write a store's features as TRIDENT would, with nothing of pathcli in the files."""
    with Export(source, "trident", job) as export:
        for name in export.names:
            export(name)
    for path in job.rglob("features_*/*.h5"):
        with h5py.File(path, "a") as file:
            del file.attrs[RECORD]


def imported(job: Path, store: Store, slides: Path | None) -> dict[str, dict[str, object]]:
    known = known_slides(slides) if slides else None
    ready = Import(store, "trident", job, encoder="uni_v1", slide=known)
    return {name: ready(name) for name in ready.names}


@pytest.fixture(scope="module")
def _home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight painted slides and a new one, a job of theirs, and a run on what was imported."""
    home = tmp_path_factory.mktemp("imported")
    (home / "slides").mkdir()
    rows = []
    for i in range(8):
        paint(home / "slides" / f"s{i}.tif", RING if i % 2 else None, seed=i)
        rows.append((f"p{i}", f"s{i}", ("normal", "tumor")[i % 2]))
    paint(home / "slides" / "new.tif", RING, seed=50)
    embedder = Embedder(Contrast(), Store(home / "own"), device="cpu")
    for path in (home / "slides").iterdir():
        embedder(path)
    foreign(embedder.store, home / "job")
    store = Store(home / "store")
    done = imported(home / "job", store, home / "slides")
    tiles = next(iter(done.values()))["spec"]
    assert isinstance(tiles, dict)
    kept = {name: tiles[name] for name in ("size_px", "mpp", "step_px", "tissue", "min_tissue")}
    given = [
        f"data.labels={table(home / 'labels.csv', rows)}",
        "data.val=0.3",
        *quick(epochs=40),
        f"encoder={json.dumps({'kind': 'imported', 'id': ENCODER})}",
        f"tiles={json.dumps(kept)}",
        "train.choose=null",
    ]
    train(load_recipe("mil-abmil", given), out=home / "runs", store=store)
    return home


@pytest.fixture
def home(_home: Path) -> Path:
    return _home


def predict(
    home: Path, run: Cli, store: Path, out: Path, slide: str = "new"
) -> tuple[int, str, str]:
    seed = home / "runs" / "mil-abmil" / "seed-1"
    given = ("predict", seed, home / "slides" / f"{slide}.tif", "--store", store, "--out", out)
    return run(*given, "--device", "cpu", "--json")


def test_a_run_on_imported_features_predicts_a_slide_whose_features_were_imported(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    code, out, err = predict(home, run, home / "store", tmp_path / "out")
    assert code == 0, err
    (slide,) = json.loads(out)["slides"]
    assert (slide["prediction"], slide["encoded"]) == ("tumor", 0)
    assert slide["warnings"] == []
    assert Path(slide["files"]["heatmap"]).is_file()
    assert lines(tmp_path / "out" / "predictions.csv")[0]["prediction"] == "tumor"
    own, _, _ = predict(home, run, home / "store", tmp_path / "out", "s1")
    assert own == 0


def test_a_resolution_that_imported_tiles_cannot_take_is_said_to_be_unused(
    home: Path, tmp_path: Path
) -> None:
    trained = read_run(home / "runs" / "mil-abmil" / "seed-1")
    ready = Predictor(trained, Store(home / "store"), device="cpu", out=tmp_path)
    new = home / "slides" / "new.tif"
    assert ready(new, mpp=0.5).warnings == ()
    (told,) = ready(new, mpp=0.25).warnings
    assert told == "0.25 um per pixel is not used: the imported tiles are cut already"


def test_what_was_imported_without_slides_is_known_by_name_and_says_so(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    imported(home / "job", Store(tmp_path / "bare"), None)
    code, out, err = predict(home, run, tmp_path / "bare", tmp_path / "out")
    assert code == 0, err
    (slide,) = json.loads(out)["slides"]
    assert slide["prediction"] == "tumor"
    assert "known by the slide's name, not by its file" in slide["warnings"][0]


def test_features_of_another_file_of_this_name_are_refused(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(home / "slides", other)
    paint(other / "new.tif", seed=77)
    imported(home / "job", Store(tmp_path / "store"), other)
    code, _, err = predict(home, run, tmp_path / "store", tmp_path / "out")
    assert code == 4
    assert len(err.splitlines()) == 1
    assert "what was imported of another file has this name" in err
    assert "--slides" in err


def test_features_of_another_model_or_none_are_refused_in_one_line(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    code, _, err = predict(home, run, home / "own", tmp_path / "out")
    assert (code, len(err.splitlines())) == (4, 1)
    assert f"learnt from {ENCODER} of tiles 64 px at 0.5 um (imported)" in err
    assert "has of this slide fake-000000000000 of tiles 64 px" in err
    code, _, err = predict(home, run, tmp_path / "empty", tmp_path / "out")
    assert (code, len(err.splitlines())) == (4, 1)
    assert "has nothing of this slide; run: pathcli store import" in err


def test_features_of_another_length_under_the_same_name_are_refused(
    home: Path, run: Cli, tmp_path: Path
) -> None:
    shutil.copytree(home / "job", tmp_path / "job")
    for path in (tmp_path / "job").rglob("features_*/*.h5"):
        with h5py.File(path, "a") as file:
            values = file["features"][:, :2]
            del file["features"]
            file["features"] = values
    imported(tmp_path / "job", Store(tmp_path / "store"), home / "slides")
    code, _, err = predict(home, run, tmp_path / "store", tmp_path / "out")
    assert (code, len(err.splitlines())) == (4, 1)
    assert "of another model of this name" in err


def test_tiles_of_unknown_size_give_a_prediction_and_no_picture(home: Path, tmp_path: Path) -> None:
    (source,) = (home / "job").rglob("features_*/new.h5")
    (tmp_path / "h5_files").mkdir()
    with h5py.File(source) as old, h5py.File(tmp_path / "h5_files" / "new.h5", "w") as new:
        for name in ("features", "coords"):
            new[name] = old[name][()]
    store = Store(tmp_path / "store")
    Import(store, "clam", tmp_path, encoder="uni_v1")("h5_files/new.h5")
    trained = read_run(home / "runs" / "mil-abmil" / "seed-1")
    facts = {**trained.facts, "tiles": UNKNOWN.to_json()}
    unplaced = Run(trained.folder, trained.recipe, trained.metrics, {"facts": facts})
    ready = Predictor(unplaced, store, device="cpu", out=tmp_path / "out", lesions=tmp_path)
    shown = ready(home / "slides" / "new.tif")
    assert (shown.prediction, shown.files, shown.candidates) == ("tumor", {}, None)
    assert any("nothing is drawn, or compared with lesions" in text for text in shown.warnings)
