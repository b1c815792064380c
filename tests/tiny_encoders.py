"""Checkpoints of real formats, small enough to make on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pathcli.encoders import build_encoder
from pathcli.torchvision_guard import guard_torchvision

TEXTS = ["invasive carcinoma", "benign", "a dense infiltrate of lymphocytes"]
WORDS = 49408
LIMIT = 12
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": LIMIT, "width": 16, "heads": 2, "layers": 2},
}
COCA = {
    "embed_dim": 16,
    "vision_cfg": TINY["vision_cfg"]
    | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
    "text_cfg": TINY["text_cfg"] | {"embed_cls": True, "output_tokens": True},
    "multimodal_cfg": {"context_length": LIMIT, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
}


def open_clip_file(
    monkeypatch: pytest.MonkeyPatch, folder: Path, name: str = "TinyText", config: Any = None
) -> Path:
    """Register an architecture with open_clip, for real, and save random weights of it."""
    guard_torchvision()
    import open_clip
    import torch

    from pathcli.encoders import clip

    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{name}.json").write_text(json.dumps(config or TINY))
    open_clip.add_model_config(folder / "configs")
    known = clip.architectures() | {name: config or TINY}
    monkeypatch.setattr(clip, "architectures", lambda: known)
    torch.manual_seed(1)
    state = open_clip.create_model(name, pretrained=None).state_dict()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return folder / "open_clip_pytorch_model.bin"


def clip_folder(folder: Path) -> Path:
    """Save a transformers CLIP with random weights and CLIP's own tokenizer."""
    guard_torchvision()
    import open_clip
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    vision = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": LIMIT}
    torch.manual_seed(1)
    CLIPModel(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    ).save_pretrained(folder)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    bpe = open_clip.get_tokenizer("ViT-B-16")
    merges = [" ".join(pair) for pair in bpe.bpe_ranks]
    made = {v: k for k, v in bpe.encoder.items()}
    vocabulary = {made[i]: i for i in range(WORDS - 2)}
    vocabulary |= {"<|startoftext|>": WORDS - 2, "<|endoftext|>": WORDS - 1}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def loaded(name: str, **given: Any) -> Any:
    encoder = build_encoder(name, **given)
    encoder.load("cpu")
    return encoder
