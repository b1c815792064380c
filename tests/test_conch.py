"""CONCH on a tiny checkpoint of its own format, against its towers written out by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoders import TEXTS, loaded

from pathcli.encoders import build_encoder
from pathcli.encoders.build import text_encoder
from pathcli.encoders.conch import TOKENIZER, Conch, Sizes
from pathcli.errors import DataError, ResourceError


@pytest.fixture
def images(rng: np.random.Generator) -> Any:
    import torch

    return torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))


SMALL = Sizes(
    image_px=64,
    width=32,
    layers=2,
    heads=2,
    pool_heads=4,
    vocabulary=12,
    words=8,
    out=16,
)


def conch_tokenizer(path: Path, size: int = 12) -> None:
    """Save a tokenizer of CONCH's form: lower case, start and end around the words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = ["<pad>", "<start_of_text>", "<end_of_text>", "benign", "invasive", "carcinoma"]
    words += [f"w{i}" for i in range(size - len(words))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "w0"))
    made.add_special_tokens(words[:3])
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", 1), ("<end_of_text>", 2)],
    )
    made.save(str(path))


@pytest.fixture
def conch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as CONCH's: both towers, the captioner's tensors, the tokenizer beside."""
    import torch

    from pathcli.encoders import conch as module

    monkeypatch.setattr(Conch, "sizes", SMALL)
    torch.manual_seed(3)
    state = module._towers(SMALL).state_dict()
    state = {k: torch.randn(v.shape) * 0.3 for k, v in state.items()}
    state["logit_scale"] = torch.tensor(4.0)
    state["text_decoder.resblocks.0.ln_1.weight"] = torch.zeros(3)
    state["visual.attn_pool_caption.query"] = torch.zeros(4, 32)
    torch.save(state, tmp_path / "pytorch_model.bin")
    conch_tokenizer(tmp_path / TOKENIZER)
    return tmp_path


def norm(x: Any, state: Any, name: str) -> Any:
    from torch.nn.functional import layer_norm

    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def attend(q: Any, k: Any, v: Any, heads: int, allowed: Any) -> Any:
    """Return scaled dot-product attention of one sequence, written out."""
    out = []
    for head in zip(*(x.chunk(heads, -1) for x in (q, k, v)), strict=True):
        scores = head[0] @ head[1].T / math.sqrt(head[0].shape[-1])
        out.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ head[2])
    import torch

    return torch.cat(out, -1)


def text_by_hand(state: Any, ids: list[int], sizes: Sizes) -> Any:
    """Return CONCH's text embedding: causal words, and a class token that looks back at them.

    The mask of the class token is shifted by one, as in open_clip when CONCH was trained: it
    sees the words and the first padding behind them, and not itself.
    """
    import torch
    from torch.nn.functional import gelu

    words = ids + [0] * (sizes.words - len(ids))
    table = state["text.token_embedding.weight"]
    x = torch.cat([table[words], state["text.cls_emb"][None]]) + state["text.positional_embedding"]
    allowed = torch.ones(len(x), len(x), dtype=torch.bool).tril()
    allowed[-1] = torch.tensor([True, *(word != 0 for word in words)])
    for i in range(sizes.layers):
        block = f"text.transformer.resblocks.{i}"
        p = {k.removeprefix(f"{block}."): v for k, v in state.items() if k.startswith(block)}
        h = norm(x, p, "ln_1") @ p["attn.in_proj_weight"].T + p["attn.in_proj_bias"]
        h = attend(*h.chunk(3, -1), sizes.heads, allowed)
        x = x + h @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        h = gelu(norm(x, p, "ln_2") @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"])
        x = x + h @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]
    return norm(x[-1], state, "text.ln_final") @ state["text.text_projection"]


def test_conchs_image_embedding_is_the_pooled_query_projected(conch: Path, images: Any) -> None:
    import torch

    encoder = loaded("conch", checkpoint=conch)
    state = torch.load(conch / "pytorch_model.bin", weights_only=True)
    pool = "visual.attn_pool_contrast"
    p = {k.removeprefix(f"{pool}."): v for k, v in state.items() if k.startswith(pool)}
    query = norm(p["query"], p, "ln_q") @ p["attn.q_proj_weight"].T
    expected = []
    with torch.no_grad():
        seen = encoder.network.visual.trunk.forward_features(encoder.preprocess(images))
    for tokens in seen:
        keys = norm(tokens, p, "ln_k")
        q, k, v = p["attn.in_proj_bias"].chunk(3)
        k, v = keys @ p["attn.k_proj_weight"].T + k, keys @ p["attn.v_proj_weight"].T + v
        pooled = attend(query + q, k, v, SMALL.pool_heads, torch.ones(1, len(keys)).bool())
        pooled = pooled @ p["attn.out_proj.weight"].T + p["attn.out_proj.bias"]
        expected.append(norm(pooled[0], state, "visual.ln_contrast"))
    expected = torch.stack(expected) @ state["visual.proj_contrast"]
    assert encoder.row_shape == (16,)
    assert (encoder.encode(images) - expected).abs().max() < 1e-4
    assert loaded("conch", checkpoint=conch, tokens=True).row_shape == (16, 32)


def test_conchs_text_embedding_is_its_class_tokens(conch: Path) -> None:
    import torch

    encoder = text_encoder(loaded("conch", checkpoint=conch))
    state = torch.load(conch / "pytorch_model.bin", weights_only=True)
    found = encoder.encode_text(["Invasive carcinoma", "benign", "benign " * 200])
    ids = [[1, 4, 5, 2], [1, 3, 2], [1, 3, 3, 3, 3, 3, 3, 2]]
    expected = torch.stack([text_by_hand(state, row, SMALL) for row in ids])
    assert (found - expected).abs().max() < 1e-4
    assert encoder.logit_scale == pytest.approx(54.598150)


def test_conch_counts_its_class_token_too(conch: Path) -> None:
    encoder = text_encoder(build_encoder("conch", checkpoint=conch))
    assert encoder.text_limit == 9
    assert encoder.count_tokens(["benign", "benign " * 6, "benign " * 200]) == [4, 9, 203]


def test_conchs_low_precision_gives_nearly_the_same(conch: Path, images: Any) -> None:
    from torch.nn.functional import cosine_similarity

    whole, half = (loaded("conch", checkpoint=conch, precision=p) for p in ("float32", "bfloat16"))
    assert cosine_similarity(whole.encode(images), half.encode(images)).min() > 0.99
    assert cosine_similarity(whole.encode_text(TEXTS), half.encode_text(TEXTS)).min() > 0.99


def test_another_checkpoint_than_conchs_is_refused(conch: Path) -> None:
    import torch

    state = torch.load(conch / "pytorch_model.bin", weights_only=True)
    for change in (
        {"visual.trunk.pos_embed": torch.zeros(1, 5, 32)},
        {"visual.proj": torch.ones(1)},
    ):
        torch.save(state | change, conch / "other.bin")
        with pytest.raises(DataError, match=f"does not fit CONCH .*{next(iter(change))}"):
            loaded("conch", checkpoint=conch / "other.bin")


def test_conchs_tokenizer_is_asked_for_with_the_command(
    conch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.encoders.conch.cache_root", lambda: tmp_path / "kept")
    conch_tokenizer(conch / TOKENIZER, size=13)
    with pytest.raises(DataError, match="knows 13 tokens, CONCH's 12"):
        build_encoder("conch", checkpoint=conch).count_tokens(TEXTS)  # type: ignore[attr-defined]
    (conch / TOKENIZER).unlink()
    with pytest.raises(ResourceError, match=r"curl -fL --create-dirs -o .*kept/conch/conch_byte"):
        build_encoder("conch", checkpoint=conch).count_tokens(TEXTS)  # type: ignore[attr-defined]
    (tmp_path / "kept" / "conch").mkdir(parents=True)
    conch_tokenizer(tmp_path / "kept" / "conch" / TOKENIZER)
    encoder = text_encoder(build_encoder("conch", checkpoint=conch))
    assert encoder.count_tokens(["benign"]) == [4]


def test_conchs_own_sizes_are_those_of_its_checkpoint() -> None:
    import torch

    from pathcli.encoders import conch as module

    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in module._towers(Sizes()).state_dict().items()}
    expected = {
        "visual.trunk.pos_embed": (1, 785, 768),
        "visual.trunk.blocks.11.mlp.fc1.weight": (3072, 768),
        "visual.attn_pool_contrast.query": (1, 512),
        "visual.attn_pool_contrast.attn.k_proj_weight": (512, 768),
        "visual.proj_contrast": (512, 512),
        "text.positional_embedding": (128, 768),
        "text.cls_emb": (768,),
        "text.token_embedding.weight": (32007, 768),
        "text.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
        "text.text_projection": (768, 512),
    }
    assert {name: shapes.get(name) for name in expected} == expected
