"""Checkpoints of LAVIS and of PA-LLaVA, converted: the numbers of what they came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_qformer as tiny
import torch
from test_convert import Llava, State, model, opened, put, rows, sample, told
from test_eva import lavis as lavis_tower
from test_vlm_parity import EVA, IMAGE, WIDTH, language, words
from test_vlm_parity import WORDS as BERT_WORDS
from tiny_vlm import llama_3
from torch import Tensor, nn
from torch.testing import assert_close

from pathcli.encoders.pallava_towers import vision_tower
from pathcli.errors import DataError, UsageError
from pathcli.runs import read_run
from pathcli.vlm.convert import convert

__all__ = ["model"]  # a fixture

HEADS = 24  # the width of a Q-Former with BERT-base's twelve heads

# --- LAVIS ---------------------------------------------------------------------------------


def lavis(family: str, kind: str, folder: Path) -> tuple[Any, State]:
    """Make a BLIP-2 or InstructBLIP; return it, and its weights as LAVIS calls them."""
    tiny.guard_torchvision()
    import transformers

    vision = {"hidden_size": EVA, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 224, "patch_size": 56}
    sizes = {"hidden_size": HEADS, "num_attention_heads": 12, "encoder_hidden_size": EVA}
    reads = family == "InstructBlip"
    config = getattr(transformers, f"{family}Config")(
        vision_config=vision,
        qformer_config=tiny.THEIRS | sizes | ({} if reads else {"use_qformer_text_input": False}),
        text_config=words(kind).to_dict(),
        num_query_tokens=tiny.QUERIES,
        image_token_index=IMAGE,
    )
    theirs = tiny.shaken(getattr(transformers, f"{family}ForConditionalGeneration")(config))
    with torch.no_grad():
        for layer in theirs.vision_model.encoder.layers:  # EVA's keys have no bias
            layer.self_attn.qkv.bias[EVA : 2 * EVA] = 0
    language(theirs.language_model, folder / "language")
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))
    state = {f"visual_encoder.{n}": x for n, x in lavis_tower(theirs.vision_model).items()}
    state["query_tokens"] = theirs.query_tokens.detach()
    for name, tensor in theirs.qformer.state_dict().items():
        called = name.replace("attention.attention.", "attention.self.")
        called = called.replace("embeddings.layernorm.", "layernorm.")
        called = called.replace("layernorm.", "embeddings.LayerNorm.")
        state[f"Qformer.bert.{called}"] = tensor
    for name, tensor in theirs.vision_model.post_layernorm.state_dict().items():
        state[f"ln_vision.{name}"] = tensor
    for name, tensor in theirs.language_projection.state_dict().items():
        state[f"{'t5' if kind == 't5' else 'llm'}_proj.{name}"] = tensor
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(tiny.PLACES)[None]
    return theirs, state


@pytest.mark.parametrize(("family", "kind"), [("InstructBlip", "llama"), ("Blip2", "t5")])
def test_lavis_checkpoints_give_transformers_logits(family: str, kind: str, tmp_path: Path) -> None:
    theirs, state = lavis(family, kind, tmp_path)
    more = {"llm_model.x": torch.ones(2), "itm_head.weight": torch.ones(2), "odd": torch.ones(3)}
    held = {f"module.{name}": x for name, x in (state | more).items()}
    torch.save({"model": held, "epoch": 3, "config": {"a": [1]}}, tmp_path / "epoch3.pth")
    source, spoken = tmp_path / "epoch3.pth", str(tmp_path / "language")
    with pytest.raises(UsageError, match="holds no language model; name it with --language"):
        convert(source, tmp_path / "out")
    with pytest.raises(UsageError, match="projects to 32, and vicuna-7b reads 4096"):
        convert(source, tmp_path / "out", language="vicuna-7b")
    made = convert(source, tmp_path / "out", language=spoken)
    values = {"encoder.precision": "float32", "connector.text": str(tmp_path)}
    run = opened(tmp_path / "out", **values)
    asked = sample(tmp_path)
    batch, pixels = told(run, asked)
    given = {"input_ids": batch["ids"].masked_fill(batch["image"], IMAGE)}
    if family == "InstructBlip":
        text = batch["text"]
        given |= {"qformer_input_ids": text["ids"], "qformer_attention_mask": text["mask"]}
    if kind == "t5":
        given["labels"] = batch["labels"]
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels, **given).logits
        assert_close(run.module.logits(batch), wanted, rtol=0, atol=1e-4)
    assert float(wanted.std()) > 0.3
    assert ("Now that you are a pathologist" in run.prompt(asked)) == (family == "InstructBlip")
    found = rows(made)
    assert sum(count for count, _ in found.values()) == len(held)
    assert found["odd"] == (1, "not used: unknown here")
    assert found["language model"] == (1, "not used: read as --language")
    penalty = -1.0 if kind == "t5" else 0.0
    decoding = {"beams": 5, "max_new_tokens": 40, "min_new_tokens": 5, "length_penalty": penalty}
    assert read_run(tmp_path / "out").recipe.values["decoding"] == decoding


def test_a_first_stage_of_lavis_has_no_language_model_to_lead_to(tmp_path: Path) -> None:
    _, state = lavis("InstructBlip", "llama", tmp_path)
    first = {name: x for name, x in state.items() if not name.startswith("llm_proj")}
    torch.save({"model": first}, tmp_path / "a.pth")
    with pytest.raises(DataError, match="a first stage"):
        convert(tmp_path / "a.pth", tmp_path / "out", language=str(tmp_path / "language"))
    lost = "Qformer.bert.encoder.layer.0.attention.self.key.weight"
    torch.save({"model": {n: x for n, x in state.items() if n != lost}}, tmp_path / "b.pth")
    with pytest.raises(DataError, match=r"layers\.0\.own\.key\.weight missing"):
        convert(tmp_path / "b.pth", tmp_path / "out", language=str(tmp_path / "language"))


# --- PA-LLaVA ------------------------------------------------------------------------------

TOKENS = 48  # the width of a PLIP with twelve heads in the connector


class History:
    """Stands for what mmengine keeps beside the weights; reading it must not run it."""

    def __setstate__(self, _: object) -> None:
        msg = "a file's own code was run"
        raise AssertionError(msg)


@dataclass
class Pallava:
    bert: Any
    norm: nn.LayerNorm
    way: nn.Linear
    tuned: Any
    projector: State

    def visual(self, tokens: Tensor) -> Tensor:
        """Return what PA-LLaVA's connector makes of the tokens of a whole image and its tiles."""
        whole, tiles = tokens[:1], tokens[1:].flatten(0, 1)[None]
        seen = self.bert(query_embeds=whole, encoder_hidden_states=tiles).last_hidden_state
        return self.way(self.norm(seen + whole))


