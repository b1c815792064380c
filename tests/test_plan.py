"""Estimates of training against numbers worked out by hand, and against published ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_language import tiny_llama, tiny_t5

from pathcli.errors import UsageError
from pathcli.recipe import Recipe, load_recipe, recipes_folder
from pathcli.vlm.language import SHAPES, HFLanguage, Lora, shape_of
from pathcli.vlm.plan import plan, table
from pathcli.vlm.qformer import QFormer
from pathcli.vlm.sizes import GPUS, TOWERS, lora_weights

GIB = 2**30


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def recipe(llama: Path, tmp_path: Path) -> Recipe:
    """PathGen-CLIP's 196 tokens of 768 -> an MLP -> a tiny LLaMA of 2 layers, width 32."""
    values: dict[str, Any] = {
        "version": 1,
        "task": "generate",
        "encoder": {"kind": "pathgen-clip", "tokens": True, "checkpoint": "not-here.pt"},
        "connector": {"kind": "mlp", "frame": "centre"},
        "language": {"kind": "hf", "model": str(llama)},
        "chat": {"template": "vicuna-v1", "limit": 400},
        "data": {"kind": "instructions", "source": "???"},
        "train": {"epochs": 3, "batch": 4, "accumulate": 2},
    }
    return Recipe("tiny", values)


def with_data(recipe: Recipe, tmp_path: Path, samples: int) -> Recipe:
    rows = []
    for i in range(samples):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"path": f"{i}.png", "question": "What is this?", "answer": "tissue " * 3})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return recipe.with_values(**{"data.source": str(path), "data.val": 0.0})


def weights(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


# --- against published sizes -------------------------------------------------------------


def test_language_models_are_as_large_as_published() -> None:
    published = {"vicuna-7b": 6.74e9, "vicuna-13b": 13.0e9, "llama-3-8b-instruct": 8.03e9}
    published |= {"flan-t5-xl": 2.85e9, "smollm2-135m": 135e6}
    for name, size in published.items():
        assert SHAPES[name].parameters == pytest.approx(size, rel=0.02), name


def test_adapters_beside_llama_3_are_pa_llavas_335_million() -> None:
    attention = 2 * (4096 + 4096) + 2 * (4096 + 1024)  # q and o, k and v
    feeds = 3 * (4096 + 14336)
    by_hand = 128 * 32 * (attention + feeds)
    assert by_hand == 335_544_320
    shape, names = SHAPES["llama-3-8b-instruct"], "q_proj k_proj v_proj o_proj"
    assert lora_weights(shape, Lora(r=128)) == by_hand
    only = lora_weights(shape, Lora(r=128, targets=tuple(names.split())))
    assert only == 128 * 32 * attention


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_llama, "all-linear"),
        (tiny_llama, ("q_proj", "v_proj", "up_proj")),
        (tiny_t5, "all-linear"),
        (tiny_t5, ("q", "wo")),
    ],
)
def test_adapters_are_counted_as_peft_makes_them(make: Any, targets: Any, tmp_path: Path) -> None:
    lora = Lora(r=3, targets=targets)
    language = HFLanguage(model=str(make(tmp_path / "m")), tune="lora", lora=lora)
    trained = language.start()["trained"]
    assert lora_weights(shape_of(language.model), lora) == trained


def test_the_q_former_is_as_large_as_blip_2s_and_clovers() -> None:
    with torch.device("meta"):
        plain, instructed = QFormer(1408, 768), QFormer(1408, 4096, instruct=True)
    assert weights(plain) == pytest.approx(105e6, rel=0.02)
    assert weights(instructed) == pytest.approx(187e6, rel=0.02)


def test_encoders_are_as_large_as_published() -> None:
    for name, (tokens, width, size) in {
        "eva-clip-g": (257, 1408, 986e6),
        "pathgen-clip": (196, 768, 86e6),
        "pathgen-clip-l": (576, 1024, 304e6),
        "plip": (49, 768, 87.5e6),
    }.items():
        tower = TOWERS[name]
        assert tower[:2] == (tokens, width), name
        assert tower.weights == pytest.approx(size, rel=0.02), name
    assert TOWERS["pathgen-clip"].flops == pytest.approx(35.1e9, rel=0.02)  # a ViT-B/16 at 224


