r"""Records of conversations in, samples out: LLaVA's, PathGen-Instruct's, tar shards'.

`llava` (LLaVA, Quilt-Instruct, PA-LLaVA's JSONL), one record of JSON or line of JSONL each:

    {"id": "1", "image": "a.jpg", "conversations": [
        {"from": "human", "value": "<image>\nWhat is shown?"},
        {"from": "gpt", "value": "A gland."}]}

`image` may be a list; "<image>" then stands as often as there are images, or nowhere. Who
speaks is human or user, then gpt or assistant, in turns; the last answer is learnt.

`pathgen-instruct`, a region of 672 px at level 0 of a slide found below `images`:

    {"id": "1", "wsi_id": "TCGA-...-DX1", "file_id": "...", "position": ["32", "64"],
     "type": "CLOSE", "conversations": [...]}

Where these regions were cut into image files already, `format: llava` takes the files.

`webdataset`: tar shards of `1.jpg` and `1.json`, which holds conversations as above, or
{"question": "...", "answer": "..."}, or {"caption": "..."}; or `1.txt`, a caption.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pathcli.data.formats import published, shards
from pathcli.data.formats.source import patient, plain
from pathcli.data.formats.tables import GROUP, IMAGE, LABEL, pick, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pathcli.data.formats.source import Row, Source, Talk
    from pathcli.types import Sample

UNSAID = "no whole conversation (question, answer, question, answer)"
NO_ANSWER = "no question or no answer"
MARK = "<image>"

_ASKS, _ANSWERS = {"human", "user"}, {"gpt", "assistant"}
_WHOLE = re.compile(r"([\w-]{11})_(?:image|roi)_|(PMC\d+)")  # a video of Quilt's, an article


def llava(source: Source) -> Iterator[Sample]:
    """Yield LLaVA's records; those without image or without a whole conversation are counted."""
    for row in source.wanted(read_rows(source.path)):
        image = pick(row, (*IMAGE, "images"))
        shown = 0 if source.words else len(image) if isinstance(image, list) else 1
        talks = conversation(row, shown)
        known = {"label": pick(row, LABEL), "group": group_of(row, image)}
        yield from source.talks(image, talks, UNSAID, **known)


def pathgen_instruct(source: Source) -> Iterator[Sample]:
    """Yield PathGen-Instruct's records as regions of slides; see `pathgen`."""
    return published.pathgen(source, conversation, "conversations")


def webdataset(source: Source) -> Iterator[Sample]:
    """Yield the samples of tar shards whose texts are conversations, questions or captions."""
    return shards.webdataset(source, _said, "no conversation, question or caption")


def _said(row: Row) -> list[Talk]:
    return conversation(row) or question(row) or shards.captions(row)


def conversation(row: Row, images: int = 1) -> list[Talk]:
    """Return the conversation of a record about so many images; none if it is not whole."""
    given = row.get("conversations")
    said = [_turn(turn) for turn in given] if isinstance(given, list) else []
    texts = [text for _, text in said]
    roles = [role for role, _ in said]
    if not said or roles != ["asks", "answers"] * (len(said) // 2) or not all(texts):
        return []
    if sum(text.count(MARK) for text in texts) not in {0, images}:
        return []
    return [(tuple(texts[:-1]), texts[-1])]


def _turn(turn: Any) -> tuple[str, str]:  # noqa: ANN401 - any JSON
    if not isinstance(turn, dict):
        return "", ""
    who = plain(turn.get("from")).casefold()
    role = "asks" if who in _ASKS else "answers" if who in _ANSWERS else ""
    return role, plain(turn.get("value"))


def question(row: Row) -> list[Talk]:
    """Return the question and answer of a record; none if either is empty."""
    asked, answer = plain(row.get("question")), plain(row.get("answer"))
    return [((asked,), answer)] if asked and answer else []


def group_of(row: Row, image: object) -> str:
    """Return what an image is a part of: as a column says, or a published set's name of it.

    Such names begin with Quilt's video, PubMed Central's article or TCGA's patient.
    """
    if told := plain(pick(row, GROUP)):
        return told
    first = image[0] if isinstance(image, list) and image else image
    name = PurePosixPath(first).name if isinstance(first, str) else ""
    if whole := _WHOLE.match(name):
        return whole[1] or whole[2]
    known = patient(name)
    return "" if known == name else known
