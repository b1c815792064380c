"""Captions in; questions and answers to train on out, as CLOVER makes them: streamed, or resumed.

Generated: a language model that is given the caption writes four or five pairs. Template: a
question of a list is drawn, and the caption is the answer. A pair that does not pass the rules of
`pathcli.curation.pairs` is left out and stands in dropped.csv with its reason. Answers of the
model are kept by the model itself, so the same call again pays for nothing twice.
"""

from __future__ import annotations

import csv
import json
import random
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

from pathcli.curation.clean_rows import Rows
from pathcli.curation.pairs import Fault, Pair, Seen, read_pairs, rules, texts
from pathcli.curation.report import Dataset
from pathcli.data.formats import CAPTIONS, recognise, samples
from pathcli.data.formats.published import PATHGEN_PX
from pathcli.data.formats.source import patient
from pathcli.data.formats.source import texts as texts_of
from pathcli.data.formats.tables import read_rows
from pathcli.data.images import image_name
from pathcli.data.outputs import dumped, name_from, square_name, whole
from pathcli.errors import DataError, UsageError
from pathcli.llm import Message
from pathcli.llm_messages import CUT
from pathcli.types import digest
from pathcli.vlm.templates import read_questions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from pathcli.curation.models import Model, Reply
    from pathcli.data.formats import Source

Kind = Literal["generated", "template"]
Form = Literal["lines", "json"]

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "pairs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["pairs"],
    "additionalProperties": False,
}
"""What a model replies where it takes a schema."""
WRITTEN = 230
"""Tokens of an answer as it is estimated: five pairs of about 45."""


@dataclass(frozen=True)
class Settings:
    """How instructions are made.

    Attributes:
        kinds: which of the two.
        form: how the model is asked to write pairs; json goes with a schema.
        questions: a list of assets/questions, or a file of that form, for templates.
        max_tokens: most tokens of a reply.
        temperature: of what the model draws; 0 takes the likeliest. CLOVER's is 1.
        seed: of the questions that are drawn.
        limit: so many captions are read, all if None.
    """

    kinds: Sequence[Kind] = ("generated", "template")
    form: Form = "lines"
    questions: str = "describe-in-detail"
    max_tokens: int = 512
    temperature: float = 1.0
    seed: int = 0
    limit: int | None = None

    def __post_init__(self) -> None:
        """Check them.

        Raises:
            UsageError: an unknown kind, or none.
        """
        if not self.kinds or set(self.kinds) - {"generated", "template"}:
            msg = f"kinds are generated and template, not {', '.join(self.kinds) or 'none'}"
            raise UsageError(msg)


@dataclass(frozen=True)
class Given:
    """A caption, what names it, and where its image is: the path, and what the record says."""

    name: str
    text: str
    path: str
    group: str = ""
    place: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Made:
    """What became of it: the folder, and counts."""

    out: Path
    data: Dataset
    unread: Mapping[str, int]
    warnings: Sequence[str]
    layout: str


# --- captions ----------------------------------------------------------------------------


def captions(
    source: Source, out: Path, layout: str = "auto", limit: int | None = None
) -> Iterator[Given]:
    """Yield the captions of a source, whose images are named from its folder of images or `out`.

    PathGen's records need no slides: images are named after slide and position, as
    `pathcli data convert --write-images` names them.

    Raises:
        PathcliError: see `pathcli.data.formats.samples`.
    """
    if layout == "auto":
        layout = recognise(source.path, CAPTIONS)
    root = (source.images or out).absolute()
    found = _pathgen(source) if layout == "pathgen" else _plain(source, layout, root)
    for number, given in enumerate(found):
        if limit is not None and number >= limit:
            return
        yield given


def _plain(source: Source, layout: str, root: Path) -> Iterator[Given]:
    for sample in samples(source, layout):
        ref = sample.images[0]
        path = name_from(root, ref) if isinstance(ref, str) else image_name(ref)
        yield Given(sample.name, sample.answer, path, sample.group)


