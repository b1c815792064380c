"""A checkpoint of someone's Q-Former in, our names for its tensors out.

Read are LAVIS' files (BLIP-2, InstructBLIP; CLOVER's `epoch{n}.pth` are such), transformers'
BLIP-2 and InstructBLIP, and a BERT. Image towers and language models beside them are left.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.cards import CARDS, Hub
from pathcli.encoders.checkpoint import read_state
from pathcli.errors import DataError
from pathcli.weights import fetch, local

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]

_FILES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".json"}
_INDEX = "model.safetensors.index.json"

_OTHERS = re.compile(
    r"(visual_encoder|vision_model(?!\.post_layernorm)|\w*language_model|(llm|t5|opt)_model|lm_head"
    r"|(bert\.|Qformer\.bert\.)?pooler|(Qformer\.)?cls\.(seq_relationship|predictions\.decoder))\."
    r"|.*(position_ids|token_type_embeddings\.weight)$"
)
"""Left out on purpose: other networks; what BLIP-2 drops of BERT; words, tied to their rows."""

_OURS = re.compile(r"(Qformer|qformer|bert|embeddings|encoder|layernorm|cls)\.|query_tokens|ln_vis")
"""Theirs of a Q-Former: each must have a name here."""

_RENAMED = (
    (r"^model\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^(?:Qformer\.bert|qformer|bert)\.", ""),
    (r"^Qformer\.cls\.", "cls."),
    (r"^query_tokens$", "queries"),
    (r"^(?:ln_vision|vision_model\.post_layernorm)\.", "norm."),
    (r"^(?:llm_proj|t5_proj|opt_proj|language_projection)\.", "project."),
    (r"^embeddings\.word_embeddings\.", "words."),
    (r"^embeddings\.position_embeddings\.", "places."),
    (r"^(?:embeddings\.)?(?:LayerNorm|layernorm)\.", "enter."),
    (r"^encoder\.layer\.", "layers."),
    (r"\.attention\.(?:self|attention)\.", ".own."),
    (r"\.crossattention\.(?:self|attention)\.", ".cross."),
    (r"\.attention\.output\.dense\.", ".own.out."),
    (r"\.attention\.output\.LayerNorm\.", ".own.norm."),
    (r"\.crossattention\.output\.dense\.", ".cross.out."),
    (r"\.crossattention\.output\.LayerNorm\.", ".cross.norm."),
    (r"\.intermediate_query\.dense\.", ".queries.up."),
    (r"\.output_query\.dense\.", ".queries.down."),
    (r"\.output_query\.LayerNorm\.", ".queries.norm."),
    (r"\.intermediate\.dense\.", ".words.up."),
    (r"\.output\.dense\.", ".words.down."),
    (r"\.output\.LayerNorm\.", ".words.norm."),
    (r"^vision_projection\.", "vision_proj."),
    (r"^text_projection\.", "text_proj."),
    (r"^cls\.predictions\.transform\.dense\.", "word_head.dense."),
    (r"^cls\.predictions\.transform\.LayerNorm\.", "word_head.norm."),
    (r"^cls\.predictions\.bias$", "word_head.bias"),
    (r"^temp$", "temperature"),
)

_LINEAR = r"\.(?:weight|bias)"
_PLACE = re.compile(
    rf"queries|(?:words|places)\.weight|(?:norm|project|enter){_LINEAR}"
    rf"|layers\.\d+\.(?:(?:own|cross)\.(?:query|key|value|out|norm)"
    rf"|(?:queries|words)\.(?:up|down|norm)){_LINEAR}"
)
_HEAD = re.compile(
    rf"(?:(?:vision_proj|text_proj|itm_head|word_head\.(?:dense|norm)){_LINEAR})"
    r"|word_head\.bias|temperature"
)


def located(name: str) -> Path:
    """Return where a card's, a path's or a hub id's files are.

    Raises:
        ResourceError: they are not here and cannot be fetched.
    """
    path = Path(name).expanduser()
    if name in CARDS and not path.exists():
        return fetch(name)
    if path.exists() or path.suffix in _SUFFIXES or name.startswith((".", "/", "~")):
        return local(path)
    return fetch(Hub(name))


def read_qformer(path: Path) -> State:
    """Return a checkpoint's Q-Former under the names of `QFormer.state_dict`, without its heads.

    A BERT gives what it has: no `queries`, no cross-attention.

    Raises:
        DataError: it is damaged, has no Q-Former, or one with a tensor that has no place here.
        ResourceError: there is nothing.
    """
    state = _renamed(path)
    found = {name: tensor for name, tensor in state.items() if _PLACE.fullmatch(name)}
    if not any(name.startswith("layers.") for name in found):
        msg = f"{path}: holds no Q-Former, neither LAVIS' nor transformers', and no BERT"
        raise DataError(msg)
    if "queries" in found:
        found["queries"] = found["queries"].reshape(found["queries"].shape[-2:])
    return {name: tensor.float() for name, tensor in found.items()}


def heads(init: str | Path, words: int) -> State:
    """Return the heads of the first stage that `QFormer.init` has; a BERT has only the last.

    They are `vision_proj`, `text_proj`, `itm_head` (`.weight`, `.bias`), `temperature` [], and
    `word_head` (`.dense`, `.norm`, and `.bias` [words], 0 for a [DEC] that is not known yet).
    What was `random` has none.

    Raises:
        DataError: as `read_qformer`, or the head is of another vocabulary.
        ResourceError: there is nothing.
    """
    from torch.nn.functional import pad  # noqa: PLC0415

    if init == "random":
        return {}
    path = located(str(init))
    state = _renamed(path).items()
    found = {name: tensor.float() for name, tensor in state if _HEAD.fullmatch(name)}
    if "temperature" in found:
        found["temperature"] = found["temperature"].reshape(())
    bias = found.get("word_head.bias")
    if bias is not None:
        if len(bias) not in {words, words - 1}:
            msg = f"{path}: its head gives {len(bias)} words, not {words}"
            raise DataError(msg)
        found["word_head.bias"] = pad(bias, (0, words - len(bias)))
    return found


def _renamed(path: Path) -> State:
    """Return all tensors but those of other networks; DataError when one has no name here."""
    found: State = {}
    for theirs, tensor in _tensors(path).items():
        name = theirs
        for pattern, ours in _RENAMED:
            name = re.sub(pattern, ours, name)
        if not (_PLACE.fullmatch(name) or _HEAD.fullmatch(name)):
            if _OURS.match(theirs.removeprefix("model.")):
                msg = f"{path}: {theirs} has no place in a Q-Former"
                raise DataError(msg)
            continue
        if name in found:
            msg = f"{path}: {theirs} is there twice, under different names"
            raise DataError(msg)
        found[name] = tensor
    return found


def _tensors(path: Path) -> State:
    """Return what a file or a folder of transformers' holds, as it is called there."""
    if not path.is_dir():
        return _of_file(path)
    if not (path / _INDEX).is_file():
        return _of_file(local(path, *_FILES))
    try:
        parts: dict[str, str] = json.loads((path / _INDEX).read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        msg = f"{path / _INDEX}: damaged index of weights"
        raise DataError(msg) from error
    wanted = sorted({file for name, file in parts.items() if not _other(name)})
    return {k: x for file in wanted for k, x in _of_file(local(path / file)).items()}


def _of_file(file: Path) -> State:
    from safetensors import safe_open  # noqa: PLC0415

    if file.suffix != ".safetensors":
        return {name: x for name, x in read_state(file).items() if not _other(name)}
    try:
        with safe_open(file, "pt") as tensors:  # language models beside it stay on the disk
            return {name: tensors.get_tensor(name) for name in tensors.keys() if not _other(name)}  # noqa: SIM118
    except Exception as error:  # safetensors has its own, undocumented error
        msg = f"{file}: corrupt checkpoint (not safetensors, or cut short)"
        raise DataError(msg) from error


def _other(name: str) -> bool:
    return _OTHERS.match(name.removeprefix("model.")) is not None
