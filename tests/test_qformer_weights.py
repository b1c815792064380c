"""Every published form of a Q-Former is read to the last tensor, or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_qformer as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from pathcli.errors import DataError, ResourceError
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.qformer_weights import heads, read_qformer

CLOSE = {"rtol": 0, "atol": 1e-5}


def started(init: Path | str, dim_out: int | None = None, **given: Any) -> QFormer:
    torch.manual_seed(0)
    ours = QFormer(tiny.DIM, dim_out, init=str(init), **tiny.SIZES | given)
    ours.start()
    return ours.eval()


def drawn(names: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return {name: torch.randn(shape, generator=draws) for name, shape in names.items()}


def lavis_file(file: Path, rows: int = tiny.WORDS, prefix: str = "", **more: Tensor) -> Any:
    """Make what LAVIS saves after the first stage; return transformers' model of its weights."""
    theirs = tiny.blip2_qformer(reads=True)
    wide, bert = tiny.WIDTH, "Qformer.bert.embeddings."
    own = drawn(
        {
            f"{bert}word_embeddings.weight": (rows, wide),
            f"{bert}position_embeddings.weight": (tiny.PLACES, wide),
            "query_tokens": (1, tiny.QUERIES, wide),
            "ln_vision.weight": (tiny.DIM,),
            "ln_vision.bias": (tiny.DIM,),
            "vision_proj.weight": (8, wide),
            "vision_proj.bias": (8,),
            "text_proj.weight": (8, wide),
            "text_proj.bias": (8,),
            "itm_head.weight": (2, wide),
            "itm_head.bias": (2,),
            "temp": (),
            "Qformer.cls.predictions.bias": (rows,),
            "Qformer.cls.predictions.transform.dense.weight": (wide, wide),
            "Qformer.cls.predictions.transform.dense.bias": (wide,),
            "Qformer.cls.predictions.transform.LayerNorm.weight": (wide,),
            "Qformer.cls.predictions.transform.LayerNorm.bias": (wide,),
            "Qformer.cls.predictions.decoder.bias": (rows,),
            "visual_encoder.patch_embed.proj.weight": (4, 3, 2, 2),
            "visual_encoder.blocks.0.norm1.weight": (4,),
        }
    )
    own["Qformer.cls.predictions.decoder.weight"] = own[f"{bert}word_embeddings.weight"]
    own[f"{bert}position_ids"] = torch.arange(tiny.PLACES)[None]
    state = tiny.lavis(theirs.state_dict(), own["query_tokens"]) | own | more
    state = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}}, file)
    return theirs, own


@pytest.mark.parametrize("prefix", ["", "module."])
def test_lavis_and_clovers_files_give_blip2s_numbers(prefix: str, tmp_path: Path) -> None:
    file = tmp_path / "epoch3.pth"
    theirs, own = lavis_file(file, prefix=prefix)
    ours = started(file)
    normed = torch.nn.functional.layer_norm(
        tiny.image(), [tiny.DIM], own["ln_vision.weight"], own["ln_vision.bias"]
    )
    wanted = theirs(
        query_embeds=own["query_tokens"].expand(3, -1, -1), encoder_hidden_states=normed
    ).last_hidden_state
    assert_close(ours.look(tiny.image()), wanted, **CLOSE)
    text = tiny.text()
    assert_close(ours.words.weight, own["Qformer.bert.embeddings.word_embeddings.weight"])
    said = ours.words(text["ids"]) + own["Qformer.bert.embeddings.position_embeddings.weight"][:6]
    read = theirs(query_embeds=said, query_length=0, attention_mask=text["mask"])
    assert_close(ours.read(text), read.last_hidden_state, **CLOSE)


def test_nothing_of_a_first_stage_is_drawn(tmp_path: Path) -> None:
    lavis_file(tmp_path / "blip2.pth")
    ours = QFormer(tiny.DIM, None, init=str(tmp_path / "blip2.pth"), **tiny.SIZES)
    facts = ours.start()
    assert facts["drawn"] == 0
    assert facts["taken"] == len(ours.state_dict())
    assert len(facts["init_sha256"]) == 64


def test_the_second_stage_begins_from_the_first_with_its_own_projection(tmp_path: Path) -> None:
    lavis_file(tmp_path / "blip2.pth")
    first = started(tmp_path / "blip2.pth")
    for given in ({}, {"instruct": True}):
        second = started(tmp_path / "blip2.pth", 8, **given)
        text = tiny.text() if given else None
        assert_close(second.look(tiny.image(), text), first.look(tiny.image(), text), **CLOSE)
        assert second.start()["drawn"] == 2


def test_the_projection_is_read_where_it_leads_to_the_same_width(tmp_path: Path) -> None:
    for name in ("llm_proj", "t5_proj", "opt_proj"):
        way = drawn({f"{name}.weight": (8, tiny.WIDTH), f"{name}.bias": (8,)})
        lavis_file(tmp_path / "two.pth", **way)
        assert_close(started(tmp_path / "two.pth", 8).project.weight, way[f"{name}.weight"])
        assert_close(started(tmp_path / "two.pth", 8).project.bias, way[f"{name}.bias"])
        assert started(tmp_path / "two.pth", 9).project.weight.shape == (9, tiny.WIDTH)


