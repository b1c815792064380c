"""The name of a labelled data set in; its classes, their texts, its layout and its numbers out.

Each set is a YAML file: one of assets/classes, or a user's own of the same form. A set without
a file is made from the labels themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence  # noqa: TC003 - pydantic reads them
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

NAMES = (
    *("lc-lung", "lc-colon", "crc-100k", "bach", "sicapv2", "osteo", "skincancer"),
    *("wsss4luad", "pcam", "mhist"),
)
TEMPLATE = "An H&E image of {}"
"""For sets of one's own; PathGen's for three of its sets."""
TEMPLATES = ("An image of {}", "An H&E patch of {}", "A histopathology image showing {}")
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class ClassName:
    """A class: `key` and `aliases` are its names in the data, `text` and `synonyms` in prompts."""

    __pydantic_config__ = _STRICT
    key: str
    text: str
    synonyms: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Folders:
    """The folder an image lies in is its label; `splits` maps a split to a folder further up."""

    __pydantic_config__ = _STRICT
    kind: Literal["folders"]
    splits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FileNames:
    """A file's name says its label: `pattern` has the groups `label` and, if known, `group`."""

    __pydantic_config__ = _STRICT
    kind: Literal["names"]
    pattern: str


@dataclass(frozen=True)
class Table:
    """A CSV or XLSX table says the labels.

    `files` maps a split ("" where a column or nobody tells) to a table; `image` is the column
    of file names, below the folder `images`; `label` the column of labels, "" where each class
    has a column of 0 and 1; `split` a column; `group` a pattern whose first group, found in the
    file name, is what must not be split.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["table"]
    files: Mapping[str, str]
    image: str
    label: str = ""
    images: str = ""
    split: str = ""
    group: str = ""


@dataclass(frozen=True)
class Arrays:
    """HDF5 arrays of images `x` [n, h, w, 3] and labels `y`, and a table with a group column.

    `x`, `y` and `table` are file names with `{split}` for each of `splits`.
    """

    __pydantic_config__ = _STRICT
    kind: Literal["arrays"]
    splits: tuple[str, ...]
    x: str
    y: str
    table: str
    group: str


Layout = Annotated[Folders | FileNames | Table | Arrays, Field(discriminator="kind")]


@dataclass(frozen=True)
class Published:
    """Numbers of the literature: shares by encoder; `data` says on which images."""

    __pydantic_config__ = _STRICT
    metric: Literal["accuracy", "balanced_accuracy", "weighted_f1", "macro_f1", "auroc"]
    data: str
    source: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class ClassSet:
    """A data set's classes in order, and all that is known of it.

    `template` has one {} for a class text; `templates` are for ensembles besides it. `split` is
    the part taken when none is asked for, "" for all. `layout` is None for a set of one's own,
    which comes as labels.csv or class folders. `note` says what was chosen here.
    """

    __pydantic_config__ = _STRICT
    name: str
    title: str
    classes: tuple[ClassName, ...]
    template: str = TEMPLATE
    templates: tuple[str, ...] = TEMPLATES
    source: str = ""
    licence: str = ""
    get: str = ""
    note: str = ""
    split: str = ""
    layout: Layout | None = None
    published: tuple[Published, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a set that cannot be asked about.

        Raises:
            DataError: fewer than two classes, a name given twice, or a template without {}.
        """
        names = [name.casefold() for c in self.classes for name in (c.key, *c.aliases)]
        if len(self.classes) < 2:  # noqa: PLR2004 - a choice is between two
            told = ", ".join(c.key for c in self.classes) or "none"
            msg = f"{self.name}: two classes are needed, there is {told}"
            raise DataError(msg)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            msg = f"{self.name}: {twice[0]!r} is the name of two classes (compared without case)"
            raise DataError(msg)
        for template in (self.template, *self.templates):
            if template.count("{}") != 1:
                msg = f"{self.name}: template {template!r} needs {{}} once, where the class goes"
                raise DataError(msg)

    @property
    def keys(self) -> tuple[str, ...]:
        """The classes' keys, whose places are the class indices."""
        return tuple(c.key for c in self.classes)

    def key_of(self, label: str) -> str | None:
        """Return the key of the class that the data call `label` (in any case), or None."""
        return self._key_of.get(label.casefold())

    @cached_property
    def _key_of(self) -> dict[str, str]:
        return {name.casefold(): c.key for c in self.classes for name in (c.key, *c.aliases)}

    def texts(self, *, ensemble: bool = False) -> dict[str, tuple[str, ...]]:
        """Return by class key its prompts: one, or with `ensemble` all synonyms x templates."""
        templates = tuple(dict.fromkeys((self.template, *self.templates)))
        return {
            c.key: tuple(
                template.replace("{}", text)
                for text in ((c.text, *c.synonyms) if ensemble else (c.text,))
                for template in (templates if ensemble else templates[:1])
            )
            for c in self.classes
        }

    def reworded(self, prompts: Sequence[str] = (), template: str | None = None) -> ClassSet:
        """Return the set with other words: `CLASS=TEXT` each, which replaces the synonyms too.

        Raises:
            UsageError: no such class, no text, or a template without {}.
        """
        given: dict[str, str] = {}
        for prompt in prompts:
            name, equals, text = prompt.partition("=")
            if not equals or not text.strip():
                msg = f"--prompt takes CLASS=TEXT, not {prompt!r}"
                raise UsageError(msg)
            key = self.key_of(name.strip())
            if key is None:
                msg = f"--prompt: no class is called {name!r}: {did_you_mean(name, [*self.keys])}"
                raise UsageError(msg)
            given[key] = text.strip()
        if template is not None and template.count("{}") != 1:
            msg = f"--template needs {{}} once, where the class goes, not {template!r}"
            raise UsageError(msg)
        classes = tuple(
            ClassName(c.key, given[c.key], aliases=c.aliases) if c.key in given else c
            for c in self.classes
        )
        if template is None:
            return replace(self, classes=classes)
        return replace(self, classes=classes, template=template, templates=())

    def published_rows(self) -> tuple[dict[str, Any], ...]:
        """Return the published numbers as flat rows."""
        return tuple(
            {
                "encoder": encoder,
                "metric": p.metric,
                "value": value,
                "images": p.data,
                "source": p.source,
            }
            for p in self.published
            for encoder, value in p.values.items()
        )


