"""EVA-CLIP's image tower from tiny checkpoints of its three formats, against BLIP-2's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file, save_file
from tiny_encoders import loaded

from pathcli.encoders import build_encoder, eva
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.torchvision_guard import guard_torchvision

WIDTH, HIDDEN, BLOCKS, PATCH = 176, 200, 2, 56  # two heads of 88, 4 x 4 patches
TOKENS = 1 + 4 * 4

State = dict[str, torch.Tensor]


@pytest.fixture
def vision() -> Any:
    """BLIP-2's image tower in transformers' form, nothing in it zero or one."""
    guard_torchvision()
    from transformers import Blip2VisionConfig, Blip2VisionModel

    sizes = {"hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": BLOCKS}
    set_seed(0)
    model = Blip2VisionModel(
        Blip2VisionConfig(**sizes, num_attention_heads=2, image_size=224, patch_size=PATCH)
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
        for layer in model.encoder.layers:  # EVA's keys have no bias
            layer.self_attn.qkv.bias[WIDTH : 2 * WIDTH] = 0
    return model.eval()


@pytest.fixture
def hf(vision: Any, tmp_path: Path) -> Path:
    """A file as transformers saves BLIP-2: the tower among other tensors."""
    state = {f"vision_model.{name}": x.contiguous() for name, x in vision.state_dict().items()}
    state["qformer.layernorm.weight"] = torch.ones(4)
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def lavis(vision: Any) -> State:
    """Return the same weights as LAVIS names them."""
    state: State = {}
    for name, tensor in vision.state_dict().items():
        if name.startswith("post_layernorm"):
            continue
        if name.startswith("embeddings."):
            key = {"class": "cls_token", "posit": "pos_embed"}.get(name[11:16])
            state[key or f"patch_embed.proj.{name.rpartition('.')[2]}"] = tensor
            continue
        _, _, block, rest = name.split(".", 3)
        rest = rest.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
        rest = rest.replace("layer_norm", "norm")
        if rest == "attn.qkv.bias":
            query, _, value = tensor.chunk(3)
            state |= {f"blocks.{block}.attn.q_bias": query, f"blocks.{block}.attn.v_bias": value}
        else:
            state[f"blocks.{block}.{rest}"] = tensor
    return state


@pytest.fixture
def images(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (2, 224, 224, 3), dtype=np.uint8))


def tower(checkpoint: Path) -> Any:
    return loaded("eva-clip-g", checkpoint=checkpoint, tokens=True)


def test_tokens_are_those_of_the_last_block_before_the_final_norm(
    hf: Path, vision: Any, images: torch.Tensor
) -> None:
    encoder = tower(hf)
    assert encoder.row_shape == (TOKENS, WIDTH)
    with torch.no_grad():
        seen = vision(encoder.preprocess(images), output_hidden_states=True)
    before = encoder.encode(images)
    assert (before - seen.hidden_states[-1]).abs().max() < 1e-5
    with torch.no_grad():
        normed = vision.post_layernorm(before.clone())
    assert (normed - seen.last_hidden_state).abs().max() < 1e-5
    assert (before - seen.last_hidden_state).abs().max() > 0.1


def test_the_three_formats_give_equal_tokens(
    hf: Path, vision: Any, images: torch.Tensor, tmp_path: Path
) -> None:
    expected, theirs = tower(hf).encode(images), lavis(vision)
    assert len(theirs) == 4 + BLOCKS * 13
    torch.save(theirs, tmp_path / "eva_vit_g.pth")
    wrapped = {f"visual_encoder.{name}": x for name, x in theirs.items()}
    wrapped |= {"ln_vision.weight": torch.ones(WIDTH), "query_tokens": torch.zeros(1, 32, 4)}
    torch.save({"model": wrapped, "epoch": 1}, tmp_path / "blip2.pth")
    for name in ("eva_vit_g.pth", "blip2.pth"):
        assert (tower(tmp_path / name).encode(images) == expected).all()


def test_a_folder_in_several_parts_is_read_whole(
    hf: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    state, folder, blank = load_file(hf), tmp_path / "parts", tmp_path / "blank"
    folder.mkdir()
    blank.mkdir()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: state[n] for n in part}, folder / f"model-{number:05}-of-00002.safetensors")
    assert (tower(folder).encode(images) == tower(hf).encode(images)).all()
    with pytest.raises(ResourceError, match=r"holds no \*\.safetensors"):
        tower(blank)


def test_what_blip_2_leaves_out_is_left_out(
    hf: Path, vision: Any, images: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a file of EVA-CLIP's own: a block more, and what follows it."""
    monkeypatch.setattr(eva, "BLOCKS", BLOCKS)
    state = lavis(vision)
    more = {n.replace("blocks.1", "blocks.2"): x for n, x in state.items() if "blocks.1" in n}
    more |= {"norm.weight": torch.ones(WIDTH), "head.weight": torch.ones(3, WIDTH)}
    torch.save(state | more, tmp_path / "eva_vit_g.pth")
    found = tower(tmp_path / "eva_vit_g.pth")
    assert (found.encode(images) == tower(hf).encode(images)).all()


def test_half_precision_is_its_own_and_near(hf: Path, images: torch.Tensor) -> None:
    """As CLOVER runs it."""
    whole, half = tower(hf), eva.EvaClipG(checkpoint=hf)
    half.load("cpu")
    assert half.precision == "float16"
    assert half.network.encoder.layers[0].mlp.fc1.weight.dtype == torch.float16
    assert half.network.encoder.layers[0].layer_norm1.weight.dtype == torch.float32
    assert half.id != whole.id
    given, expected = half.encode(images), whole.encode(images)
    assert given.dtype == torch.float32
    assert 0 < float((given - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_blip_2s_sizes_fill_a_vit_g() -> None:
    guard_torchvision()
    from transformers import Blip2VisionConfig

    config = Blip2VisionConfig()
    assert config.num_hidden_layers == eva.BLOCKS == 39
    assert config.hidden_size // config.num_attention_heads == eva.HEAD_DIM
    assert (config.hidden_size, config.layer_norm_eps, config.hidden_act) == (1408, 1e-6, "gelu")


def test_other_checkpoints_are_refused(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="patch tokens only: --tokens"):
        build_encoder("eva-clip-g")
    state = load_file(hf)
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"other\.safetensors: holds no EVA-CLIP image tower"):
        tower(tmp_path / "other.safetensors")
    place = "vision_model.embeddings.position_embedding"
    save_file(state | {place: torch.zeros(1, 50, WIDTH)}, tmp_path / "larger.safetensors")
    with pytest.raises(DataError, match=r"no EVA-CLIP for 224 px \(.*position_embedding is"):
        tower(tmp_path / "larger.safetensors")
    del state["vision_model.encoder.layers.0.mlp.fc2.bias"]
    save_file(state, tmp_path / "part.safetensors")
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.fc2\.bias missing"):
        tower(tmp_path / "part.safetensors")
