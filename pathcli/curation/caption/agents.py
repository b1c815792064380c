"""Models that write captions between them: each asks about patches in order and notes what it did.

Prompts are those of assets/curation/caption.yaml. What a model is asked goes through
`ask_all`, which asks several things at once; a patch that was dropped before is passed on
unasked. A `fault` (refused, timed out) concerns one patch; an endpoint that is gone raises.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from pathcli.curation.caption import revise
from pathcli.data.images import read_image
from pathcli.errors import DataError
from pathcli.llm import Message, Picture
from pathcli.llm_messages import list_in, list_schema
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pathcli.curation.models import Model, Reply
    from pathcli.types import ImageTextEncoder, Region

    Conversation = Sequence[Message]
    Schema = Mapping[str, Any]

Item = TypeVar("Item")

CLIP_TOKENS = 77
"""Most tokens of a caption, the marks of its beginning and end among them, as CLIP reads it."""
FIRST_SENTENCES = "first-sentences"
"""Names the rule that shortens captions by whole sentences, where no model is to."""

_TEXTS = list_schema("texts", {"type": "string"})
_MOST = {"describe": 400, "revise": 600, "summarise": 120, "attributes": 800, "findings": 800}
_REFUSAL = re.compile(
    r"\W*(?:i(?:'|\u2019)?m (?:very )?sorry|i am sorry|sorry,|i can(?:'|\u2019|no)t|i am unable|"
    r"i(?:'|\u2019)m unable|as an ai)\b",
    re.IGNORECASE,
)
_PART = 1024  # patches that are on their way to one agent
_WORDS_A_TOKEN = 0.65  # of captions, by CLIP's tokenizer


@dataclass
class Patch:
    """A square of a slide on its way to a caption; `why` tells why it was dropped.

    `steps` are what each agent was given and said, in order. `unfamiliar` says that a model
    wrote about it which has seen nothing like it.
    """

    wsi_id: str
    file_id: str
    region: Region
    routes: tuple[str, ...]
    near: str = ""
    cosine: float | None = None
    caption: str = ""
    why: str = ""
    detail: str = ""
    unfamiliar: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Slide and level-0 corner, as PathGen names its files."""
        return f"{self.wsi_id}_{self.region.xy[0]}_{self.region.xy[1]}"

    def drop(self, why: str, detail: str = "") -> None:
        """Give it up: nothing more is asked about it."""
        self.why, self.detail = why, " ".join(detail.split())[:300]

    def mark(self, reply: Reply) -> None:
        """Remember what is to be known of a caption that a model had to do with."""
        self.unfamiliar = self.unfamiliar or reply.note

    def note(self, agent: str, **facts: Any) -> None:  # noqa: ANN401 - JSON
        """Remember what an agent was given and did; what is empty is left out."""
        self.steps.append(
            {"agent": agent} | {k: v for k, v in facts.items() if v not in ("", None)}
        )


# --- asking --------------------------------------------------------------------------------


def prompts() -> dict[str, str]:
    """Return the agents' prompts by name."""
    path = asset("curation/caption.yaml")
    return {k: str(v) for k, v in read_mapping(path, "must map names to prompts").items()}


def filled(prompt: str, **words: object) -> str:
    """Return a prompt with `{name}` replaced; other braces stay."""
    for name, value in words.items():
        prompt = prompt.replace(f"{{{name}}}", str(value))
    return prompt


def user(*content: str | Picture) -> Message:
    """Return what is said to a model."""
    return Message("user", content)


def asked(
    model: Model,
    items: Iterable[Item],
    conversation: Callable[[Item], Conversation | None],
    max_tokens: int,
    schema: Schema | None = None,
) -> Iterator[tuple[Item, Conversation, Reply | None]]:
    """Yield each item in order, with what was said about it and the model's reply.

    Those without conversation are not asked about, and have no reply. So many as `_PART` are
    held at most, however few of them are asked about. A `schema` goes to models that it binds.
    """
    every, given = iter(items), settings(model, max_tokens, schema)
    while part := list(islice(every, _PART)):
        yield from _asked(model, part, conversation, given)


