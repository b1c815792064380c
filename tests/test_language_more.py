"""Language models of transformers: options, sizes, and where their files come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_language import batch, llama, started, t5

from pathcli import weights
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.recipe import check_recipe, load_recipe
from pathcli.vlm import language_files
from pathcli.vlm.language import HFLanguage, Lora
from pathcli.vlm.language_files import SHAPES, from_gguf, shape_of

__all__ = ["llama", "t5"]  # fixtures

FRENCH = "The capital of France is"


# --- options and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({"load": "4bit"}, "pip install bitsandbytes"),
        ({"load": "8bit"}, "pip install bitsandbytes"),
        ({"attention": "flash_attention_2"}, "pip install flash-attn --no-build-isolation"),
    ],
)
def test_without_its_package_an_option_names_the_command(
    options: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathcli.vlm.language.find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=f"run: {command}$"):
        HFLanguage(model="vicuna-7b", **options)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be trained whole"):
        HFLanguage(model="vicuna-7b", tune="full", load="4bit")
    with pytest.raises(UsageError, match="its steps would be rounded away"):
        HFLanguage(model="vicuna-7b", tune="full", load="bfloat16")
    with pytest.raises(UsageError, match=r"lora\.r must be"):
        HFLanguage(model="vicuna-7b", lora=Lora(r=0))


@pytest.mark.parametrize(("load", "precision"), [("float16", "bfloat16"), ("bfloat16", "float16")])
def test_frozen_weights_are_not_of_the_other_half_precision(load: str, precision: str) -> None:
    given = {"language.load": load, "train.precision": precision}
    given |= {"data.source": "a.json", "start.run": "run"}
    (fault,) = check_recipe(load_recipe("clover-stage2").with_values(**given)).faults
    assert fault.startswith(f"language.load: {load} under train.precision: {precision} keeps")


def test_a_recipe_sets_adapters_and_hears_of_a_misspelt_option() -> None:
    from pathcli.recipe import _Check

    check = object.__new__(_Check)
    check.faults, check.asked = [], []
    resolved: dict[str, Any] = {}
    lora = {"r": 128, "alpha": 256, "targets": ["q_proj", "v_proj"]}
    given = {"model": "llama-3-8b-instruct", "tune": "lora", "lora": lora}
    made = HFLanguage(**check._fill("language", HFLanguage, given, resolved))
    assert made.lora == Lora(r=128, alpha=256, targets=("q_proj", "v_proj"))
    assert resolved["lora"] == {**lora, "dropout": 0.05}
    assert (resolved["load"], resolved["checkpointing"]) == ("float32", False)
    check._fill("language", HFLanguage, {"model": "x", "lora": {"rank": 8}}, {})
    check._fill("language", HFLanguage, {"model": "x", "tune": "some"}, {})
    assert [fault.partition(":")[0] for fault in check.faults] == ["language.lora", "language.tune"]


def test_layers_that_cannot_be_recomputed_are_refused(llama: str) -> None:
    from pathcli.vlm.language import _recompute

    with pytest.raises(UsageError, match="checkpointing: the layers of Linear cannot"):
        _recompute(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_the_one_asked_for(llama: str, attention: Any) -> None:
    made = started(llama, attention=attention)
    assert made.network.config._attn_implementation == attention
    assert torch.allclose(made.loss(*batch()), started(llama).loss(*batch()), atol=1e-5)


def test_what_is_known_without_weights(llama: str, t5: str) -> None:
    causal, both = HFLanguage(model=llama), HFLanguage(model=t5)
    assert (causal.width, causal.seq2seq, both.width, both.seq2seq) == (32, False, 32, True)
    assert not list(causal.parameters())
    assert both.tokenizer("red cells").input_ids[-1] == both.tokenizer.eos_token_id


def test_a_tokenizer_without_padding_pads_with_its_end(llama: str, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(llama, tmp_path / "copy")
    told = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(told | {"pad_token": None}))
    assert HFLanguage(model=str(folder)).tokenizer.pad_token_id == 2


def test_facts_name_the_weights_and_count_what_is_trained(llama: str) -> None:
    facts = HFLanguage(model=llama, tune="lora", lora=Lora(r=2)).start()
    assert facts["source"] == weights.sha256(Path(llama))
    assert facts["frozen"] == shape_of(llama).parameters
    assert facts["trained"] == shape_of(llama).lora(2)


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("vicuna-7b", "hf download lmsys/vicuna-7b-v1.5 and"),
        ("llama-3-8b-instruct", "hf download meta-llama/Meta-Llama-3-8B-Instruct and"),
        ("some/where", "hf download some/where and"),
    ],
)
def test_a_model_that_is_not_here_is_met_with_the_command(model: str, command: str) -> None:
    with pytest.raises(ResourceError, match=command):
        HFLanguage(model=model).start()


def test_what_is_no_language_model_is_refused_in_one_line(tmp_path: Path) -> None:
    import tiny_plip

    with pytest.raises(ResourceError, match="no such"):
        HFLanguage(model=str(tmp_path / "nowhere")).start()
    with pytest.raises(DataError, match=f"{tmp_path}: not a model") as caught:
        HFLanguage(model=str(tmp_path)).start()
    assert "\n" not in str(caught.value)
    bert = tiny_plip.bert_folder(tmp_path / "bert")
    with pytest.raises(DataError, match=r"that generates.*BertModel"):
        HFLanguage(model=str(bert)).start()
    with pytest.raises(UsageError, match="'lite0' is no language model; there is: smollm2-135m"):
        HFLanguage(model="lite0").start()


def test_damaged_weights_are_refused(llama: str, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(llama, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes(b"rot")
    with pytest.raises(DataError, match="weights cannot be read"):
        started(str(folder))


# --- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_sizes_agrees_with_transformers_models_of_those_sizes(name: str) -> None:
    from transformers import LlamaConfig, T5Config

    known = SHAPES[name]
    if known.seq2seq:
        config = T5Config(
            d_model=known.hidden,
            d_kv=64,
            d_ff=known.ffn,
            num_layers=known.layers,
            num_heads=known.heads,
            vocab_size=known.vocabulary,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    else:
        config = LlamaConfig(
            hidden_size=known.hidden,
            intermediate_size=known.ffn,
            num_hidden_layers=known.layers,
            num_attention_heads=known.heads,
            num_key_value_heads=known.kv_heads,
            vocab_size=known.vocabulary,
            tie_word_embeddings=name.startswith("smollm2"),
        )
    assert language_files._shape(config) == known


def test_adapters_of_llama_3_are_as_many_as_pa_llava_trains() -> None:
    assert SHAPES["llama-3-8b-instruct"].lora(128) == 335_544_320


def test_sizes_are_found_by_name_by_hub_id_and_in_a_folder(llama: str) -> None:
    assert shape_of("lmsys/vicuna-7b-v1.5") is shape_of("vicuna-7b") is SHAPES["vicuna-7b"]
    found = shape_of(llama)
    assert (found.layers, found.hidden, found.ffn, found.heads) == (2, 32, 48, 4)
    assert found.parameters == sum(p.numel() for p in started(llama).parameters())
    with pytest.raises(UsageError, match="hf download some/where"):
        shape_of("some/where")


# --- GGUF ----------------------------------------------------------------------------------------


def test_a_gguf_is_converted_once_and_half_a_conversion_is_never_seen(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(language_files, "cache_root", lambda: tmp_path / "cache")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"weights")
    seen: list[list[Path]] = []

    def convert(path: Path, folder: Path) -> None:
        shutil.copytree(llama, folder, dirs_exist_ok=True)
        seen.append([p for p in folder.parent.iterdir() if not p.name.startswith(".")])

    monkeypatch.setattr(language_files, "_convert", convert)
    folder = from_gguf(file)
    assert from_gguf(file) == folder
    assert seen == [[]]
    assert list(folder.parent.iterdir()) == [folder]
    file.write_bytes(b"others")
    assert from_gguf(file) != folder


def test_the_faster_of_two_conversions_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_files, "cache_root", lambda: tmp_path / "cache")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"weights")

    def slow(path: Path, folder: Path) -> None:
        (folder / "config.json").write_text("mine")
        other = folder.parent / folder.name[1:].rpartition("-")[0]
        other.mkdir()
        (other / "config.json").write_text("theirs")

    monkeypatch.setattr(language_files, "_convert", slow)
    folder = from_gguf(file)
    assert (folder / "config.json").read_text() == "theirs"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_file_that_is_no_gguf_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language_files, "cache_root", lambda: tmp_path / "cache")
    file = tmp_path / "x.gguf"
    file.write_bytes(b"weights")
    with pytest.raises(DataError, match="no language model that transformers reads"):
        from_gguf(file)
    assert list((tmp_path / "cache" / "converted").iterdir()) == []


@pytest.mark.slow
def test_smollm2_speaks_and_its_weights_are_half_precision_safetensors() -> None:
    if weights.find("smollm2-135m") is None:
        pytest.skip("smollm2-135m is not in the cache; run: pathcli models pull smollm2-135m")
    made = started("smollm2-135m").eval()
    ids = torch.tensor([made.tokenizer(FRENCH).input_ids])
    found = made.generate(made.embed(ids), torch.ones_like(ids, dtype=torch.bool), max_new_tokens=4)
    assert "Paris" in made.tokenizer.decode(found[0])
    config = json.loads((made.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    assert language_files._shape(made.config) == SHAPES["smollm2-135m"]


def test_a_tokenizers_own_code_is_never_run_whatever_is_typed(
    llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(llama) / name).read_bytes())
    told = {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["code.Theirs", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="no tokenizer that can be read"):
        _ = HFLanguage(model=str(tmp_path)).tokenizer
