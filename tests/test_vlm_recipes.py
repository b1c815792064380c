"""Every shipped recipe of the tasks align and generate, with tiny models of its own formats."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_tables
import tiny_vlm
import torch
from conftest import Run as Call
from huggingface_hub import constants
from safetensors.torch import load_file
from test_image_text_recipes import TASKS as IMAGE_TEXT_TASKS
from tiny_tables import N
from tiny_vlm import WIDTH, WORDS

from pathcli.errors import DataError, UsageError
from pathcli.recipe import Recipe, build, check_recipe, list_recipes, load_recipe, resolve_recipe
from pathcli.runs import Run, train
from pathcli.store import Store
from pathcli.types import Progress, silent
from pathcli.vlm.model import NOT_LEARNT
from pathcli.weights import find, sha256

TASKS = {"align", "generate"}
SHIPPED = [r.name for r in list_recipes() if r.task in TASKS]
BEFORE = {
    "clover-stage2": "clover-stage1",
    "clover-stage2-flant5": "clover-stage1",
    "pallava-stage2": "pallava-stage1",
    "pathgen-llava-stage2": "pathgen-llava-stage1",
    "pathgen-describe-stage2": "pathgen-describe-stage1",
    "pathgen-revise": "pathgen-describe-stage2",
    "clover-mini-stage2": "clover-mini-stage1",
}

QFORMER = {"width": WIDTH, "layers": 2, "heads": 2, "hidden": 48}
SIZES: dict[str, dict[str, Any]] = {
    "clover": QFORMER | {"words": len(WORDS) + 1},
    "clover-mini": QFORMER,
    "pallava": {"layers": 1, "heads": 2, "hidden": 32},
    "pathgen-llava": {},
    "pathgen-describe": {},
    "pathgen-revise": {},
    "pathgen-summarise": {},
}
"""Keys of `connector`, by a recipe's name without its stage."""


# --- data of every layout ----------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, _painted: Path) -> Path:
    """A folder with pictures, two slides, and a table of each layout the recipes are made for."""
    return tiny_tables.fill(tmp_path_factory.mktemp("data"), _painted)


TABLES = {
    "clover-stage1": "quilt.csv",
    "clover-stage2": "questions.json",
    "clover-stage2-flant5": "questions.json",
    "pallava-stage1": "pcaption.json",
    "pallava-stage2": "vqa.jsonl",
    "pathgen-llava-stage1": "pairs.csv",
    "pathgen-llava-stage2": "pathgen.json",
    "pathgen-describe-stage1": "pairs.csv",
    "pathgen-describe-stage2": "pcaption.json",
    "pathgen-revise": "corrupted.json",
    "pathgen-summarise": "summaries.jsonl",
    "clover-mini-stage1": "captions.csv",
    "clover-mini-stage2": "talks.json",
}


# --- training every recipe once ----------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of tiny models: a hub's cache, which is the one in use, and files."""
    folder = tmp_path_factory.mktemp("models")
    cache = tiny_vlm.fill_hub(folder / "hub")
    tiny_vlm.smol(folder / "smol")
    tiny_vlm.blip2(folder / "blip2_pretrained.pth")
    (bert,) = tiny_vlm.repository(cache, "bert-base-uncased").glob("snapshots/*")
    tiny_vlm.plip(folder / "plip.safetensors", bert)
    with pytest.MonkeyPatch.context() as patch:
        tiny_vlm.clip_l(folder / "clip-l.safetensors", patch)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield folder


