"""What patches are looked for by: attributes of a cancer, and the findings of a slide's report."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pathcli.curation.caption.agents import filled, texts_of, user
from pathcli.data.formats.tables import pick, read_rows
from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from pathcli.curation.models import Model

ANY = "any"

_SLIDE = ("wsi_id", "wsi", "slide", "id")
_REPORT = ("report", "text", "findings")
_PARTS = re.compile(r"[\n;]+|(?<=[.!?])\s+")
_FEW = 3  # words below which a part of a report is no finding


def attributes_of(cancer: str, model: Model | None, words: Mapping[str, str]) -> tuple[str, ...]:
    """Return phrases for what may be seen of a cancer: the shipped ones, or a model's.

    Raises:
        UsageError: without a model, a name that is not shipped.
        DataError: the model's list cannot be read, asked twice.
    """
    path = asset("curation/attributes.yaml")
    known = read_mapping(path, "must map cancers to their attributes")
    name = cancer.lower().removeprefix("tcga-")
    project = known.get(name) if name != "common" else None
    if model is not None:
        called = project["name"] if project else "any organ" if name == ANY else cancer
        said = [user(filled(words["attributes"], cancer=called))]
        found, fault = texts_of(model, said, "attributes", words["again"])
        if not found:
            msg = (
                f"{model.name}: no attributes of {called} ({fault or 'an empty list'}); leave out "
            )
            raise DataError(msg + "--prompt to take the shipped ones")
        return tuple(found)
    if name != ANY and project is None:
        names = [ANY, *(key for key in known if key != "common")]
        msg = f"--cancer {cancer}: {did_you_mean(name, names)}; --prompt MODEL knows others"
        raise UsageError(msg)
    return (*known["common"], *(project["attributes"] if project else ()))


def findings_in(
    report: str, model: Model | None, words: Mapping[str, str]
) -> tuple[tuple[str, ...], str]:
    """Return the findings of a report, and what was wrong with the model's list of them.

    Without a model they are its lines and sentences of three words or more.
    """
    if not report.strip():
        return (), ""
    if model is not None:
        said = [user(filled(words["findings"], report=report))]
        found, fault = texts_of(model, said, "findings", words["again"])
        return tuple(found), fault
    parts = (" ".join(part.split()).strip(" .-*") for part in _PARTS.split(report))
    return tuple(dict.fromkeys(part for part in parts if len(part.split()) >= _FEW)), ""


@dataclass(frozen=True)
class Reports:
    """Reports by slide, or by what slides' names begin with (a TCGA patient, say)."""

    texts: Mapping[str, str]

    @classmethod
    def read(cls, path: Path) -> Reports:
        """Read a table with the columns wsi_id and report, or a folder of texts named by slide.

        Raises:
            DataError: a column is missing, or a folder holds no text.
            ResourceError: it is not there.
        """
        if path.is_dir():
            files = sorted(path.glob("*.txt"))
            if not files:
                msg = f"{path}: no report; a folder of them has SLIDE.txt for each slide"
                raise DataError(msg)
            return cls({file.stem: file.read_text(encoding="utf-8") for file in files})
        found = dict[str, str]()
        for row in read_rows(path):
            slide, report = pick(row, _SLIDE), pick(row, _REPORT)
            if slide is None or report is None:
                msg = f"{path}: reports need the columns wsi_id and report, not {', '.join(row)}"
                raise DataError(msg)
            found[str(slide).strip()] = str(report)
        return cls(found)

    def find(self, wsi: str) -> str:
        """Return a slide's report, "" if there is none; of several the longest name's."""
        return self.texts[max(names, key=len)] if (names := self._named(wsi)) else ""

    def _named(self, wsi: str) -> Sequence[str]:
        begins = (
            wsi[:end] for end in range(len(wsi), 0, -1) if end == len(wsi) or wsi[end] in "-._"
        )
        return [name for name in begins if name in self.texts]
