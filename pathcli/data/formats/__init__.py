"""A file, folder or glob of images and texts in, samples out: every layout we read, by name.

`CAPTIONS` are layouts of images and captions, `TALKS` those of questions and conversations; how
a record of each looks is told by `formats`, and with a sample in the module that reads it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pathcli.data.formats import conversations, vqa
from pathcli.data.formats.published import pathgen, pathgen_init, pmc_oa, pubmedvision, quilt
from pathcli.data.formats.shards import COMPRESSED, folder, shard_list, webdataset
from pathcli.data.formats.source import Source
from pathcli.data.formats.tables import CAPTION, IMAGE, TABLES, manifest, read_rows
from pathcli.errors import DataError, ResourceError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from pathcli.types import Sample

__all__ = ["CAPTIONS", "TALKS", "Format", "Source", "TalkFormat", "formats", "recognise", "samples"]

Format = Literal[
    "auto",
    "manifest",
    "webdataset",
    "folder",
    "pathgen",
    "pathgen-init",
    "quilt-1m",
    "pmc-oa",
    "pubmedvision",
]

TalkFormat = Literal[
    Format,
    "llava",
    "pathgen-instruct",
    "questions",
    "clover-generations",
    "pathvqa",
    "lxmert",
    "pmc-vqa",
]


@dataclass(frozen=True)
class Layout:
    """How one layout is read, what a record of it holds, and the columns it is known by."""

    read: Callable[[Source], Iterator[Sample]]
    record: str
    marks: frozenset[str] = frozenset()


def _layout(read: Callable[[Source], Iterator[Sample]], record: str, *marks: str) -> Layout:
    return Layout(read, record, frozenset(marks))


CAPTIONS: dict[str, Layout] = {
    "pathgen": _layout(
        pathgen,
        "{wsi_id, position: [x, y], caption, file_id?}: 672 px of a slide at level 0",
        *("wsi_id", "position", "caption"),
    ),
    "pubmedvision": _layout(
        pubmedvision,
        "{image: [...], conversations, modality, body_part}: the first answer is the caption",
        *("image", "conversations", "modality"),
    ),
    "pmc-oa": _layout(pmc_oa, "{image, caption, pmcid}", "image", "caption", "pmcid"),
    "quilt-1m": _layout(
        quilt,
        "CSV with image_path, caption, pathology",
        *("image_path", "caption", "pathology"),
    ),
    "manifest": _layout(manifest, "{image, caption, label?, group?}; CSV, JSON, JSONL or Parquet"),
    "webdataset": _layout(webdataset, "tar shards: 1.jpg with 1.txt, or 1.json {caption}"),
    "folder": _layout(folder, "a folder: a.png with a.txt"),
    "pathgen-init": _layout(
        pathgen_init, "*_imgs.json, lists of names, and the tables that have their captions"
    ),
}

TALKS: dict[str, Layout] = {
    "pubmedvision": CAPTIONS["pubmedvision"],
    "pathgen-instruct": _layout(
        conversations.pathgen_instruct,
        "{wsi_id, file_id?, position: [x, y], type, conversations}: 672 px of a slide at level 0",
        *("wsi_id", "position", "conversations"),
    ),
    "llava": _layout(
        conversations.llava,
        "{image, conversations: [{from: human, value}, {from: gpt, value}, ...]}",
        "conversations",
    ),
    "pmc-vqa": _layout(
        vqa.pmc_vqa,
        "CSV with Figure_path, Question, Choice A, ... Choice D, Answer, Answer_label?",
        *("figure_path", "question", "choice a", "answer"),
    ),
    "clover-generations": _layout(
        vqa.clover_generations, '{path, QA: lines of question: "..." and answer: "..."}', "qa"
    ),
    "lxmert": _layout(
        vqa.lxmert,
        "{img_id, sentf: {pvqa: [question, ...]}, labelf: {pvqa: [{answer: score}, ...]}}",
        *("img_id", "sentf", "labelf"),
    ),
    "pathvqa": _layout(
        vqa.pathvqa,
        "a pickle (or JSON) of {img_id, sent or question, label: {answer: score}}",
        *("img_id", "label"),
    ),
    "questions": _layout(
        vqa.questions,
        "{image or path, question, answer}; CSV, JSON, JSONL or Parquet",
        *("question", "answer"),
    ),
    **CAPTIONS,
    "webdataset": _layout(
        conversations.webdataset,
        "tar shards: 1.jpg with 1.json {conversations} or {question, answer}, or a caption",
    ),
}
"""In the order in which a first record is tried: the more telling columns first."""

log = logging.getLogger("pathcli")


def formats(layouts: Mapping[str, Layout] = TALKS) -> list[tuple[str, str]]:
    """Return the name of each layout and what a record of it holds, in one line."""
    return [(name, layout.record) for name, layout in layouts.items()]


def samples(
    source: Source, name: str = "auto", layouts: Mapping[str, Layout] = CAPTIONS
) -> Iterator[Sample]:
    """Return the samples of a source in the order of its rows; `source.dropped` counts the rest.

    Raises:
        DataError: it is of no known layout, or not of the one named.
        ResourceError: it is not there, or a library that reads it is not.
        UsageError: `keep` is given for what has no columns.
    """
    if name == "auto":
        name = recognise(source.path, layouts)
        log.info("%s: read as %s", source.path, name)
    if source.keep and name in {"webdataset", "folder"}:
        msg = f"{source.path}: data.keep chooses rows of a table, this is a {name}"
        raise UsageError(msg)
    return layouts[name].read(source)


def recognise(path: Path, layouts: Mapping[str, Layout] = CAPTIONS) -> str:
    """Return the layout of a file, folder or pattern, by its endings and its first row.

    Raises:
        DataError: it is none we know.
        ResourceError: it is not there.
    """
    if path.is_dir():
        name = _of_folder(path)
        if name != "manifest" or layouts is CAPTIONS:
            return name
    if path.name.lower().endswith((".tar", *COMPRESSED)):
        shard_list(path)
        return "webdataset"
    if not path.exists():
        msg = f"{path}: no such file or folder (in a recipe: data.source)"
        raise ResourceError(msg)
    if path.name.endswith("_imgs.json"):
        return "pathgen-init"
    row = next(iter(vqa.records(path) if layouts is TALKS else read_rows(path)), {})
    for name, layout in layouts.items():
        if layout.marks and layout.marks <= row.keys():
            return name
    if {*row} & {*IMAGE} and {*row} & {*CAPTION}:
        return "manifest"
    marks = {name: ", ".join(sorted(each.marks)) for name, each in layouts.items() if each.marks}
    known = "; ".join(f"{name} ({columns})" for name, columns in marks.items())
    msg = (
        f"{path}: no known layout, the first row has {', '.join(row) or 'nothing'}; a table needs "
        f"an image ({', '.join(IMAGE)}) and a caption ({', '.join(CAPTION)}), or give --format "
        "(in a recipe: data.format)"
        + (f"; by their columns are known: {known}" if layouts is TALKS else "")
    )
    raise DataError(msg)


def _of_folder(path: Path) -> str:
    names = [entry.name.lower() for entry in path.iterdir()]
    if any(name.endswith("_imgs.json") for name in names):
        return "pathgen-init"
    if any(name.endswith((".tar", *COMPRESSED)) for name in names):
        return "webdataset"
    if any(name.endswith(".parquet") for name in names):
        return "manifest"
    tables = [name for name in names if name.endswith(TABLES)]
    if tables and not any(name.endswith(".txt") for name in names):
        msg = f"{path}: a folder; name the table in it as data.source, e.g. {path / tables[0]}"
        raise DataError(msg)
    return "folder"
