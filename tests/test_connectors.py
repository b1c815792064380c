"""The connector `mlp` against LLaVA's projector, and what encoders give it to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image
from tiny_encoders import clip_folder, open_clip_file

from pathcli.encoders.clip import OpenClipEncoder, PathGenClip, QuiltNet
from pathcli.encoders.hf import HFClipEncoder
from pathcli.encoders.imageset import centre_square
from pathcli.encoders.pallava_plip import PallavaPlip
from pathcli.encoders.pallava_towers import vision_part, vision_tower
from pathcli.errors import UsageError
from pathcli.registry import resolve
from pathcli.torchvision_guard import guard_torchvision
from pathcli.vlm.connectors import Mlp


def test_mlp_is_llavas_projector() -> None:
    guard_torchvision()
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    given = {
        "vision_config": CLIPVisionConfig(hidden_size=12),
        "text_config": LlamaConfig(hidden_size=20, num_attention_heads=2),
    }
    theirs = LlavaMultiModalProjector(LlavaConfig(**given))
    ours = resolve("connector", "mlp")(12, 20)
    ours.start()
    theirs.linear_1.load_state_dict(ours.layers[0].state_dict())
    theirs.linear_2.load_state_dict(ours.layers[2].state_dict())
    tokens = torch.randn(3, 7, 12)
    assert (ours(tokens, torch.arange(3)) - theirs(tokens)).abs().max() < 1e-6
    assert ours.count(7) == 7


def test_its_depth_is_the_number_of_linear_layers() -> None:
    linear = Mlp(12, 20, depth=1)
    tokens = torch.randn(2, 3, 12)
    state = linear.state_dict()
    expected = tokens @ state["layers.0.weight"].T + state["layers.0.bias"]
    assert (linear(tokens, torch.arange(2)) - expected).abs().max() < 1e-6
    assert [type(layer).__name__ for layer in Mlp(12, 20, depth=3).layers] == [
        *("Linear", "GELU", "Linear", "GELU", "Linear")
    ]
    with pytest.raises(UsageError, match="depth must be at least 1"):
        Mlp(12, 20, depth=0)


def test_its_first_weights_are_the_seeds() -> None:
    made = Mlp(12, 20)
    drawn = []
    for seed in (1, 1, 2):
        set_seed(seed)
        assert made.start()["kind"] == "mlp"
        drawn.append(made.state_dict()["layers.0.weight"].clone())
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()


def view(frame: str, image: np.ndarray, side: int) -> np.ndarray:
    (only,) = Mlp(1, 1, frame=frame).views(image, side)  # type: ignore[arg-type]
    return only


def test_the_padded_frame_is_llavas(rng: np.random.Generator) -> None:
    """LLaVA: the image in the middle of a square of (122, 116, 104)."""
    image = rng.integers(0, 256, (40, 61, 3), dtype=np.uint8)
    square = Image.new("RGB", (61, 61), (122, 116, 104))
    square.paste(Image.fromarray(image), (0, 10))
    assert (view("pad", image, 61) == np.asarray(square)).all()
    assert (view("pad", image.transpose(1, 0, 2), 61)[:, :10] == (122, 116, 104)).all()
    shrunk = np.asarray(square.resize((20, 20), Image.Resampling.BICUBIC))
    assert np.abs(view("pad", image, 20).astype(int) - shrunk).max() <= 2


def test_frames_show_the_middle_or_the_whole(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    assert (view("centre", image, 40) == image[:, 10:50]).all()
    assert (view("centre", image, 16) == centre_square(image, 16)).all()
    whole = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC))
    assert np.abs(view("squash", image, 24).astype(int) - whole).max() <= 2
    square = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
    assert all((view(frame, square, 30) == square).all() for frame in ("centre", "pad", "squash"))
    with pytest.raises(UsageError, match="frame is one of centre, pad, squash, not 'crop'"):
        view("crop", image, 24)


# --- the tokens it reads -----------------------------------------------------------------


@pytest.fixture
def images(rng: np.random.Generator) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))


def test_open_clips_tokens_of_a_layer_are_transformers_hidden_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: torch.Tensor
) -> None:
    """The same weights in both libraries."""
    guard_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    file = open_clip_file(monkeypatch, tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 128, "image_size": 64, "patch_size": 16}
    hf = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="gelu")).eval()
    tower = getattr(hf, "vision_model", hf)
    tower.load_state_dict(vision_part(torch.load(file, weights_only=True)), strict=True)
    made = {
        n: OpenClipEncoder(model="TinyText", checkpoint=file, tokens=True, layer=n)
        for n in (-1, -2)
    }
    for encoder in made.values():
        encoder.load("cpu")
    with torch.no_grad():
        seen = tower(made[-1].preprocess(images), output_hidden_states=True).hidden_states
        last = tower.post_layernorm(seen[-1])
    assert made[-2].row_shape == (16, 32)
    assert (made[-2].encode(images) - seen[-2][:, 1:]).abs().max() < 1e-5
    assert (made[-1].encode(images) - last[:, 1:]).abs().max() < 1e-5
    assert (seen[-1] - seen[-2]).abs().max() > 0.1


def test_a_clip_folders_tokens_are_its_hidden_states(tmp_path: Path, images: torch.Tensor) -> None:
    guard_torchvision()
    from transformers import CLIPModel

    folder = clip_folder(tmp_path)
    network = CLIPModel.from_pretrained(folder).eval()
    for layer in (-1, -2):
        encoder = HFClipEncoder(model=str(folder), tokens=True, layer=layer)
        encoder.load("cpu")
        with torch.no_grad():
            pixels = encoder.preprocess(images)
            seen = network.vision_model(pixel_values=pixels, output_hidden_states=True)
        assert (encoder.encode(images) - seen.hidden_states[layer][:, 1:]).abs().max() < 1e-5


def test_pallava_plips_tokens_are_of_the_last_but_one_layer(tmp_path: Path) -> None:
    tower = vision_tower(32, 3, 112, 48)
    torch.save(tower.state_dict(), tmp_path / "plip.bin")
    encoder = PallavaPlip(checkpoint=tmp_path / "plip.bin", tokens=True)
    encoder.load("cpu")
    images = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    with torch.no_grad():
        seen = tower.eval()(encoder.preprocess(images), output_hidden_states=True).hidden_states
    assert len(seen) == 4
    assert encoder.row_shape == (4, 32)
    assert (encoder.encode(images) - seen[2][:, 1:]).abs().max() < 1e-5
    assert (seen[3] - seen[2]).abs().max() > 1e-3


def test_the_layer_is_in_the_id_where_it_is_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = open_clip_file(monkeypatch, tmp_path)
    (tmp_path / "hf").mkdir()
    for build in (
        lambda **given: OpenClipEncoder(model="TinyText", checkpoint=file, **given),
        lambda **given: HFClipEncoder(model=str(clip_folder(tmp_path / "hf")), **given),
        lambda **given: PathGenClip(checkpoint=file, **given),
        lambda **given: QuiltNet(checkpoint=file, **given),
    ):
        ids = [build(tokens=True, layer=layer).id for layer in (-1, -2, -3)]
        assert len(set(ids)) == 3
        assert ids[0] == build(tokens=True).id
        with pytest.raises(UsageError, match="layer -2 is of patch tokens; set tokens: true"):
            build(layer=-2)
        with pytest.raises(UsageError, match="from the last one's -1 backwards: not 1"):
            build(tokens=True, layer=1)


def test_a_layer_the_tower_has_not_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = open_clip_file(monkeypatch, tmp_path), clip_folder(tmp_path / "hf")
    for encoder in (
        OpenClipEncoder(model="TinyText", checkpoint=file, tokens=True, layer=-3),
        HFClipEncoder(model=str(folder), tokens=True, layer=-3),
    ):
        with pytest.raises(UsageError, match="this tower has 2: not -3"):
            encoder.load("cpu")
