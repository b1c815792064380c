"""Whole batches prepared by torch, against what each encoder's authors do image by image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pathcli.encoders import build_encoder
from pathcli.encoders.preprocess import Preprocess
from pathcli.torchvision_guard import guard_torchvision

MEAN_ERROR, WORST_ERROR, COSINE = 0.02, 2.0, 0.9999


def tissue(side: int, n: int = 4) -> np.ndarray:
    """Stained texture uint8 [n, side, side, 3]: smooth colour, sharp nuclei, grain."""
    rng = np.random.default_rng(side)
    made = []
    for _ in range(n):
        coarse = rng.integers(90, 250, (side // 16 + 1, side // 16 + 1, 3), dtype=np.uint8)
        image = np.array(Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR))
        y, x = np.mgrid[:side, :side]
        for cx, cy, r in rng.integers((0, 0, 3), (side, side, 9), (40, 3)):
            image[(x - cx) ** 2 + (y - cy) ** 2 < r * r] = (80, 50, 120)
        grain = rng.integers(-12, 13, image.shape)
        made.append(np.clip(image.astype(int) + grain, 0, 255).astype(np.uint8))
    return np.stack(made)


def published(size: int, mean: Any, std: Any, interpolation: str) -> Any:
    """PIL's resize, torchvision's ToTensor and Normalize: what model cards print."""
    guard_torchvision()
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        InterpolationMode,
        Normalize,
        Resize,
        ToTensor,
    )

    how = InterpolationMode(interpolation)
    return Compose([Resize(size, how), CenterCrop(size), ToTensor(), Normalize(mean, std)])


def open_clips(encoder: Any) -> Any:
    guard_torchvision()
    from open_clip.transform import image_transform

    del encoder
    return image_transform(224, is_train=False)  # its defaults are those of OpenAI's weights


def timms(encoder: Any) -> Any:
    guard_torchvision()
    import timm
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config(
        {}, pretrained_cfg=timm.get_pretrained_cfg(encoder.model).to_dict()
    )
    config.pop("crop_mode")
    return create_transform(**config | {"crop_pct": 1.0})  # tiles are used whole


OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

PUBLISHED: dict[str, Any] = {
    "open_clip:ViT-B-16": open_clips,
    "pathgen-clip": open_clips,
    "quilt-net": open_clips,
    "pathgen-clip-l": lambda _: published(336, *OPENAI, "bicubic"),
    "conch": lambda _: published(448, *OPENAI, "bicubic"),
    "uni": lambda _: published(224, *IMAGENET, "bilinear"),
    "eva-clip-g": lambda _: published(224, *OPENAI, "bicubic"),
    "pallava-plip": lambda _: published(224, *OPENAI, "bicubic"),
    "lite0": timms,
    "timm:vit_base_patch16_224": timms,
    "timm:resnet18": timms,
}


def encoder_of(name: str) -> Any:
    given = {} if name in {"lite0", "pallava-plip"} else {"checkpoint": "unread"}
    return build_encoder(name, tokens=name == "eva-clip-g", **given)


def network(side: int) -> Any:
    """A network with random weights that sees edges and colours."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 32, 16, 16),
        torch.nn.GELU(),
        torch.nn.Conv2d(32, 64, 2, 2),
        torch.nn.GELU(),
        torch.nn.AdaptiveAvgPool2d(2),
        torch.nn.Flatten(),
    ).eval()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("scale", [8 / 7, 2])
def test_batches_are_prepared_as_the_authors_prepare_images(name: str, scale: float) -> None:
    import torch

    encoder = encoder_of(name)
    how: Preprocess = encoder.preprocess
    images = tissue(int(how.size * scale))
    transform = PUBLISHED[name](encoder)
    theirs = torch.stack([transform(Image.fromarray(i)) for i in images])
    ours = how(torch.from_numpy(images))
    assert ours.shape == theirs.shape
    error = ((ours - theirs) * torch.tensor(how.std).view(3, 1, 1) * 255).abs()
    assert error.max() <= WORST_ERROR + 1e-3
    assert error.mean() <= MEAN_ERROR
    with torch.inference_mode():
        a, b = (network(how.size)(x) for x in (ours, theirs))
    assert torch.nn.functional.cosine_similarity(a, b).min() >= COSINE


def test_a_clip_folder_is_prepared_as_its_own_processor_does(tmp_path: Path) -> None:
    guard_torchvision()
    import torch
    from tiny_encoders import clip_folder
    from transformers import CLIPImageProcessor

    folder = clip_folder(tmp_path / "clip")
    how = build_encoder(f"hf:{folder}").preprocess  # type: ignore[attr-defined]
    images = tissue(80)
    processor = CLIPImageProcessor.from_pretrained(folder)
    theirs = processor([Image.fromarray(i) for i in images], return_tensors="pt")["pixel_values"]
    error = ((how(torch.from_numpy(images)) - theirs) * torch.tensor(how.std).view(3, 1, 1)).abs()
    assert error.max() * 255 <= WORST_ERROR + 1e-3
    assert error.mean() * 255 <= MEAN_ERROR


def test_tiles_of_the_right_size_are_only_normalised() -> None:
    import torch

    images = torch.from_numpy(tissue(64))
    ours = Preprocess(64, *OPENAI)(images)
    mean, std = (np.array(x) for x in OPENAI)
    expected = (images.numpy() / 255 - mean) / std
    assert np.abs(ours.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5


def test_prepared_pixels_can_be_trained_on_after_inference() -> None:
    import torch

    images = torch.from_numpy(tissue(64))
    with torch.inference_mode():
        Preprocess(32, *OPENAI)(images)
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (Preprocess(32, *OPENAI)(images) * weight).sum().backward()
    assert weight.grad is not None
