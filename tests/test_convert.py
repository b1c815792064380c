"""Published checkpoints in their authors' layouts, converted: the same logits, nothing lost."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run as Call
from PIL import Image
from safetensors.torch import save_file
from test_vlm_parity import IMAGE, llava
from torch import Tensor
from torch.testing import assert_close

from pathcli.data.images import read_image
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.runs import read_run
from pathcli.types import Sample
from pathcli.vlm.convert import convert, files, settled
from pathcli.vlm.own import RunResponder
from pathcli.vlm.responders import open_responder

State = dict[str, Tensor]
HEADS = 24  # the width of a Q-Former with BERT-base's twelve heads
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_hidden_size": 24,
    "image_aspect_ratio": "pad",
    "tokenizer_model_max_length": 512,
    "tune_mm_mlp_adapter": False,
    "max_length": 4096,
    "torch_dtype": "float32",
    "_name_or_path": "somewhere/else",
}


def opened(out: Path, **values: Any) -> RunResponder:
    recipe = settled(read_run(out).recipe, out).with_values(**values)
    return RunResponder(recipe, out / "weights.safetensors", device="cpu")


def sample(folder: Path) -> Sample:
    pixels = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "x.png")
    return Sample("x", (str(folder / "x.png"),), "no, benign", ("What do you see?",))


def told(run: RunResponder, asked: Sample) -> tuple[dict[str, Any], Tensor]:
    """Return a batch of a question, and the pixels of its image's views."""
    batch = run.examples([asked], np.random.default_rng(0))
    encoder: Any = run.module.encoder
    views = run.module.connector.views(read_image(asked.images[0]), encoder.input_px)
    return batch, encoder.preprocess(torch.from_numpy(np.stack(views)))


def rows(made: Any) -> dict[str, tuple[int, str]]:
    return {row["what"]: (row["tensors"], row["where"]) for row in made.rows}


# --- LLaVA ---------------------------------------------------------------------------------


@dataclass
class Llava:
    folder: Path
    theirs: Any
    state: State = field(default_factory=dict)

    def write(self, to: Path, *, files: int = 2, kind: str = "safetensors", **config: Any) -> Path:
        """Write the checkpoint as LLaVA's code saves it."""
        to.mkdir()
        shutil.copytree(self.folder / "language", to, dirs_exist_ok=True)
        (to / "model.safetensors").unlink()
        own = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(own | CONFIG | config))
        names = sorted(self.state)
        parts = [names[n::files] for n in range(files)]
        stem, end = ("model", "safetensors") if kind == "safetensors" else ("pytorch_model", "bin")
        index = {}
        for number, part in enumerate(parts, start=1):
            file = f"{stem}-{number:05}-of-{files:05}.{end}" if files > 1 else f"{stem}.{end}"
            index |= dict.fromkeys(part, file)
            put({name: self.state[name].contiguous() for name in part}, to / file)
        if files > 1:
            text = json.dumps({"metadata": {}, "weight_map": index})
            (to / f"{stem}.{end}.index.json").write_text(text)
        return to

    def same(self, run: RunResponder) -> None:
        asked = sample(self.folder)
        batch, pixels = told(run, asked)
        ids = batch["ids"].masked_fill(batch["image"], IMAGE)
        with torch.no_grad():
            wanted = self.theirs(input_ids=ids, pixel_values=pixels).logits
            found = run.module.logits(batch)
        assert float(wanted.std()) > 0.3
        assert_close(found, wanted, rtol=0, atol=1e-4)


