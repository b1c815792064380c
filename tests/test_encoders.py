"""Every kind of encoder on a tiny checkpoint of its own format, against its own library."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathcli.encoders import build_encoder
from pathcli.encoders.clip import architecture_of, architectures, published_normalisation
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.torchvision_guard import guard_torchvision

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def torch() -> Any:
    import torch

    torch.manual_seed(0)
    return torch


@pytest.fixture
def images(torch: Any, rng: np.random.Generator) -> Any:
    return torch.from_numpy(rng.integers(0, 256, (3, 80, 80, 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def open_clip() -> Any:
    guard_torchvision()
    import open_clip

    return open_clip


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, open_clip: Any, tmp_path: Path) -> Path:
    """Register the architecture `Tiny` with open_clip, for real, and save a random checkpoint."""
    import torch

    from pathcli.encoders import clip

    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "Tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    known = architectures() | {"Tiny": TINY}
    monkeypatch.setattr(clip, "architectures", lambda: known)
    model = open_clip.create_model("Tiny", pretrained=None)
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        tmp_path / "tiny.pt",
    )
    return tmp_path / "tiny.pt"


def cosine(a: Any, b: Any) -> float:
    from torch.nn.functional import cosine_similarity

    return float(cosine_similarity(a.flatten(1), b.flatten(1)).min())


def reference(open_clip: Any, checkpoint: Path, images: Any) -> Any:
    """Return open_clip's own features: its transform image by image, its forward."""
    import torch
    from PIL import Image

    model, _, transform = open_clip.create_model_and_transforms("Tiny", pretrained=str(checkpoint))
    batch = torch.stack([transform(Image.fromarray(i.numpy())) for i in images])
    with torch.no_grad():
        return model.eval().encode_image(batch)


# --- open_clip ---------------------------------------------------------------------------


def test_open_clip_features_equal_open_clips_own(tiny: Path, images: Any, open_clip: Any) -> None:
    encoder = build_encoder("open_clip:Tiny", checkpoint=tiny)
    encoder.load("cpu")
    same_size = images[:, :64, :64].contiguous()
    assert encoder.row_shape == (16,)
    expected = reference(open_clip, tiny, same_size)
    assert (encoder.encode(same_size) - expected).abs().max() < 1e-5
    # resized by torch on whole batches, not by PIL image by image
    assert cosine(encoder.encode(images), reference(open_clip, tiny, images)) >= 0.9999


def test_tokens_are_the_patches_of_the_tower(tiny: Path, images: Any) -> None:
    encoder = build_encoder("open_clip:Tiny", checkpoint=tiny, tokens=True)
    encoder.load("cpu")
    assert encoder.row_shape == (16, 32)
    assert encoder.encode(images).shape == (3, 16, 32)


def test_a_safetensors_checkpoint_gives_the_same_features(
    tiny: Path, images: Any, torch: Any
) -> None:
    from safetensors.torch import save_file

    state = torch.load(tiny, weights_only=True)["state_dict"]
    save_file(
        {k.removeprefix("module."): v.contiguous() for k, v in state.items()},
        tiny.with_suffix(".safetensors"),
    )
    found = []
    for path in (tiny, tiny.with_suffix(".safetensors")):
        encoder = build_encoder("open_clip:Tiny", checkpoint=path)
        encoder.load("cpu")
        found.append(encoder.encode(images))
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize(
    "change", [{"tokens": True}, {"precision": "bfloat16"}, {"checkpoint": "other.pt"}]
)
def test_the_id_names_weights_pooling_and_precision(
    tiny: Path, torch: Any, change: dict[str, Any]
) -> None:
    state = torch.load(tiny, weights_only=True)["state_dict"]
    state["module.logit_scale"] += 1
    torch.save({"state_dict": state}, tiny.parent / "other.pt")
    given: dict[str, Any] = {"checkpoint": tiny}
    before = build_encoder("open_clip:Tiny", **given).id
    assert build_encoder("open_clip:Tiny", **given).id == before
    assert build_encoder("open_clip:Tiny", **given | change).id != before


def test_quick_gelu_changes_features_and_id(tiny: Path, images: Any, monkeypatch: Any) -> None:
    from pathcli.encoders.clip import OpenClipEncoder

    plain = build_encoder("open_clip:Tiny", checkpoint=tiny)
    plain.load("cpu")
    id_before, before = plain.id, plain.encode(images)
    monkeypatch.setattr(OpenClipEncoder, "quick_gelu", True)
    quick = build_encoder("open_clip:Tiny", checkpoint=tiny)
    quick.load("cpu")
    assert quick.id != id_before
    assert (quick.encode(images) - before).abs().max() > 1e-4
    gelu = {type(m).__name__ for m in quick.network.modules()}  # type: ignore[attr-defined]
    assert "QuickGELU" in gelu


