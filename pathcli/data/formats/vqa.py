r"""Tables of questions and answers in, samples out.

`questions` (CLOVER's instructions, PathVQA on the hub, PA-LLaVA's test sets, any table): an
image by one of the usual names, or embedded in Parquet, a question and an answer.

    [{"question": "What is shown?", "answer": "A gland.", "path": "a.jpg"}]

`clover-generations`, what CLOVER's generator said of a caption, as it came:

    [{"QA": "question: \"What is shown?\"\nanswer: \"A gland.\"", "path": "a.jpg",
      "caption": "..."}]

`pathvqa`, its official pickles (of which only lists, dicts, sets, texts and numbers are let in)
or the same in JSON; an image is named without ending and found in any folder below `images`:

    [{"img_id": "train_0422", "sent": "Where is it?", "label": {"in the liver": 1},
      "question_type": "where", "answer_type": "other", "question_id": 100422000}]

`lxmert`, the same by image; the answer of a question is the one of the highest score:

    [{"img_id": "test_0001", "sentf": {"pvqa": ["Is it benign?"]}, "labelf": {"pvqa": [{"no": 1}]}}]

`pmc-vqa`: Answer is a letter or the words, Answer_label a letter where it is there. Asked is
the question and a line for each choice ("A: stroma"), answered letter and words ("B: gland").

    Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer_label
    PMC1_Fig1.jpg,...,What is shown?,A:stroma,B:gland,C:nerve,D:fat,gland,B
"""

from __future__ import annotations

import hashlib
import pickle
import re
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from pathcli.data.formats.conversations import NO_ANSWER, group_of, question
from pathcli.data.formats.source import plain
from pathcli.data.formats.tables import IMAGE, LABEL, pick, read_rows
from pathcli.data.images import open_parquet
from pathcli.errors import DataError, ResourceError
from pathcli.types import Member

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from pathcli.data.formats.source import Row, Source
    from pathcli.types import Sample

PICKLES = (".pkl", ".pickle", ".p")

_SAID = re.compile(r"^[\W\d_]*(question|answer)[\s\d*]*:", re.IGNORECASE | re.MULTILINE)
_QUOTES = " \t\r\n*\"'“”"
_EMBEDDED = 64  # rows of embedded images held at a time


# --- layouts -----------------------------------------------------------------------------


def questions(source: Source) -> Iterator[Sample]:
    """Yield the rows of a table of image, question and answer.

    An image embedded in Parquet goes by its bytes, so that all its questions are of one image.

    Raises:
        DataError: a column is missing, or a folder holds the Parquet files of several splits.
    """
    rows = by_content(source.path) if is_parquet(source.path) else read_rows(source.path)
    yield from _asked(source, rows, {"question", "answer"})


def clover_generations(source: Source) -> Iterator[Sample]:
    """Yield the pairs that stand in CLOVER's generations; those badly formed are counted."""
    rows = (pair for row in read_rows(source.path) for pair in _generated(row))
    yield from _asked(source, rows, {"qa"}, "badly formed: question and answer do not alternate")


def pathvqa(source: Source) -> Iterator[Sample]:
    """Yield PathVQA's questions from its pickles, or from the same records in JSON."""
    source.deep = True
    yield from _asked(source, records(source.path), {"img_id", "label"}, told=official)


def lxmert(source: Source) -> Iterator[Sample]:
    """Yield PathVQA's questions in LXMERT's form; images without questions are counted."""
    source.deep = True
    rows = (each for row in records(source.path) for each in of_image(row))
    yield from _asked(source, rows, {"img_id", "sentf", "labelf"})


def pmc_vqa(source: Source) -> Iterator[Sample]:
    """Yield PMC-VQA's questions with their choices; the group is the article."""
    rows, needed = read_rows(source.path), {"figure_path", "question", "choice a", "answer"}
    yield from _asked(source, rows, needed, "the answer is none of the choices", _chosen)


def _asked(
    source: Source,
    rows: Iterable[Row],
    needed: set[str],
    why: str = NO_ANSWER,
    told: Callable[[Row], Row] = lambda row: row,
) -> Iterator[Sample]:
    """Yield the samples of rows, whose `question` and `answer` are found by `told`."""
    for row in source.wanted(rows):
        if source.rows == 1:
            _check(source.path, row, needed, words=source.words)
        image = pick(row, ("figure_path", "img_id", *IMAGE))
        label = pick(row, LABEL)
        known = {"label": label if isinstance(label, str) else None, "group": group_of(row, image)}
        talks, name = question(told(row)), row.get(_CONTENT, "")
        yield from source.talks(image, talks, why, name=name, **known)


def _check(path: Path, row: Row, needed: set[str], *, words: bool) -> None:
    lacks = sorted(needed - row.keys())
    if not words and not {*IMAGE, "figure_path", "img_id"} & row.keys():
        lacks.append(f"image ({', '.join(IMAGE)})")
    if lacks:
        msg = f"{path}: no {', no '.join(lacks)}: the first record has {', '.join(row)}"
        raise DataError(msg)


# --- records -----------------------------------------------------------------------------