def settings(model: Model, max_tokens: int, schema: Schema | None) -> dict[str, Any]:
    """Return how a model is asked: with a schema, if that binds its answers."""
    return {"max_tokens": max_tokens} | (
        {"schema": schema} if schema and model.takes_schema else {}
    )


def _asked(
    model: Model,
    items: Sequence[Item],
    conversation: Callable[[Item], Conversation | None],
    given: dict[str, Any],
) -> Iterator[tuple[Item, Conversation, Reply | None]]:
    waiting: deque[tuple[Item, Conversation | None]] = deque()

    def conversations() -> Iterator[Conversation]:
        for item in items:
            waiting.append((item, said := conversation(item)))
            if said is not None:
                yield said

    for reply in model.ask_all(conversations(), **given):
        item, said = waiting.popleft()
        while said is None:
            yield item, (), None
            item, said = waiting.popleft()
        yield item, said, reply
    yield from ((item, (), None) for item, _ in waiting)


def again(  # noqa: PLR0917 - of one question
    model: Model,
    said: Conversation,
    reply: str,
    why: str,
    max_tokens: int,
    schema: Schema | None = None,
) -> Reply:
    """Ask once more, saying why the first reply cannot be used."""
    more = (*said, Message("assistant", (reply or "-",)), user(why))
    return next(iter(model.ask_all([more], **settings(model, max_tokens, schema))))


def texts_of(model: Model, said: Conversation, what: str, retry: str) -> tuple[list[str], str]:
    """Return the texts a model replies as a JSON list, and what is wrong, after one retry."""
    limit = _MOST[what]
    reply = next(iter(model.ask_all([said], **settings(model, limit, _TEXTS))))
    for attempt in range(2):
        if reply.fault:
            return [], reply.fault
        try:
            return _texts(reply.text), ""
        except DataError as error:
            fault = str(error)
        if attempt == 0:
            reply = again(model, said, reply.text, filled(retry, fault=fault), limit, _TEXTS)
    return [], fault


def _texts(reply: str) -> list[str]:
    found = list_in(reply)
    if not all(isinstance(text, str) for text in found):
        msg = "this is not a JSON list of texts"
        raise DataError(msg)
    return list(dict.fromkeys(" ".join(text.split()) for text in found if text.strip()))


def picture(region: Region) -> Picture:
    """Return the pixels of a patch as a PNG file.

    Raises:
        DataError: they cannot be read.
    """
    return Picture.of(read_image(region))


# --- the three that write ------------------------------------------------------------------


def described(patches: Iterable[Patch], model: Model, words: Mapping[str, str]) -> Iterator[Patch]:
    """Yield patches with a model's description as their caption."""

    def conversation(patch: Patch) -> Conversation | None:
        try:
            return [user(picture(patch.region), words["describe"])]
        except DataError as error:
            patch.drop("the patch cannot be read", str(error))
            return None

    for patch, _, reply in asked(model, patches, conversation, _MOST["describe"]):
        if reply is not None:
            text, fault = _plain(reply)
            patch.mark(reply)
            facts = {"said": reply.text, "fault": fault, "note": reply.note}
            patch.note("describe", model=model.name, **facts)
            if fault:
                patch.drop("no description", fault)
            else:
                patch.caption = text
        yield patch


def revised(patches: Iterable[Patch], model: Model, words: Mapping[str, str]) -> Iterator[Patch]:
    """Yield patches with a model's edits made; where they cannot be, the caption stays as it is."""

    def conversation(patch: Patch) -> Conversation | None:
        if patch.why:
            return None
        text = filled(words["revise"], caption=patch.caption)
        return [user(picture(patch.region), text)]

    for patch, said, reply in asked(model, patches, conversation, _MOST["revise"], revise.SCHEMA):
        if reply is not None:
            _revise(patch, model, words, said, reply)
        yield patch