def _pathgen(source: Source) -> Iterator[Given]:
    for row in source.wanted(read_rows(source.path)):
        told, at = texts_of(row.get("caption")), row.get("position")
        if not row.get("wsi_id") or not isinstance(at, list) or not told:
            source.drop("no slide, position or caption", f"row {source.rows}")
            continue
        place = {key: row[key] for key in ("wsi_id", "position", "file_id", "side") if row.get(key)}
        name = "_".join(map(str, (row["wsi_id"], *at)))
        path = square_name(str(row["wsi_id"]), at, row.get("side") or PATHGEN_PX)
        yield Given(name, told[0], f"{path}.png", patient(str(row["wsi_id"])), place)


# --- asking ------------------------------------------------------------------------------


def conversation(caption: str, form: Form) -> list[Message]:
    """Return how a model is asked about a caption: rules, one worked example, the caption."""
    told = texts()
    pairs = [Pair(**pair) for pair in told["example"]["pairs"]]
    if form == "json":
        shown = json.dumps({"pairs": [pair._asdict() for pair in pairs]})
    else:
        shown = "\n\n".join(f'question: "{p.question}"\nanswer: "{p.answer}"' for p in pairs)
    return [
        Message("system", (f"{told['system']}\n\n{told['forms'][form]}",)),
        Message("user", (told["example"]["caption"],)),
        Message("assistant", (shown,)),
        Message("user", (caption,)),
    ]


def asking(settings: Settings) -> dict[str, Any]:
    """Return the parameters of requests."""
    given: dict[str, Any] = {"max_tokens": settings.max_tokens, "temperature": settings.temperature}
    return given | ({"schema": SCHEMA} if settings.form == "json" else {})


def _replies(
    found: Iterable[Given], model: Model | None, settings: Settings
) -> Iterator[tuple[Given, Reply | None]]:
    """Yield captions with what the model says to them."""
    if model is None:
        yield from ((given, None) for given in found)
        return
    waiting: deque[Given] = deque()

    def talks() -> Iterator[list[Message]]:
        for given in found:
            waiting.append(given)
            yield conversation(given.text, settings.form)

    for reply in model.ask_all(talks(), **asking(settings)):
        yield waiting.popleft(), reply


# --- making ------------------------------------------------------------------------------