def _generated(row: Row) -> Iterator[Row]:
    """Yield a record for each question of a generation; an answer is empty if it has none."""
    parts = _SAID.split(plain(row.get("qa")))[1:]
    said = [
        (who.casefold(), text.strip(_QUOTES))
        for who, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    made: list[Row] = []
    for who, text in said:
        if who == "question":
            made.append(row | {"question": text, "answer": ""})
        elif made and not made[-1]["answer"]:
            made[-1]["answer"] = text
        else:
            made.append(row | {"question": "", "answer": text})
    yield from made or [row]


def official(row: Row) -> Row:
    """Return a row of PathVQA's pickles with its question and likeliest answer by name."""
    asked = row.get("question") or row.get("sent")
    return row | {"question": asked, "answer": _best(row.get("label"))}


def of_image(row: Row) -> Iterator[Row]:
    """Yield the questions on one image of LXMERT's form, a row each."""
    sets, labels = row.get("sentf"), row.get("labelf")
    found = 0
    for name, asked in sets.items() if isinstance(sets, dict) else ():
        answers = labels.get(name) if isinstance(labels, dict) else None
        for text, label in zip_longest(asked, answers or ()):
            found += 1
            yield row | {"question": text, "answer": _best(label)}
    if not found:
        yield row


def _best(label: Any) -> str:  # noqa: ANN401 - any record
    """Return the answer of the highest score, the first of several."""
    if not isinstance(label, dict) or not label:
        return plain(label) if isinstance(label, str) else ""
    return plain(max(label, key=lambda answer: float(label[answer] or 0)))


def _chosen(row: Row) -> Row:
    """Return a row of PMC-VQA whose question has its choices and whose answer its letter."""
    named = {k: _without(k, plain(row.get(f"choice {k.lower()}"))) for k in "ABCD"}
    choices = {k: words for k, words in named.items() if words}
    told = plain(row.get("answer_label")) or plain(row.get("answer"))
    same = (k for k, words in choices.items() if _without(k, told).casefold() == words.casefold())
    right = told if told in choices else next(same, "")
    lines = [f"{k}: {words}" for k, words in choices.items()]
    asked = "\n".join([plain(row.get("question")), *lines])
    return row | {"question": asked, "answer": right and f"{right}: {choices[right]}"}


def _without(letter: str, words: str) -> str:
    """Return a choice without its letter."""
    return re.sub(rf"^{letter}\s*:", "", words).strip()


# --- pictures in Parquet -----------------------------------------------------------------

_CONTENT = "image content"


def is_parquet(path: Path) -> bool:
    """Return whether a file or folder is read as Parquet."""
    return path.is_dir() or path.suffix.lower() == ".parquet"


def by_content(path: Path) -> Iterator[Row]:
    """Yield the rows of Parquet, each with a name made of its embedded image's bytes."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    splits = sorted({file.name.partition("-")[0] for file in files})
    if len(splits) > 1:
        msg = f"{path}: files of several splits ({', '.join(splits)}); name one: {splits[-1]}-*"
        raise DataError(msg)
    for file in files:
        digests: Iterator[str] | None = None
        for row in read_rows(file):
            image = pick(row, IMAGE)
            if isinstance(image, Member):
                digests = digests or _digests(file, image.name.partition("[")[0])
                row[_CONTENT] = next(digests)
            yield row


def _digests(file: Path, column: str) -> Iterator[str]:
    for batch in open_parquet(str(file)).iter_batches(_EMBEDDED, columns=[f"{column}.bytes"]):
        for value in batch.column(0).to_pylist():
            data = (value or {}).get("bytes") or b""
            yield hashlib.blake2b(data, digest_size=8).hexdigest()


# --- pickles -----------------------------------------------------------------------------


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, sets, texts and numbers; nothing in the file is ever called."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - two classes
        if (module, name) in {("builtins", "set"), ("builtins", "frozenset")}:
            return {"set": set, "frozenset": frozenset}[name]
        msg = f"it asks for {module}.{name}, which could run anything"
        raise pickle.UnpicklingError(msg)


def records(path: Path) -> Iterator[Row]:
    """Yield the records of a pickle, or of a table as `read_rows` does.

    Raises:
        DataError: damaged, no list of records, or not of plain values alone.
        ResourceError: it is not there, or may not be read.
    """
    if path.suffix.lower() not in PICKLES:
        yield from read_rows(path)
        return
    try:
        with path.open("rb") as file:
            found = _Plain(file, encoding="utf-8").load()
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror})"
        raise ResourceError(msg) from error
    except pickle.UnpicklingError as error:
        msg = f"{path}: not a pickle of lists, dicts, texts and numbers alone ({error})"
        raise DataError(msg) from error
    except Exception as error:  # a damaged pickle raises what its bytes provoke
        msg = f"{path}: not a whole pickle ({type(error).__name__})"
        raise DataError(msg) from error
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        msg = f"{path}: a pickle of questions is a list of records, not a {type(found).__name__}"
        raise DataError(msg)
    for row in found:
        yield {str(key).casefold(): value for key, value in row.items()}
