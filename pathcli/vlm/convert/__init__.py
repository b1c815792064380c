"""A published checkpoint in its authors' layout in; a run's folder, which `ask` reads, out.

    LLaVA's own   a folder; PathGen-LLaVA, Quilt-LLaVA, LLaVA-Med v1.5; whole, adapters, projector
    LAVIS'        a .pth; CLOVER, BLIP-2 and InstructBLIP before a language model
    xtuner's      a .pth, or a folder; PA-LLaVA

Weights of a language model go through tensor by tensor, into files of 2 GiB: of one of 13 B
there is never more than such a file in memory. Of pickles tensors are read, and nothing in
them is ever called.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from pathcli.errors import ResourceError, UsageError
from pathcli.recipe import VERSION, Recipe
from pathcli.report import json_text, versions
from pathcli.store.files import disk_errors
from pathcli.types import Report
from pathcli.vlm.convert.files import read_json, read_pickle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_INSIDE = {"encoder": ("model", "checkpoint"), "language": ("model",), "chat": ("template",)}


@dataclass(frozen=True)
class Converted:
    """What was found and written: a row for each part, with its `tensors`, `MiB` and place."""

    folder: Path
    layout: str
    rows: tuple[Mapping[str, Any], ...]

    @property
    def command(self) -> str:
        """The next command."""
        return f'pathcli ask img.png "what tissue is this?" --model {shlex.quote(str(self.folder))}'


@dataclass(frozen=True)
class Made:
    """What a layout's reader gives: sections of a recipe, trained weights, how it generates."""

    sections: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, Tensor]
    decoding: Mapping[str, Any]


@dataclass
class Job:
    """What is converted, the folder it is written to, and what the user said of it."""

    source: Path
    out: Path
    encoder: str | None
    checkpoint: Path | None
    language: str | None
    parts: dict[tuple[str, str], list[int]] = field(default_factory=dict)

    def note(self, what: str, where: str, *tensors: Tensor) -> None:
        """Count tensors of one part that go to one place; all that is read is counted."""
        counts = self.parts.setdefault((what, where), [0, 0])
        counts[0] += len(tensors)
        counts[1] += sum(tensor.nbytes for tensor in tensors)


def convert(
    source: Path,
    out: Path,
    *,
    encoder: str | None = None,
    checkpoint: Path | None = None,
    language: str | None = None,
) -> Converted:
    """Write a checkpoint as a run's folder, whole or not at all.

    Args:
        source: a folder or file of one of the layouts above.
        out: a folder that is not there yet.
        encoder: the vision tower, where the checkpoint names none that is known here.
        checkpoint: that tower's weights, where they are the user's own.
        language: the language model, where the checkpoint holds none: a card's name, a hub's
            id or a folder.

    Raises:
        UsageError: a layout that is none of these, or an option is needed, or one too many.
        DataError: damaged, tensors are missing, or it works in a way that is not known here.
        ResourceError: a file is missing, or `out` cannot be written.
    """
    layout, at = _layout(source.expanduser())
    out = out.expanduser().absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        msg = f"{out} is there already; name a folder that is not"
        raise UsageError(msg)
    with disk_errors(out, "OUT"):
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            job = Job(at, part, encoder, checkpoint, language)
            made: Made = import_module(f"{__name__}.{layout}").read(job)
            rows = _write(job, made, out.name, source)
            part.chmod(0o755)
            os.replace(part, out)  # noqa: PTH105 - over an empty folder, too
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Converted(out, layout, rows)


def settled(recipe: Recipe, folder: Path) -> Recipe:
    """Return a run's recipe in which what lies in the run's folder (`./...`) is found from here."""
    values = {name: dict(x) if isinstance(x, dict) else x for name, x in recipe.values.items()}
    for section, keys in _INSIDE.items():
        for key in keys:
            value = (values.get(section) or {}).get(key)
            if isinstance(value, str) and value.startswith("./"):
                values[section][key] = str(folder.absolute() / value)
    return replace(recipe, values=values)


def _write(job: Job, made: Made, name: str, source: Path) -> tuple[dict[str, Any], ...]:
    """Write a run's files but those a reader wrote; return the summary's rows."""
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in made.weights.items()}
    save_file(weights, job.out / "weights.safetensors", {"format": "pt"})
    values = {"version": VERSION, "task": "generate", **made.sections}
    values["decoding"] = dict(made.decoding)
    values["data"] = {"kind": "instructions", "source": "none"}  # it was trained elsewhere
    values["train"] = {"seed": 0}
    recipe = Recipe(name, values)
    head = f"# {source.name}, trained elsewhere and converted; data and train say nothing of it\n"
    (job.out / "recipe.yaml").write_text(head + recipe.to_yaml(), encoding="utf-8")
    rows = tuple(
        {"what": what, "tensors": count, "MiB": round(size / 2**20, 1), "where": where}
        for (what, where), (count, size) in job.parts.items()
    )
    known = {"recipe": name, "converted": str(source.absolute()), "versions": versions()}
    known["facts"] = {"parts": rows}
    report = Report(title=f"{name}, converted", metrics={}, rows=rows, provenance=known)
    (job.out / "report.json").write_text(json_text(report), encoding="utf-8")
    (job.out / "provenance.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return rows


# --- which layout it is --------------------------------------------------------------------


def _layout(source: Path) -> tuple[str, Path]:
    """Return the name of a checkpoint's layout, and the file or folder to read.

    Raises:
        UsageError: it is of transformers, which needs no converting, or of none we know.
        ResourceError: there is nothing.
    """
    if not source.exists():
        msg = f"{source}: no such checkpoint"
        raise ResourceError(msg)
    if source.is_file():
        return _of_file(source), source
    if (source / "config.json").is_file():
        config = read_json(source / "config.json")
        if "vision_config" in config:  # Gemma's has mm_*, too
            msg = f"{source} is in transformers' form, which is asked as it is: --model {source}"
            raise UsageError(msg)
        if any(name.startswith("mm_") for name in config):
            return "llava", source
    if (source / "projector").is_dir():
        return "pallava", source
    inside = sorted(source.rglob("mp_rank_00_model_states.pt")) or sorted(source.glob("*.pth"))
    if len(inside) == 1 and inside[0].is_file():
        return _of_file(inside[0]), inside[0]
    msg = f"{source}: of no layout known here: LLaVA's (config.json with mm_*), a .pth of LAVIS' "
    raise UsageError(msg + "or xtuner's, or xtuner's folder with projector/ in it")


def _of_file(file: Path) -> str:
    state = read_pickle(file)
    if any(name.startswith("projector.") for name in state):
        return "pallava"
    if "query_tokens" in state:
        return "lavis"
    msg = f"{file}: tensors of neither LAVIS (query_tokens) nor xtuner (projector.*)"
    raise UsageError(msg)