def put(state: State, file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file(state, file, {"format": "pt"})
    else:
        torch.save(state, file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Llava:
    folder = tmp_path_factory.mktemp("llava")
    theirs, _ = llava("llama", folder)
    made, inner = Llava(folder, theirs), theirs.model
    for name, tensor in inner.language_model.state_dict().items():
        made.state[f"model.{name}"] = tensor
    made.state["lm_head.weight"] = theirs.lm_head.weight.detach()
    made.state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for theirs_, ours in (("linear_1", 0), ("linear_2", 2)):
        for name, tensor in getattr(inner.multi_modal_projector, theirs_).state_dict().items():
            made.state[f"model.mm_projector.{ours}.{name}"] = tensor
    for name, tensor in inner.vision_tower.state_dict().items():
        made.state[f"model.vision_tower.vision_tower.vision_model.{name}"] = tensor
    return made


@pytest.mark.parametrize(
    ("files", "kind", "name"),
    [(2, "safetensors", "Llama"), (2, "bin", "Llama"), (1, "safetensors", "Mistral")],
)
def test_a_whole_llava_gives_transformers_logits(
    model: Llava, tmp_path: Path, files: int, kind: str, name: str
) -> None:
    config = {"architectures": [f"Llava{name}ForCausalLM"], "sliding_window": None}
    source = model.write(tmp_path / "llava", files=files, kind=kind, **config)
    made = convert(source, tmp_path / "out", encoder=f"hf:{model.folder / 'clip'}")
    assert made.command.endswith(f"--model {tmp_path / 'out'}")
    run = opened(tmp_path / "out")
    model.same(run)
    network = run.module.language.network
    assert type(network).__name__ == f"{name}ForCausalLM"
    inst = "[INST] <image>\nWhat do you see? [/INST]" in run.prompt(sample(tmp_path))
    assert inst == (name == "Mistral")
    found = rows(made)
    whole = len(network.state_dict())
    assert found["language model"] == (whole, "language/")
    assert found["projector"] == (4, "weights.safetensors")
    assert found["rotary angles"] == (1, "not used: computed anew")
    tower, where = found["vision tower"]
    assert where == "not used: equal to hf's"
    assert whole + 4 + 1 + tower == len(model.state)
    assert read_run(tmp_path / "out").recipe.values["decoding"] == {"max_new_tokens": 1024}


def test_a_frozen_tower_that_is_not_the_named_one_is_told(model: Llava, tmp_path: Path) -> None:
    lost = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    half = {n: x.half() if "vision_tower" in n else x for n, x in model.state.items()}
    for changed, why in ((half, "equal to hf's"), (half | {lost: half[lost] + 1}, "1 differ from")):
        folder = tmp_path / why[:1]
        source = Llava(model.folder, None, changed).write(folder)
        made = convert(source, tmp_path / f"{why[:1]}-out", encoder=f"hf:{model.folder / 'clip'}")
        assert why in rows(made)["vision tower"][1]


def test_a_moved_run_finds_its_language_model(model: Llava, tmp_path: Path) -> None:
    source = model.write(tmp_path / "llava")
    convert(source, tmp_path / "out", encoder=f"hf:{model.folder / 'clip'}")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    shutil.rmtree(source)
    model.same(opened(tmp_path / "moved"))


def test_large_language_models_are_written_in_several_files(
    model: Llava, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARD", 50_000)
    source = model.write(tmp_path / "llava")
    convert(source, tmp_path / "out", encoder=f"hf:{model.folder / 'clip'}")
    written = sorted((tmp_path / "out" / "language").glob("model-*.safetensors"))
    assert len(written) > 2
    assert all(file.stat().st_size < 70_000 for file in written)
    model.same(opened(tmp_path / "out"))


def test_a_projector_alone_needs_its_language_model(model: Llava, tmp_path: Path) -> None:
    source = tmp_path / "pretrain"
    source.mkdir()
    of_base = {"architectures": ["LlamaForCausalLM"]}  # LLaVA saves it so where all is frozen
    (source / "config.json").write_text(json.dumps(CONFIG | of_base))
    state = {name: x for name, x in model.state.items() if "mm_projector" in name}
    torch.save(state, source / "mm_projector.bin")
    clip = f"hf:{model.folder / 'clip'}"
    with pytest.raises(
        UsageError, match=r"somewhere/else.*not known here; name it with --language"
    ):
        convert(source, tmp_path / "out", encoder=clip)
    convert(source, tmp_path / "out", encoder=clip, language=str(model.folder / "language"))
    assert not (tmp_path / "out" / "language").exists()
    model.same(opened(tmp_path / "out"))


def test_adapters_are_put_beside_their_language_model(model: Llava, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(model.folder / "language")
    how = LoraConfig(r=4, lora_alpha=12, lora_dropout=0.1, target_modules=["q_proj", "up_proj"])
    tuned = get_peft_model(base, how)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    source = tmp_path / "llava-lora"
    tuned.save_pretrained(source)
    (source / "config.json").write_text(json.dumps(CONFIG))
    rest = {f"base_model.model.{n}": x for n, x in model.state.items() if "mm_projector" in n}
    torch.save(rest, source / "non_lora_trainables.bin")
    given = {"encoder": f"hf:{model.folder / 'clip'}", "language": str(model.folder / "language")}
    made = convert(source, tmp_path / "out", **given)
    assert rows(made)["adapters"] == (8, "weights.safetensors")
    run = opened(tmp_path / "out")
    batch, _ = told(run, sample(tmp_path))
    with torch.no_grad():
        embeds = run.module.embeds(batch)
        wanted = tuned.eval()(inputs_embeds=embeds).logits
        assert_close(run.module.logits(batch), wanted, rtol=0, atol=1e-4)
        with tuned.disable_adapter():
            assert float((tuned(inputs_embeds=embeds).logits - wanted).abs().max()) > 0.1
    state = torch.load(source / "non_lora_trainables.bin", weights_only=True)
    state["base_model.model.model.embed_tokens.weight"] = torch.zeros(3, 3)
    torch.save(state, source / "non_lora_trainables.bin")
    with pytest.raises(DataError, match="adapters beside retrained words"):
        convert(source, tmp_path / "more", **given)


def test_a_tuned_tower_is_written_too(model: Llava, tmp_path: Path) -> None:
    begun = tmp_path / "clip"
    shutil.copytree(model.folder / "clip", begun)
    state = dict(files.stream(begun / "model.safetensors"))
    put({n: x * 0.5 if "vision" in n else x for n, x in state.items()}, begun / "model.safetensors")
    source = model.write(tmp_path / "llava", unfreeze_mm_vision_tower=True)
    made = convert(source, tmp_path / "out", encoder=f"hf:{begun}")
    assert rows(made)["vision tower, tuned"][1] == "encoder/"
    shutil.rmtree(begun)
    model.same(opened(tmp_path / "out"))
    with pytest.raises(
        UsageError, match="tuned from quilt-net; name that with --encoder hf:FOLDER"
    ):
        convert(source, tmp_path / "other", encoder="quilt-net")
    lost = "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias"
    less = Llava(model.folder, None, {n: x for n, x in model.state.items() if n != lost})
    source = less.write(tmp_path / "less", unfreeze_mm_vision_tower=True)
    with pytest.raises(DataError, match=r"vision_model\.pre_layrnorm\.bias missing"):
        convert(source, tmp_path / "other", encoder=f"hf:{model.folder / 'clip'}")


@pytest.mark.parametrize(
    ("tower", "section"),
    [
        ("/data/x/pathgenclip-vit-large-patch14-hf", {"kind": "pathgen-clip-l-hf"}),
        ("./pathgenclip-vit-large-patch14/", {"kind": "pathgen-clip-l-hf"}),
        ("wisdomik/QuiltNet-B-32", {"kind": "quilt-net"}),
        ("wisdomik/QuiltNet-B-16", {"kind": "quilt-net", "model": "B-16"}),
        ("openai/clip-vit-base-patch16", {"kind": "hf", "model": "openai/clip-vit-base-patch16"}),
    ],
)
def test_towers_are_known_by_name(
    model: Llava, tmp_path: Path, tower: str, section: dict[str, str]
) -> None:
    source = model.write(tmp_path / "llava", mm_vision_tower=tower)
    shutil.copytree(model.folder / "clip", source / "their-clip")
    made = convert(source, tmp_path / "out")
    folder = source / "their-clip"
    assert rows(made)["their-clip/"] == (0, f"not used: --encoder hf:{folder} takes a CLIP")
    recipe = read_run(tmp_path / "out").recipe.values
    assert recipe["encoder"] == section | {"tokens": True, "layer": -2}
    assert recipe["connector"] == {"kind": "mlp", "depth": 2, "frame": "pad"}
    assert recipe["chat"] == {"template": "vicuna-v1", "limit": 512}


def test_what_cannot_be_converted_is_met_with_one_line(model: Llava, tmp_path: Path) -> None:
    source = model.write(tmp_path / "llava", mm_vision_tower="them/their-tower")
    with pytest.raises(UsageError, match=r"'them/their-tower' is no encoder known .*--encoder hf:"):
        convert(source, tmp_path / "out")
    clip = f"hf:{model.folder / 'clip'}"
    with pytest.raises(UsageError, match="leave out --language"):
        convert(source, tmp_path / "out", encoder=clip, language="vicuna-7b")
    with pytest.raises(UsageError, match="no such encoder"):
        convert(source, tmp_path / "out", encoder="hg:x")
    config = json.loads((source / "config.json").read_text())
    for wrong, why in (
        ({"mm_use_im_start_end": True}, "marks around an image"),
        ({"image_aspect_ratio": "anyres"}, "'anyres'"),
        ({"mm_projector_type": "qformer"}, "'qformer'"),
        ({"mm_vision_select_feature": "cls_patch"}, "class token"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "LLaMA and Mistral are read"),
    ):
        (source / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(DataError, match=why):
            convert(source, tmp_path / "out", encoder=clip)
    (source / "config.json").write_text(json.dumps(config))
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ResourceError, match=r"of which model-00002-of-00002\.safetensors is not"):
        convert(source, tmp_path / "out", encoder=clip)
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["llava"]


@pytest.mark.parametrize(
    "lost",
    [
        "model.mm_projector.2.bias",
        "model.layers.1.mlp.up_proj.weight",
        "model.mm_projector.0.weight",
    ],
)
def test_a_missing_tensor_is_named(model: Llava, tmp_path: Path, lost: str) -> None:
    less = Llava(model.folder, None, {n: x for n, x in model.state.items() if n != lost})
    source = less.write(tmp_path / "llava")
    with pytest.raises(
        DataError, match=lost.replace("model.mm_projector.", "").replace(".", r"\.")
    ):
        convert(source, tmp_path / "out", encoder=f"hf:{model.folder / 'clip'}")
    assert not (tmp_path / "out").exists()


# --- what is no checkpoint -----------------------------------------------------------------


class _Calls:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_what_is_no_checkpoint_is_refused_and_never_run(tmp_path: Path) -> None:
    file, mark, out = tmp_path / "x.pth", tmp_path / "ran", tmp_path / "out"
    for held in (_Calls(mark), {"state_dict": _Calls(mark)}, {"projector.a": _Calls(mark)}, {}):
        torch.save(held, file)
        with pytest.raises(DataError, match=r"x\.pth: holds no tensors by name"):
            convert(file, out)
    file.write_bytes(pickle.dumps({"state_dict": _Calls(mark)}))
    with pytest.raises(DataError, match=r"x\.pth: no weights can be read here"):
        convert(file, out)
    file.write_bytes(b"")
    with pytest.raises(DataError, match="an empty file"):
        convert(file, out)
    assert not mark.exists()
    torch.save({"a": torch.ones(2)}, file)
    with pytest.raises(UsageError, match=r"neither LAVIS .* nor xtuner"):
        convert(file, out)
    with pytest.raises(ResourceError, match="no such checkpoint"):
        convert(tmp_path / "none", out)
    (tmp_path / "hf").mkdir()
    gemma = '{"model_type": "gemma3", "vision_config": {}, "mm_tokens_per_image": 256}'
    (tmp_path / "hf" / "config.json").write_text(gemma)
    with pytest.raises(UsageError, match="asked as it is: --model"):
        convert(tmp_path / "hf", out)
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(UsageError, match="of no layout known here"):
        convert(tmp_path / "hf", out)
    (tmp_path / "hf" / "config.json").write_text('{"mm_vision_tower": "openai/clip"}')
    for source in (tmp_path / "hf", file):
        with pytest.raises(UsageError, match=rf"run: pathcli models convert {source} OUT"):
            open_responder(str(source))


def test_the_command_says_what_was_found_and_what_comes_next(
    model: Llava, tmp_path: Path, run: Call
) -> None:
    source, out = model.write(tmp_path / "llava"), tmp_path / "out"
    command = [
        "models",
        "convert",
        str(source),
        str(out),
        "--encoder",
        f"hf:{model.folder / 'clip'}",
    ]
    code, told_, err = run(*command)
    assert code == 0, err
    assert "language/" in told_
    assert f"--model {out}" in err.replace("\n", "")
    code, _, err = run(*command)
    assert code == 2
    assert "is there already" in err.replace("\n", " ")
