"""Texts through every kind of text tower, against the tower's own library."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_encoders import COCA, LIMIT, TINY, clip_folder, open_clip_file

from pathcli.encoders import build_encoder
from pathcli.encoders.build import text_encoder
from pathcli.errors import DataError, ResourceError, UsageError

TEXTS = [
    "an H&E image of lung adenocarcinoma",
    "benign lung tissue",
    "Squamous cell carcinoma, keratin pearls!",
    "stroma",
    "lymphocytes in a dense infiltrate",
]
LONG = "cell " * 200


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return open_clip_file(monkeypatch, tmp_path)


@pytest.fixture(scope="session")
def _clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def folder(_clip: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_clip, tmp_path / "clip"))


def loaded(name: str, **given: Any) -> Any:
    encoder = text_encoder(build_encoder(name, **given))
    encoder.load("cpu")
    return encoder


# --- ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("open_clip:ViT-B-16", {}, "open_clip_ViT-B-16-be84033dd15f"),
        (
            "open_clip:ViT-B-16",
            {"tokens": True, "precision": "bfloat16"},
            "open_clip_ViT-B-16-792a6a947dc4",
        ),
        ("pathgen-clip", {}, "pathgen-clip-51ddaba95da3"),
        ("pathgen-clip-l", {}, "pathgen-clip-l-3730bea25491"),
        ("timm:vit_tiny_patch16_224", {}, "timm_vit_tiny_patch16_224-984985075907"),
        ("hf", {}, "hf_clip-6cb4cfc2f325"),
    ],
)
def test_ids_are_those_under_which_features_were_stored_before(
    tmp_path: Path, name: str, given: dict[str, Any], expected: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    if name == "hf":
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        (tmp_path / "preprocessor_config.json").write_text('{"crop_size": 224}')
        assert build_encoder(f"hf:{tmp_path}").id == expected
    else:
        given = {"checkpoint": tmp_path / "model.safetensors", **given}
        assert build_encoder(name, **given).id == expected


# --- open_clip ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, COCA], ids=["clip", "coca"])
def test_text_embeddings_equal_open_clips_own_in_batches_of_any_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Any
) -> None:
    import open_clip
    import torch

    name = "coca_Tiny" if config is COCA else "TinyText"
    file = open_clip_file(monkeypatch, tmp_path, name, config)
    monkeypatch.setattr("pathcli.encoders.text.BATCH", 2)
    encoder = loaded(f"open_clip:{name}", checkpoint=file)
    model = open_clip.create_model(name, pretrained=str(file)).eval()
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=False)
    found = encoder.encode_text(TEXTS)
    assert found.dtype == torch.float32
    assert found.shape == (5, 16)
    assert (found - expected).abs().max() < 1e-5
    half = loaded(f"open_clip:{name}", checkpoint=file, precision="bfloat16").encode_text(TEXTS)
    assert half.dtype == torch.float32
    assert 0 < (half - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_long_caption_is_counted_whole_and_cut_at_the_limit(file: Path) -> None:
    encoder = loaded("open_clip:TinyText", checkpoint=file)
    assert encoder.text_limit == LIMIT
    # each word is one token, beside start and end
    assert encoder.count_tokens([LONG, "cell", "", "cell cell"]) == [202, 3, 2, 4]
    cut, fits, less = (encoder.encode_text(["cell " * n])[0] for n in (200, LIMIT - 2, LIMIT - 3))
    assert (cut - fits).abs().max() < 1e-6
    assert (cut - less).abs().max() > 1e-4


def test_published_limits_are_known_before_anything_is_loaded() -> None:
    limits = {n: build_encoder(n).text_limit for n in ("pathgen-clip", "quilt-net", "conch")}  # type: ignore[attr-defined]
    assert limits == {"pathgen-clip": 77, "quilt-net": 77, "conch": 128}


def test_the_scale_is_the_checkpoints_own_or_a_hundred(file: Path) -> None:
    import torch

    state = torch.load(file, weights_only=True)
    state["logit_scale"] = torch.tensor(3.0)
    torch.save(state, file)
    assert loaded("open_clip:TinyText", checkpoint=file).logit_scale == pytest.approx(20.085537)
    del state["logit_scale"]
    torch.save(state, file)
    assert loaded("open_clip:TinyText", checkpoint=file).logit_scale == 100


def test_pathgen_clip_reads_texts_with_quick_gelu(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    import torch

    from pathcli.encoders.clip import PathGenClip

    monkeypatch.setattr(PathGenClip, "architecture", "TinyText")
    found = loaded("pathgen-clip", checkpoint=file).encode_text(TEXTS)
    tokens = open_clip.get_tokenizer("TinyText")(TEXTS)
    with torch.no_grad():
        quick, plain = (
            open_clip.create_model("TinyText", pretrained=str(file), force_quick_gelu=q)
            .eval()
            .encode_text(tokens)
            for q in (True, False)
        )
    assert (found - quick).abs().max() < 1e-5
    assert (found - plain).abs().max() > 1e-4


def test_a_tokenizer_on_the_hub_is_asked_for_only_with_a_text() -> None:
    encoder = text_encoder(build_encoder("open_clip:ViT-B-16-SigLIP", checkpoint="x"))
    with pytest.raises(ResourceError, match=r"run: hf download timm/ViT-B-16-SigLIP"):
        encoder.count_tokens(TEXTS)


# --- transformers ------------------------------------------------------------------------


def test_text_embeddings_equal_transformers_own(folder: Path) -> None:
    import torch
    from transformers import CLIPModel, CLIPTokenizer

    encoder = loaded(f"hf:{folder}")
    texts = [*TEXTS, LONG]
    model = CLIPModel.from_pretrained(folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    given = tokenizer(texts, padding=True, truncation=True, max_length=LIMIT, return_tensors="pt")
    with torch.no_grad():
        seen = model.get_text_features(**given)
    expected = getattr(seen, "pooler_output", seen)  # transformers 4 gives the tensor itself
    assert (encoder.encode_text(texts) - expected).abs().max() < 1e-5
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_both_libraries_count_the_same_tokens(folder: Path, file: Path) -> None:
    hf, ours = loaded(f"hf:{folder}"), loaded("open_clip:TinyText", checkpoint=file)
    assert hf.text_limit == LIMIT
    assert hf.count_tokens([*TEXTS, LONG]) == ours.count_tokens([*TEXTS, LONG])
    assert hf.count_tokens([LONG]) == [202]
    cut, fits = hf.encode_text([LONG]), hf.encode_text(["cell " * (LIMIT - 2)])
    assert (cut - fits).abs().max() < 1e-6


def test_a_folder_without_a_scale_is_given_a_hundred(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["logit_scale"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert loaded(f"hf:{folder}").logit_scale == 100


def test_a_folder_without_its_tokenizer_or_with_anothers_is_refused(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("49408", "49000"))
    with pytest.raises(DataError, match="knows 49408 tokens, not 49000"):
        build_encoder(f"hf:{folder}").count_tokens(TEXTS)  # type: ignore[attr-defined]
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        build_encoder(f"hf:{folder}").count_tokens(TEXTS)  # type: ignore[attr-defined]
    for name in ("tokenizer.json", "vocab.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(ResourceError, match="no tokenizer in it"):
        build_encoder(f"hf:{folder}").count_tokens(TEXTS)  # type: ignore[attr-defined]


# --- none --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lite0", "uni"])
def test_an_encoder_of_images_alone_is_refused_for_texts(name: str) -> None:
    with pytest.raises(UsageError, match=rf"encoder {name} has no text tower; use .*mini-clip"):
        text_encoder(build_encoder(name))


def test_patches_are_not_compared_with_texts() -> None:
    with pytest.raises(UsageError, match="gives patches"):
        text_encoder(build_encoder("pathgen-clip", tokens=True))