def instruct(
    source: Source,
    out: Path,
    model: Model | None,
    settings: Settings,
    *,
    layout: str = "auto",
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> Made:
    """Make instructions of captions and write clover.json, llava.json and dropped.csv in `out`.

    Args:
        source: captions and where their images are.
        out: the folder.
        model: who writes pairs; None if only templates are wanted.
        settings: how.
        layout: of the source.
        progress: called with the captions done and those read, 0 for not known.

    Raises:
        UsageError: generated ones are wanted without a model.
        ResourceError: the budget is spent, or an endpoint or the disk fails: what was answered is
            kept, and the same call again goes on.
        DataError: there is no caption.
    """
    if (model is not None) != ("generated" in settings.kinds):
        msg = "kind generated needs a model, and only it does"
        raise UsageError(msg)
    work = _Work(settings, model.name if model else "")
    source = Rows(source)
    if layout == "auto":
        layout = recognise(source.path, CAPTIONS)
    found = captions(source, out, layout, settings.limit)
    with ExitStack() as files:
        clover, llava, lost = (
            files.enter_context(whole(out / name, "--out"))
            for name in ("clover.json", "llava.json", "dropped.csv")
        )
        singles, talks = files.enter_context(_List(clover)), files.enter_context(_List(llava))
        how: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        table = csv.writer(files.enter_context(lost.open("w", **how)))
        table.writerow(["id", "kind", "reason", "detail", "question", "answer"])
        for given, reply in _replies(found, model, settings):
            pairs, dropped = work.of(given, reply)
            table.writerows(_unread(source))
            table.writerows((given.name, *row) for row in dropped)
            for kind in settings.kinds:
                own = [pair for each, pair in pairs if each == kind]
                for pair in own:
                    singles.add(work.clover(given, kind, pair))
                if own:
                    talks.add(work.llava(given, kind, own, talks.count + 1))
            progress(work.data.captions, 0)
        table.writerows(_unread(source))
        if not work.data.captions:
            why = ", ".join(f"{n} {why}" for why, n in source.dropped.items())
            msg = f"{source.path}: no caption to make instructions of ({why or 'it is empty'})"
            raise DataError(msg)
    return Made(out, work.data, dict(source.dropped), source.warnings, layout)


def _unread(rows: Rows) -> Iterator[tuple[str, ...]]:
    """Yield the lines of dropped.csv of rows that gave no caption, once."""
    for row in rows.taken():
        yield (row.id, "", row.reason, f"{row.count} rows" * (row.count > 1), "", "")


class _Work:
    """The captions of one run, made into pairs one after the other."""

    def __init__(self, settings: Settings, model: str) -> None:
        self.settings, self.data, self._seen = settings, Dataset(texts()["body_parts"]), Seen()
        asked = read_questions(settings.questions) if "template" in settings.kinds else ()
        self._questions = asked
        self.source: dict[str, dict[str, str]] = {
            "generated": {"model": model, "prompt": prompt_digest(settings.form)},
            "template": {"prompt": digest(list(asked))},
        }

    def of(
        self, given: Given, reply: Reply | None
    ) -> tuple[list[tuple[Kind, Pair]], list[tuple[str, ...]]]:
        """Return the pairs of a caption, and the rows of those that were dropped."""
        self._seen.next()
        self.data.captions += 1
        made: list[tuple[Kind, Pair]] = []
        dropped: list[tuple[str, ...]] = []

        def judge(kind: Kind, pair: Pair) -> None:
            fault = rules().fault(pair, template=kind == "template") or self._seen.fault(pair)
            if fault:
                drop(kind, fault, pair)
            else:
                made.append((kind, pair))
                self.data.add(kind, given.name, pair, given.text)

        def drop(kind: Kind, fault: Fault, pair: Pair = Pair("", "")) -> None:  # noqa: B008 - a tuple
            dropped.append((kind, *(part[:300] for part in fault), *pair))
            self.data.drop(kind, given.name, fault, pair)

        for kind in self.settings.kinds:
            if kind == "template":
                judge(kind, Pair(self._question(given), " ".join(given.text.split())))
            elif reply is not None:
                pairs, faults = _read(reply)
                for pair in pairs:
                    judge(kind, pair)
                for fault in faults:
                    drop(kind, fault)
        return made, dropped

    def _question(self, given: Given) -> str:
        told = digest([self.settings.seed, given.name, given.text])
        return random.Random(told).choice(self._questions)  # noqa: S311 - no secret

    def clover(self, given: Given, kind: Kind, pair: Pair) -> dict[str, Any]:
        """Return a pair in CLOVER's form, with where it is from."""
        return {**pair._asdict(), "path": given.path, **self._facts(given, kind)}

    def llava(self, given: Given, kind: Kind, pairs: Sequence[Pair], number: int) -> dict[str, Any]:
        """Return the pairs of a caption in LLaVA's form: one conversation."""
        talk = [
            {"from": who, "value": text}
            for pair in pairs
            for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        talk[0]["value"] = f"<image>\n{talk[0]['value']}"
        facts = {"id": str(number), "image": given.path, "conversations": talk, "type": kind}
        return facts | self._facts(given, kind)

    def _facts(self, given: Given, kind: Kind) -> dict[str, Any]:
        group = {"group": given.group} if given.group else {}
        told = {"kind": kind, "caption_id": given.name, **self.source[kind]}
        return {**given.place, **group, **told}


def _read(reply: Reply) -> tuple[list[Pair], list[Fault]]:
    """Return the pairs of a reply, those before the cut of one that was cut off."""
    cut = reply.fault.startswith(CUT)
    if reply.fault and not cut:
        return [], [Fault("no answer", reply.fault)]
    return read_pairs(reply.text, cut=cut)


def prompt_digest(form: Form) -> str:
    """Return what names the words a model is asked with, whatever the caption."""
    return digest([message.to_json() for message in conversation("", form)])


def facts(settings: Settings) -> dict[str, Any]:
    """Return everything that decides what is made, beside captions and model."""
    told = {"rules": rules().digest, "settings": asdict(settings)}
    if "generated" in settings.kinds:
        told["prompt"] = {"digest": prompt_digest(settings.form), "form": settings.form}
    if "template" in settings.kinds:
        told["questions"] = digest(list(read_questions(settings.questions)))
    return told


class _List:
    """A JSON list that is written one record a line."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        self._file.write(b"[")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.write(b"\n]\n")
        self._file.close()

    def add(self, record: Mapping[str, Any]) -> None:
        self._file.write((b",\n" if self.count else b"\n") + dumped(record))
        self.count += 1
