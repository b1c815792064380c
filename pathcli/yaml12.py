"""YAML in, plain values out, by the rules of YAML 1.2, which are the ones people expect."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from pathcli.types import DataError

if TYPE_CHECKING:
    from collections.abc import Callable


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: 1e-4 is a number, `no` and `on` are words, dates are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML has it

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:  # noqa: ANN401
        """Refuse a key given twice, which YAML forbids and PyYAML lets pass."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.MarkedYAMLError(problem=f"key {key!r} given twice", problem_mark=mark)
        return super().construct_mapping(node, deep)


_SCALARS: tuple[tuple[str, str, Callable[[str], Any]], ...] = (
    ("null", r"^(?:~|null|Null|NULL|)$", lambda _: None),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", lambda text: text.lower() == "true"),
    ("int", r"^[-+]?[0-9]+$", int),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", float),
)


def _teach(name: str, form: str, make: Callable[[str], Any]) -> None:
    def construct(loader: _Loader, node: Any) -> Any:  # noqa: ANN401 - PyYAML's own node
        return make(str(loader.construct_scalar(node)))

    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{name}", re.compile(form), None)
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
