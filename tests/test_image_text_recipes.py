"""Every shipped recipe on images and texts, with tiny towers of its own format."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from conftest import Run
from PIL import Image
from safetensors.torch import load_file, save_file

from pathcli.recipe import Recipe, build, check_recipe, list_recipes, load_recipe, resolve_recipe
from pathcli.runs import train
from pathcli.state import trainable_state
from pathcli.store import Store
from pathcli.torchvision_guard import guard_torchvision
from pathcli.trainer import Loop
from pathcli.weights import find

TASKS = {"contrastive", "itc-itm"}
SHIPPED = [r.name for r in list_recipes() if r.task in TASKS]
PATHGEN = ["pathgen-clip", "pathgen-clip-l"]
N = 11

SMALL = {
    name: {
        "embed_dim": width,
        "vision_cfg": {"image_size": 28, "layers": 1, "width": 64, "patch_size": 14},
        "text_cfg": {"context_length": 77, "width": width, "heads": 2, "layers": 1},
    }
    for name, width in (("ViT-B-16", 16), ("ViT-L-14-336", 32))
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with first weights: of open_clip's architectures made small, and a BERT."""
    guard_torchvision()
    from open_clip import CLIP, CLIPTextCfg, CLIPVisionCfg
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("towers")
    set_seed(0)
    for name, config in SMALL.items():
        network = CLIP(
            config["embed_dim"],
            CLIPVisionCfg(**config["vision_cfg"]),
            CLIPTextCfg(**config["text_cfg"]),
            quick_gelu=True,
        )
        save_file(network.state_dict(), folder / f"{name}.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tissue", "number", *map(str, range(N))]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    limits = {"intermediate_size": 48, "max_position_embeddings": 16, "vocab_size": len(words)}
    BertModel(BertConfig(**sizes, **limits)).save_pretrained(folder / "bert")
    (folder / "bert" / "vocab.txt").write_text("\n".join(words))
    return folder


@pytest.fixture
def _small(towers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let open_clip's architectures of the recipes be small ones, and their weights be here."""
    from open_clip import factory

    from pathcli.encoders import clip, open_clip_model

    for name, config in SMALL.items():
        monkeypatch.setitem(factory._MODEL_CONFIGS, name, config)
    monkeypatch.setattr(clip, "architectures", lambda: SMALL)
    here = {card: towers / f"{name}.safetensors" for name, card in open_clip_model.OPENAI.items()}
    monkeypatch.setattr(open_clip_model, "fetch", here.__getitem__)


def pictures(folder: Path) -> list[str]:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(N):
        pixels = rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(N)]


