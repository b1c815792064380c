import json
from pathlib import Path
from typing import Any

import pytest
import synthetic
from conftest import SIZE, Run

from pathcli import registry
from pathcli.errors import PathcliError
from pathcli.store import Store


def test_an_unknown_command_is_a_usage_error(run: Run) -> None:
    code, _, err = run("tyle", "x.svs")
    assert code == 2
    assert "tile" in err


# --- tile --------------------------------------------------------------------------------


def test_tile_prints_a_table_and_writes_an_overview(slide_path: Path, run: Run) -> None:
    code, out, _ = run("tile", slide_path)
    assert code == 0
    for told in ("painted-", "1500 x 1100", "0.5 header", "22%"):
        assert told in out
    assert len(list(Path("pathcli-out").glob("*.overview.png"))) == 1


def test_tile_json_is_one_object_and_nothing_else(slide_path: Path, run: Run) -> None:
    code, out, _ = run("tile", slide_path, "--json", "--geojson", "--size", 100, "--step", 50)
    assert code == 0
    (slide,) = json.loads(out)["slides"]
    assert slide["tiles"] > 60
    assert (slide["mpp"], slide["mpp_source"], slide["reader"]) == (0.5, "header", "direct")
    assert Path(slide["overview"]).is_file()
    assert json.loads(Path(slide["geojson"]).read_text())["features"]


def test_mpp_comes_from_the_list_before_the_option_before_the_header(
    slide_path: Path, run: Run
) -> None:
    Path("list.csv").write_text(f"wsi,mpp\n{slide_path},0.3\n")
    Path("bare.csv").write_text(f"wsi\n{slide_path}\n")
    seen = []
    for given in (
        ("list.csv", "--slide-mpp", 0.4),
        ("bare.csv", "--slide-mpp", 0.4),
        ("bare.csv",),
    ):
        _, out, _ = run("tile", *given, "--json", "--no-overview")
        slide = json.loads(out)["slides"][0]
        seen.append((slide["mpp"], slide["mpp_source"]))
    assert seen == [(0.3, "csv"), (0.4, "--slide-mpp"), (0.5, "header")]


def bad_inputs(folder: Path) -> dict[str, Path]:
    """Make one of each kind of file that is no slide, or has no usable resolution."""
    (folder / "empty.svs").touch()
    (folder / "text.svs").write_text("hello" * 100)
    whole = synthetic.slide(folder / "cut.svs", synthetic.picture(600, 500, (0, 0, 400, 400)))
    whole.write_bytes(whole.read_bytes()[:2000])
    picture = synthetic.picture(600, 500, (0, 0, 400, 400))
    synthetic.slide(folder / "no-mpp.tiff", picture, mpp=None, aperio=False)
    synthetic.slide(folder / "absurd.tiff", picture, mpp=352.9, aperio=False)
    return {p.stem: p for p in folder.iterdir() if p.is_file()} | {"gone": folder / "gone.svs"}


@pytest.mark.parametrize("kind", ["empty", "text", "cut", "no-mpp", "absurd", "gone"])
def test_one_bad_slide_is_one_line_and_exit_4(tmp_path: Path, run: Run, kind: str) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    path = bad_inputs(folder)[kind]
    code, out, err = run("tile", path)
    assert code == 4
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith(f"error: {path}: ")
    assert "Traceback" not in err
    assert not list((tmp_path / "default-store").rglob("*.h5"))


