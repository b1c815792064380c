"""A table and settings in; the recipe that learns an outcome of it, before it is tested, out."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pathcli.errors import UsageError
from pathcli.mil.benchmarks import BENCHMARKS
from pathcli.mil.sheets import read_sheet
from pathcli.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

_SAY = (
    "classes of a column label (or --set data.target=COLUMN), a value (--set "
    "outcome.column=COLUMN), or survival (--set outcome.time=COLUMN --set outcome.event=COLUMN)"
)


def outcome_recipe(settings: Sequence[str]) -> str:
    """Return the shipped recipe whose outcome the settings describe, "" where they do not."""
    section = load_recipe("mil-regression", ["outcome={}", *_own(settings)]).values["outcome"]
    said = {*section, str(section.get("kind"))} if isinstance(section, dict) else set()
    if said & {"time", "event", "cox", "hazards"}:
        return "mil-survival"
    return "mil-regression" if said & {"column", "regression"} else ""


def columns_of(settings: Sequence[str]) -> tuple[str, ...] | None:
    """Return the columns that the settings name, None where they name no outcome."""
    name = outcome_recipe(settings)
    if not name:
        return None
    section = load_recipe(name, _own(settings)).values["outcome"]  # not checked yet, so not built
    keys = ("column",) if name == "mil-regression" else ("time", "event")
    return tuple(str(section.get(key, key)) for key in keys)


def of_classes(settings: Sequence[str]) -> bool:
    """Tell whether the settings name classes, so that no outcome is meant."""
    return any(text.startswith(("data.target=", "data.classes=")) for text in settings)


def refuse_unclear(name: str, settings: Sequence[str]) -> None:
    """Refuse settings of an outcome that do not say which it is.

    Raises:
        UsageError: there are such.
    """
    if (own := _own(settings)) and not outcome_recipe(settings):
        msg = f"{name}: --set {own[0]} does not say what is learnt; --train learns {_SAY}"
        raise UsageError(msg)


def refuse_unsaid(name: str, settings: Sequence[str]) -> None:
    """Refuse to train on a table without labels where nothing says what is learnt.

    Raises:
        UsageError: it is such a table, or the settings say it wrongly.
    """
    refuse_unclear(name, settings)
    path = Path(name).expanduser()
    said = any(text.startswith(("data.target=", "data=")) for text in settings)
    if name in BENCHMARKS or said or not path.is_file():
        return
    if read_sheet(path).find(("label",)) is None:
        msg = f"{name}: --train has to know what is learnt: {_SAY}"
        raise UsageError(msg)


def recipe_for(
    path: Path, head: str, encoder: str | None, slides: Path | None, settings: Sequence[str]
) -> Recipe:
    """Return the recipe of a head that learns what the settings say, named after all three.

    Raises:
        UsageError: they do not say what is learnt.
    """
    name, columns = outcome_recipe(settings), columns_of(settings)
    if columns is None:
        msg = f"{path.name}: --train has to know what is learnt: {_SAY}"
        raise UsageError(msg)
    given = {
        "data.labels": str(path),
        "data.slides": None if slides is None else str(slides.absolute()),
        **({"head": {"kind": head}} if head != "abmil" else {}),
        **({"encoder": {"kind": encoder}} if encoder else {}),
    }
    known = load_recipe(name, [*(f"{k}={json.dumps(v)}" for k, v in given.items()), *settings])
    return replace(known, name=plain_name(path.stem, *columns, head))


def plain_name(*words: str) -> str:
    """Return words as one name of a folder."""
    return "-".join(re.sub(r"\W+", "_", word) for word in words)


def _own(settings: Sequence[str]) -> list[str]:
    """Return the settings of the section `outcome`."""
    return [text for text in settings if re.match(r"outcome\b", text)]
