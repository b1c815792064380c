"""A set of questions about images in, one kind of row out.

A set is a name we know (assets/vqa/sets.yaml) or any table of one's own, a record each:

    {"question": "...", "answer": "...", "image": "a.png",
     "options": ["...", "..."], "type": "...", "id": "...", "group": "..."}

The last four may be missing. Read as well are PathVQA's pickles and JSON, LLaVA's
conversations (every answer is a question by itself), PMC-VQA's choices, PathMMU's `data.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

from pathcli.data.formats.conversations import NO_ANSWER, conversation, group_of
from pathcli.data.formats.source import Files, plain
from pathcli.data.formats.tables import IMAGE, TABLES, pick, read_rows
from pathcli.data.formats.vqa import (
    PICKLES,
    by_content,
    is_parquet,
    of_image,
    official,
    records,
)
from pathcli.data.labelled import open_dataset
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.evals.vqa_cards import SetCard, cards
from pathcli.metrics import vqa as rules
from pathcli.metrics.vqa_text import answer_index, option_texts
from pathcli.registry import did_you_mean
from pathcli.types import Member, digest

if TYPE_CHECKING:
    from pathcli.data.formats.source import Row
    from pathcli.types import ImageRef

MISSING = 0.01
"""Share of questions whose image may be missing before nothing is asked at all."""

NO_IMAGE, NOT_THERE = "no image is named", "no such image file"
_NONE_OF = "the answer is none of the options"
_MARK = "<image>"
_SPLIT = "test"  # of a set that has parts


# --- questions ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question about images with its reference.

    `images` are as the table names them until `with_images` finds them. `options` are without
    letters, and `answer` then is one of them; `type` is the table's word, else what
    `question_type` says; `group` is what must not be split, "" where nobody says.
    """

    id: str
    images: tuple[ImageRef, ...]
    question: str
    answer: str
    options: tuple[str, ...] = ()
    type: str = ""
    group: str = ""

    @cached_property
    def kind(self) -> str:
        """Return closed (of yes or no), choice (of options) or open."""
        return rules.kind(self.answer, self.options)

    @property
    def unit(self) -> str:
        """Return what is independent of others: the group, else the image, else the question."""
        return self.group or "; ".join(map(str, self.images)) or self.id


@dataclass(frozen=True)
class QuestionSet:
    """A set's questions, what was left out by reason, and where all of it is from.

    `root` is the folder of the images; `found` tells whether they were looked for. `split` is the
    part of a set that has several, "" of all others.
    """

    name: str
    questions: tuple[Question, ...]
    source: str
    root: Path
    card: SetCard = field(default_factory=SetCard)
    dropped: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    found: bool = False
    split: str = ""

    @cached_property
    def digest(self) -> str:
        """Return 12 hex digits over what is asked and what is right."""
        return digest([[q.id, q.question, q.answer, *q.options] for q in self.questions])

    def first(self, limit: int | None) -> QuestionSet:
        """Return the first `limit` questions, all of them for None."""
        return replace(self, questions=self.questions[:limit])


def read_questions(
    name: str,
    *,
    data: Path | None = None,
    images: Path | None = None,
    split: str | None = None,
) -> QuestionSet:
    """Return the questions of a set.

    Args:
        name: a set we know, with `data`; or a table of one's own.
        data: the folder the set lies in, or its table.
        images: the folder of images (default: the set's own, else the table's folder).
        split: a part, where one table holds several (PathMMU: test, test_tiny, val).

    Raises:
        UsageError: no set is called so, it needs `data`, or it has no such split.
        ResourceError: its files are not there.
        DataError: a table is damaged, two questions have one id, or no question is left.
    """
    card, path = cards().get(name), Path(name)
    if card is None and not (path.exists() or path.suffix.lower() in {*TABLES, *PICKLES}):
        msg = f"no VQA set is called {name!r} (or give a table): {did_you_mean(name, [*cards()])}"
        raise UsageError(msg)
    if card is None:
        return _of_tables(SetCard(title=path.stem), path.stem, [path], images or data, split)
    if data is None:
        msg = f"{name}: where is it? give --data DIR; {card.get}"
        raise UsageError(msg)
    if card.question:
        if table := _label_table(card, data):
            return _of_label_table(card, name, table, images)
        return _of_labels(card, name, data, images)
    if data.is_file():
        return _of_tables(card, name, [data], images, split)
    if images is None:
        images = next((data / each for each in card.images if (data / each).is_dir()), data)
    return _of_tables(card, name, _tables(card, name, data), images, split)


def _tables(card: SetCard, name: str, folder: Path) -> list[Path]:
    """Return the first kind of table that lies in a folder: one file, or the shards of one."""
    if tables := _there(card, folder):
        return tables
    msg = (
        f"{folder}: no {' or '.join(card.tables)}; --data may also name the table of {name}; "
        f"to get it: {card.get}"
    )
    raise ResourceError(msg)