class Stages:
    """Recipes of small sizes, and their runs, each of which is trained when first asked for."""

    def __init__(self, folder: Path, models: Path, data: Path) -> None:
        self.store, self.out = Store(folder / "store"), folder / "runs"
        self.models, self.data = models, data
        self._runs: dict[str, Run] = {}

    def recipe(self, name: str) -> Recipe:
        """Return a shipped recipe, with other sizes and paths alone."""
        if name.startswith("clover-mini") and not (find("lite0") and find("minilm-tokenizer")):
            pytest.skip("lite0 or MiniLM is not in the cache; run: pathcli models pull minilm")
        family = re.sub("-stage.*", "", name)
        known, models = load_recipe(name), self.models
        given = {f"connector.{key}": value for key, value in SIZES[family].items()}
        given |= {"train.epochs": 1, "train.batch": 2, "train.workers": 0, "train.shard": "none"}
        given |= {"data.source": str(self.data / TABLES[name])}
        if "accumulate" in known.values["train"]:
            given |= {"train.batch": 1, "train.accumulate": 2}
        if "images" in known.values["data"]:
            given["data.images"] = str(self.data)
        if family == "pallava":
            given["encoder.checkpoint"] = str(models / "plip.safetensors")
        if known.values.get("encoder", {}).get("kind") == "pathgen-clip-l":
            given["encoder.checkpoint"] = str(models / "clip-l.safetensors")
        if name == "clover-stage1":
            given["connector.init"] = str(models / "blip2_pretrained.pth")
        if name == "clover-mini-stage2":
            given["language.model"] = str(models / "smol")
        if name in BEFORE:
            given["start.run"] = str(self.run(BEFORE[name]).folder)
        return known.with_values(**given)

    def run(self, name: str) -> Run:
        """Return the run of a recipe."""
        if name not in self._runs:
            (self._runs[name],) = self.train(self.recipe(name), self.out)
        return self._runs[name]

    def train(self, recipe: Recipe, out: Path, **given: Any) -> list[Run]:
        """Train a recipe on the CPU."""
        return train(recipe, out=out, store=self.store, device="cpu", **given)

    def begun(self, name: str) -> Any:
        """Return the work of a recipe before its first step."""
        task = build(self.recipe(name))
        task.prepare(self.store, device="cpu", progress=lambda _: silent)
        return task.begin(1)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, models: Path, data: Path) -> Stages:
    return Stages(tmp_path_factory.mktemp("stages"), models, data)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "weights.safetensors")


# --- as shipped --------------------------------------------------------------------------


def test_every_shipped_recipe_is_trained_by_tests_of_its_task() -> None:
    """`mil` is in test_runs.py, `mil-outcome` and images and texts have files of their own."""
    parts = [{"mil"}, {"mil-outcome"}, IMAGE_TEXT_TASKS, TASKS]
    for recipe in list_recipes():
        assert sum(recipe.task in tasks for tasks in parts) == 1, recipe.name
    assert {*SHIPPED} == {*TABLES}


@pytest.mark.parametrize("name", SHIPPED)
def test_check_says_exactly_what_a_recipe_still_needs(name: str) -> None:
    known = load_recipe(name)
    found = check_recipe(known)
    assert not found.faults
    asked = re.findall(r"""^[^#]*?(\w+): ["']?\?\?\?""", known.text, re.MULTILINE)
    assert [path.rpartition(".")[2] for path in found.asked] == asked
    assert ("start.run" in found.asked) == (name in BEFORE)


def test_what_is_missing_is_said_in_one_line(run: Call) -> None:
    code, _, err = run("train", "--recipe", "clover-stage2")
    assert (code, len(err.splitlines())) == (2, 1), err
    assert "recipe clover-stage2 asks for data.source" in err
    assert err.strip().endswith(": give --set data.source=... --set start.run=...")
    assert err.count("--set") == 2