def class_set(name: str) -> ClassSet:
    """Return a set we know by name, or that of a user's own YAML file.

    Raises:
        UsageError: no set is called `name`.
        DataError: the file is not of the form of assets/classes.
        ResourceError: there is no such file.
    """
    if name in NAMES:
        return _read(asset(f"classes/{name}.yaml"), name)
    if name.endswith((".yaml", ".yml")):
        return _read(Path(name), Path(name).stem)
    hint = did_you_mean(name, list(NAMES))
    msg = f"no data set is called {name!r} (your own: a folder, a .csv or a .yaml): {hint}"
    raise UsageError(msg)


def class_set_of(labels: Iterable[str], name: str) -> ClassSet:
    """Return the set that `labels` make: a class is called what its label says, `_` a space.

    Raises:
        DataError: fewer than two labels.
    """
    found = sorted(set(labels))
    classes = tuple(ClassName(label, label.replace("_", " ")) for label in found)
    return ClassSet(name=name, title=name, classes=classes)


def _read(path: Path, name: str) -> ClassSet:
    values = read_mapping(path, "not a data set; it needs title and classes")
    try:
        return _ADAPTER.validate_python({"name": name} | values)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        msg = f"{path}: {at}: {first['msg'].lower()} (the files of assets/classes show the form)"
        raise DataError(msg) from error


_ADAPTER: TypeAdapter[ClassSet] = TypeAdapter(ClassSet)
