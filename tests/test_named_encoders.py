"""Published encoders by name: PLIP, QuiltNet and UNI, on tiny checkpoints of their formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_encoders import LIMIT, TEXTS, TINY, clip_folder, loaded, open_clip_file

from pathcli.encoders import build_encoder
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.registry import resolve


@pytest.fixture
def images(rng: np.random.Generator) -> Any:
    import torch

    return torch.from_numpy(rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("plip", "hf download vinid/plip and"),
        ("pathgen-clip-l-hf", "hf download jamessyx/pathgenclip-vit-large-patch14-hf and"),
        (
            "quilt-net",
            "hf download wisdomik/QuiltNet-B-32 open_clip_config.json open_clip_pytorch_model.bin",
        ),
        (
            "quilt-net:B-16",
            "hf download wisdomik/QuiltNet-B-16 open_clip_config.json open_clip_pytorch_model.bin",
        ),
        ("conch", "hf download MahmoodLab/conch pytorch_model.bin"),
        ("uni", "hf download MahmoodLab/UNI pytorch_model.bin"),
    ],
)
def test_without_the_hub_the_error_names_the_command(name: str, command: str) -> None:
    with pytest.raises(ResourceError, match=command):
        _ = build_encoder(name).id


def test_the_names_stand_for_what_their_authors_published() -> None:
    found = {n: build_encoder(n, checkpoint="x") for n in ("quilt-net", "conch", "uni")}
    assert {n: (e.input_px, e.native.size_px, e.native.mpp) for n, e in found.items()} == {
        "quilt-net": (224, 224, 0.5),
        "conch": (448, 448, 0.5),
        "uni": (224, 256, 0.5),
    }
    assert found["uni"].preprocess.mean == (0.485, 0.456, 0.406)  # type: ignore[attr-defined]
    assert found["conch"].preprocess.mean[0] == pytest.approx(0.48145466)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "side"), [("pathgen-clip-l-hf", 336), ("plip", 224)])
def test_a_published_folder_is_fetched_when_it_is_needed_and_not_before(
    name: str, side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    folder = clip_folder(tmp_path / "clip")

    def fetched(what: str) -> Path:
        asked.append(what)
        return folder

    monkeypatch.setattr("pathcli.encoders.hf.fetch", fetched)
    kind = resolve("encoder", name)
    encoder = kind(tokens=True, layer=-2)
    assert (encoder.name, encoder.native.size_px, encoder.layer) == (name, side, -2)
    assert not asked
    with pytest.raises(UsageError, match="layers are counted from the last"):
        kind(tokens=True, layer=3)
    assert not asked
    assert (encoder.input_px, encoder.text_limit) == (64, LIMIT)
    assert encoder.id.startswith(f"{name}-")
    assert asked == [name]


# --- plip --------------------------------------------------------------------------------


@pytest.fixture
def plip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as PLIP's: pickled weights, with a buffer that newer transformers lack."""
    import torch
    from safetensors.torch import load_file

    from pathcli.encoders.hf import Plip

    folder = clip_folder(tmp_path / "plip")
    state = load_file(folder / "model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(LIMIT)[None]
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "patch_size": 16, "image_size": 64}
    monkeypatch.setattr(Plip, "vision", tiny)
    return folder


def test_plip_is_read_from_its_folder(plip: Path, images: Any) -> None:
    encoder = loaded("plip", checkpoint=plip)
    plain = loaded(f"hf:{plip}")
    assert encoder.name == "plip"
    assert encoder.id.startswith("plip-")
    assert encoder.row_shape == (16,)
    assert (encoder.encode(images) == plain.encode(images)).all()
    assert (encoder.encode_text(TEXTS) == plain.encode_text(TEXTS)).all()
    assert encoder.text_limit == LIMIT


