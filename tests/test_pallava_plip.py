"""PA-LLaVA's PLIP on tiny towers: against transformers and open_clip, and as an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from tiny_plip import PATCH, PATCHES, bert_folder, images, model, started

from pathcli.encoders.itc_itm import ItcItm
from pathcli.encoders.pallava_plip import PallavaPlip, PallavaPlipModel
from pathcli.encoders.pallava_towers import vision_part, vision_tower
from pathcli.errors import DataError, UsageError
from pathcli.state import trainable_state
from pathcli.torchvision_guard import guard_torchvision


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_folder(tmp_path_factory.mktemp("bert"))


# --- the towers ----------------------------------------------------------------------------


def test_images_and_texts_become_embeddings_and_patches_tokens(bert: Path) -> None:
    plip = started(bert)
    tokens = plip.tokens(["red tissue", "a"])
    assert plip.embed_images(images()).shape == (2, 8)
    assert plip.embed_texts(tokens).shape == (2, 8)
    seen = plip.towers.see(plip.preprocess(images()))
    assert seen.shape == (2, 1 + PATCHES, 32)
    assert plip.towers.compare(**tokens, seen=seen).shape == (2, 2)


def test_the_published_sizes_are_the_default_and_give_196_patches() -> None:
    with torch.device("meta"):
        plip = PallavaPlipModel()
        tower = vision_tower(plip.sizes.width, plip.sizes.layers, plip.sizes.patch_px, 3072)
    assert tower.embeddings.position_embedding.weight.shape == (1 + 196, 768)
    assert tower.config.num_attention_heads == 12
    assert (plip.queue, plip.momentum, plip.text_limit, plip.sizes.dim) == (57600, 0.995, 100, 256)


def test_a_text_alone_is_read_as_bert_reads_it(bert: Path) -> None:
    from transformers import BertModel

    plip, reference = started(bert), BertModel.from_pretrained(bert).eval()
    tokens = plip.tokens(["red tissue of a", "blue"])
    expected = reference(input_ids=tokens["ids"], attention_mask=tokens["mask"])
    found = plip.towers.text(input_ids=tokens["ids"], attention_mask=tokens["mask"])
    kept = tokens["mask"].bool()
    torch.testing.assert_close(
        found.last_hidden_state[kept], expected.last_hidden_state[kept], atol=1e-5, rtol=1e-5
    )


def test_matching_looks_at_the_image_and_at_all_of_the_text(bert: Path) -> None:
    plip = started(bert)
    seen = plip.towers.see(plip.preprocess(images()))
    text = plip.tokens(["red tissue of a", "red tissue of much"])
    alone = plip.embed_texts(text)
    said = plip.towers.compare(**text, seen=seen[[0, 0]])
    assert not torch.allclose(said, plip.towers.compare(**text, seen=seen[[1, 1]]), atol=1e-6)
    assert not torch.allclose(said[0], said[1], atol=1e-6)  # the texts differ in the last word
    assert torch.equal(alone, plip.embed_texts(text))


def test_padding_changes_nothing(bert: Path) -> None:
    plip = started(bert)
    padded = plip.embed_texts(plip.tokens(["red", "red tissue of a much"]))[0]
    torch.testing.assert_close(padded, plip.embed_texts(plip.tokens(["red"]))[0])


def test_long_texts_are_cut_and_counted_whole(bert: Path) -> None:
    plip = model(bert, text_limit=5)
    assert plip.tokens(["red tissue of a much 1 2"])["ids"].shape == (1, 5)
    assert plip.count_tokens(["red tissue of a much 1 2", "red"]) == [9, 3]


# --- first weights -------------------------------------------------------------------------


def test_an_open_clip_tower_gives_the_same_tokens(bert: Path, tmp_path: Path) -> None:
    guard_torchvision()
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    sizes = CLIPVisionCfg(layers=2, width=64, head_width=64, patch_size=PATCH, image_size=224)
    set_seed(0)
    theirs = _build_vision_tower(16, sizes, quick_gelu=True).eval()
    theirs.output_tokens = True
    state = {f"visual.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save(state | {"logit_scale": torch.ones([])}, tmp_path / "clip.pt")
    plip = started(bert, vision=str(tmp_path / "clip.pt"), width=64)
    pixels = plip.preprocess(images())
    with torch.no_grad():
        _, tokens = theirs(pixels)
        seen = plip.towers.see(pixels)[:, 1:]
    torch.testing.assert_close(seen, tokens, atol=1e-5, rtol=1e-5)


def test_a_transformers_folder_begins_the_tower(bert: Path, tmp_path: Path) -> None:
    guard_torchvision()
    from transformers import CLIPConfig, CLIPModel

    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 1}
    image = layers | {"intermediate_size": 128, "patch_size": PATCH, "image_size": 224}
    words = layers | {"intermediate_size": 32, "vocab_size": 30}
    CLIPModel(CLIPConfig(vision_config=image, text_config=words)).save_pretrained(tmp_path)
    plip = started(bert, vision=str(tmp_path))
    expected = CLIPModel.from_pretrained(tmp_path).vision_model.state_dict()
    for name, tensor in plip.towers.visual.state_dict().items():
        assert torch.equal(tensor, expected[name])


def test_a_tower_of_another_patch_is_refused_by_name(bert: Path, tmp_path: Path) -> None:
    save_file(vision_tower(32, 2, 56, 128).state_dict(), tmp_path / "b32.safetensors")
    with pytest.raises(DataError, match=r"b32.*position_embedding|b32.*patch_embedding"):
        model(bert, vision=str(tmp_path / "b32.safetensors")).start()


def test_a_file_without_an_image_tower_is_refused(bert: Path, tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="no CLIP image tower"):
        model(bert, vision=str(tmp_path / "x.safetensors")).start()


def test_a_text_limit_beyond_the_positions_is_refused(bert: Path) -> None:
    with pytest.raises(DataError, match="text_limit is 17"):
        model(bert, text_limit=17).start()


@pytest.mark.parametrize(
    "wrong", [{"momentum": 1.5}, {"temperature": 0.9}, {"patch_px": 30}, {"queue": 0}]
)
def test_numbers_out_of_range_are_refused(bert: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        model(bert, **wrong)


# --- the encoder ---------------------------------------------------------------------------


def released(folder: Path) -> tuple[Path, Any]:
    """Write a tiny `plip_80w_196token.bin` in the names PA-LLaVA's code loads strictly."""
    set_seed(3)
    tower = vision_tower(32, 3, PATCH, 128).eval()
    state = {
        f"vision_model.{name.replace('post_layernorm', 'post_layrnorm')}": tensor
        for name, tensor in tower.state_dict().items()
    }
    state["vision_model.embeddings.position_ids"] = torch.arange(1 + PATCHES)[None]
    torch.save(state, folder / "plip_80w_196token.bin")
    return folder / "plip_80w_196token.bin", tower


