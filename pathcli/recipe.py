"""One YAML file in, one checked run out: load, `--set`, check, resolve, build.

A recipe has `version`, `task` and one section per argument of the task. A section with a
`kind` names a registered component; its other keys are that constructor's keyword-only
arguments, checked against the signature itself, so there is no second schema. What stands
before the `*` of a constructor is decided by the data, and no recipe may set it.
"""

from __future__ import annotations

import collections.abc
import inspect
import json
import re
import shlex
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.registry import BUILTIN, did_you_mean, names, resolve
from pathcli.yaml12 import dump_yaml, parse_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VERSION = 1
ASKED = "???"
"""The value of what only the user can know."""


@dataclass(frozen=True)
class Recipe:
    """A recipe as plain values; `text` is the file with its comments, `given` paths set since."""

    name: str
    values: Mapping[str, Any]
    text: str = ""
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.values.get("task"))

    @property
    def summary(self) -> str:
        """Return the file's first comment line."""
        first = self.text.partition("\n")[0]
        return first.removeprefix("#").strip().rstrip(".") if first.startswith("#") else ""

    def meant(self, path: str) -> str:
        """Return in brackets, after a space, what the comment says of a value it asks for."""
        key = re.escape(path.rpartition(".")[2])
        said = re.search(rf"""^.*\b{key}: ["']?\?\?\?.*?#\s*(.+)$""", self.text, re.MULTILINE)
        return f" ({said[1]})" if said else ""

    def with_values(self, **dotted: Any) -> Recipe:  # noqa: ANN401 - any YAML value
        """Return a copy with other values: `with_values(**{"train.seed": 1})`."""
        values = json.loads(json.dumps(self.values))
        for path, value in dotted.items():
            *parents, last = path.split(".")
            at = values
            for parent in parents:
                if not isinstance(at.get(parent), dict):
                    at[parent] = {}
                at = at[parent]
            at[last] = value
        return replace(self, values=values, given=self.given | dotted.keys())

    def to_yaml(self) -> str:
        """Return the values as YAML."""
        return dump_yaml(self.values)


@dataclass(frozen=True)
class Checkup:
    """What is wrong with a recipe, each fault with its path; and what it still asks for.

    `resolved` has the values of the sections that could be read, with every default.
    """

    faults: tuple[str, ...]
    asked: tuple[str, ...]
    resolved: Mapping[str, Any]


# --- finding and reading -----------------------------------------------------------------


def recipes_folder() -> Path:
    """Return the folder of shipped recipes: inside the package, or beside it in a checkout.

    Raises:
        ResourceError: this installation does not carry them.
    """
    package = Path(__file__).parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    msg = "the recipes are missing from this installation; reinstall pathcli"
    raise ResourceError(msg)


def list_recipes() -> list[Recipe]:
    """Return the shipped recipes, by name."""
    return [_read(path) for path in sorted(recipes_folder().rglob("*.yaml"), key=lambda p: p.stem)]


