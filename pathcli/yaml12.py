"""YAML in, plain values out, and back, by YAML 1.2's rules, which are the ones people expect."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from pathcli.errors import DataError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-4 is a number, `no` and `on` are words, dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML has it
    yaml_constructors = {  # noqa: RUF012 - likewise
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in {"str", "seq", "map"}
    }

    def compose_node(self, parent: Any, index: Any) -> Any:  # noqa: ANN401 - PyYAML's own nodes
        """Refuse aliases: every value stands where it is read, and none holds itself."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = "aliases (*name) are not read here; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401
        """Refuse a key given twice, which YAML forbids and PyYAML lets pass."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key!r} given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401, ARG002
        """Write every value out."""
        return True


_SCALARS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", lambda _: None),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", lambda text: text.lower() == "true"),
    ("int", r"^[-+]?[0-9]+$", int),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", float),
)


def _teach(name: str, form: str, make: Callable[[str], Any]) -> None:
    def construct(loader: _Loader, node: Any) -> Any:  # noqa: ANN401 - PyYAML's own node
        text = str(loader.construct_scalar(node))
        if not re.match(form, text):
            problem = f"{text!r} is no {name}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return make(text)

    for part in (_Loader, _Dumper):
        part.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(form), None)
    _Loader.add_constructor(f"tag:yaml.org,2002:{name}", construct)


for _scalar in _SCALARS:
    _teach(*_scalar)


def parse_yaml(text: str, source: str) -> Any:  # noqa: ANN401 - any YAML value
    """Return the value of a YAML text.

    Raises:
        DataError: it is no YAML; the message has the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        msg = f"{source}{line}: not YAML: {error.problem}"
        raise DataError(msg) from error
    except yaml.YAMLError as error:
        msg = f"{source}: not YAML: {str(error).splitlines()[0]}"
        raise DataError(msg) from error


def read_mapping(path: Path, form: str) -> dict[str, Any]:
    """Return the mapping in a YAML file; `form` ends the sentence said where it is none.

    Raises:
        ResourceError: the file cannot be read.
        DataError: it is no YAML, or no mapping.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
        raise ResourceError(msg) from error
    if not isinstance(values, dict):
        msg = f"{path}: {form}"
        raise DataError(msg)
    return values


def dump_yaml(value: Any) -> str:  # noqa: ANN401 - any YAML value
    """Return a value as YAML that `parse_yaml` reads back as it was."""
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