def test_the_released_file_gives_the_tokens_pa_llava_reads(tmp_path: Path) -> None:
    file, tower = released(tmp_path)
    encoder = PallavaPlip(checkpoint=file, tokens=True)
    encoder.load("cpu")
    with torch.no_grad():
        states = tower(encoder.preprocess(images()), output_hidden_states=True).hidden_states
    assert encoder.row_shape == (PATCHES, 32)
    torch.testing.assert_close(encoder.encode(images()), states[2][:, 1:])  # after layer 2 of 3


def test_the_released_file_has_no_embeddings_and_reads_no_text(tmp_path: Path) -> None:
    file, _ = released(tmp_path)
    with pytest.raises(UsageError, match="only patch tokens"):
        PallavaPlip(checkpoint=file).load("cpu")
    encoder = PallavaPlip(checkpoint=file, tokens=True)
    encoder.load("cpu")
    with pytest.raises(UsageError, match="no text"):
        encoder.encode_text(["a"])


def test_the_weights_of_a_run_encode_as_the_trained_model_does(bert: Path, tmp_path: Path) -> None:
    plip = started(bert, temperature=0.1)
    file = tmp_path / "weights.safetensors"
    save_file(trainable_state(ItcItm(plip)), file)
    encoder = PallavaPlip(checkpoint=file, text=str(bert), text_limit=10)
    encoder.load("cpu")
    assert encoder.row_shape == (8,)
    assert encoder.logit_scale == pytest.approx(10)
    said = ["red tissue", "a"]
    torch.testing.assert_close(encoder.encode(images()), plip.embed_images(images()))
    torch.testing.assert_close(encoder.encode_text(said), plip.embed_texts(plip.tokens(said)))
    assert encoder.count_tokens(said) == [4, 3]
    tokens = PallavaPlip(checkpoint=file, tokens=True)
    tokens.load("cpu")
    assert tokens.row_shape == (PATCHES, 32)
    assert tokens.id != encoder.id


def test_damaged_and_foreign_checkpoints_are_refused(bert: Path, tmp_path: Path) -> None:
    state = trainable_state(ItcItm(started(bert)))
    lacking = {name: x for name, x in state.items() if "layers.1.mlp.fc1" not in name}
    for name, wrong in {"lacking": lacking, "foreign": {"a": torch.ones(1)}}.items():
        file = tmp_path / f"{name}.safetensors"
        save_file(wrong, file)
        with pytest.raises(DataError, match=name):
            PallavaPlip(checkpoint=file, tokens=True).load("cpu")
    with pytest.raises(UsageError, match="needs weights"):
        PallavaPlip().load("cpu")


def test_only_the_image_tower_is_taken_from_a_clip() -> None:
    state = {
        "text_model.x": torch.ones(1),
        "vision_model.embeddings.class_embedding": torch.ones(2),
    }
    assert list(vision_part(state)) == ["embeddings.class_embedding"]