def _there(card: SetCard, folder: Path) -> list[Path]:
    return next(filter(None, (sorted(folder.glob(each)) for each in card.tables)), [])


def _label_table(card: SetCard, data: Path) -> Path | None:
    """Return the set's own table of labels, where it has one and this is it."""
    tables = [data] if data.is_file() else _there(card, data)
    if not (tables and card.columns and tables[0].suffix == ".csv"):
        return None
    return tables[0] if card.columns["image"] in next(read_rows(tables[0]), {}) else None


def _of_tables(
    card: SetCard, name: str, tables: Sequence[Path], images: Path | None, split: str | None
) -> QuestionSet:
    dropped: Counter[str] = Counter()
    rows = (row for table in tables for row in _rows(table, card, split))
    made = (each for row in rows for each in _questions(row, dropped))
    kept = tuple(_named(question, number) for number, question in enumerate(made))
    kept = tuple(question for question in kept if question.answer)
    source, root = ", ".join(map(str, tables)), images or tables[0].parent
    found = QuestionSet(name, kept, source, root, card, +dropped)
    return _whole(replace(found, split=(split or _SPLIT) if card.splits else ""))


def _named(question: Question, number: int) -> Question:
    """Return a question with what its record lacked: its number as id, and its type."""
    of_words = rules.question_type(question.question, question.answer)
    kind = question.type or ("choice" if question.options else of_words)
    return replace(question, id=question.id or str(number), type=kind)


def _of_label_table(card: SetCard, name: str, table: Path, images: Path | None) -> QuestionSet:
    options = {label: text for text, labels in card.options.items() for label in labels}
    dropped: Counter[str] = Counter()
    questions = []
    for row in read_rows(table):
        image, label, group = (plain(row.get(card.columns[c])) for c in ("image", "label", "group"))
        answer = options.get(label.removesuffix(".0"))
        if not image or answer is None:
            dropped[f"label {label!r} is no class of {name}" if image else NO_IMAGE] += 1
            continue
        rest = (card.question, answer, tuple(card.options), "choice", group)
        questions.append(Question(image, (image,), *rest))
    root = images or table.parent
    return _whole(QuestionSet(name, tuple(questions), str(table), root, card, dropped))


def _of_labels(card: SetCard, name: str, data: Path, images: Path | None) -> QuestionSet:
    folder = data if data.is_dir() else data.parent
    told = data if data.is_file() else None
    named = card.classes or str(folder)
    _, found = open_dataset(named, images or folder, labels=told, split="all" if told else None)
    options = {label.casefold(): text for text, of in card.options.items() for label in of}
    dropped = Counter(found.dropped)
    questions = []
    for sample in found.samples:
        answer = options.get(sample.label.casefold())
        if answer is None:
            dropped[f"label {sample.label!r} is no class of {name}"] += 1
            continue
        rest = (card.question, answer, tuple(card.options), "choice", sample.group)
        questions.append(Question(sample.name, sample.images, *rest))
    made = QuestionSet(name, tuple(questions), found.source, folder, card, dropped, found.warnings)
    return replace(_whole(made), found=True)


def _whole(made: QuestionSet) -> QuestionSet:
    """Return a set that can be asked.

    Raises:
        DataError: it is empty, or an id stands for two questions.
    """
    if not made.questions:
        why = ", ".join(f"{what}: {n}" for what, n in made.dropped.items()) or "it has no records"
        msg = f"{made.source}: no question is left ({why}); a record is {{question, answer, image}}"
        raise DataError(msg)
    twice = [each for each, n in Counter(q.id for q in made.questions).items() if n > 1]
    if twice:
        msg = f"{made.source}: id {twice[0]!r} stands for two questions; ids must differ"
        raise DataError(msg)
    return made


# --- records -----------------------------------------------------------------------------


def _rows(table: Path, card: SetCard, split: str | None) -> Iterator[Row]:
    """Yield the records of a table, those of PathMMU's parts and LXMERT's images taken apart."""
    parts = None
    for row in by_content(table) if is_parquet(table) else records(table):
        held = [key for key, value in row.items() if _listed(value)]
        if "sentf" in row:
            for number, each in enumerate(of_image(row)):
                yield each | {"id": f"{plain(row.get('img_id'))}-{number}"}
        elif held and not row.keys() & {"question", "conversations"}:
            parts = _wanted(card, split or _SPLIT, held)
            category = plain(row.get("image"))
            for part in parts:
                for item in row.get(part) or ():
                    own = {str(key).casefold(): value for key, value in item.items()}
                    name = f"{category}-{part}-{plain(own.get('no'))}"
                    yield own | {"type": category, "id": name}
        else:
            yield row
    if split and parts is None:
        msg = f"--split: {table} holds one part; leave it out, or name another table with --data"
        raise UsageError(msg)