def load_recipe(name: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a name or a file, with `settings` (`section.key=value`) applied.

    Raises:
        UsageError: no recipe has this name, or a setting has no `=`.
        DataError: the file is no recipe.
    """
    path = Path(name).expanduser()
    if path.suffix not in {".yaml", ".yml"} and not path.is_file():
        shipped = {p.stem: p for p in recipes_folder().rglob("*.yaml")}
        if str(name) not in shipped:
            hint = did_you_mean(str(name), sorted(shipped))
            msg = f"no recipe is called {str(name)!r} (a file of yours ends in .yaml): {hint}"
            raise UsageError(msg)
        path = shipped[str(name)]
    recipe = _read(path)
    given = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            msg = f"--set takes section.key=value, not {setting!r}"
            raise UsageError(msg)
        given[key] = parse_yaml(value, f"--set {setting!r}")
    return recipe.with_values(**given)


def _read(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        msg = f"{path}: no such recipe; pathcli recipes list shows the shipped ones"
        raise ResourceError(msg) from None
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read as a recipe ({error})"
        raise DataError(msg) from error
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        msg = f"{path}: a recipe is a mapping with version, task and sections"
        raise DataError(msg)
    return Recipe(path.stem, values, text)


# --- checking ----------------------------------------------------------------------------


def check_recipe(recipe: Recipe) -> Checkup:
    """Return every fault of a recipe at once, and what it asks the user for."""
    return _Check(recipe).checkup


def resolve_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with every default written out and every path absolute.

    Raises:
        UsageError: it has faults, or asks for something still; all are named.
    """
    return replace(recipe, values=_passed(recipe).resolved)


def build(recipe: Recipe) -> Any:  # noqa: ANN401 - tasks share no base class
    """Return the recipe's task, built from its sections.

    A component whose first arguments the data decide is handed over as a function of them.

    Raises:
        UsageError: the recipe has faults, or asks for something still; all are named.
        ResourceError: a component needs what is not here.
    """
    check = _passed(recipe)
    if check.absent:
        raise check.absent
    return check.task


def build_part(recipe: Recipe, section: str) -> Any:  # noqa: ANN401 - components share no base class
    """Return what builds one section of a recipe that was checked before: a function or class."""
    given = dict(recipe.values[section])
    return partial(resolve(section, given.pop("kind")), **given)


def _passed(recipe: Recipe) -> _Check:
    check = _Check(recipe)
    if check.faults:
        msg = f"recipe {recipe.name}: " + "; ".join(check.faults)
        raise UsageError(msg)
    if check.asked:
        given = " ".join(f"--set {path}=..." for path in check.asked)
        asked = ", ".join(path + recipe.meant(path) for path in check.asked)
        msg = f"recipe {recipe.name} asks for {asked}: give {given}"
        raise UsageError(msg)
    return check


class _Check:
    """One walk over a recipe that collects faults, resolved values and built sections."""

    def __init__(self, recipe: Recipe) -> None:
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.resolved: dict[str, Any] = {"version": VERSION, "task": recipe.task}
        self.task: Any = None
        self.absent: ResourceError | None = None  # no fault of the recipe
        self._given = recipe.given
        values = dict(recipe.values)
        if values.pop("version", None) != VERSION:
            self.faults.append(f"version: must be {VERSION}")
        factory = self._component("task", "task", values.pop("task", None))
        if factory is not None:
            self._task(factory, values)

    @property
    def checkup(self) -> Checkup:
        return Checkup(tuple(self.faults), tuple(self.asked), self.resolved)

    def _task(self, factory: Any, values: dict[str, Any]) -> None:  # noqa: ANN401
        sections, built = _arguments(factory), {}
        self._unknown("", values, list(sections))
        for name, parameter in sections.items():
            if name in values:
                built[name] = self._section(name, parameter.annotation, values[name], factory)
            elif parameter.default is inspect.Parameter.empty:
                self.faults.append(f"{name}: missing")
        if not (self.faults or self.asked or self.absent):
            self.task = self._built("", factory, built)

    def _section(self, name: str, annotation: Any, value: Any, owner: Any) -> Any:  # noqa: ANN401
        if value == ASKED:
            self.asked.append(name)
            return None
        if not isinstance(value, dict):
            form = f"{{kind: {names(name)[0]}}}" if name in BUILTIN else "{key: value}"
            self.faults.append(f"{name}: must be a mapping such as {form}, not {value!r}")
            return None
        given, resolved = dict(value), {}
        if name in BUILTIN:
            kind = given.pop("kind", None)
            factory, resolved = self._component(name, f"{name}.kind", kind), {"kind": kind}
        else:
            factory = _constructor(_hint(owner, annotation))
        if factory is None:
            return None
        before = len(self.faults) + len(self.asked)
        arguments = self._fill(name, factory, given, resolved)
        self.resolved[name] = resolved
        if len(self.faults) + len(self.asked) > before:
            return None
        if _decided_by_data(factory):
            return partial(factory, **arguments)
        return self._built(f"{name}: ", factory, arguments)

    def _built(self, prefix: str, factory: Any, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        try:
            return factory(**arguments)
        except ResourceError as error:
            self.absent = error
        except PathcliError as error:
            self.faults.append(f"{prefix}{error}")
        return None

    def _component(self, kind: str, path: str, name: Any) -> Any:  # noqa: ANN401
        if name == ASKED:
            self.asked.append(path)
            return None
        if not isinstance(name, str):
            self.faults.append(f"{path}: name a {kind}: {', '.join(names(kind))}")
            return None
        try:
            return resolve(kind, name)
        except UsageError as error:
            self.faults.append(f"{path}: {error}")
            return None

    def _fill(
        self,
        section: str,
        factory: Any,  # noqa: ANN401
        given: dict[str, Any],
        resolved: dict[str, Any],
    ) -> dict[str, Any]:
        """Check a section's arguments one by one; all go to `resolved`, defaults too."""
        takes, arguments = _arguments(factory), {}
        if not any(p.kind is p.VAR_KEYWORD for p in _parameters(factory)):
            if "kind" in resolved and f"{section}.kind" in self._given:
                self.faults += _misfit(section, resolved["kind"], given, list(takes))
            else:
                self._unknown(f"{section}.", given, list(takes))
        for name, parameter in takes.items():
            path = f"{section}.{name}"
            if given.get(name) == ASKED:
                self.asked.append(path)
            elif name in given:
                adapter = TypeAdapter(_hint(factory, parameter.annotation))
                arguments[name] = self._typed(path, adapter, given[name])
                resolved[name] = _plain(adapter, arguments[name])
            elif parameter.default is inspect.Parameter.empty:
                self.faults.append(f"{path}: missing")
            else:
                adapter = TypeAdapter(_hint(factory, parameter.annotation))
                resolved[name] = _plain(adapter, parameter.default)
        extra = {name: value for name, value in given.items() if name not in takes}
        resolved.update(extra)
        return arguments | extra

    def _typed(self, path: str, adapter: TypeAdapter[Any], value: Any) -> Any:  # noqa: ANN401
        try:
            # JSON's strict rules: a list may be a tuple, text a path, but never text a number
            found = adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError as error:
            reasons = dict.fromkeys(_plainly(item["msg"]) for item in error.errors())
            self.faults.append(f"{path}: {', or '.join(reasons)} (it is {value!r})")
            return None
        return [_absolute(each) for each in found] if isinstance(found, list) else _absolute(found)

    def _unknown(self, prefix: str, given: Mapping[str, Any], known: list[str]) -> None:
        self.faults += [
            f"{prefix}{name}: no such key: {did_you_mean(str(name), known)}"
            for name in given
            if name not in known
        ]


def _misfit(section: str, kind: str, given: Mapping[str, Any], known: list[str]) -> list[str]:
    """Return the fault of a section whose kind alone was set: what to write instead of it."""
    kept = {"kind": kind} | {name: given[name] for name in given if name in known}
    text = ", ".join(f"{name}: {json.dumps(value)}" for name, value in kept.items())
    strange = ", ".join(str(name) for name in given if name not in known)
    told = f"{section}: {kind} takes no {strange} (known: {', '.join(known)}); without: --set "
    return [f"{told}{shlex.quote(f'{section}={{{text}}}')}"] * bool(strange)


def _absolute(value: Any) -> Any:  # noqa: ANN401 - YAML values
    return value.expanduser().absolute() if isinstance(value, Path) else value


def _parameters(factory: Any) -> list[inspect.Parameter]:  # noqa: ANN401
    return list(inspect.signature(factory).parameters.values())


def _arguments(factory: Any) -> dict[str, inspect.Parameter]:  # noqa: ANN401
    """Return what a recipe may set: keyword-only arguments, or all of a function's or dataclass."""
    parameters = _parameters(factory)
    only = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    if _decided_by_data(factory):
        return only
    return {p.name: p for p in parameters if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}}


def _decided_by_data(factory: Any) -> bool:  # noqa: ANN401
    """Tell whether a class is built from the data's dimensions first."""
    first = next(iter(_parameters(factory)), None)
    return bool(
        first
        and inspect.isclass(factory)
        and first.kind is first.POSITIONAL_OR_KEYWORD
        and first.default is first.empty
    )


def _hint(factory: Any, annotation: Any) -> Any:  # noqa: ANN401
    """Return the type an annotation of `factory` means; Any where its module does not know it."""
    if not isinstance(annotation, str):
        return Any if annotation is inspect.Parameter.empty else annotation
    function = factory.__init__ if inspect.isclass(factory) else factory
    known = {"Path": Path} | {n: getattr(collections.abc, n) for n in ("Mapping", "Sequence")}
    try:
        return eval(annotation, known | inspect.unwrap(function).__globals__)  # noqa: S307 - our own source
    except NameError:
        return Any


def _constructor(hint: Any) -> Any:  # noqa: ANN401
    """Return what builds a section that has no `kind`: a class, or the function annotated to it."""
    return next(iter(getattr(hint, "__metadata__", ())), hint)


def _plainly(reason: str) -> str:
    """Return pydantic's reason in the words of a recipe."""
    reason = reason.removeprefix("Input ").replace("a valid integer", "an integer")
    boolean = {"valid boolean": "boolean (true or false)"}
    words = boolean | {"valid array": "list", "valid ": "", " after validation": ""}
    for word, ours in words.items():
        reason = reason.replace(word, ours)
    return reason[:1].lower() + reason[1:]


def _plain(adapter: TypeAdapter[Any], value: Any) -> Any:  # noqa: ANN401
    return adapter.dump_python(value, mode="json", warnings=False)
