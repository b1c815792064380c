"""Commands called wrongly: one line that says what is wrong and what to write instead."""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from cohorts import paint
from conftest import Run as Cli
from entries import make_tiles
from peer_files import register, trident
from test_exchange import put

from pathcli.recipe import Recipe, check_recipe, load_recipe
from pathcli.store import Store


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def one_line(result: tuple[int, str, str], code: int) -> str:
    found, _, err = result
    assert (found, len(err.splitlines())) == (code, 1), err
    return err


# --- recipes -----------------------------------------------------------------------------


def test_a_kind_set_alone_names_the_keys_that_do_not_fit_and_what_to_write(run: Cli) -> None:
    sets = ("--set", "data.labels=x.csv", "--set", "head.kind=clam-sb")
    err = one_line(run("train", "--recipe", "mil-abmil", *sets), 2)
    assert "head: clam-sb takes no attention (known: hidden, " in err
    assert """without: --set 'head={kind: "clam-sb"}'""" in err


def test_what_it_says_to_write_is_right_and_keeps_what_fits() -> None:
    given = ["outcome.time=months", "outcome.event=dead", "data.labels=x.csv"]
    (fault,) = check_recipe(load_recipe("mil-survival", [*given, "outcome.kind=hazards"])).faults
    said = fault.partition("--set '")[2].removesuffix("'")
    fixed = load_recipe("mil-survival", [*given, said])
    assert check_recipe(fixed).faults == ()
    assert fixed.values["outcome"] == {
        "kind": "hazards",
        "time": "months",
        "event": "dead",
        "unit": "",
    }


def test_a_kind_that_takes_all_the_keys_needs_no_word_and_a_typing_error_keeps_its_hint() -> None:
    def faults(*settings: str) -> tuple[str, ...]:
        return check_recipe(load_recipe("mil-abmil", ["data.labels=x.csv", *settings])).faults

    assert faults("head.kind=acmil") == ()
    (typed,) = faults("head.atention=gated")
    assert typed.startswith("head.atention: no such key: did you mean 'attention'?")
    (none,) = faults("train.kind=x")
    assert none.startswith("train.kind: no such key")


def test_a_recipe_is_the_same_however_its_values_came_about() -> None:
    values = load_recipe("mil-abmil").values
    again = Recipe("mil-abmil", values).with_values(**{"head.kind": "abmil"})
    assert again == Recipe("mil-abmil", values)


# --- tables ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (("mil-abmil",), True),
        (("mil-abmil", "--set", "data.target=stage"), False),
        (("mil-survival", "--set", "outcome.time=months", "--set", "outcome.event=dead"), False),
    ],
)
def test_a_table_of_patients_alone_asks_for_that_of_their_slides(
    given: tuple[str, ...], label: bool, run: Cli, tmp_path: Path
) -> None:
    clini = tmp_path / "clini.csv"
    clini.write_text("PATIENT,stage,months,dead\np1,I,3,1\np2,II,4,0\n")
    words = ("train", "--recipe", *given, "--set", f"data.labels={clini}", "--device", "cpu")
    err = one_line(run(*words), 4)
    assert "data.slide_table=FILE, too, with columns PATIENT,FILENAME" in err
    assert ("data.target=COLUMN" in err) == label


# --- bundles -----------------------------------------------------------------------------


def test_what_is_no_bundle_is_called_what_it_is(run: Cli, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(tmp_path / "notes.txt", "notes.txt")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive_:
        archive_.add(tmp_path / "notes.txt", "notes.txt")
    for name, what in (
        ("x.zip", "an archive"),
        ("x.tar.gz", "an archive"),
        ("notes.txt", "a file"),
        ("nowhere", "no such folder"),
    ):
        err = one_line(run("models", "unpack", tmp_path / name), 5)
        assert f"{name}: {what}; a bundle is the folder, with manifest.json, that" in err
        assert ("extract it" in err) == (what == "an archive")


def test_what_cannot_be_looked_into_is_no_bundle_either(
    run: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError

    (tmp_path / "x.tar").write_text("none")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(tarfile, "is_tarfile", refuse)
    for name in ("x.tar", "pipe"):
        assert f"{name}: a file; a bundle is" in one_line(
            run("models", "unpack", tmp_path / name), 5
        )
    assert "cannot be read" in one_line(run("models", "unpack", tmp_path / ("a" * 300)), 5)


# --- exchange ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["trident", "clam", "stamp", "acmil", "zarr", "geojson"])
def test_an_export_into_a_file_is_refused_before_any_slide(
    form: str, store: Store, run: Cli, tmp_path: Path
) -> None:
    for i in range(3):
        put(store, make_tiles(20, f"s{i}-0000000{i}"))
    file = tmp_path / "there"
    file.write_text("kept")
    for out in (file, file / "below"):
        words = ("store", "export", out, "--format", form, "--store", store.root)
        assert f"{file}: a file; OUT is a folder" in one_line(run(*words), 2)
    assert file.read_text() == "kept"


def test_acmils_one_file_may_be_named_and_replaced(store: Store, run: Cli, tmp_path: Path) -> None:
    put(store, make_tiles(20, "s0-00000000"))
    words = ("store", "export", tmp_path / "all.h5", "--format", "acmil", "--store", store.root)
    assert run(*words)[0] == 0
    code, _, err = run(*words, "--overwrite")
    assert code == 0, err


def test_two_slides_of_one_name_are_both_named_and_a_list_tells_which(
    store: Store, run: Cli, tmp_path: Path
) -> None:
    for site, seed in (("a", 1), ("b", 2)):
        (tmp_path / "slides" / site).mkdir(parents=True)
        paint(tmp_path / "slides" / site / "s1.tif", seed=seed)
    job = tmp_path / "job"
    trident(job)
    words = ("store", "import", job, "--format", "trident", "--store", store.root, "--slides")
    err = one_line(run(*words, tmp_path / "slides"), 4)
    for site in ("a", "b"):
        assert str(tmp_path / "slides" / site / "s1.tif") in err
    assert "a list (CSV, header wsi)" in err
    (tmp_path / "list.csv").write_text("wsi\nslides/b/s1.tif\n")
    code, _, err = run(*words, tmp_path / "list.csv", "--json")
    assert code == 0, err
    (card,) = store.slides().values()
    assert not card["reader"].startswith("imported")
    shutil.rmtree(tmp_path / "slides")
    err = one_line(run(*words, tmp_path / "slides"), 5)
    assert "no such folder or list of slides" in err