def _listed(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _wanted(card: SetCard, split: str, held: Sequence[str]) -> Sequence[str]:
    known = [*card.splits] or list(held)
    if split not in known:
        msg = f"--split: no part is called {split!r}: {did_you_mean(split, known)}"
        raise UsageError(msg)
    return card.splits.get(split, (split,))


def _questions(row: Row, dropped: Counter[str]) -> Iterator[Question]:
    """Yield the questions of a record; one that cannot be asked has no answer, and is counted."""
    image = pick(row, ("figure_path", "img_id", "images", *IMAGE))
    names = [name for name in (image if isinstance(image, list) else [image]) if name]
    refs = tuple(name if isinstance(name, Member) else str(name) for name in names)
    told = plain(pick(row, ("id", "question_id", "qid", "index")))
    kept = (_type(row), group_of(row, image) or plain(row.get("image content")))
    if "conversations" in row:
        talks = conversation(row, max(len(refs), 1))
        said = [*talks[0][0], talks[0][1]] if talks else ["", ""]
        pairs = [*zip(said[::2], said[1::2], strict=True)]
        for number, (asked, answer) in enumerate(pairs):
            dropped[NO_ANSWER] += not answer
            name = f"{told}-{number}" if told and len(pairs) > 1 else told
            yield Question(name, refs, asked.replace(_MARK, "").strip(), answer, (), *kept)
        return
    if not plain(row.get("question")):
        row = official(row) if isinstance(row.get("label"), Mapping) else row
    asked = plain(row.get("question")).replace(_MARK, "").strip()
    answer, options = plain(row.get("yes_no_answer")) or _answer(row.get("answer")), _options(row)
    if options and answer:
        place = _place(row, answer, options)
        dropped[_NONE_OF] += place is None
        answer = "" if place is None else options[place]
    elif not (asked and answer):
        dropped[NO_ANSWER] += 1
    yield Question(told, refs, asked, answer if asked else "", options, *kept)


def _answer(told: object) -> str:
    """Return a cell as the answer it is: JSON's true and false are yes and no."""
    return {True: "yes", False: "no"}[told] if isinstance(told, bool) else plain(told)


def _type(row: Row) -> str:
    told = pick(row, ("type", "question_type", "answer_type", "category", "domain"))
    if isinstance(told, Mapping):  # LLaVA-Med's {"histology": true, ...}
        return ", ".join(str(key) for key, true in told.items() if true)
    return plain(told)


def _options(row: Row) -> tuple[str, ...]:
    """Return the options of a record without letters: a list, JSON, "a | b", or PMC-VQA's."""
    told = row.get("options") or row.get("choices")
    if isinstance(told, str):
        try:
            told = json.loads(told)
        except ValueError:
            told = told.split("|")
    if isinstance(told, Mapping):
        told = [told[key] for key in sorted(told)]
    if not isinstance(told, Iterable):
        told = [row.get(f"choice {letter}") for letter in ascii_uppercase.lower()]
    return tuple(option_texts([text for text in map(plain, told) if text]))


def _place(row: Row, answer: str, options: Sequence[str]) -> int | None:
    letter = plain(row.get("answer_label"))
    place = answer_index(letter, options) if letter else None
    return answer_index(answer, options) if place is None else place


# --- images ------------------------------------------------------------------------------


def with_images(asked: QuestionSet, *, missing: float = MISSING) -> QuestionSet:
    """Return the questions whose images are there, and where those are.

    Raises:
        ResourceError: more than the share `missing` has none; the first is named.
    """
    if asked.found:
        return asked
    files = Files(asked.root, deep=bool(asked.card.tables), bare=True)
    found, lacks, dropped = [], "", Counter(asked.dropped)
    for question in asked.questions:
        paths = [r if isinstance(r, Member) else files.find(str(r)) for r in question.images]
        if all(paths) and paths:
            found.append(replace(question, images=tuple(filter(None, paths))))
        else:
            dropped[NOT_THERE if paths else NO_IMAGE] += 1
            lacks = lacks or (", ".join(map(str, question.images)) or f"question {question.id}")
    lost, of = len(asked.questions) - len(found), len(asked.questions)
    if not found or lost > missing * of:
        msg = (
            f"{asked.source}: {lost} of {of} questions have no image below {asked.root} "
            f"(the first: {lacks}); give --images DIR"
        )
        raise ResourceError(
            msg + (f", or allow it with --missing {lost / of:.2f}" if found else "")
        )
    return replace(asked, questions=tuple(found), dropped=dropped, found=True)