@pytest.mark.slow
def test_a_mismatched_checkpoint_is_refused_with_the_architecture_that_fits(
    tmp_path: Path, open_clip: Any, torch: Any
) -> None:
    with torch.device("meta"):
        model = open_clip.create_model("ViT-B-32", load_weights=False, device="meta")
    none = torch.zeros(())
    state = {name: none.expand(value.shape) for name, value in model.state_dict().items()}
    torch.save(state, tmp_path / "b32.pt")
    encoder = build_encoder("pathgen-clip", checkpoint=tmp_path / "b32.pt")
    with pytest.raises(DataError, match="use --encoder open_clip:ViT-B-32"):
        encoder.load("cpu")


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14-336", "RN50", "coca_ViT-B-32"])
def test_the_architecture_is_read_off_the_shapes(name: str, torch: Any, open_clip: Any) -> None:
    with torch.device("meta"):
        model = open_clip.create_model(name, pretrained=None, load_weights=False, device="meta")
    assert architecture_of(model.state_dict()) == name


def test_tensors_that_decide_nothing_are_no_mismatch(tiny: Path, torch: Any, images: Any) -> None:
    plain = build_encoder("open_clip:Tiny", checkpoint=tiny)
    plain.load("cpu")
    state = torch.load(tiny, weights_only=True)["state_dict"]
    state = {f"_orig_mod.{k}": v for k, v in state.items() if not k.endswith("logit_scale")}
    state |= {"logit_bias": torch.zeros(()), "input_resolution": torch.tensor(64)}
    state |= {"attn_mask": torch.zeros(8, 8)}
    torch.save(state, tiny.parent / "odd.pt")
    odd = build_encoder("open_clip:Tiny", checkpoint=tiny.parent / "odd.pt")
    odd.load("cpu")
    assert (odd.encode(images) == plain.encode(images)).all()


def test_normalisation_is_that_of_the_published_weights() -> None:
    found = {n: published_normalisation(n)[0] for n in ("ViT-B-16", "ViT-B-16-SigLIP")}
    assert found["ViT-B-16"][0] == pytest.approx(0.48145466)
    assert found["ViT-B-16-SigLIP"] == (0.5, 0.5, 0.5)
    with pytest.raises(UsageError, match="pools its patches"):
        build_encoder("open_clip:coca_ViT-B-32", checkpoint="x", tokens=True).load("cpu")


def test_pathgen_encoders_are_what_their_authors_run() -> None:
    base, large = build_encoder("pathgen-clip"), build_encoder("pathgen-clip-l")
    assert (base.model, base.input_px, base.quick_gelu) == ("ViT-B-16", 224, True)  # type: ignore[attr-defined]
    assert (large.model, large.input_px, large.quick_gelu) == ("ViT-L-14-336", 336, True)  # type: ignore[attr-defined]
    assert (large.native.size_px, large.native.mpp) == (336, 0.5)
    with pytest.raises(ResourceError, match="hf download jamessyx/PathGen-CLIP-L"):
        _ = large.id


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("exploded").touch, ())


@pytest.mark.parametrize("body", [b"", b"garbage" * 50, pickle.dumps({"w": Bomb()})])
def test_a_corrupt_or_malicious_checkpoint_is_refused(
    tmp_path: Path, tiny: Path, body: bytes
) -> None:
    (tmp_path / "bad.pt").write_bytes(body)
    encoder = build_encoder("open_clip:Tiny", checkpoint=tmp_path / "bad.pt")
    with pytest.raises(DataError, match=r"bad\.pt"):
        encoder.load("cpu")
    (tmp_path / "cut.pt").write_bytes(tiny.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"cut\.pt"):
        build_encoder("open_clip:Tiny", checkpoint=tmp_path / "cut.pt").load("cpu")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "given", "match"),
    [
        ("light0", {}, "did you mean 'lite0'"),
        ("open_clip", {}, "open_clip:NAME"),
        ("open_clip:ViT-B-61", {"checkpoint": "x"}, "did you mean 'ViT-B-16'"),
        ("lite0:x", {}, "takes no ':x'"),
        ("lite0", {"checkpoint": "x"}, "does not take --checkpoint"),
        ("timm:resnet19", {}, "timm has no network"),
        ("lite0", {"precision": "int3"}, "--precision is one of"),
    ],
)
def test_wrong_names_and_arguments_are_usage_errors(
    name: str, given: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        _ = build_encoder(name, **given).id


def test_an_absent_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="no such checkpoint"):
        _ = build_encoder("pathgen-clip", checkpoint=tmp_path / "none.pt").id


# --- transformers ------------------------------------------------------------------------