def test_a_vocabulary_without_dec_grows_by_it(tmp_path: Path) -> None:
    _, own = lavis_file(tmp_path / "blip2.pth", rows=tiny.WORDS - 1)
    rows = own["Qformer.bert.embeddings.word_embeddings.weight"]
    ours = started(tmp_path / "blip2.pth")
    assert torch.equal(ours.words.weight[:-1], rows)
    assert 0.005 < float(ours.words.weight[-1].detach().std()) < 0.05
    bias = heads(tmp_path / "blip2.pth", tiny.WORDS)["word_head.bias"]
    assert torch.equal(bias[:-1], own["Qformer.cls.predictions.bias"])
    assert bias[-1] == 0


def test_heads_of_the_first_stage_are_read_apart(tmp_path: Path) -> None:
    _, own = lavis_file(tmp_path / "blip2.pth")
    found = heads(tmp_path / "blip2.pth", tiny.WORDS)
    head = "Qformer.cls.predictions."
    wanted = {f"{n}.{p}" for n in ("vision_proj", "text_proj", "itm_head") for p in _BOTH}
    words = {
        "word_head.dense.weight": f"{head}transform.dense.weight",
        "word_head.dense.bias": f"{head}transform.dense.bias",
        "word_head.norm.weight": f"{head}transform.LayerNorm.weight",
        "word_head.norm.bias": f"{head}transform.LayerNorm.bias",
        "word_head.bias": f"{head}bias",
        "temperature": "temp",
    }
    assert found.keys() == wanted | words.keys()
    for name in found:
        assert torch.equal(found[name], own[words.get(name, name)]), name
    assert not wanted & read_qformer(tmp_path / "blip2.pth").keys()
    assert heads("random", 9) == {}
    with pytest.raises(DataError, match="21 words, not 30"):
        heads(tmp_path / "blip2.pth", 30)


_BOTH = ("weight", "bias")


@pytest.mark.parametrize(
    "kind",
    [
        "Blip2ForConditionalGeneration",
        "Blip2ForImageTextRetrieval",
        "InstructBlipForConditionalGeneration",
    ],
)
def test_transformers_own_files_give_their_numbers(kind: str, tmp_path: Path) -> None:
    theirs = tiny.whole(kind)
    theirs.save_pretrained(tmp_path)
    seen: list[Tensor] = []
    theirs.vision_model.post_layernorm.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        image = theirs.vision_model(pixels).last_hidden_state
        given = {"query_embeds": theirs.query_tokens.expand(3, -1, -1)}
        text, reads = tiny.text(), kind.startswith("Instruct")
        if reads:
            asked = torch.cat([torch.ones(3, tiny.QUERIES).long(), text["mask"]], 1)
            given |= {"input_ids": text["ids"], "attention_mask": asked}
        states = theirs.qformer(**given, encoder_hidden_states=image).last_hidden_state
        wanted = states[:, : tiny.QUERIES]
        stage = "Retrieval" not in kind
        ours = started(tmp_path, 40 if stage else None, instruct=reads)
        apart = started(tmp_path, 40 if stage else None, instruct=reads, norm=False)
        of = torch.arange(3)
        out = theirs.language_projection(wanted) if stage else wanted
        question = text if reads else None
        assert_close(ours(seen[-2], of, question), out, rtol=0, atol=5e-5)  # eps 1e-5, theirs 1e-6
        assert_close(apart(image, of, question), out, **CLOSE)
        if not stage:
            last = theirs.itm_head.weight
            assert torch.equal(heads(tmp_path, tiny.WORDS)["itm_head.weight"], last)
            assert {"vision_proj.bias", "text_proj.weight"} <= heads(tmp_path, 21).keys()


def test_of_weights_in_several_files_only_those_with_a_qformer_are_opened(tmp_path: Path) -> None:
    theirs = tiny.whole("InstructBlipForConditionalGeneration")
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    language = {n: x for n, x in state.items() if n.startswith("language_model.")}
    assert language
    save_file({n: x for n, x in state.items() if n not in language}, tmp_path / "one.safetensors")
    whole = read_qformer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "two.safetensors").write_bytes(b"never read")
    index = {n: "two.safetensors" if n in language else "one.safetensors" for n in state}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    parts = read_qformer(tmp_path)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


# --- BERT ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A BERT of our sizes with the kind of token it adds to each made nothing."""
    tiny.guard_torchvision()
    from transformers import BertConfig, BertForPreTraining

    sizes = {name: x for name, x in tiny.THEIRS.items() if name != "encoder_hidden_size"}
    model = tiny.shaken(BertForPreTraining(BertConfig(**sizes | {"vocab_size": tiny.WORDS - 1})))
    model.bert.embeddings.token_type_embeddings.weight.data.zero_()
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    return folder, model


