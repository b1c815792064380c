"""Labelled images and the many ways their classes can be put into words, as a corpus."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003 - recipes read annotations when they run
from typing import TYPE_CHECKING, Any

from pathcli.data.corpus import Corpus
from pathcli.data.formats.source import plain
from pathcli.data.formats.tables import read_rows
from pathcli.errors import DataError, ResourceError
from pathcli.types import Sample, digest
from pathcli.weights import asset
from pathcli.yaml12 import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_COLUMNS = ("image", "label", "split")
_SPLITS = {"train", "val"}


@dataclass(frozen=True)
class Wordings:
    """What classes are called: in training, in validation, and by words kept out of both.

    `phrases` and `unseen` hold bare phrases by label; `prompts` those that validation asks by.
    """

    templates: tuple[str, ...]
    phrases: Mapping[str, Sequence[str]]
    prompts: Mapping[str, Sequence[str]]
    unseen: Mapping[str, Sequence[str]]

    def captions(self, label: str) -> list[str]:
        """Return every phrase of a label in every template."""
        return _filled(self.templates, self.phrases[label])

    def asked(self) -> dict[str, list[str]]:
        """Return the prompts of validation: each phrase in each of the first three templates."""
        return {k: _filled(self.templates[:3], v) for k, v in self.prompts.items()}


def _filled(templates: Sequence[str], phrases: Sequence[str]) -> list[str]:
    return [t.replace("{}", phrase) for phrase in phrases for t in templates]


def read_wordings(path: Path | None = None) -> Wordings:
    """Return the wordings of a file, by default those of mini-clip.

    Raises:
        DataError: a part is missing, or a phrase kept out of training is trained on.
        ResourceError: there is no such file.
    """
    path = path or asset("mini-clip/wordings.yaml")
    try:
        values: Any = parse_yaml(path.read_text(encoding="utf-8"), str(path))
        parts = [values["classes"], values.get("prompts", {}), values.get("unseen", {})]
        texts = [{label: _texts(said) for label, said in part.items()} for part in parts]
        found = Wordings(_texts(values["templates"]), *texts)
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror}); wordings are needed"
        raise ResourceError(msg) from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        msg = f"{path}: wordings have templates, and by label lists of texts ({error})"
        raise DataError(msg) from error
    if wrong := [t for t in found.templates if t.count("{}") != 1]:
        msg = f"{path}: template {wrong[0]!r} needs {{}} once, where the phrase goes"
        raise DataError(msg)
    for label, phrases in found.unseen.items():
        known = {p.casefold() for p in found.phrases.get(label, ())}
        if trained := known & {p.casefold() for p in phrases}:
            msg = f"{path}: {min(trained)!r} is among the unseen phrases and trained on"
            raise DataError(msg)
    return found


def _texts(value: object) -> tuple[str, ...]:
    """Return a list of texts; TypeError for all else, a bare text too, whose letters it is not."""
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        msg = f"{value!r} is no list of texts"
        raise TypeError(msg)
    return tuple(value)


class ClassCaptions:
    """The section `data` of a recipe: a table of labelled images, and words for the labels.

    Captions are drawn anew each time an image is seen, so the model learns what a class is
    called in general, and images of one label are positives of each other.
    """

    def __init__(
        self, *, table: Path, images: Path | None = None, wordings: Path | None = None
    ) -> None:
        """Keep the arguments.

        Args:
            table: CSV (or TSV, JSON) with image,label,split and maybe group; rows whose split
                is neither train nor val are left out.
            images: folder the paths start from (default: the table's own).
            wordings: YAML with templates, classes, prompts (default: mini-clip's).
        """
        self.table, self.images, self.wordings = table, images, wordings

    def corpus(self) -> Corpus:
        """See `CorpusData.corpus`.

        Raises:
            DataError: a column is missing, a label has no words, or a split is empty.
            ResourceError: there is no table.
        """
        words = read_wordings(self.wordings)
        samples: dict[str, list[Sample]] = {"train": [], "val": []}
        left: Counter[str] = Counter()
        for row in self._rows():
            if row["split"] not in _SPLITS:
                left[f"split {row['split']}"] += 1
            elif row["label"] not in words.phrases:
                left[f"no words for label {row['label']}"] += 1
            else:
                samples[row["split"]].append(self._sample(row))
        self._check(samples)
        lines = sorted((s.name, s.label, s.group, k) for k, v in samples.items() for s in v)
        labels = {s.label for part in samples.values() for s in part}
        captions = {label: words.captions(label) for label in sorted(labels)}
        return Corpus(
            train=samples["train"],
            val=samples["val"],
            digest=digest([lines, captions]),
            dropped=dict(left),
            wordings=captions,
            prompts={k: v for k, v in words.asked().items() if k in labels},
        )

    def _rows(self) -> Iterator[dict[str, str]]:
        for number, row in enumerate(read_rows(self.table), start=1):
            if missing := [c for c in _COLUMNS if c not in row]:
                told = f"row {number}: no column {missing[0]}"
                msg = f"{self.table}: {told}; it has image,label,split[,group]"
                raise DataError(msg)
            yield {column: plain(row.get(column)) for column in (*_COLUMNS, "group")}

    def _sample(self, row: Mapping[str, str]) -> Sample:
        path = (self.images or self.table.parent) / row["image"]
        return Sample(row["image"], (str(path),), label=row["label"], group=row["group"])

    def _check(self, samples: Mapping[str, Sequence[Sample]]) -> None:
        for split, found in samples.items():
            if not found:
                msg = f"{self.table}: no row of split {split} can be used"
                raise DataError(msg)
        for what in ("group", "name"):
            sides = [{getattr(s, what) for s in part} - {""} for part in samples.values()]
            if both := sides[0] & sides[1]:
                word = "image" if what == "name" else what
                msg = f"{self.table}: {word} {min(both)!r} is in train and in val"
                raise DataError(msg)
