"""Sections of a recipe for the towers, language models and adapters that checkpoints name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathcli.cards import CARDS, Hub
from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean, names, resolve
from pathcli.vlm.convert.files import read_json
from pathcli.vlm.language_files import shape_of

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]


def encoder_section(name: str, checkpoint: Path | None, **wanted: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the recipe's section of an encoder `NAME` or `NAME:WHAT` that gives tokens.

    Raises:
        UsageError: no encoder is called so, or it does not take what is `wanted`.
    """
    kind, _, what = name.partition(":")
    if kind not in names("encoder"):
        msg = f"--encoder {name}: no such encoder: {did_you_mean(kind, names('encoder'))}"
        raise UsageError(msg)
    given = {"kind": kind, "tokens": True, **wanted}
    if what:
        given["model"] = str(Path(what).absolute()) if Path(what).is_dir() else what
    if checkpoint is not None:
        given["checkpoint"] = str(checkpoint.expanduser().absolute())
    takes = inspect.signature(resolve("encoder", kind)).parameters
    if lost := [key for key in given if key not in takes and key != "kind"]:
        msg = f"--encoder {name}: it has no {', '.join(lost)}, which this checkpoint needs"
        raise UsageError(msg)
    return given


def language_name(given: str | None, named: str, source: Path) -> str:
    """Return the language model the user named, or the checkpoint, as a recipe has it.

    Raises:
        UsageError: neither names one that is known here.
    """
    cards = {c.source.repo: name for name, c in CARDS.items() if isinstance(c.source, Hub)}
    for name in (given, named):
        if name and Path(name).expanduser().is_dir():
            return str(Path(name).expanduser().absolute())
        if name and (name in cards or name in CARDS):
            return cards.get(name, name)
    if given:
        return given
    said = f"names {named!r}, which is not known here" if named else "holds no language model"
    msg = f"{source} {said}; name it with --language: vicuna-7b, flan-t5-xl, hub id or FOLDER"
    raise UsageError(msg)


def check_width(language: str, width: int, source: Path) -> None:
    """Refuse a language model that reads embeddings of another width than is projected to.

    Raises:
        UsageError: it does, or its sizes are not known before it is here.
    """
    reads = shape_of(language).hidden
    if reads != width:
        msg = f"{source} projects to {width}, and {language} reads {reads}; name another --language"
        raise UsageError(msg)


def numbers(language: str) -> str:
    """Return the precision a language model is kept in: a folder's own, else bfloat16."""
    if not Path(language).is_dir():
        return "bfloat16"
    config = read_json(Path(language) / "config.json")
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return found if found in {"float32", "bfloat16", "float16"} else "bfloat16"


_LORA = re.compile(r"(?:llm\.)?base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")


def lora(
    state: State, language: str, alpha: float | None, dropout: float, source: Path
) -> tuple[dict[str, Any], State]:
    """Return `language` with peft's adapters as a recipe's section, and their weights as a run's.

    Without `alpha` it is twice the rank.

    Raises:
        DataError: tensors are no adapters, are missing, or of several ranks.
    """
    found = {name: _LORA.fullmatch(name) for name in state}
    if wrong := [name for name, match in found.items() if not match]:
        msg = f"{source}: {wrong[0]} is no LoRA weight, which alone are read ({len(wrong)} in all)"
        raise DataError(msg)
    places = {name: (match[1], match[2]) for name, match in found.items() if match}
    ranks = {t.shape[0 if places[name][1] == "A" else 1] for name, t in state.items()}
    targets = sorted({layer.rpartition(".")[2] for layer, _ in places.values()})
    wanted = 2 * len(targets) * shape_of(language).layers
    if len(ranks) != 1 or len(places) != wanted:
        msg = f"{source}: {len(places)} LoRA weights of ranks {sorted(ranks)}; of one rank, beside "
        raise DataError(msg + f"{', '.join(targets)} of {language}, there are {wanted}")
    (rank,) = ranks
    adapters = {"r": rank, "alpha": int(alpha or 2 * rank), "dropout": dropout, "targets": targets}
    weights = {
        f"language.network.{layer}.lora_{side}.default.weight": state[name]
        for name, (layer, side) in places.items()
    }
    section = {"kind": "hf", "model": language, "tune": "lora", "lora": adapters}
    return section | {"load": numbers(language)}, weights