def test_texts_are_read_as_bert_reads_them(bert: tuple[Path, Any]) -> None:
    folder, theirs = bert
    ours, text = started(folder), tiny.text()
    read = theirs.bert(input_ids=text["ids"], attention_mask=text["mask"]).last_hidden_state
    assert_close(ours.read(text), read, **CLOSE)


def test_queries_begin_with_berts_feed_forward_layers_and_attend_anew(
    bert: tuple[Path, Any],
) -> None:
    ours = started(bert[0])
    for layer in ours.layers:
        pairs = zip(layer.queries.parameters(), layer.words.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert all(a is not b for a, b in pairs)
    narrow = (768 / tiny.WIDTH) ** 0.5  # as much goes through as through 768
    assert 0.015 < float(ours.layers[0].cross.query.weight.detach().std()) / narrow < 0.025
    assert 0.015 < float(ours.queries.detach().std()) < 0.025
    with torch.no_grad():
        ours.layers[0].queries.up.weight.zero_()
    assert ours.layers[0].words.up.weight.abs().max() > 0
    without = started(bert[0], 8)
    assert torch.equal(without.layers[3].queries.up.weight, ours.layers[3].queries.up.weight)


def test_the_first_names_of_bert_and_its_head_of_words_are_known(
    bert: tuple[Path, Any], tmp_path: Path
) -> None:
    state = load_file(bert[0] / "model.safetensors")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, first in old.items():
        state = {name.replace(new, first): tensor for name, tensor in state.items()}
    assert any("gamma" in name for name in state)
    save_file(state, tmp_path / "model.safetensors")
    now, then = read_qformer(bert[0]), read_qformer(tmp_path / "model.safetensors")
    assert all(torch.equal(now[name], then[name]) for name in now | then)
    head = heads(bert[0], tiny.WORDS)
    predictions = bert[1].cls.predictions
    assert torch.equal(head["word_head.dense.weight"], predictions.transform.dense.weight)
    assert torch.equal(head["word_head.norm.bias"], predictions.transform.LayerNorm.bias)
    assert head.keys() == {n for n in head if n.startswith("word_head.")}


def test_a_draw_is_the_seeds(bert: tuple[Path, Any]) -> None:
    one, other = started(bert[0]), started(bert[0])
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert started("random", 8).start() == {"kind": "qformer", "init": "random"}


def test_a_narrow_network_drawn_anew_tells_images_apart() -> None:
    looks = started("random").look(tiny.image(8)).detach()
    assert float(looks.std(0).mean()) > 0.05  # with BERT-base's draw it would be 0.006


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Qformer.bert.encoder.layer.0.adapter.dense.weight",
        "Qformer.bert.encoder.layer.1.crossattention.self.query.weight",
        "Qformer.bert.encoder.layer.9.attention.self.query.weight",
        "query_tokens_more",
    ],
)
def test_a_tensor_without_a_place_is_named(name: str, tmp_path: Path) -> None:
    lavis_file(tmp_path / "blip2.pth", **{name: torch.zeros(tiny.WIDTH, tiny.WIDTH)})
    with pytest.raises(DataError, match=r"(adapter|layers\.1\.cross|layers\.9|_more).*"):
        started(tmp_path / "blip2.pth")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"words": 30}, r"words\.weight is \(21, 32\), not \(30, 32\)"),
        ({"positions": 20}, r"places\.weight is \(16, 32\), not \(20, 32\)"),
        ({"queries": 6}, r"queries is \(5, 32\), not \(6, 32\)"),
        ({"layers": 3}, r"layers\.3\.\S+ unexpected"),
        ({"layers": 5}, r"layers\.4\.\S+ missing"),
        ({"cross_every": 1}, r"layers\.1\.cross\.\S+ missing"),
        ({"cross_every": 4}, r"layers\.2\.cross\.\S+ unexpected"),
        ({"hidden": 40}, r"layers\.0\.\S+ is \(48"),
    ],
)
def test_weights_of_other_sizes_are_refused(
    given: dict[str, int], said: str, tmp_path: Path
) -> None:
    lavis_file(tmp_path / "blip2.pth")
    with pytest.raises(DataError, match=said):
        started(tmp_path / "blip2.pth", **given)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    lavis_file(tmp_path / "blip2.pth")
    held = torch.load(tmp_path / "blip2.pth", weights_only=True)["model"]
    held.pop("ln_vision.bias")
    torch.save(held, tmp_path / "less.pth")
    with pytest.raises(DataError, match=r"norm\.bias missing"):
        started(tmp_path / "less.pth")


def test_what_is_no_qformer_is_refused(tmp_path: Path) -> None:
    torch.save({"visual_encoder.a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="holds no Q-Former"):
        started(tmp_path / "a.pth")
    (tmp_path / "b.safetensors").write_bytes(b"\0\1\2")
    with pytest.raises(DataError, match="corrupt checkpoint"):
        started(tmp_path / "b.safetensors")
    with pytest.raises(ResourceError, match="no such checkpoint"):
        started(tmp_path / "c.pth")
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(DataError, match="damaged index"):
        started(tmp_path)
    with pytest.raises(ResourceError, match="hub"):
        started("nobody/nothing-2.7b")