@pytest.fixture
def hf_folder(tmp_path: Path, torch: Any) -> Path:
    guard_torchvision()
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = {"image_size": 64, "patch_size": 16, "hidden_size": 32, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
    folder = tmp_path / "clip"
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def test_hf_features_equal_transformers_own(hf_folder: Path, images: Any, torch: Any) -> None:
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPModel

    encoder = build_encoder(f"hf:{hf_folder}")
    encoder.load("cpu")
    model = CLIPModel.from_pretrained(hf_folder).eval()
    processor = CLIPImageProcessor.from_pretrained(hf_folder)
    pictures = [Image.fromarray(i.numpy()) for i in images]
    with torch.no_grad():
        given = processor(pictures, return_tensors="pt")["pixel_values"]
        pooled = model.vision_model(pixel_values=given)
        expected = model.visual_projection(pooled.pooler_output)
    assert cosine(encoder.encode(images), expected) >= 0.9999
    tokens = build_encoder(f"hf:{hf_folder}", tokens=True)
    tokens.load("cpu")
    assert cosine(tokens.encode(images), pooled.last_hidden_state[:, 1:]) >= 0.9999


def test_a_folder_that_is_no_clip_is_refused(hf_folder: Path, tmp_path: Path) -> None:
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(DataError, match="'bert' model"):
        build_encoder(f"hf:{hf_folder}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no config\.json"):
        build_encoder(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(ResourceError, match="hf download someone/clip"):
        build_encoder("hf:someone/clip")


def test_the_folder_of_the_newest_transformers_is_read(hf_folder: Path, images: Any) -> None:
    old = build_encoder(f"hf:{hf_folder}")
    how = json.loads((hf_folder / "preprocessor_config.json").read_text())
    (hf_folder / "preprocessor_config.json").unlink()
    (hf_folder / "processor_config.json").write_text(json.dumps({"image_processor": how}))
    new = build_encoder(f"hf:{hf_folder}")
    assert new.preprocess == old.preprocess  # type: ignore[attr-defined]
    (hf_folder / "processor_config.json").write_text(
        json.dumps({"image_processor": how | {"do_normalize": False}})
    )
    with pytest.raises(DataError, match="do_normalize is off"):
        build_encoder(f"hf:{hf_folder}")


def test_hf_weights_that_do_not_fit_their_configuration_are_refused(
    hf_folder: Path, torch: Any
) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(hf_folder / "model.safetensors")
    state.pop("visual_projection.weight")
    save_file(state, hf_folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="visual_projection"):
        build_encoder(f"hf:{hf_folder}").load("cpu")
    (hf_folder / "model.safetensors").write_bytes(b"rot")
    with pytest.raises(DataError, match="cannot be read"):
        build_encoder(f"hf:{hf_folder}").load("cpu")


# --- timm --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pooled", "tokens"),
    [("resnet10t", (512,), (36, 512)), ("vit_tiny_patch16_224", (192,), (196, 192))],
)
def test_timm_networks_take_a_local_checkpoint(
    tmp_path: Path, torch: Any, name: str, pooled: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    import timm

    network = timm.create_model(name, pretrained=False)
    torch.save(network.state_dict(), tmp_path / "w.pt")
    for wanted, flag in ((pooled, False), (tokens, True)):
        encoder = build_encoder(f"timm:{name}", checkpoint=tmp_path / "w.pt", tokens=flag)
        encoder.load("cpu")
        assert encoder.row_shape == wanted
    other = timm.create_model("resnet18", pretrained=False)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    with pytest.raises(DataError, match="does not fit timm's"):
        build_encoder(f"timm:{name}", checkpoint=tmp_path / "w.pt").load("cpu")


def test_published_timm_weights_need_the_hub() -> None:
    with pytest.raises(ResourceError, match="hf download timm/"):
        _ = build_encoder("timm:vit_tiny_patch16_224").id


@pytest.mark.usefixtures("lite0")
def test_lite0_is_the_network_its_weights_were_trained_for(torch: Any, data: Path) -> None:
    from PIL import Image

    encoder = build_encoder("lite0")
    encoder.load("cpu")
    tokens = build_encoder("lite0", tokens=True)
    tokens.load("cpu")
    assert encoder.row_shape == (1280,)
    assert tokens.row_shape == (49, 1280)
    lung = data / "lc25000-lung" / "images"
    paths = [sorted((lung / c).iterdir())[i] for c in ("lung_n", "lung_aca") for i in range(8)]
    batch = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))) for p in paths])
    features = encoder.encode(batch)
    assert torch.allclose(tokens.encode(batch).mean(1), features, atol=1e-4)
    unit = torch.nn.functional.normalize(features, dim=1)
    alike = unit @ unit.T
    same = (alike[:8, :8].sum() - 8 + alike[8:, 8:].sum() - 8) / 112
    assert same > alike[:8, 8:].mean() + 0.02  # alike tissue, alike features
    assert features.std() > 0.1


# --- guard -------------------------------------------------------------------------------


def test_torchvision_imports_after_the_guard_and_twice_is_once() -> None:
    guard_torchvision()
    guard_torchvision()
    import torchvision

    assert torchvision.__version__
