"""Q-Formers so small that a test makes several, ours and transformers' of the same sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pathcli.torchvision_guard import guard_torchvision
from pathcli.vlm.qformer import QFormer

DIM, WIDTH, LAYERS, QUERIES, WORDS, PLACES = 24, 32, 4, 5, 21, 16
SIZES = {
    "queries": QUERIES,
    "width": WIDTH,
    "layers": LAYERS,
    "heads": 2,
    "hidden": 48,
    "words": WORDS,
    "positions": PLACES,
    "text_limit": 10,
}
THEIRS = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "encoder_hidden_size": DIM,
    "vocab_size": WORDS,
    "max_position_embeddings": PLACES,
}


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """Draw every weight anew, norms and biases among them, so that each one matters."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(module.named_parameters()):
            drawn = torch.randn(weight.shape, generator=draws) * 0.2
            norm = name.endswith("weight") and weight.ndim == 1
            weight.copy_(drawn + (1 if norm else 0))
    return module.eval()


def qformer(dim_out: int | None = None, **given: Any) -> QFormer:
    return shaken(QFormer(DIM, dim_out, **SIZES | {"init": "random"} | given))


def image(n: int = 3, t: int = 7) -> Tensor:
    return torch.randn(n, t, DIM, generator=torch.Generator().manual_seed(1))


def text(n: int = 3, t: int = 6, padded: int = 2) -> dict[str, Tensor]:
    """Texts of which the first is shorter than the others by `padded`."""
    draws = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(5, WORDS - 1, (n, t), generator=draws), torch.ones(n, t).long()
    mask[0, t - padded :] = 0
    return {"ids": ids * mask, "mask": mask}


def blip2_qformer(*, reads: bool, **given: int) -> Any:
    guard_torchvision()
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(**THEIRS, use_qformer_text_input=reads, **given)
    return shaken(Blip2QFormerModel(config))


def instruct_qformer() -> Any:
    guard_torchvision()
    from transformers import InstructBlipQFormerConfig, InstructBlipQFormerModel

    return shaken(InstructBlipQFormerModel(InstructBlipQFormerConfig(**THEIRS)))


def whole(kind: str) -> Any:
    """Return one of transformers' BLIP-2s with an image tower and, where it has one, an OPT."""
    guard_torchvision()
    import transformers

    family = "InstructBlip" if kind.startswith("InstructBlip") else "Blip2"
    reads = {} if family == "InstructBlip" else {"use_qformer_text_input": "Retrieval" in kind}
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    words = {"hidden_size": 40, "ffn_dim": 48, "word_embed_proj_dim": 40, "vocab_size": 30}
    words |= {"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = getattr(transformers, f"{family}Config")(
        vision_config=tower | {"hidden_size": DIM, "intermediate_size": 48},
        qformer_config=THEIRS | reads,
        text_config=transformers.OPTConfig(**words).to_dict(),
        num_query_tokens=QUERIES,
        image_text_hidden_size=8,
    )
    return shaken(getattr(transformers, kind)(config))


def lavis(state: dict[str, Tensor], queries: Tensor) -> dict[str, Tensor]:
    """Call the weights of `blip2_qformer` as LAVIS does, the words' embeddings among them."""
    found = {"query_tokens": queries}
    for name, tensor in state.items():
        called = name.replace("attention.attention.", "attention.self.")
        found["Qformer.bert." + called.replace("layernorm.", "embeddings.LayerNorm.")] = tensor
    return found
