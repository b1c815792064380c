"""A former stage's run in, its weights by name out: where a stage of training begins."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path  # noqa: TC003 - builds the section `start`
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.recipe import build_part
from pathcli.runs import read_run
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from pathcli.recipe import Recipe
    from pathcli.types import Encoder

_NAMED = 3
_LANGUAGE = "language."  # of which nothing is left behind: it would be another model


@dataclass(frozen=True, kw_only=True)
class Start:
    """The section `start` of a recipe: `run`, the folder of a finished run, or null for none."""

    run: Path | None = None

    def refuse_another(self, encoder: Encoder) -> None:
        """Refuse a former stage that saw images through another encoder, layer or pooling.

        Both are compared by their ids, which follow from weights and not from paths; what was
        trained behind one precision goes on behind another.

        Raises:
            UsageError: the two differ; both are named.
            ResourceError: there is no finished run, or weights are gone.
        """
        if self.run is None:
            return
        run = read_run(self.run)
        section = run.recipe.values.get("encoder")
        if section is None:  # of another task: `fill` will find nothing in it
            return
        facts = run.facts
        former = str(facts.get("encoder") or facts.get("model", {}).get("encoder") or "")
        if former == encoder.id or _named(run.recipe, encoder) == encoder.id:
            return
        named = ", ".join(f"{k}: {v}" for k, v in section.items() if v is not None)
        theirs = f"{former} {{{named}}}".strip()
        layer = getattr(encoder, "layer", -1)
        msg = (
            f"start.run: {self.run} was trained behind the encoder {theirs}, and "
            f"this stage has {encoder.id} (layer {layer}); give it that run's section `encoder`"
        )
        raise UsageError(msg)

    def fill(self, module: torch.nn.Module, prefixes: Sequence[str]) -> Mapping[str, Any]:
        """Put a former stage's weights into those parts of `module` whose names begin so.

        What the run has and the module has not (texts a connector no longer reads) stays out,
        and what the module has and the run has not (a new projection) stays as it is; both are
        counted in what is returned for provenance, which knows the run by its weights' SHA-256
        and not by its path. Nothing is done where no run is named.

        Raises:
            ResourceError: there is no finished run, or its weights are gone.
            DataError: they are damaged, of other shapes, nothing of a part has a place, or not
                all of a language model has.
        """
        if self.run is None:
            return {}
        run, file = read_run(self.run), self.run / "weights.safetensors"
        chosen = tuple(prefixes)
        here = {k: v for k, v in module.state_dict().items() if k.startswith(chosen)}
        named = {k: v for k, v in _read(file).items() if k.startswith(chosen)}
        saved = {_called(name, here): value for name, value in named.items()}
        taken = {name: value for name, value in saved.items() if name in here}
        _refuse_others(file, taken, here)
        for prefix in chosen:
            of_run = [name for name in saved if name.startswith(prefix)]
            lost = [name for name in of_run if name not in taken]
            if lost and (lost == of_run or prefix == _LANGUAGE):
                msg = f"{file}: {len(lost)} of {len(of_run)} tensors {prefix}* have no place here "
                raise DataError(msg + f"({_some(lost)}); is it a stage before this one?")
        if not taken:
            msg = f"{file}: no tensor is called {' or '.join(p + '*' for p in chosen)}; "
            raise DataError(msg + "start.run names a former stage of this model")
        module.load_state_dict(taken, strict=False)
        trained = [n for n, p in module.named_parameters() if p.requires_grad and n in here]
        return {
            "recipe": run.recipe.name,
            "weights": sha256(file),
            "taken": len(taken),
            "left": len(saved) - len(taken),
            "fresh": sum(name not in taken for name in trained),
        }


def _named(recipe: Recipe, encoder: Encoder) -> str | None:
    """Return the id of a recipe's encoder in the precision of this one; None where it is gone."""
    same = {"precision": encoder.precision} if hasattr(encoder, "precision") else {}
    section = {**recipe.values["encoder"], **same}
    with suppress(PathcliError, TypeError):  # a file that moved, an option of an earlier version
        return str(build_part(replace(recipe, values={"encoder": section}), "encoder")().id)
    return None


def _called(name: str, here: Mapping[str, torch.Tensor]) -> str:
    """Return what a weight is called here: a layer that got adapters is their `base_layer`."""
    layer, _, weight = name.rpartition(".")
    below = f"{layer}.base_layer.{weight}"
    return below if name not in here and below in here else name


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except FileNotFoundError:
        msg = f"{file}: no weights here; is the run finished?"
        raise ResourceError(msg) from None
    except Exception as error:  # safetensors has its own, undocumented error
        msg = f"{file}: damaged weights ({error})"
        raise DataError(msg) from error


def _refuse_others(
    file: Path, taken: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]
) -> None:
    """Refuse tensors of other shapes than the module's."""
    faults = [
        f"{name} is {tuple(value.shape)}, not {tuple(here[name].shape)}"
        for name, value in sorted(taken.items())
        if value.shape != here[name].shape
    ]
    if faults:
        msg = f"{file}: {len(faults)} tensors do not fit ({_some(faults)}); give this stage the "
        raise DataError(msg + "sizes of that one")


def _some(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