@pytest.mark.parametrize(
    ("card", "command"),
    [
        ("eva-clip-g", "hf download Salesforce/blip2-itm-vit-g model.safetensors"),
        ("vicuna-7b", "hf download lmsys/vicuna-7b-v1.5"),
        ("bert-base-uncased", "hf download google-bert/bert-base-uncased"),
    ],
)
def test_a_model_that_is_not_here_is_met_with_its_command(
    card: str,
    command: str,
    stages: Stages,
    models: Path,
    data: Path,
    run: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = stages.run("clover-stage1").folder
    hub = tmp_path / "hub"
    hub.mkdir()
    for model in (models / "hub").iterdir():
        if model != tiny_vlm.repository(models / "hub", card):
            (hub / model.name).symlink_to(model)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    given = {f"connector.{key}": value for key, value in SIZES["clover"].items()}
    given |= {"data.source": data / "questions.json", "start.run": before}
    sets = [part for key, value in given.items() for part in ("--set", f"{key}={value}")]
    code, _, err = run("train", "--recipe", "clover-stage2", *sets, "--device", "cpu")
    (line,) = (line for line in err.splitlines() if "hf download" in line)
    assert code == 5, err
    assert f"run: {command} and copy the hub cache" in line


def test_tokens_of_the_store_and_images_that_change_do_not_go_together() -> None:
    for name in ("clover-mini-stage1", "clover-mini-stage2"):
        given = {"data.source": "a.json", "augment": {"mirror": True}}
        if name in BEFORE:
            given["start.run"] = "runs/before"
        (fault,) = check_recipe(load_recipe(name).with_values(**given)).faults
        assert fault.startswith("cache.tokens: the store has images as they are"), fault


def test_the_recipes_of_clover_do_to_images_what_its_code_does() -> None:
    for name in ("clover-stage1", "clover-stage2", "clover-stage2-flant5"):
        made = load_recipe(name).values["augment"]
        crop = [0.2, 1.0] if name == "clover-stage1" else [0.5, 1.0]
        assert made == {"crop": crop, "mirror": True}


# --- trained -----------------------------------------------------------------------------


def stopped(name: str) -> Progress:
    """Interrupt a run when its second step is done and not yet saved."""

    def report(done: int, total: int) -> None:
        if "seed-" in name and done == total:
            raise KeyboardInterrupt

    return report


def noted(steps: list[int]) -> Callable[[str], Progress]:
    """Return what notes the steps that a run makes."""
    return lambda name: lambda done, _: steps.append(done) if "seed-" in name else None


@pytest.mark.parametrize("name", SHIPPED)
def test_a_run_stopped_after_a_step_ends_with_the_same_bytes(
    name: str, stages: Stages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stages.recipe(name)
    assert resolve_recipe(resolve_recipe(made)).values == resolve_recipe(made).values
    whole = stages.run(name)
    assert whole.provenance["steps"] == 2
    assert whole.facts["samples"] == {"train": N - 1, "val": 1}
    assert np.isfinite(whole.metrics["loss"])
    monkeypatch.setattr("pathcli.trainer.SAVE_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        stages.train(made, tmp_path, progress=stopped)
    (kept,) = tmp_path.rglob("state.pt")
    once = torch.load(kept, weights_only=True)
    assert once["step"] == 1
    torch.rand(5)
    steps: list[int] = []
    (ended,) = stages.train(made, tmp_path, progress=noted(steps))
    assert steps == [2]
    for file in ("weights.safetensors", "metrics.jsonl"):
        assert (ended.folder / file).read_bytes() == (whole.folder / file).read_bytes()
    moved = [k for k, v in weights(ended).items() if not torch.equal(v, once["module"][k])]
    assert len(moved) > len(once["module"]) / 2


@pytest.mark.parametrize(("name", "before"), BEFORE.items())
def test_the_next_stage_starts_from_the_run_of_the_former(
    name: str, before: str, stages: Stages
) -> None:
    former = stages.run(before)
    saved = weights(former)
    work = stages.begun(name)
    own = work.module.state_dict()
    parts = ("connector.", "language.")
    taken = {k for k in saved if k in own and k.startswith(parts)}
    assert len(taken) > 3
    for key in taken:
        assert torch.equal(own[key], saved[key].to(own[key].dtype)), key
    fresh = {k for k in own if k.startswith("connector.")} - taken
    clover = name.startswith("clover")
    assert fresh == ({f"connector.project.{x}" for x in ("weight", "bias")} if clover else set())
    left = {k for k in saved if k.startswith(parts)} - taken
    assert all(re.search(r"\.(words|places)\.", key) for key in left), left
    facts = stages.run(name).facts["start"]
    assert (facts["recipe"], facts["taken"], facts["left"]) == (before, len(taken), len(left))
    assert facts["weights"] == sha256(former.folder / "weights.safetensors")


def test_a_stage_behind_another_layer_is_refused(stages: Stages, tmp_path: Path) -> None:
    made = stages.recipe("pathgen-llava-stage2").with_values(**{"encoder.layer": -1})
    with pytest.raises(UsageError, match=r"layer: -2.*, and this stage has .* \(layer -1\)"):
        stages.train(made, tmp_path)


# --- what is saved -----------------------------------------------------------------------


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def adapters(rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of adapters beside all layers of a tiny LLaMA: 32 wide, keys 16, 48."""
    wide = {"self_attn.q_proj": (32, 32), "self_attn.o_proj": (32, 32)}
    wide |= {"self_attn.k_proj": (32, 16), "self_attn.v_proj": (32, 16)}
    wide |= {"mlp.gate_proj": (32, 48), "mlp.up_proj": (32, 48), "mlp.down_proj": (48, 32)}
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        for name, (dim_in, dim_out) in wide.items():
            at = f"language.network.model.layers.{layer}.{name}"
            found[f"{at}.lora_A.default.weight"] = (rank, dim_in)
            found[f"{at}.lora_B.default.weight"] = (dim_out, rank)
    return found


def size(file: Path) -> int:
    """Return the bytes of a file's tensors, without the header that names them."""
    head = file.read_bytes()[:8]
    return file.stat().st_size - 8 - int.from_bytes(head, "little")


@pytest.mark.parametrize("name", ["pathgen-llava-stage1", "clover-stage2", "pallava-stage1"])
def test_the_file_of_weights_has_what_was_trained_and_nothing_else(
    name: str, stages: Stages
) -> None:
    run = stages.run(name)
    saved = weights(run)
    shapes = {key: tuple(value.shape) for key, value in saved.items()}
    language = {k: v for k, v in shapes.items() if not k.startswith("connector.")}
    assert language == (adapters(128) if name == "pallava-stage1" else {})
    module = stages.begun(name).module
    connector = {f"connector.{k}": tuple(v.shape) for k, v in module.connector.named_parameters()}
    assert {k: v for k, v in shapes.items() if k in connector} == connector
    assert shapes.keys() == connector.keys() | language.keys()
    if name == "pathgen-llava-stage1":
        first, last = (linear(f"connector.layers.{i}", 32, 32) for i in (0, 2))
        assert connector == first | last
    assert {value.dtype for value in saved.values()} == {torch.float32}
    count = sum(int(np.prod(shape)) for shape in shapes.values())
    assert size(run.folder / "weights.safetensors") == 4 * count
    assert run.facts["language"]["trained"] == sum(int(np.prod(x)) for x in language.values())


def test_a_batch_in_which_nothing_is_learnt_is_an_error(stages: Stages, tmp_path: Path) -> None:
    work = stages.begun("pathgen-llava-stage1")
    batch = work.collate([work.examples[0], work.examples[1]], np.random.default_rng(0))
    assert torch.isfinite(work.module.loss(batch))
    batch["labels"].fill_(NOT_LEARNT)
    with pytest.raises(DataError, match="no token is learnt"):
        work.module.loss(batch)
    visual = int(batch["image"][0].sum())
    short = stages.recipe("pathgen-llava-stage1").with_values(**{"chat.limit": visual + 1})
    with pytest.raises(DataError, match=f"{visual} visual tokens leave no room for words"):
        stages.train(short, tmp_path)
