"""The models of the vision-language recipes in their own formats, so small that each is a moment.

Those of a hub lie in a hub's cache under the names by which recipes call them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from tiny_chat import CHATML, LLAMA_3, byte_bpe
from tiny_language import tiny_llama, tiny_t5
from tiny_plip import WORDS, started
from tiny_qformer import DIM, THEIRS, WIDTH, shaken

from pathcli.cards import CARDS
from pathcli.encoders.itc_itm import ItcItm
from pathcli.state import trainable_state
from pathcli.torchvision_guard import guard_torchvision

PLACES, SIDE = 512, 28
COMMIT = "0" * 40


def fill_hub(cache: Path) -> Path:
    """Make a hub's cache with every model the recipes take from there."""
    makers = {
        "eva-clip-g": eva,
        "bert-base-uncased": bert,
        "vicuna-7b": tiny_llama,
        "vicuna-13b": tiny_llama,
        "llama-3-8b-instruct": llama_3,
        "flan-t5-xl": tiny_t5,
        "pathgen-clip-l-hf": clip,
    }
    for card, make in makers.items():
        model = repository(cache, card)
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text(COMMIT)
        (model / "snapshots" / COMMIT).mkdir(parents=True)
        make(model / "snapshots" / COMMIT)
    return cache


def repository(cache: Path, card: str) -> Path:
    """Return where a hub's cache has the model of a card."""
    return cache / f"models--{CARDS[card].source.repo.replace('/', '--')}"


# --- language models ---------------------------------------------------------------------


def llama_3(folder: Path) -> Path:
    """Make a LLaMA with a tokenizer of bytes and Llama 3's marks."""
    tiny_llama(folder)
    byte_bpe("<|begin_of_text|>", "<|end_of_text|>", LLAMA_3).save_pretrained(folder)
    return folder


def smol(folder: Path) -> Path:
    """Make a LLaMA with a tokenizer of bytes and SmolLM2's marks."""
    tiny_llama(folder)
    byte_bpe(None, "<|im_end|>", CHATML).save_pretrained(folder)
    return folder


# --- towers ------------------------------------------------------------------------------


def eva(folder: Path) -> None:
    """Make EVA-CLIP's tower of one block, 16 patches and a class token, as BLIP-2 has it."""
    guard_torchvision()
    from transformers import Blip2VisionConfig, Blip2VisionModel

    sizes = {"hidden_size": DIM, "intermediate_size": WIDTH, "num_hidden_layers": 1}
    set_seed(0)
    tower = Blip2VisionModel(
        Blip2VisionConfig(**sizes, num_attention_heads=1, image_size=224, patch_size=56)
    )
    state = {f"vision_model.{name}": x.contiguous() for name, x in tower.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def clip(folder: Path) -> None:
    """Make a CLIP of transformers' without a tokenizer: 4 patches of 32."""
    guard_torchvision()
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    vision, text = {"image_size": SIDE, "patch_size": SIDE // 2}, {"vocab_size": 20}
    set_seed(0)
    CLIPModel(
        CLIPConfig(vision_config=sizes | vision, text_config=sizes | text, projection_dim=8)
    ).save_pretrained(folder)
    how = {"crop_size": SIDE, "size": {"shortest_edge": SIDE}, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))


def clip_l(file: Path, patch: pytest.MonkeyPatch) -> None:
    """Write a PathGen-CLIP-L of two blocks and 4 patches, and let its architecture be so small."""
    guard_torchvision()
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg, factory

    from pathcli.encoders import clip as ours

    vision = {"image_size": SIDE, "patch_size": SIDE // 2, "layers": 2, "width": 64}
    text = {"context_length": 77, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    patch.setitem(factory._MODEL_CONFIGS, "ViT-L-14-336", config)
    patch.setattr(ours, "architectures", lambda: {"ViT-L-14-336": config})
    set_seed(0)
    network = CLIP(32, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=True)
    save_file(network.state_dict(), file)


def bert(folder: Path) -> Path:
    """Make a BERT of two layers with as many places as BERT-base, and its vocabulary."""
    guard_torchvision()
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 1}
    limits = {"max_position_embeddings": PLACES, "vocab_size": len(WORDS)}
    set_seed(0)
    BertModel(BertConfig(**sizes, **limits, intermediate_size=48)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def blip2(file: Path) -> Path:
    """Write a Q-Former of two layers as LAVIS's `blip2_pretrained.pth` has it, heads too."""
    guard_torchvision()
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    sizes = THEIRS | {"num_hidden_layers": 2, "vocab_size": len(WORDS) + 1}
    sizes["max_position_embeddings"] = PLACES
    theirs = shaken(InstructBlipQFormerModel(InstructBlipQFormerConfig(**sizes)))
    state = {"query_tokens": torch.randn(1, 32, WIDTH), "itm_head.weight": torch.randn(2, WIDTH)}
    state |= {"ln_vision.weight": torch.ones(DIM), "ln_vision.bias": torch.zeros(DIM)}
    for name, tensor in theirs.state_dict().items():
        called = name.replace("attention.attention.", "attention.self.")
        state["Qformer.bert." + called.replace("layernorm.", "LayerNorm.")] = tensor
    torch.save({"model": state}, file)
    return file


def plip(file: Path, text: Path) -> Path:
    """Write what a run of the recipe pallava-plip leaves: 4 patches of 32."""
    save_file(trainable_state(ItcItm(started(text))), file)
    return file