def _revise(
    patch: Patch, model: Model, words: Mapping[str, str], said: Conversation, reply: Reply
) -> None:
    replies, edits, fault = [reply.text], None, reply.fault
    if not fault:
        edits, fault = _edited(patch, reply.text)
        if fault:
            why = filled(words["again"], fault=fault)
            reply = again(model, said, reply.text, why, _MOST["revise"], revise.SCHEMA)
            replies.append(reply.text)
            edits, second = (None, reply.fault) if reply.fault else _edited(patch, reply.text)
            fault = f"{fault}; then: {second}" if second else ""
    given = patch.caption
    if edits:
        patch.caption = " ".join(revise.apply(given, edits).split())
        patch.mark(reply)
    done = None if edits is None else [edit.to_json() for edit in edits]
    facts = {"given": given, "said": replies, "edits": done, "fault": fault, "note": reply.note}
    patch.note("revise", model=model.name, **facts)


def _edited(patch: Patch, reply: str) -> tuple[Sequence[revise.Edit] | None, str]:
    """Return the edits of a reply that can be made, or what is wrong with them."""
    try:
        edits = revise.read_edits(reply)
        if not revise.apply(patch.caption, edits).strip():
            return None, "nothing of the caption would be left"
    except DataError as error:
        return None, str(error)
    return edits, ""


def summarised(
    patches: Iterable[Patch],
    model: Model,
    words: Mapping[str, str],
    encoder: ImageTextEncoder,
) -> Iterator[Patch]:
    """Yield patches whose captions a model made short enough; one that it did not is dropped."""
    most = limit_of(encoder)

    def conversation(patch: Patch) -> Conversation | None:
        if patch.why or _fits(patch, encoder):
            return None
        few = round(most * _WORDS_A_TOKEN)
        return [user(filled(words["summarise"], caption=patch.caption, words=few))]

    for patch, said, reply in asked(model, patches, conversation, _MOST["summarise"]):
        if reply is not None:
            _summarise(patch, model, words, encoder, said, reply)
        yield patch


def _summarise(  # noqa: PLR0917 - one step's facts
    patch: Patch,
    model: Model,
    words: Mapping[str, str],
    encoder: ImageTextEncoder,
    said: Conversation,
    reply: Reply,
) -> None:
    given, replies, most = patch.caption, [reply.text], limit_of(encoder)
    text, fault = _plain(reply)
    tokens = encoder.count_tokens([text])[0]
    if not fault and tokens > most:
        why = filled(words["longer"], tokens=tokens, limit=most)
        reply = again(model, said, reply.text, why, _MOST["summarise"])
        replies.append(reply.text)
        text, fault = _plain(reply)
        tokens = encoder.count_tokens([text])[0]
    facts = {"given": given, "said": replies, "tokens": tokens, "fault": fault}
    patch.note("summarise", model=model.name, **facts)
    if fault:
        patch.drop("no summary", fault)
    elif tokens > most:
        patch.drop("the summary is too long", f"{tokens} tokens, {most} are the most")
    else:
        patch.caption = text


def _plain(reply: Reply) -> tuple[str, str]:
    """Return a reply's words in one line, and what is wrong: nothing said, or a refusal."""
    text = " ".join(reply.text.split())
    refused = f"refused: {text[:80]}" if _REFUSAL.match(text) else ""
    return text, reply.fault or ("" if text else "nothing was said") or refused


def limit_of(encoder: ImageTextEncoder) -> int:
    """Return the most tokens of a caption: CLIP's, or fewer where this encoder reads fewer."""
    return min(CLIP_TOKENS, encoder.text_limit)


def _fits(patch: Patch, encoder: ImageTextEncoder) -> bool:
    (tokens,) = encoder.count_tokens([patch.caption])
    if tokens <= limit_of(encoder):
        patch.note("summarise", tokens=tokens, said="short enough as it is")
        return True
    return False


def by_first_sentences(patches: Iterable[Patch], encoder: ImageTextEncoder) -> Iterator[Patch]:
    """Yield patches whose captions are as many whole sentences, from the first, as fit."""
    for patch in patches:
        if not patch.why and not _fits(patch, encoder):
            parts = revise.sentences_of(patch.caption)
            begins = [" ".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]
            counts = encoder.count_tokens(begins) if begins else []
            most = limit_of(encoder)
            fit = next((b for b, n in zip(begins, counts, strict=True) if n <= most), "")
            patch.note("summarise", model=FIRST_SENTENCES, given=patch.caption, said=fit)
            if fit:
                patch.caption = fit
            else:
                patch.drop("the first sentence is too long", f"{most} tokens are the most")
        yield patch