def test_another_clip_than_plips_is_refused(plip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pathcli.encoders.hf import Plip

    monkeypatch.setattr(Plip, "vision", Plip.vision | {"patch_size": 32})
    with pytest.raises(DataError, match=r"not PLIP's ViT-B/32 but .*'patch_size': 16"):
        loaded("plip", checkpoint=plip)
    with pytest.raises(UsageError, match="plip needs the whole folder"):
        build_encoder("plip", checkpoint=plip / "pytorch_model.bin")


# --- quilt-net ---------------------------------------------------------------------------


@pytest.fixture
def quilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from pathcli.encoders.clip import QuiltNet

    monkeypatch.setattr(QuiltNet, "sizes", {"B-32": "TinyText", "B-16": "TinyOther"})
    open_clip_file(monkeypatch, tmp_path, "TinyOther", TINY | {"embed_dim": 8})
    return open_clip_file(monkeypatch, tmp_path)


def test_quilt_net_is_read_from_a_file_or_its_folder(quilt: Path, images: Any) -> None:
    file, folder = (loaded("quilt-net", checkpoint=p) for p in (quilt, quilt.parent))
    assert file.row_shape == (16,)
    assert file.id == folder.id
    assert file.id.startswith("quilt-net-")
    assert (file.encode(images) == folder.encode(images)).all()
    assert file.count_tokens(["cell " * 200]) == [202]
    assert (file.encode_text(["cell " * 200]) == file.encode_text(["cell " * 10])).all()


def test_quilt_nets_activation_is_that_of_its_configuration(quilt: Path, images: Any) -> None:
    plain = loaded("quilt-net", checkpoint=quilt)
    config = quilt.parent / "open_clip_config.json"
    config.write_text(json.dumps({"model_cfg": TINY | {"quick_gelu": True}}))
    quick = loaded("quilt-net", checkpoint=quilt)
    assert quick.id != plain.id
    assert (quick.encode(images) - plain.encode(images)).abs().max() > 1e-4
    assert (quick.encode_text(TEXTS) - plain.encode_text(TEXTS)).abs().max() > 1e-4
    config.write_text(json.dumps({"model_cfg": TINY}))
    assert build_encoder("quilt-net", checkpoint=quilt).id == plain.id
    config.write_text("{}")
    with pytest.raises(DataError, match="not open_clip's configuration"):
        _ = build_encoder("quilt-net", checkpoint=quilt).id


def test_quilt_net_of_another_size_is_refused(quilt: Path) -> None:
    with pytest.raises(
        DataError, match=r"does not fit open_clip's TinyOther.*its shapes are those of TinyText"
    ):
        loaded("quilt-net:B-16", checkpoint=quilt)
    with pytest.raises(UsageError, match="comes as B-32 and B-16, not 'L-14'"):
        build_encoder("quilt-net:L-14")
    (quilt.parent / "empty").mkdir()
    with pytest.raises(ResourceError, match=r"holds no open_clip_model\.safetensors or"):
        _ = build_encoder("quilt-net", checkpoint=quilt.parent / "empty").id


# --- uni ---------------------------------------------------------------------------------

TINY_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


@pytest.fixture
def uni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import timm
    import torch

    from pathcli.encoders.timm import Uni

    options = {"init_values": 0.1} | TINY_VIT
    monkeypatch.setattr(Uni, "options", options)
    network = timm.create_model("vit_large_patch16_224", num_classes=0, **options)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    return tmp_path / "pytorch_model.bin"


def test_uni_gives_timms_class_token(uni: Path, images: Any) -> None:
    import timm
    import torch

    encoder = loaded("uni", checkpoint=uni)
    assert encoder.row_shape == (32,)
    assert encoder.id == build_encoder("uni", checkpoint=uni.parent).id
    network = timm.create_model("vit_large_patch16_224", num_classes=0, **encoder.options)
    network.load_state_dict(torch.load(uni, weights_only=True))
    with torch.no_grad():
        expected = network.eval()(encoder.preprocess(images))
    assert (encoder.encode(images) - expected).abs().max() < 1e-5
    assert loaded("uni", checkpoint=uni, tokens=True).row_shape == (196, 32)


def test_a_vit_without_layer_scale_is_not_uni(uni: Path) -> None:
    import timm
    import torch

    network = timm.create_model("vit_large_patch16_224", num_classes=0, **TINY_VIT)
    torch.save(network.state_dict(), uni)
    with pytest.raises(DataError, match=r"blocks\.0\.ls1\.gamma missing"):
        loaded("uni", checkpoint=uni)


def test_unis_own_size_is_a_vit_l_with_layer_scale() -> None:
    import timm
    import torch

    from pathcli.encoders.timm import Uni

    with torch.device("meta"):
        state = timm.create_model(
            "vit_large_patch16_224", num_classes=0, **Uni.options
        ).state_dict()
    assert state["blocks.23.ls2.gamma"].shape == (1024,)
    assert state["pos_embed"].shape == (1, 197, 1024)
    assert not any(name.startswith(("head", "fc_norm")) for name in state)
