"""LLaVA's own layout in (arXiv:2310.03744), not transformers' of the same name; a run's parts out.

Whole checkpoints hold the language model under its names in transformers, the projector
(`model.mm_projector`), and sometimes the vision tower. LLaVA's code reads that tower by its
name (`mm_vision_tower`), and so it is here, unless it was tuned (`unfreeze_mm_vision_tower`).
Folders of adapters (`non_lora_trainables.bin`) and of a projector alone (`mm_projector.bin`)
need the language model they were trained with.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pathcli.cards import CARDS, Hub
from pathcli.encoders.checkpoint import shape_faults
from pathcli.errors import DataError, UsageError
from pathcli.vlm.connectors import Mlp
from pathcli.vlm.convert import Made
from pathcli.vlm.convert.files import Shards, read_json, refuse_faults, stream, weight_files
from pathcli.vlm.convert.parts import (
    check_width,
    encoder_section,
    language_name,
    lora,
    numbers,
)
from pathcli.vlm.language import HFLanguage
from pathcli.vlm.language_files import read_config
from pathcli.weights import fetch, find

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from pathcli.vlm.convert import Job

    State = dict[str, Tensor]

DECODING = {"max_new_tokens": 1024}  # LLaVA's evaluation; greedy, as Quilt-LLaVA's
MISTRAL = r"""# LLaVA-Med v1.5 (its template mistral_instruct)
version: 1
bos: true
user: "[INST] {} [/INST]"
answer: " {} "
end: "{eos}"
"""
_TOWERS = (
    (r"path-?gen-?clip.*(large|-l\b)", "pathgen-clip-l-hf"),
    (r"quiltnet-b-32$", "quilt-net"),
    (r"quiltnet-b-16$", "quilt-net:B-16"),
    (r"^openai/clip-vit-.*", "hf:{}"),
    (r"^vinid/plip$", "plip"),
)
"""What `mm_vision_tower` ends in, a hub's id or a folder of its authors; and the encoder here."""

_PROJECTOR = re.compile(r"model\.mm_projector\.(?:(\d+)\.)?(weight|bias)")
_TOWER = re.compile(r"model\.vision_tower\.(?:vision_tower\.)?(vision_model\..+)")
_WORDS = re.compile(r"(?:model\.(?:embed_tokens|layers\.\d+|norm)|lm_head)\.(?!.*inv_freq$).+")
_ITS_OWN = re.compile(
    r"_|(.*_)?mm_|use_mm|image_|vision_|tokenizer_|freeze|unfreeze|pretrain|auto_map"
    r"|transformers_version|quantization_config"
)
"""Keys of config.json that say nothing of the language model."""

_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "*generation_config*")
_PLAIN_LORA = {"bias": "none", "use_rslora": False, "use_dora": False, "modules_to_save": None}


def read(job: Job) -> Made:
    """Return a checkpoint's parts; its own language model goes to `language/`.

    Raises:
        UsageError: the tower or the language model has to be named, or one was in vain.
        DataError: tensors are missing, or it works in a way that is not known here.
        ResourceError: a file is missing.
    """
    config = read_json(job.source / "config.json")
    kind, frame = _refuse(config, job.source)
    encoder = _encoder(job, config)
    files, adapters = _files(job.source)
    sorted_ = _Sorted(job)
    for file in files:
        sorted_.take(file)
    for inside in sorted(job.source.glob("*/config.json")):  # as PathGen-LLaVA has its tower
        job.note(f"{inside.parent.name}/", f"not used: --encoder hf:{inside.parent} takes a CLIP")
    if not sorted_.projector and (beside := job.source / "mm_projector.bin").is_file():
        sorted_.take(beside)
    connector, weights = _connector(config, sorted_.projector, job.source)
    sizes = weights["connector.layers.0.weight"].shape
    if sorted_.words is not None:
        language = _whole(job, config, kind, sorted_.words, sizes[0], partial=adapters is not None)
    else:
        language, more = _beside(job, config, adapters, sizes[0])
        weights |= more
    if config.get("unfreeze_mm_vision_tower"):
        encoder = _tuned(job, encoder, sorted_.tower)
    elif sorted_.tower:
        job.note("vision tower", _untold(encoder, sorted_.tower), *sorted_.tower.values())
    chat = {"template": "vicuna-v1", "limit": int(config.get("tokenizer_model_max_length") or 2048)}
    if kind == "mistral":
        (job.out / "chat.yaml").write_text(MISTRAL, encoding="utf-8")
        chat["template"] = "./chat.yaml"
    sections = {"encoder": encoder, "connector": connector | {"frame": frame}}
    return Made(sections | {"language": language, "chat": chat}, weights, DECODING)


