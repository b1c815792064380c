"""PA-LLaVA's files, which xtuner writes, in; a run's parts out.

A .pth (or the folder DeepSpeed writes: its `mp_rank_00_model_states.pt`) holds `projector.*`
and LoRA weights `llm.*`; xtuner's converted folder has `projector/` and `llm_adapter/`. The
image tower is a file of its own, `plip_80w_196token.bin`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from pathcli.encoders.checkpoint import shape_faults
from pathcli.encoders.pallava_towers import vision_part
from pathcli.errors import DataError, UsageError
from pathcli.vlm.convert import Made
from pathcli.vlm.convert.files import (
    read_json,
    read_pickle,
    refuse_faults,
    stream,
    weight_files,
)
from pathcli.vlm.convert.parts import check_width, language_name, lora
from pathcli.vlm.scale_invariant import ScaleInvariant

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from pathcli.vlm.convert import Job

    State = dict[str, Tensor]

HEADS = 12  # of bert-base-uncased, whose configuration the connector has
DECODING = {"max_new_tokens": 1200}  # greedy
PLIP = "plip_80w_196token.bin"
_DROPOUT = 0.05  # of its LoRA, which a .pth does not tell; nor that alpha is twice the rank

_RENAMED = (
    (r"^(?:projector\.)?model\.", ""),
    (r"^bert\.encoder\.layer\.", "layers."),
    (r"\.attention\.self\.", ".self_attn."),
    (r"\.crossattention\.self\.", ".multihead_attn."),
    (r"\.attention\.output\.dense\.", ".self_attn.out_proj."),
    (r"\.crossattention\.output\.dense\.", ".multihead_attn.out_proj."),
    (r"\.attention\.output\.LayerNorm\.", ".norm1."),
    (r"\.crossattention\.output\.LayerNorm\.", ".norm2."),
    (r"\.intermediate_query\.dense\.", ".linear1."),
    (r"\.output_query\.dense\.", ".linear2."),
    (r"\.output_query\.LayerNorm\.", ".norm3."),
    (r"^mlp\.model\.0\.", "projection."),
)


def read(job: Job) -> Made:
    """Return a checkpoint's parts; the image tower goes to `encoder.safetensors`.

    Raises:
        UsageError: the image tower has to be named, or the language model is of another width.
        DataError: tensors are missing or have no place.
        ResourceError: a file is missing.
    """
    if job.encoder not in {None, "pallava-plip"}:
        msg = f"--encoder {job.encoder}: PA-LLaVA's is pallava-plip; its file is --checkpoint"
        raise UsageError(msg)
    projector, adapters, tower, how = _read(job)
    weights = _connector(projector, job.source)
    section = _section(weights, job.source)
    language = language_name(job.language, "llama-3-8b-instruct", job.source)
    check_width(language, len(weights["projection.weight"]), job.source)
    if not adapters:
        msg = f"{job.source}: holds no LoRA weights (llm.base_model.model.*), which PA-LLaVA has"
        raise DataError(msg)
    alpha, dropout = how.get("lora_alpha"), float(how.get("lora_dropout", _DROPOUT))
    spoken, trained = lora(adapters, language, alpha, dropout, job.source)
    job.note("connector", "weights.safetensors", *weights.values())
    job.note("adapters", "weights.safetensors", *adapters.values())
    sections = {
        "encoder": _encoder(job, tower),
        "connector": section,
        "language": spoken,
        "chat": {"template": "llama-3", "limit": 2048},
    }
    named = {f"connector.{name}": tensor for name, tensor in weights.items()}
    return Made(sections, named | trained, DECODING)


def _read(job: Job) -> tuple[State, State, State, dict[str, Any]]:
    """Return tensors of projector, adapters and image tower, and the adapters' configuration."""
    if job.source.is_dir():
        projector = _folder(job.source / "projector", "")
        adapter = job.source / "llm_adapter"
        how = read_json(adapter / "adapter_config.json")
        adapters = _folder(adapter, "adapter_")
        return projector, adapters, {}, how
    projector, adapters, tower = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, tensor in read_pickle(job.source).items():
        if name.startswith("projector."):
            projector[name] = tensor
        elif name.startswith("llm."):
            adapters[name] = tensor
        elif name.startswith("visual_encoder."):
            tower[name.removeprefix("visual_encoder.")] = tensor
        else:
            job.note(name, "not used: unknown here", tensor)
    return projector, adapters, tower, {}


def _folder(folder: Path, prefix: str) -> State:
    """Return the tensors of a model's or an adapter's folder."""
    kinds = (f"{prefix}model.safetensors", f"{prefix}model.bin")
    files = [folder / name for name in kinds if (folder / name).is_file()][:1]
    files = files or weight_files(folder)
    if not files:
        msg = f"{folder}: holds no {kinds[0]}"
        raise DataError(msg)
    return {name: tensor for file in files for name, tensor in stream(file)}


def _connector(theirs: State, source: Path) -> State:
    """Return the projector's tensors as `ScaleInvariant` names them."""
    found: State = {}
    for name, tensor in theirs.items():
        for pattern, ours in _RENAMED:
            name = re.sub(pattern, ours, name)  # noqa: PLW2901 - step by step
        if not name.endswith("position_ids"):
            found[name] = tensor
    for name in [n for n in found if n.endswith(("_attn.query.weight", "_attn.query.bias"))]:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if gone := [part for part in parts if part not in found]:
            msg = f"{source}: {gone[0]} missing"
            raise DataError(msg)
        joined = name.replace(".query.", ".in_proj_")
        found[joined] = torch.cat([found.pop(part) for part in parts])
    return found


def _section(weights: State, source: Path) -> dict[str, Any]:
    """Return the connector's section; DataError when tensors differ from what it says."""
    numbers = [int(n.split(".")[1]) for n in weights if n.startswith("layers.")]
    try:
        dim_out, dim_in = weights["projection.weight"].shape
        hidden = len(weights["layers.0.linear1.weight"])
    except (KeyError, ValueError):
        msg = f"{source}: holds no projector of PA-LLaVA's (BERT's layers, and one linear layer)"
        raise DataError(msg) from None
    sizes = {"layers": max(numbers) + 1, "heads": HEADS, "hidden": hidden}
    with torch.device("meta"):
        wanted = ScaleInvariant(dim_in, dim_out, **sizes)
    refuse_faults(shape_faults(weights, wanted), source)
    return {"kind": "scale-invariant", **sizes}


def _encoder(job: Job, tower: State) -> dict[str, Any]:
    """Write PLIP's image tower; return its section."""
    if not tower:
        beside = job.source / PLIP if job.source.is_dir() else job.source.with_name(PLIP)
        file = job.checkpoint or beside
        if not file.is_file():
            msg = f"{file} is not here; PA-LLaVA's image tower is --checkpoint {PLIP}, out of the "
            raise UsageError(msg + "plip.tar.gz beside it on the hub")
        tower = dict(stream(file))
    part = {name: tensor.clone() for name, tensor in vision_part(tower).items()}
    if not part:
        msg = f"{job.checkpoint or PLIP}: holds no image tower"
        raise DataError(msg)
    save_file(part, job.out / "encoder.safetensors", {"format": "pt"})
    job.note("image tower", "encoder.safetensors", *part.values())
    return {"kind": "pallava-plip", "tokens": True, "checkpoint": "./encoder.safetensors"}
