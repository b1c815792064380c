"""PA-LLaVA's PLIP so small that it trains in a second, and a BERT for it to begin from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from pathcli.encoders.pallava_plip import PallavaPlipModel
from pathcli.torchvision_guard import guard_torchvision

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220)}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tissue", "of", "a", "much", *COLOURS]
WORDS += [str(number) for number in range(12)]
PATCH, PATCHES = 112, 4


def bert_folder(folder: Path) -> Path:
    """Make a BERT of two layers with its vocabulary, as a folder of the hub."""
    guard_torchvision()
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    limits = {"intermediate_size": 48, "max_position_embeddings": 16, "vocab_size": len(WORDS)}
    set_seed(0)
    BertModel(BertConfig(**sizes, **limits)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def model(bert: Path, **given: Any) -> PallavaPlipModel:
    tiny = {"width": 32, "layers": 2, "patch_px": PATCH, "dim": 8, "queue": 10, "text_limit": 10}
    return PallavaPlipModel(**{"vision": "random", "text": str(bert)} | tiny | given)


def started(bert: Path, **given: Any) -> PallavaPlipModel:
    set_seed(1)
    made = model(bert, **given)
    made.start()
    return made.eval()


def images(n: int = 2) -> torch.Tensor:
    draws = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 30, 40, 3), generator=draws, dtype=torch.uint8)