# --- by hand -----------------------------------------------------------------------------


def test_weights_tokens_operations_and_memory_by_hand(recipe: Recipe, llama: Path) -> None:
    found = plan(recipe, "2xa100-80g")
    numbers, tokens, width = found.numbers, 400, 32
    mlp, size = 768 * 32 + 32 + 32 * 32 + 32, shape_of(str(llama)).parameters
    assert [(p.name, p.trained, p.frozen) for p in found.parts] == [
        ("encoder", 0, TOWERS["pathgen-clip"].weights),
        ("connector", mlp, 0),
        ("language", 0, size),
    ]
    assert (numbers["trained"], numbers["samples_per_step"]) == (mlp, 8)
    assert numbers["visual_tokens_per_sample"] == 196
    assert numbers["tokens_per_step"] == 8 * tokens
    connector = 2 * 196 * (768 * 32 + 32 * 32)
    language = 2 * size * tokens + 4 * 2 * tokens**2 * width
    sample = TOWERS["pathgen-clip"].flops + 3 * connector + 2 * language
    assert numbers["flops_per_step"] == pytest.approx(8 * sample)
    assert numbers["hours_per_1000_steps"] == pytest.approx(
        1000 * 8 * sample / (2 * 312e12 * 0.35) / 3600, rel=0.01
    )
    memory = numbers["memory_gib"]
    assert memory["weights"] == pytest.approx(
        4 * (mlp + size + TOWERS["pathgen-clip"].weights) / GIB, abs=0.01
    )
    assert "hours" not in numbers
    assert any("data.source" in note for note in found.notes)
    assert any("as long as the recipe allows" in note for note in found.notes)


def test_data_that_are_here_decide_steps_and_lengths(recipe: Recipe, tmp_path: Path) -> None:
    found = plan(with_data(recipe, tmp_path, 21), "a100-80g")
    numbers = found.numbers
    assert numbers["samples"] == 21
    assert numbers["steps"] == 9  # 6 batches, 3 steps, three times
    assert 0 < numbers["text_tokens_per_sample"] < 400 - 196
    assert any("21 samples" in note and "tokenizer" in note for note in found.notes)
    per_step = plan(recipe, "a100-80g").numbers["hours_per_1000_steps"] / 1000
    assert 0 < numbers["hours"] < 9 * per_step


def test_training_whole_costs_gradients_and_two_moments(recipe: Recipe, llama: Path) -> None:
    size = shape_of(str(llama)).parameters
    frozen = plan(recipe).parts[2]
    whole = plan(recipe.with_values(**{"language.tune": "full"})).parts[2]
    assert (whole.trained, whole.frozen) == (size, 0)
    assert whole.forward == frozen.forward
    assert whole.backward == 2 * frozen.backward == 2 * whole.forward
    large = recipe.with_values(
        **{"language.model": "vicuna-13b", "language.tune": "full", "train.precision": "bfloat16"}
    )
    memory = plan(large, "8xa100-80g").numbers["memory_gib"]
    assert memory["gradients"] == pytest.approx(4 * 13.02e9 / GIB, rel=0.01)
    assert memory["optimizer"] == pytest.approx(2 * memory["gradients"], rel=0.001)
    shared = plan(large.with_values(**{"train.shard": "full"}), "8xa100-80g").numbers["memory_gib"]
    assert shared["optimizer"] == pytest.approx(memory["optimizer"] / 8, rel=0.001)
    assert shared["activations"] == memory["activations"]


def test_quarters_and_halves_of_memory_by_precision(recipe: Recipe) -> None:
    def frozen(load: str) -> float:
        given = recipe.with_values(**{"language.model": "vicuna-7b", "language.load": load})
        return float(plan(given).numbers["memory_gib"]["weights"])

    rest = 4 * (TOWERS["pathgen-clip"].weights + 768 * 4096 + 4096 * 4096 + 2 * 4096) / GIB
    assert frozen("float32") - rest == pytest.approx(4 * 6.738e9 / GIB, rel=0.001)
    assert frozen("float16") - rest == pytest.approx(2 * 6.738e9 / GIB, rel=0.001)