def test_a_bad_slide_does_not_stop_the_batch(slide_path: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    bad = bad_inputs(folder)
    code, out, err = run("tile", slide_path, *bad.values(), "--json")
    assert code == 3
    told = json.loads(out)
    assert len(told["slides"]) == 1
    assert {f["path"] for f in told["failures"]} == {str(p) for p in bad.values()}
    assert "6 of 7 slides failed" in err
    assert len(Path("pathcli-out/failures.csv").read_text().splitlines()) == 7


def test_an_empty_folder_and_an_empty_file_say_what_they_are(tmp_path: Path, run: Run) -> None:
    (tmp_path / "none").mkdir()
    code, _, err = run("tile", tmp_path / "none")
    assert (code, "no slides in this folder" in err) == (4, True)


def test_a_slide_without_tissue_is_recorded_and_exits_0(tmp_path: Path, run: Run) -> None:
    path = synthetic.slide(tmp_path / "glass.svs", synthetic.picture(900, 900, (0, 0, 0, 0)))
    code, _, err = run("tile", path)
    assert code == 0
    assert "warning:" in err
    assert len(Store().tiles) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--tissue", "magic"), "no tissue is called 'magic'"),
        (("--mpp", "99"), "outside 0.05-20"),
        (("--size", "0"), "--size"),
        (("--min-tissue", "7"), "between 0 and 1"),
        (("--bogus",), "--bogus"),
    ],
)
def test_impossible_options_are_usage_errors(
    slide_path: Path, run: Run, arguments: tuple[str, ...], told: str
) -> None:
    code, _, err = run("tile", slide_path, *arguments)
    assert code == 2
    assert told in err


def test_debug_shows_no_header_text(tmp_path: Path, run: Run) -> None:
    import numpy as np
    import tifffile

    path = tmp_path / "strip.tif"
    tifffile.imwrite(path, np.full((300, 300, 3), 200, np.uint8), description="Patient: Jane Doe")
    out = run("tile", path, "--debug", "--slide-mpp", 1, "--size", 50)
    assert "Jane" not in "".join(map(str, out))


def test_a_file_where_a_folder_is_needed_is_one_line(slide_path: Path, run: Run) -> None:
    code, _, err = run("tile", slide_path, "--out", slide_path)
    assert (code, "a file is where a folder is needed" in err) == (2, True)