def pathgen(folder: Path, slide: Path) -> dict[str, Any]:
    """Records on two slides of two patients, as PathGen-1.6M has them."""
    (folder / "slides").mkdir()
    names = ["TCGA-AA-0001-01Z-00-DX1", "TCGA-AA-0002-01Z-00-DX1"]
    for name in names:
        shutil.copy(slide, folder / "slides" / f"{name}.svs")
    records = [
        {
            "wsi_id": names[i > 7],
            "position": [f"{32 * i}", "64"],
            "caption": f"tissue number {i}",
            "file_id": f"{i > 7}",
        }
        for i in range(N)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    return {"source": str(folder / "records.json"), "images": str(folder / "slides")}


def pathgen_init(folder: Path) -> dict[str, Any]:
    """An index of names, and a table with their captions beside it."""
    names = pictures(folder / "web")
    (folder / "quilt_1m_imgs.json").write_text(json.dumps(names))
    lines = [f"tissue number {i},{name}" for i, name in enumerate(names)]
    (folder / "quilt.csv").write_text("\n".join(["caption,image_path", *lines]))
    return {"source": str(folder), "images": str(folder / "web"), "val": 0.3}


def classes(folder: Path) -> dict[str, Any]:
    """A table of labelled images, of which some are validated on."""
    labels = ["lung_n", "lung_aca", "lung_scc"]
    names = pictures(folder / "patches")
    lines = [f"{n},{labels[i % 3]},{'val' if i > 7 else 'train'}" for i, n in enumerate(names)]
    (folder / "patches" / "labels.csv").write_text("\n".join(["image,label,split", *lines]))
    return {"table": str(folder / "patches" / "labels.csv")}


def table(folder: Path) -> dict[str, Any]:
    lines = [f"{name},tissue number {i}" for i, name in enumerate(pictures(folder / "web"))]
    (folder / "web" / "train.csv").write_text("\n".join(["image,caption", *lines]))
    return {"source": str(folder / "web" / "train.csv"), "val": 0.3}


def fitted(name: str, folder: Path, towers: Path, slide: Path) -> Recipe:
    """Return a shipped recipe with small data, tiny towers and a few steps."""
    known = load_recipe(name)
    kind, layout = known.values["model"]["kind"], known.values["data"].get("format")
    given: dict[str, Any] = {"train.batch": 3, "train.epochs": 1, "train.workers": 0}
    given |= {"train.lr": 1e-3, "train.precision": "float32"}
    if known.values["train"].get("chunk"):
        given["train.chunk"] = 2
    if kind == "mini-clip":
        if not (find("lite0") and find("minilm") and find("minilm-tokenizer")):
            pytest.skip("lite0 or MiniLM is not in the cache; run: pathcli models pull minilm")
        data = classes(folder)
    elif kind == "pallava-plip":
        tiny = {"vision": "random", "text": str(towers / "bert"), "width": 32, "layers": 1}
        tiny |= {"patch_px": 112, "dim": 8, "queue": 10, "text_limit": 10}
        given |= {f"model.{key}": value for key, value in tiny.items()}
        data = table(folder)
    else:
        data = pathgen(folder, slide) if layout == "pathgen" else pathgen_init(folder)
        if known.values["model"]["init"] == "???":
            given["model.init"] = str(
                towers / f"{known.values['model']['architecture']}.safetensors"
            )
    return known.with_values(**given, **{f"data.{key}": value for key, value in data.items()})


def quiet(done: int, total: int) -> None:
    del done, total


# --- as shipped --------------------------------------------------------------------------


def test_the_recipes_are_there() -> None:
    expected = {f"{name}-stage{stage}" for name in PATHGEN for stage in (1, 2)}
    assert expected | {"mini-clip", "pallava-plip", "pathgen-clip-l-init"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_check_says_exactly_what_a_recipe_still_needs(name: str, run: Run) -> None:
    known = load_recipe(name)
    found = check_recipe(known)
    assert not found.faults
    asked = re.findall(r"""(\w+): ["']?\?\?\?""", known.text)
    assert [path.rpartition(".")[2] for path in found.asked] == asked
    code, out, err = run("recipes", "check", name)
    assert code == 0
    for path in found.asked:
        assert f": give --set {path}=..." in out + err
    if known.values["model"]["kind"] == "open-clip":
        assert (out + err).count(")") >= len(found.asked) >= 2  # each with what it is


def test_the_retriever_is_trained_as_the_model_it_helps_to_make() -> None:
    first, own = (load_recipe(f"pathgen-clip-l-{n}").values for n in ("stage2", "init"))
    assert own["data"] == first["data"]
    assert own["train"] == first["train"]
    assert own["model"] == load_recipe("pathgen-clip-l-stage1").values["model"]


@pytest.mark.parametrize("name", PATHGEN)
def test_the_two_stages_have_the_numbers_of_the_text(name: str) -> None:
    for stage, epochs in ((1, 1), (2, 2)):
        made = load_recipe(f"{name}-stage{stage}").values["train"]
        assert (made["epochs"], made["batch"], made["lr"]) == (epochs, 384, 3e-5)
        assert (made["betas"], made["eps"]) == ([0.9, 0.98], 1e-6)
        assert (made["optimizer"], made["weight_decay"]) == ("adamw", 0.1)


# --- trained -----------------------------------------------------------------------------


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_stopped_after_two_steps_ends_with_equal_weights(
    name: str, towers: Path, slide_path: Path, store: Store, tmp_path: Path
) -> None:
    made = resolve_recipe(fitted(name, tmp_path, towers, slide_path))
    assert resolve_recipe(made).values == made.values
    task = build(made)
    task.prepare(store, device="cpu", progress=lambda _: quiet)

    def loop(folder: str) -> Loop:
        set_seed(1)
        return Loop(task.begin(1), task.train, tmp_path / folder, "cpu")

    whole = loop("whole")
    before = trainable_state(whole.work.module)
    assert whole.run(quiet)
    assert whole.steps > 2
    assert loop("cut").run(quiet, stop_after=2) is False
    cut = loop("cut")
    torch.rand(5)
    assert cut.run(quiet)
    assert cut.lines == whole.lines
    assert cut.best_state.keys() == whole.best_state.keys()
    assert all(torch.equal(cut.best_state[k], v) for k, v in whole.best_state.items())
    moved = [k for k, v in before.items() if not torch.equal(v, whole.best_state[k])]
    assert len(moved) > len(before) / 2
    assert np.isfinite(whole.best["loss"])


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", PATHGEN)
def test_the_second_stage_starts_from_the_run_of_the_first(
    name: str, towers: Path, slide_path: Path, store: Store, tmp_path: Path
) -> None:
    from pathcli.encoders import build_encoder

    first = fitted(f"{name}-stage1", tmp_path, towers, slide_path)
    (run,) = train(first, out=tmp_path / "runs", store=store, device="cpu")
    second = fitted(f"{name}-stage2", tmp_path, towers, slide_path)
    second = second.with_values(**{"model.init": str(run.folder)})
    task = build(second)
    task.prepare(store, device="cpu", progress=lambda _: quiet)
    weights = load_file(run.folder / "weights.safetensors")
    starts = trainable_state(task.begin(1).module)
    assert starts.keys() == weights.keys()
    assert all(torch.equal(starts[k], v) for k, v in weights.items())
    (last,) = train(second, out=tmp_path / "runs", store=store, device="cpu")
    trained = load_file(last.folder / "weights.safetensors")
    assert not all(torch.equal(trained[k], v) for k, v in weights.items())
    assert last.facts["model"]["encoder"] == name
    read = build_encoder(name, checkpoint=last.folder / "weights.safetensors")
    read.load("cpu")
    assert read.row_shape == (SMALL[read.architecture]["embed_dim"],)


@pytest.mark.usefixtures("_small")
def test_the_command_trains_and_says_how_to_measure(
    run: Run, towers: Path, slide_path: Path, tmp_path: Path
) -> None:
    made = fitted("pathgen-clip-stage2", tmp_path, towers, slide_path)
    (tmp_path / "mine.yaml").write_text(made.to_yaml())
    code, out, err = run("train", "--recipe", "mine.yaml", "--device", "cpu")
    assert code == 0, err
    assert "image_to_text_r1" in out + err
    weights = "runs/mine/seed-1/weights.safetensors"
    said = " ".join((out + err).split())
    assert f"pathcli zeroshot DATASET --encoder pathgen-clip --checkpoint {weights}" in said
    code, _, err = run("train", "--recipe", "pathgen-clip-stage1")
    assert code == 2
    assert "give --set data.source=... --set data.images=..." in err