@pytest.fixture(scope="module")
def pallava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pallava]:
    tiny.guard_torchvision()
    from peft import LoraConfig, get_peft_model
    from transformers import Blip2QFormerConfig, Blip2QFormerModel, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pallava")
    sizes = {"hidden_size": TOKENS, "encoder_hidden_size": TOKENS, "num_attention_heads": 12}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 40, "cross_attention_frequency": 1}
    bert = tiny.shaken(Blip2QFormerModel(Blip2QFormerConfig(**sizes)))
    bert.layernorm.load_state_dict({"weight": torch.ones(TOKENS), "bias": torch.zeros(TOKENS)})
    norm = tiny.shaken(nn.LayerNorm(TOKENS, eps=1e-12), 1)
    way = tiny.shaken(nn.Linear(TOKENS, WIDTH), 2)
    projector = {"projector.model.bert.embeddings.position_ids": torch.arange(5)[None]}
    for name, tensor in bert.state_dict().items():
        if not name.startswith("layernorm."):
            called = name.replace("attention.attention.", "attention.self.")
            projector[f"projector.model.bert.{called}"] = tensor
    projector |= {f"projector.model.norm.{n}": x for n, x in norm.state_dict().items()}
    projector |= {f"projector.model.mlp.model.0.{n}": x for n, x in way.state_dict().items()}
    llama_3(folder / "language")
    base = LlamaForCausalLM.from_pretrained(folder / "language")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    tower = tiny.shaken(vision_tower(TOKENS, 2, 112, 64))
    state = {f"vision_model.{name}": x for name, x in tower.state_dict().items()}
    torch.save(state, folder / "plip_80w_196token.bin")
    return folder, Pallava(bert, norm, way, tuned, projector)