def test_checkpointing_trades_memory_for_another_forward_pass(recipe: Recipe) -> None:
    given = recipe.with_values(**{"language.model": "vicuna-7b"})
    plain = plan(given).parts[2]
    again = plan(given.with_values(**{"language.checkpointing": True})).parts[2]
    assert again.kept < plain.kept / 5
    assert again.backward == pytest.approx(plain.backward + plain.forward)


def test_what_does_not_fit_is_said(recipe: Recipe) -> None:
    given = recipe.with_values(**{"language.model": "vicuna-13b", "language.tune": "full"})
    assert any("do not fit into 80" in note for note in plan(given).notes)
    assert not any("do not fit" in note for note in plan(recipe).notes)


def test_a_cache_of_tokens_spares_the_encoder_and_takes_space(
    recipe: Recipe, tmp_path: Path
) -> None:
    given = with_data(recipe, tmp_path, 10).with_values(cache={"tokens": "float16"})
    found = plan(given)
    assert found.parts[0].forward == 0
    assert found.numbers["cache_mb_per_image"] == pytest.approx(196 * 768 * 2 / 1e6, abs=1e-3)
    assert found.numbers["cache_gb"] == pytest.approx(10 * 196 * 768 * 2 / 1e9, rel=0.01)
    assert "cache_gb" not in plan(with_data(recipe, tmp_path, 10)).numbers


def test_a_cache_that_does_not_fit_is_refused_before_it_is_begun(
    recipe: Recipe, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = with_data(recipe, tmp_path, 10).with_values(cache={"tokens": "float16"})
    need, store = 10 * 196 * 768 * 2, tmp_path / "new" / "store"
    free = SimpleNamespace(free=1_000_000_000 + need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    (tmp_path / "mine.yaml").write_text(given.to_yaml())
    code, _, err = run("train", "--recipe", tmp_path / "mine.yaml", "--dry-run", "--store", store)
    assert code == 5
    assert f"{store}: 10 images' tokens need 0.00301 GB" in err
    assert not store.parent.exists()
    kept = store / "features" / "pathgen-clip-0" / "whole" / "images-0123abcd@1.h5"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"x")
    (store / "store.json").write_text('{"format": 1}')
    assert plan(given, store=store).numbers["cache_gb"]  # that byte is there already


# --- every recipe, and the command -------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.stem for path in recipes_folder().rglob("*.yaml")))
def test_every_shipped_recipe_can_be_planned_without_its_inputs(name: str) -> None:
    found = plan(load_recipe(name))
    json.dumps(found.to_json(), allow_nan=False)
    assert table(found)
    known = found.numbers["trained"] is not None
    assert known or any("recipes check --batch" in note for note in found.notes)


def test_an_unknown_gpu_is_refused(recipe: Recipe) -> None:
    for wrong in ("a100", "0xh100", "", "2x"):
        with pytest.raises(UsageError, match="--gpu"):
            plan(recipe, wrong)
    assert {"a100-40g", "a100-80g", "h100", "h200", "rtx-4090", "v100", "l40s"} < set(GPUS)


def test_the_command_prints_an_estimate_and_trains_nothing(run: Any, tmp_path: Path) -> None:
    line = ("train", "--recipe", "pallava-stage2", "--out", tmp_path / "runs")
    code, out, _ = run(*line, "--dry-run", "--gpu", "16xh100", "--json")
    found = json.loads(out)
    assert (code, found["estimate"], found["gpus"]) == (0, True, 16)
    parts = {part["part"]: part["trained"] for part in found["parts"]}
    assert parts["language"] == 335_544_320
    assert parts["connector"] == pytest.approx(60e6, rel=0.02)
    code, out, err = run(*line, "--dry-run")
    assert code == 0
    assert "335.5 M trained" in out
    assert "data.source" in err
    code, _, err = run(*line, "--gpu", "h100")
    assert code == 2
    assert "--dry-run" in err
    assert not (tmp_path / "runs").exists()
