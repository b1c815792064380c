"""open_clip's architectures, trained: first weights, gradients, and who reads what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from PIL import Image

from pathcli.data.corpus import Corpus
from pathcli.encoders.contrastive import ContrastiveTask
from pathcli.errors import DataError, UsageError
from pathcli.settings import TrainSettings
from pathcli.store import Store
from pathcli.types import Sample


class Table:
    """Twelve plain images of 8 px with a caption each, of which some are validated on."""

    def __init__(self, folder: Path) -> None:
        found = []
        for i in range(12):
            path = folder / f"{i}.png"
            Image.fromarray(np.full((8, 8, 3), 20 * i, np.uint8)).save(path)
            found.append(Sample(str(i), (str(path),), f"grey {i}"))
        self.given = Corpus(found[:8], found[8:], "abc")

    def corpus(self) -> Corpus:
        return self.given


TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an architecture that open_clip and `pathgen-clip` know while the test runs."""
    from pathcli.encoders import clip, open_clip_model
    from pathcli.torchvision_guard import guard_torchvision

    guard_torchvision()
    from open_clip import factory

    for name in ("tiny", "tiny-quickgelu"):
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, TINY)
    monkeypatch.setattr(clip, "architectures", lambda: {"tiny": TINY, "tiny-quickgelu": TINY})
    monkeypatch.setattr(
        clip, "published_normalisation", lambda _: (clip.OPENAI_MEAN, clip.OPENAI_STD, "bicubic")
    )
    monkeypatch.setattr(clip.PathGenClip, "architecture", "tiny")
    monkeypatch.setitem(open_clip_model.OPENAI, "tiny", "openai-clip-b16")
    return "tiny"


def started(**given: Any) -> Any:
    from pathcli.encoders.open_clip_model import OpenClipModel

    model = OpenClipModel(**{"architecture": "tiny", "init": "random"} | given)
    model.facts = model.start()
    return model


def test_what_is_trained_is_read_by_the_encoder_of_its_name(
    tiny: str, store: Store, tmp_path: Path
) -> None:
    from pathcli.encoders import build_encoder
    from pathcli.encoders.open_clip_model import OpenClipModel
    from pathcli.trainer import Loop

    made = TrainSettings(batch=4, epochs=1, lr=1e-3)
    trains = ContrastiveTask(
        model=OpenClipModel(architecture=tiny, init="random"), data=Table(tmp_path), train=made
    )
    trains.prepare(store, device="cpu", progress=lambda _: lambda done, total: None)
    set_seed(1)
    work = trains.begin(1)
    loop = Loop(work, made, tmp_path / "run", "cpu")
    assert loop.run(lambda *_: None)
    loop.save_weights()
    weights, model = tmp_path / "run" / "weights.safetensors", work.module.model
    assert work.facts["model"]["encoder"] == "pathgen-clip"
    read = build_encoder("pathgen-clip", checkpoint=weights)
    read.load("cpu")
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(read.encode(images), model.embed_images(images))
        texts = ["red 0", "a long caption " * 60]
        torch.testing.assert_close(read.encode_text(texts), model.embed_texts(model.tokens(texts)))
        assert read.logit_scale == pytest.approx(model.scale().item())
    assert model.count_tokens(texts) == [4, 182]
    # and the next stage goes on from it, by the run's folder or the file in it
    for init in (tmp_path / "run", weights):
        again = started(init=init)
        theirs = model.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in again.state_dict().items())
    assert len({started(init=weights).facts["init"], again.facts["init"], "random"}) == 2


def test_openai_s_weights_are_those_of_the_card_and_quickgelu_is_theirs(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    from pathcli.encoders import open_clip_model

    published = started().module
    save_file(published.state_dict(), tmp_path / "openai.safetensors")
    asked: list[str] = []
    monkeypatch.setattr(
        open_clip_model, "fetch", lambda name: asked.append(name) or tmp_path / "openai.safetensors"
    )
    model = started(init="openai")
    assert asked == ["openai-clip-b16"]
    assert all(
        torch.equal(v, model.module.state_dict()[k]) for k, v in published.state_dict().items()
    )
    images = torch.randint(0, 256, (2, 40, 40, 3), dtype=torch.uint8)
    plain = started(init=tmp_path / "openai.safetensors", quick_gelu=False)
    with torch.no_grad():
        assert not torch.allclose(plain.embed_images(images), model.embed_images(images))
    assert plain.facts["encoder"] == "open_clip:tiny"


def test_activations_computed_twice_give_the_same_gradients(tiny: str) -> None:
    set_seed(1)
    once = started()
    set_seed(1)
    twice = started(checkpointing=True).train()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    for model in (once, twice):
        model.embed_images(images).sum().backward()
    assert twice.module.visual.transformer.grad_checkpointing
    for one, other in zip(once.parameters(), twice.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_first_weights_that_cannot_be_are_one_clear_error(tiny: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from pathcli.encoders.open_clip_model import OpenClipModel
    from pathcli.errors import ResourceError

    with pytest.raises(ResourceError, match=r"none: no such checkpoint"):
        OpenClipModel(architecture=tiny, init=tmp_path / "none")
    (tmp_path / "stopped").mkdir()
    with pytest.raises(ResourceError, match=r"stopped: holds no weights\.safetensors"):
        OpenClipModel(architecture=tiny, init=tmp_path / "stopped")
    with pytest.raises(UsageError, match="no architecture 'tinny': did you mean 'tiny'"):
        OpenClipModel(architecture="tinny")
    with pytest.raises(UsageError, match=r"init: openai is known for .*, not for tiny-quickgelu"):
        OpenClipModel(architecture="tiny-quickgelu")
    state = started().module.state_dict() | {"text_projection": torch.zeros(32, 8)}
    save_file(state, tmp_path / "narrow.safetensors")
    with pytest.raises(DataError, match=r"narrow.*does not fit open_clip's tiny .*text_projection"):
        started(init=tmp_path / "narrow.safetensors")