@pytest.mark.parametrize("form", ["pth", "deepspeed", "folder"])
def test_pallavas_files_give_the_numbers_of_the_modules_they_came_from(
    pallava: tuple[Path, Pallava], tmp_path: Path, form: str
) -> None:
    folder, theirs = pallava
    adapters = {
        f"llm.{name.replace('.default', '') if form == 'pth' else name}": x.detach()
        for name, x in theirs.tuned.named_parameters()
        if "lora_" in name
    }
    state, source = theirs.projector | adapters, tmp_path / "instruction_tuning_weight.pth"
    if form == "pth":
        torch.save({"meta": {}, "state_dict": state, "message_hub": History()}, source)
    elif form == "deepspeed":
        source.mkdir()
        torch.save({"module": state, "x": History()}, source / "mp_rank_00_model_states.pt")
    else:
        source = tmp_path / "xtuner"
        theirs.tuned.save_pretrained(source / "llm_adapter")
        (source / "projector").mkdir()
        own = {n.removeprefix("projector."): x.contiguous() for n, x in theirs.projector.items()}
        put(own, source / "projector" / "model.safetensors")
    spoken = str(folder / "language")
    with pytest.raises(UsageError, match=r"--checkpoint plip_80w_196token\.bin"):
        convert(source, tmp_path / "out", language=spoken)
    plip = folder / "plip_80w_196token.bin"
    made = convert(source, tmp_path / "out", language=spoken, checkpoint=plip)
    run = opened(tmp_path / "out")
    asked = sample(tmp_path)
    batch, pixels = told(run, asked)
    assert len(pixels) > 4
    with torch.no_grad():
        seen = theirs.visual(batch["tokens"])
        assert_close(run.module.visual(batch), seen, rtol=0, atol=1e-4)
        wanted = theirs.tuned(inputs_embeds=run.module.embeds(batch)).logits
        assert_close(run.module.logits(batch), wanted, rtol=0, atol=1e-4)
        with theirs.tuned.disable_adapter():
            before = theirs.tuned(inputs_embeds=run.module.embeds(batch)).logits
    assert float((before - wanted).abs().max()) > 0.1
    assert rows(made)["adapters"] == (28, "weights.safetensors")
    assert "<|start_header_id|>user<|end_header_id|>\n\n<image>" in run.prompt(asked)


def test_pallavas_missing_tensors_are_named(pallava: tuple[Path, Pallava], tmp_path: Path) -> None:
    folder, theirs = pallava
    lora = {f"llm.{n}": x.detach() for n, x in theirs.tuned.named_parameters() if "lora_" in n}
    whole = theirs.projector | lora
    given = {"language": str(folder / "language"), "checkpoint": folder / "plip_80w_196token.bin"}
    layer = "projector.model.bert.encoder.layer.1."
    for lost, why in (
        (f"{layer}crossattention.self.key.bias", r"multihead_attn\.key\.bias missing"),
        (f"{layer}output_query.dense.weight", r"linear2\.weight missing"),
        (next(iter(lora)), "27 LoRA weights"),
        ("projector.model.mlp.model.0.weight", "holds no projector"),
    ):
        torch.save({n: x for n, x in whole.items() if n != lost}, tmp_path / "a.pth")
        with pytest.raises(DataError, match=why):
            convert(tmp_path / "a.pth", tmp_path / "out", **given)
    torch.save(theirs.projector, tmp_path / "a.pth")
    with pytest.raises(DataError, match="holds no LoRA weights"):
        convert(tmp_path / "a.pth", tmp_path / "out", **given)


def test_a_llava_without_a_tokenizer_is_told_so(model: Llava, tmp_path: Path) -> None:
    source = model.write(tmp_path / "llava")
    for file in source.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(DataError, match=r"llava: no tokenizer that fits .* copy there") as caught:
        convert(source, tmp_path / "out", encoder=f"hf:{model.folder / 'clip'}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
