"""The name of a chat template or of a list of questions in; what its file holds out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ConfigDict, TypeAdapter, ValidationError

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

TEMPLATES = (
    "plain",
    "vicuna-v1",
    "llama-3",
    "chatml",
    "flan",
)
QUESTIONS = ("describe", "describe-in-detail")


@dataclass(frozen=True)
class Template:
    """How a conversation is written: {} is where words go.

    `system` is written once, around `default` unless a recipe says else; then for each turn
    `user`, `assistant`, `answer`, `end` and `after`, of which `answer` and `end` are learnt.
    `join` stands between images and words of a turn. `special` are the special tokens all this
    holds; an `end` of {eos} is the tokenizer's own; with `bos` a text begins with the
    tokenizer's own mark, where it has one.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    name: str
    version: Literal[1]
    bos: bool
    user: str
    answer: str
    end: str
    assistant: str = ""
    after: str = ""
    system: str = ""
    default: str = ""
    join: str = "\n"
    special: tuple[str, ...] = ()

    @property
    def asks(self) -> bool:
        """Whether the user's words are said at all."""
        return "{}" in self.user


def read_template(name: str) -> Template:
    """Return a template we know by name, or that of a user's own YAML file.

    Raises:
        UsageError: no template is called `name`.
        DataError: the file is not of the form of assets/chat.
        ResourceError: there is no such file.
    """
    path, values = _yaml("chat", name, TEMPLATES)
    try:
        found = _ADAPTER.validate_python({"name": path.stem} | values)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        msg = f"{path}: {at}: {first['msg'].lower()} (the files of assets/chat show the form)"
        raise DataError(msg) from error
    if found.answer.count("{}") != 1 or found.end not in {"{eos}", *found.special}:
        msg = f"{path}: answer holds {{}} once, and end is {{eos}} or one of special"
        raise DataError(msg)
    return found


def read_questions(name: str) -> tuple[str, ...]:
    """Return a list of questions we know by name, or that of a user's own YAML file.

    Raises:
        UsageError: no list is called `name`.
        DataError: the file is not of the form of assets/questions.
        ResourceError: there is no such file.
    """
    path, values = _yaml("questions", name, QUESTIONS)
    found = values.get("questions")
    if not isinstance(found, list) or not found or not all(isinstance(q, str) for q in found):
        msg = f"{path}: questions must be a list of texts (assets/questions shows the form)"
        raise DataError(msg)
    return tuple(found)


def _yaml(folder: str, name: str, known: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    if name in known:
        path = asset(f"{folder}/{name}.yaml")
    elif name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
    else:
        hint = did_you_mean(name, list(known))
        msg = f"no file of assets/{folder} is called {name!r} (your own ends in .yaml): {hint}"
        raise UsageError(msg)
    form = f"must be a mapping (the files of assets/{folder} show the form)"
    return path, read_mapping(path, form)


_ADAPTER: TypeAdapter[Template] = TypeAdapter(Template)


class Voice(NamedTuple):
    """A template in the terms of one tokenizer.

    `begin` and `close` are the special tokens (id, text) that the tokenizer itself puts around
    a text, `control` finds what it would take for one, `stop` are the ids that end an answer.
    """

    template: Template
    begin: tuple[tuple[int, str], ...]
    close: tuple[tuple[int, str], ...]
    control: re.Pattern[str]
    stop: tuple[int, ...]

    def words(self, text: str) -> str:
        """Return words that no part of is a special token."""
        return self.control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text.strip())


@lru_cache(maxsize=8)
def voice(template: Template, tokenizer: Any) -> Voice:  # noqa: ANN401 - transformers'
    """Return a template in the terms of a tokenizer.

    Raises:
        UsageError: the tokenizer lacks what the template needs.
    """
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    special = {*added, *tokenizer.all_special_tokens}
    missing = [mark for mark in template.special if mark not in special]
    if missing or not tokenizer.is_fast or tokenizer.eos_token is None:
        lack = missing[0] if missing else "a fast tokenizer with an end of text"
        msg = f"chat template {template.name} needs {lack}, which this language model has not"
        raise UsageError(msg)
    bos, eos = tokenizer.bos_token, str(tokenizer.eos_token)
    own, end = tokenizer("").input_ids, int(tokenizer.eos_token_id)
    begins = template.bos and bos is not None and own[:1] == [tokenizer.bos_token_id]
    filled = replace(template, end=template.end.replace("{eos}", eos))
    marks = sorted((mark for mark in special if len(mark) > 1), key=len, reverse=True)
    return Voice(
        filled,
        begin=((tokenizer.bos_token_id, str(bos)),) if begins else (),
        close=((end, eos),) if own[-1:] == [end] else (),
        control=re.compile("|".join(map(re.escape, marks))),
        stop=tuple(dict.fromkeys([tokenizer.convert_tokens_to_ids(filled.end), end])),
    )
