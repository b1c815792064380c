"""What is known of the VQA sets and of the words in which questions are put (assets/vqa)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence  # noqa: TC003 - pydantic reads them
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import repeat
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ConfigDict, TypeAdapter

from pathcli.errors import UsageError
from pathcli.registry import did_you_mean
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from pathcli.evals.vqa_data import Question

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class SetCard:
    """A set we know: where its files lie, what it is put with, and who says so.

    `classes`, `question` and `options` (text: labels) make questions of labelled images; their
    labels may stand in one of `tables`, under the names that `columns` gives image, label, group.
    """

    __pydantic_config__ = _STRICT
    title: str = ""
    source: str = ""
    get: str = ""
    tables: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompt: str = "plain"
    classes: str = ""
    question: str = ""
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    columns: Mapping[Literal["image", "label", "group"], str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """How questions are worded; assets/vqa/prompts.yaml tells the form."""

    __pydantic_config__ = _STRICT
    name: str
    about: str
    source: str
    models: tuple[str, ...] = ()
    open: str = "{question}"
    closed: str = "{question}"
    choice: str = "{question}\n{options}"
    option: str | tuple[str, ...] = "{letter}: {text}"
    join: str = "\n"
    decoding: Mapping[str, float] = field(default_factory=dict)

    def words(self, question: Question, order: Sequence[int] = ()) -> str:
        """Return what is asked, the options in `order` (default: as they are)."""
        lines = self.lines(question, order)
        form = getattr(self, "choice" if lines else question.kind)
        return str(form.format(question=question.question, options=self.join.join(lines)))

    def lines(self, question: Question, order: Sequence[int] = ()) -> list[str]:
        """Return the options as they are written, in `order` (default: as they are)."""
        forms = [self.option] if isinstance(self.option, str) else self.option
        shown = [question.options[i] for i in order or range(len(question.options))]
        places = zip(shown, ascii_uppercase, _then_last(forms), strict=False)
        return [form.format(letter=letter, text=text) for text, letter, form in places]


def _then_last(forms: Sequence[str]) -> Iterator[str]:
    yield from forms
    yield from repeat(forms[-1])


def prompts() -> dict[str, Prompt]:
    """Return the prompts we know by name."""
    return {
        name: TypeAdapter(Prompt).validate_python({"name": name, **values})
        for name, values in _asset("prompts").items()
    }


def prompt_of(name: str | None, card: SetCard, model: str = "") -> Prompt:
    """Return the prompt of a name; else the one of the model's authors, else the set's own.

    Raises:
        UsageError: no prompt is called `name`.
    """
    known = prompts()
    if name is None:
        fits = (p for p in known.values() for like in p.models if fnmatch(model.casefold(), like))
        return next(fits, known[card.prompt])
    if name not in known:
        msg = f"--prompt: none is called {name!r}: {did_you_mean(name, [*known])}"
        raise UsageError(msg)
    return known[name]


def cards() -> dict[str, SetCard]:
    """Return the sets we know by name."""
    return {
        name: TypeAdapter(SetCard).validate_python(values)
        for name, values in _asset("sets").items()
    }


def published(name: str, split: str = "") -> list[dict[str, Any]]:
    """Return the numbers of the literature on a set: metric, rule, source and values by model.

    Of a set that has splits, those measured on `split`; all of them without one.
    """
    rows = _asset("published").get(name, ())
    return [row for row in rows if not split or row.get("split", split) == split]


def _asset(name: str) -> dict[str, Any]:
    return read_mapping(asset(f"vqa/{name}.yaml"), "must be a mapping")