def _refuse(config: Mapping[str, Any], source: Path) -> tuple[str, str]:
    """Return the kind of language model and the frame of images; DataError for what is unknown."""
    name = next(iter(config.get("architectures") or [""]))
    found = re.fullmatch(r"(?:Llava)?(Llama|Mistral)ForCausalLM", name)
    frames = {"pad": "pad", None: "centre", "square": "centre"}
    aspect = config.get("image_aspect_ratio")
    faults = [
        (not found, f"architectures is {name!r}: LLaMA and Mistral are read"),
        (config.get("mm_use_im_start_end"), "mm_use_im_start_end: marks around an image"),
        (aspect not in frames, f"image_aspect_ratio is {aspect!r}: pad and square are read"),
        (
            config.get("mm_vision_select_feature", "patch") != "patch",
            "mm_vision_select_feature: the class token is read, too",
        ),
    ]
    for wrong, why in faults:
        if wrong:
            msg = f"{source / 'config.json'}: {why}; a checkpoint of this kind cannot be converted"
            raise DataError(msg)
    assert found  # noqa: S101 - the first of the faults
    return found[1].lower(), frames[aspect]


def _encoder(job: Job, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section of the tower that config.json names, or that the user did."""
    layer = int(config.get("mm_vision_select_layer", -2))
    tower = str(config.get("mm_vision_tower") or config.get("vision_tower") or "")
    name = job.encoder
    if name is None and (Path(tower) / "config.json").is_file():
        name = f"hf:{tower}"
    for ending, known in _TOWERS:
        if name is None and re.search(ending, tower.rstrip("/"), re.IGNORECASE):
            name = known.format(tower)
    if name is None:
        msg = f"{job.source / 'config.json'}: mm_vision_tower {tower!r} is no encoder known here; "
        raise UsageError(msg + "name it with --encoder, such as --encoder hf:FOLDER")
    return encoder_section(name, job.checkpoint, layer=layer)


def _files(source: Path) -> tuple[list[Path], Path | None]:
    """Return the files of weights, and that of adapters where there is one."""
    if (source / "adapter_config.json").is_file():
        named = ("adapter_model.safetensors", "adapter_model.bin")
        found = [source / name for name in named if (source / name).is_file()]
        rest = source / "non_lora_trainables.bin"
        if not found or not rest.is_file():
            msg = f"{source}: adapters are adapter_model.safetensors or .bin beside {rest.name}"
            raise DataError(msg)
        return [rest], found[0]
    files = weight_files(source)
    if not files and not (source / "mm_projector.bin").is_file():
        msg = f"{source}: no *.safetensors, pytorch_model*.bin or mm_projector.bin in it"
        raise DataError(msg)
    return files, None


class _Sorted:
    """Tensors of a checkpoint by what they are of; those of the language model are written."""

    def __init__(self, job: Job) -> None:
        self.job, self.projector, self.tower = job, dict[str, Any](), dict[str, Any]()
        self.words: Shards | None = None

    def take(self, file: Path) -> None:
        """Take all tensors of a file."""
        for theirs, tensor in stream(file):
            name = theirs.removeprefix("base_model.model.")  # of peft
            if match := _PROJECTOR.fullmatch(name):
                self.projector[f"layers.{match[1] or 0}.{match[2]}"] = tensor.clone()
                self.job.note("projector", "weights.safetensors", tensor)
            elif match := _TOWER.fullmatch(name):
                self.tower[match[1]] = tensor
            elif _WORDS.fullmatch(name):
                self.words = self.words or Shards(self.job.out / "language")
                self.words.add(name, tensor)
                self.job.note("language model", "language/", tensor)
            elif name.endswith("inv_freq"):
                self.job.note("rotary angles", "not used: computed anew", tensor)
            else:
                self.job.note(theirs, "not used: unknown here", tensor)


def _connector(
    config: Mapping[str, Any], projector: State, source: Path
) -> tuple[dict[str, Any], State]:
    """Return the section of the projector that config.json names, and its weights."""
    kind = str(config.get("mm_projector_type") or "linear")
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if kind != "linear" and not found:
        msg = f"{source / 'config.json'}: mm_projector_type {kind!r}, not linear or mlp2x_gelu"
        raise DataError(msg)
    depth, first = int(found[1]) if found else 1, projector.get("layers.0.weight")
    if first is None:
        msg = f"{source}: holds no projector (model.mm_projector.0.weight)"
        raise DataError(msg)
    with torch.device("meta"):
        wanted = Mlp(first.shape[1], first.shape[0], depth=depth)
    refuse_faults(shape_faults(projector, wanted), source)
    section = {"kind": "mlp", "depth": depth}
    return section, {f"connector.{name}": tensor for name, tensor in projector.items()}


# --- the language model --------------------------------------------------------------------


def _whole(
    job: Job, config: Mapping[str, Any], kind: str, words: Shards, width: int, *, partial: bool
) -> dict[str, Any]:
    """Finish the folder of a language model that is in the checkpoint; return its section."""
    if partial or job.language:
        why = "adapters beside retrained words" if partial else "leave out --language"
        msg = f"{job.source}: holds weights of a language model itself; {why}"
        raise DataError(msg) if partial else UsageError(msg)
    words.close()
    values = {k: v for k, v in config.items() if not _ITS_OWN.match(k)}
    values |= {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"]}
    text = json.dumps(values, indent=1) + "\n"
    (words.folder / "config.json").write_text(text, encoding="utf-8")
    for pattern in _TOKENIZER:
        for file in job.source.glob(pattern):
            shutil.copyfile(file, words.folder / file.name)
    refuse_faults(_faults(words), job.source)
    language = HFLanguage(model=str(words.folder))
    try:
        language.tokenizer.get_vocab()
    except DataError as error:
        why = "copy there the tokenizer's files of the language model it was trained from"
        msg = f"{job.source}: no tokenizer that fits its language model; {why}"
        raise DataError(msg) from error
    if language.width != width:
        msg = f"{job.source}: projects to {width}, but its language model reads {language.width}"
        raise DataError(msg)
    load = str(words.dtype).removeprefix("torch.")
    return {"kind": "hf", "model": "./language", "tune": "frozen", "load": load}


def _faults(words: Shards) -> list[str]:
    """Return how tensors differ from those that config.json promises, one phrase each."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    config = read_config(words.folder)
    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(config).state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.tie_word_embeddings and "lm_head.weight" not in words.shapes:
        wanted.pop("lm_head.weight", None)
    faults = [f"{name} missing" for name in wanted if name not in words.shapes]
    faults += [f"{name} unexpected" for name in words.shapes if name not in wanted]
    return faults + [
        f"{name} is {shape}, not {wanted[name]}"
        for name, shape in words.shapes.items()
        if name in wanted and wanted[name] != shape
    ]


def _beside(
    job: Job, config: Mapping[str, Any], adapters: Path | None, width: int
) -> tuple[dict[str, Any], State]:
    """Return the section of a language model that is elsewhere, and weights of adapters to it."""
    plain: dict[str, Any] = {}
    named = str(config.get("_name_or_path") or "")
    if adapters is not None:
        plain = read_json(job.source / "adapter_config.json")
        named = str(plain.get("base_model_name_or_path") or named)
    language = language_name(job.language, named, job.source)
    check_width(language, width, job.source)
    if adapters is None:
        section = {"kind": "hf", "model": language, "tune": "frozen"}
        return section | {"load": numbers(language)}, {}
    odd = [k for k, v in _PLAIN_LORA.items() if plain.get(k, v) != v]
    odd += [k for k in ("rank_pattern", "alpha_pattern") if plain.get(k)]
    if odd:
        msg = f"{job.source / 'adapter_config.json'}: {odd[0]} {plain[odd[0]]!r} is not known here"
        raise DataError(msg)
    state = dict(stream(adapters))
    job.note("adapters", "weights.safetensors", *state.values())
    dropout = float(plain.get("lora_dropout", 0))
    return lora(state, language, plain.get("lora_alpha"), dropout, job.source)


# --- the vision tower ----------------------------------------------------------------------


def _clip(encoder: Mapping[str, Any]) -> Path | Hub | None:
    """Return where a CLIP in transformers' form is; None for one in another form."""
    if encoder["kind"] == "hf":
        model = Path(encoder["model"])
        return model if model.is_dir() else Hub(encoder["model"])
    published = CARDS["pathgen-clip-l-hf"].source
    if encoder["kind"] != "pathgen-clip-l-hf" or not isinstance(published, Hub):
        return None
    return published


def _untold(encoder: Mapping[str, Any], tower: State) -> str:
    """Return why a checkpoint's tower is not used, and whether that changes anything.

    LLaVA's code reads a frozen tower by its name and leaves what the checkpoint has; so of
    LLaVA-Med v1.5 (its repository's issue 105).
    """
    kind, source = encoder["kind"], _clip(encoder)
    begun = find(source) if isinstance(source, Hub) else source
    if begun is None:
        return f"not used: LLaVA reads a frozen tower by its name, here {kind}; not compared"
    pairs = (pair for file in weight_files(begun) for pair in stream(file))
    other = sum(not _rounded(x, tower[name]) for name, x in pairs if name in tower)
    if not other:
        return f"not used: equal to {kind}'s"
    why = f"not used: LLaVA reads a frozen tower by its name; {other} differ from {kind}'s, and "
    return why + "unfreeze_mm_vision_tower: true in config.json takes them"


def _rounded(exact: Tensor, stored: Tensor) -> bool:
    """Tell whether a tensor is another one in its own precision, perhaps by way of float16."""
    if exact.shape != stored.shape:
        return False
    ways = (exact, exact.half())
    return any(torch.equal(way.to(stored.dtype), stored) for way in ways)


def _tuned(job: Job, encoder: dict[str, Any], tower: State) -> dict[str, Any]:
    """Write a CLIP with the checkpoint's own vision tower to `encoder/`; return its section.

    Configuration and text tower are those of the CLIP it began from.
    """
    source = _clip(encoder)
    if source is None:
        name = encoder["kind"]
        msg = f"{job.source}: its tower was tuned from {name}; name that with --encoder hf:FOLDER"
        raise UsageError(msg)
    begun = source if isinstance(source, Path) else fetch(source)
    clip = Shards(job.out / "encoder")
    for file in [*begun.glob("*.json"), *begun.glob("*.txt")]:
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, clip.folder / file.name)
    faults = []
    for name, tensor in (pair for file in weight_files(begun) for pair in stream(file)):
        mine = tower.get(name, tensor)
        if mine.shape != tensor.shape:
            faults.append(f"{name} is {tuple(mine.shape)}, not {tuple(tensor.shape)}")
        if name.startswith("vision_model.") and name not in tower and not name.endswith("_ids"):
            faults.append(f"{name} missing")
        clip.add(name, mine.to(tensor.dtype) if name in tower else tensor)
    faults += [f"{n} unexpected" for n in tower if n not in clip.shapes and not n.endswith("_ids")]
    refuse_faults(faults, job.source)
    clip.close()
    job.note("vision tower, tuned", "encoder/", *tower.values())
    return encoder | {"kind": "hf", "model": "./encoder"}