def test_an_unusable_store_is_one_line(slide_path: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").touch()
    code, _, err = run("tile", slide_path, "--store", tmp_path / "full")
    assert (code, "not a store" in err) == (4, True)
    code, out, err = run("store", "info", "--store", slide_path, "--json")
    assert code == 4
    assert json.loads(out)["exit_code"] == 4
    assert "is a file" in err


def test_a_bug_is_one_line_unless_debug_is_asked_for(
    slide_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boom(*_: object, **__: object) -> None:
        msg = "boom"
        raise ZeroDivisionError(msg)

    monkeypatch.setattr("pathcli.slides.tiling.tile", boom)
    code, _, err = run("tile", slide_path)
    assert code == 1
    assert "ZeroDivisionError: boom (a bug in pathcli" in err
    assert "Traceback" not in err
    monkeypatch.setattr("pathcli.slides.discovery.discover", boom)
    code, _, err = run("tile", slide_path, "--debug")
    assert code == 1
    assert "Traceback" in err


def test_the_code_of_an_error_stays_under_debug(slide_path: Path, run: Run) -> None:
    code, _, err = run("tile", slide_path, "--tissue", "foo", "--debug")
    assert (code, "Traceback" in err) == (2, True)


def test_a_usage_error_is_json_too(slide_path: Path, run: Run) -> None:
    for wrong in (("--size", "0"), ("--foo",), ("--slide-mpp", "nan")):
        code, out, _ = run("tile", slide_path, *wrong, "--json")
        assert code == json.loads(out)["exit_code"] == 2


def test_the_folder_one_stands_in_is_a_folder(slide_path: Path, run: Run) -> None:
    code, out, _ = run("tile", ".", "--json")
    assert code == 0
    assert [Path(s["path"]).name for s in json.loads(out)["slides"]] == [slide_path.name]


def test_commands_that_read_make_no_store(tmp_path: Path, run: Run) -> None:
    code, _, err = run("store", "list", "--store", tmp_path / "typo")
    assert (code, "no store here" in err) == (5, True)
    assert not (tmp_path / "typo").exists()


def test_a_file_name_of_any_bytes_does_not_lose_the_batch(slide_path: Path, run: Run) -> None:
    folder = slide_path.parent / "odd"
    folder.mkdir()
    slide_path.rename(folder / "fine.svs")
    (folder / "bad\udcff.svs").write_bytes(b"x")
    code, out, _ = run("tile", folder, "--json")
    assert code == 3
    assert len(json.loads(out)["slides"]) == 1
    assert len(Path("pathcli-out/failures.csv").read_text().splitlines()) == 2
    (folder / "bad\udcff.svs").unlink()
    assert run("tile", folder)[0] == 0
    assert not Path("pathcli-out/failures.csv").exists()


def test_a_step_below_a_pixel_of_the_scan_is_refused(slide_path: Path, run: Run) -> None:
    code, _, err = run("tile", slide_path, "--mpp", 0.1, "--size", 500, "--step", 1)
    assert (code, "use --step 5 or more" in err) == (2, True)


# --- embed -------------------------------------------------------------------------------


def test_embed_says_which_tiles_it_uses_and_skips_what_is_there(
    slide_path: Path, run: Run, fake: type
) -> None:
    code, out, err = run("embed", slide_path, "--encoder", "fake")
    assert code == 0
    assert "fake: tiles of 64 px at 0.5 um per pixel (the tests)" in err
    assert "encoded" in out
    passes = fake.passes  # type: ignore[attr-defined]
    code, out, _ = run("embed", slide_path, "--encoder", "fake", "--json")
    (slide,) = json.loads(out)["slides"]
    assert (code, slide["encoded"], slide["cached"]) == (0, 0, True)
    assert slide["row_shape"] == [3]
    assert fake.passes == passes  # type: ignore[attr-defined]


def test_two_slides_of_one_name_keep_two_entries(
    slide_path: Path, tmp_path: Path, run: Run, fake: type
) -> None:
    other = tmp_path / "b" / slide_path.name
    other.parent.mkdir()
    synthetic.slide(other, synthetic.picture(*SIZE, (0, 0, 500, 500), seed=1))
    assert run("embed", slide_path, other, "--encoder", "fake")[0] == 0
    assert len(Store().features) == 2
    (tmp_path / "c").mkdir()
    moved = slide_path.rename(tmp_path / "c" / slide_path.name)
    run("embed", moved, "--encoder", "fake")
    assert len(Store().features) == 2
    run("embed", moved, "--encoder", "fake", "--slide-mpp", 0.25)
    run("embed", moved, "--encoder", "fake", "--min-tissue", 0.7)
    assert len(Store().features) == 4


def test_missing_weights_fail_once_with_exit_5(slide_path: Path, run: Run) -> None:
    code, _, err = run("embed", slide_path, slide_path, "--encoder", "pathgen-clip")
    assert code == 5
    assert err.count("hf download jamessyx/PathGen-CLIP") == 1
    assert not list(Store().tiles)


def test_a_corrupt_checkpoint_leaves_no_entry(slide_path: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "w.pt").write_bytes(b"rot" * 99)
    code, _, err = run(
        "embed", slide_path, "--encoder", "open_clip:ViT-B-16", "--checkpoint", tmp_path / "w.pt"
    )
    assert code == 4
    assert "w.pt: corrupt checkpoint" in err
    assert not list(Store().features)


def test_what_is_said_of_many_slides_is_said_once(
    slide_path: Path, tmp_path: Path, run: Run
) -> None:
    (tmp_path / "w.pt").write_bytes(b"rot" * 99)
    many = []
    for i in range(5):
        (tmp_path / f"s{i}").mkdir()
        many.append(tmp_path / f"s{i}" / "a.svs")
        synthetic.slide(many[-1], synthetic.picture(600, 500, (0, 0, 400, 400), seed=i))
    checkpoint = ("--encoder", "open_clip:ViT-B-16", "--checkpoint", tmp_path / "w.pt")
    code, _, err = run("embed", *many, *checkpoint)
    assert (code, err.count("w.pt")) == (4, 1)
    assert "(5 slides)" in err
    code, _, err = run("tile", *many, "--size", 64, "--mpp", 0.25)
    assert (code, err.count("upsampled")) == (0, 1)
    assert "5 slides: " in err


def test_an_unknown_encoder_is_a_usage_error(slide_path: Path, run: Run) -> None:
    code, _, err = run("embed", slide_path, "--encoder", "pathgen")
    assert (code, "did you mean 'pathgen-clip'" in err) == (2, True)


# --- store, models, doctor ---------------------------------------------------------------


def test_store_commands_tell_and_clean(slide_path: Path, run: Run, fake: type) -> None:
    assert "nothing here yet" in run("store", "list")[2]
    run("embed", slide_path, "--encoder", "fake")
    code, out, _ = run("store", "list", "--json")
    entries = json.loads(out)["entries"]
    assert [e["kind"] for e in entries] == ["tiles", "features"]
    _, out, _ = run("store", "info", "--json")
    assert json.loads(out)["slides"] == 1
    _, out, _ = run("store", "info", entries[0]["item"])
    assert "rows of (3,)" in out
    code, _, err = run("store", "info", "painted")
    assert (code, "did you mean" in err) == (4, True)
    code, out, _ = run("store", "verify", "--json")
    assert (code, json.loads(out)["counts"]) == (0, {"ok": 3})
    path = next((Store().root / "features").rglob("*.h5"))
    path.write_bytes(path.read_bytes()[:999])
    code, out, _ = run("store", "verify")
    assert (code, "broken" in out) == (4, True)
    code, out, _ = run("store", "prune", "--dry-run", "--json")
    assert len(json.loads(out)["removed"]) == 1
    assert path.exists()
    run("store", "prune")
    assert not path.exists()


def test_models_say_what_is_here_and_how_to_get_the_rest(run: Run) -> None:
    _, out, _ = run("models", "list", "--json")
    models = {m["name"]: m for m in json.loads(out)["models"]}
    assert {"lite0", "pathgen-clip", "pathgen-clip-l"} <= set(models)
    assert models["pathgen-clip-l"]["licence"] == "CC-BY-NC-4.0"
    _, out, _ = run("models", "info", "pathgen-clip")
    assert "pathcli models pull pathgen-clip" in out
    assert run("models", "pull", "pathgen-clip")[0] == 5
    assert run("models", "pull", "nothing")[0] == 2
    for name in ("pallava-plip", "open_clip:ViT-B-32"):  # no word of `plip`, another encoder
        code, _, err = run("models", "info", name)
        assert code == 2
        assert "--checkpoint FILE" in err


def test_doctor_checks_every_part(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    checks = {c["what"]: c["state"] for c in json.loads(out)["checks"]}
    assert code == 0
    assert {"python", "torch", "torchvision", "OpenSlide", "store", "lite0"} <= set(checks)
    assert checks["torchvision"] == "ok"


def test_exit_codes_cover_the_error_tree() -> None:
    def tree(kind: type[PathcliError]) -> set[int]:
        return {kind.exit_code}.union(*(tree(k) for k in kind.__subclasses__()))

    assert tree(PathcliError) == {1, 2, 4, 5}


def test_the_registry_is_what_help_says(slide_path: Path, run: Run) -> None:
    _, out, _ = run("tile", "--help")
    assert "otsu|hsv|hsv:PRESET|auto|none" in " ".join(out.split())
    plain = [name for name in registry.BUILTIN["tissue"] if ":" not in name]
    assert sorted(plain) == sorted(["otsu", "hsv", "auto", "none", "imported"])


def test_anything_is_json_or_text(slide_path: Path, run: Run) -> None:
    def check(value: Any) -> None:
        assert isinstance(value, dict)

    for arguments in (
        ("tile", slide_path),
        ("store", "list"),
        ("store", "verify"),
        ("models", "list"),
    ):
        _, out, _ = run(*arguments, "--json")
        check(json.loads(out))
        assert out.count("\n") == 1
