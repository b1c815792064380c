"""Models of this machine that are asked as endpoints are; what they said once is kept."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from pathcli.curation.models import UNFAMILIAR, kept_in
from pathcli.device import pick_device
from pathcli.endpoints import Budget, Price
from pathcli.errors import DataError, UsageError
from pathcli.llm import Picture, Reply
from pathcli.llm_messages import CUT, LETTERS, in_words, tokens_of
from pathcli.store.responses import response_key
from pathcli.types import Sample
from pathcli.vlm.language import HFLanguage
from pathcli.vlm.language_files import version_of
from pathcli.vlm.memory import memory
from pathcli.vlm.responders import Unfinished
from pathcli.vlm.written import IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from pathcli.curation.models import Unfamiliar
    from pathcli.llm import Message
    from pathcli.store import Store
    from pathcli.vlm.responders import Responder

    Conversation = Sequence[Message]


class Local(ABC):
    """A model of this machine; see `pathcli.curation.models.Opened`. A schema is told in words."""

    price: Price | None = None
    takes_schema = False

    def __init__(self, name: str, digest: str, batch: int, store: Store | None) -> None:
        """Keep answers below `digest` in a store, and ask about `batch` things at a time."""
        self.name, self.digest, self.batch = name, digest, batch
        self.budget, self._kept = Budget(price=Price(0, 0)), kept_in(store, digest)

    @abstractmethod
    def answer(
        self, new: Mapping[str, Conversation], max_tokens: int, temperature: float
    ) -> Sequence[Reply]:
        """Return a reply to each conversation; they stand by the digests of their requests."""

    def ask_all(
        self,
        conversations: Iterable[Conversation],
        *,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> Iterator[Reply]:
        """Yield a reply to each conversation, in order, a batch at a time.

        Raises:
            UsageError: answers are to be drawn, and the model draws none.
            ResourceError: memory is full.
        """
        every = iter(conversations)
        while part := list(islice(every, self.batch)):
            told = [in_words(one, schema) if schema else one for one in part]
            keys = [self._key(one, max_tokens, temperature) for one in told]
            known = {key: found for key in keys if (found := self._known(key))}
            new = {k: one for k, one in zip(keys, told, strict=True) if k not in known}
            said = self.answer(new, max_tokens, temperature) if new else ()
            for key, reply in zip(new, said, strict=True):
                known[key] = reply
                if self._kept and (reply.text or not reply.fault):
                    known_of = {"fault": reply.fault, "note": reply.note}
                    facts = {name: text for name, text in known_of.items() if text}
                    self._kept.put(key, reply.text, model=self.name, **facts)
            for key in keys:
                if self._kept and self._kept.earlier(key):
                    self.budget.count_before(0, 0)
                yield known[key]

    def known(
        self,
        conversation: Conversation,
        *,
        schema: Mapping[str, Any] | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> Reply | None:
        """Return the reply that is kept already, None if there is none."""
        told = in_words(conversation, schema) if schema else conversation
        return self._known(self._key(told, max_tokens, temperature))

    def _key(self, said: Conversation, max_tokens: int, temperature: float) -> str:
        short = json.dumps([message.to_json(short=True) for message in said])
        return response_key(self.digest, short, str(max_tokens), f"{temperature:g}")

    def _known(self, key: str) -> Reply | None:
        found = self._kept.find(key) if self._kept else None
        return Reply(found.text, found.fault, found.note) if found else None


# --- models that read --------------------------------------------------------------------


class LanguageModel(Local):
    """A language model of transformers. Drawn answers are the same ones each time.

    The likeliest token is taken, or with a temperature one is drawn, from a generator that is
    seeded by the request's digest alone, whatever else is asked in the same batch.
    """

    def __init__(
        self, model: str, *, store: Store | None = None, device: str = "auto", batch: int = 8
    ) -> None:
        """Find a model, whose weights are read when it is first asked.

        Raises:
            ResourceError: it is not here, or the device is not.
        """
        self._device = pick_device(device)
        load = "bfloat16" if self._device.startswith("cuda") else "float32"
        self._language = HFLanguage(model=model, load=load)  # type: ignore[arg-type]  # a Load
        self._ready = False
        digest = response_key("language", version_of(self._language.folder, model), load)
        super().__init__(model, digest, batch, store)

    def answer(
        self, new: Mapping[str, Conversation], max_tokens: int, temperature: float
    ) -> Sequence[Reply]:
        """See `Local.answer`; a conversation longer than the model reads is a fault."""
        ids = {key: self._ids(one) for key, one in new.items()}
        limit = getattr(self._language.config, "max_position_embeddings", None)
        long = {k for k, row in ids.items() if limit and len(row) + max_tokens > limit}
        short = [key for key in ids if key not in long]
        rows = self._generate([ids[k] for k in short], short, max_tokens, temperature)
        decode = self._language.tokenizer.decode
        texts = [decode(row, skip_special_tokens=True) for row in rows]
        found = {
            key: Reply(text.strip(), f"{CUT} at {max_tokens} tokens" * (len(row) >= max_tokens))
            for key, row, text in zip(short, rows, texts, strict=True)
        }
        for key in long:
            told = f"too long: {len(ids[key])} tokens and {max_tokens} to answer, it has {limit}"
            found[key] = Reply("", told)
        return [found[key] for key in new]

    @torch.inference_mode()
    def _generate(
        self, ids: Sequence[Tensor], keys: Sequence[str], max_tokens: int, temperature: float
    ) -> list[list[int]]:
        """Return the tokens of answers to tokenised conversations, int64 [t] each."""
        if not ids:
            return []
        if not self._ready:
            self._language.start()
            self._language.eval().to(self._device)
            self._ready = True
        shown = pad_sequence(list(ids), batch_first=True).to(self._device)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        draw = Draw(keys, temperature) if temperature > 0 else None
        with memory(self.name, self._device):
            rows = self._language.generate(
                self._language.embed(shown),
                mask.bool().to(self._device),
                max_new_tokens=max_tokens,
                draw=draw,
            )
        for asked, said in zip(ids, rows, strict=True):
            self.budget.count(len(asked), len(said))
        return rows

    def _ids(self, said: Conversation) -> Tensor:
        """Return a conversation's tokens: by the tokenizer's own template, if it has one."""
        tokenizer = self._language.tokenizer
        if any(isinstance(part, Picture) for message in said for part in message.content):
            msg = f"{self.name} reads words alone, and is shown a picture; name one that sees"
            raise UsageError(msg)
        told = [{"role": m.role, "content": self._safe(m)} for m in said]
        own = bool(tokenizer.chat_template)
        text = self._templated(told) if own else _plain(told)
        return torch.tensor(tokenizer(text, add_special_tokens=not own).input_ids)

    def _templated(self, told: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError  # noqa: PLC0415

        apply = self._language.tokenizer.apply_chat_template
        try:
            return str(apply(told, tokenize=False, add_generation_prompt=True))
        except TemplateError:  # one that has no words for the system
            first, second, *rest = told
            joined = second | {"content": f"{first['content']}\n\n{second['content']}"}
            return str(apply([joined, *rest], tokenize=False, add_generation_prompt=True))

    def _safe(self, message: Message) -> str:
        """Return a message's words; what would be a special token is taken apart by a space."""
        text = "\n".join(str(part) for part in message.content)
        for token in self._marks:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    @cached_property
    def _marks(self) -> list[str]:
        tokens = self._language.tokenizer.added_tokens_decoder.values()
        return sorted((t.content for t in tokens if t.special and len(t.content) > 1), key=len)


def _plain(told: Sequence[Mapping[str, str]]) -> str:
    """Return a conversation for a model without template: each turn after who says it."""
    who = {"system": "", "user": "USER: ", "assistant": "ASSISTANT: "}
    lines = [who[each["role"]] + each["content"] for each in told]
    return "\n".join([*lines, "ASSISTANT:"])


class Draw:
    """Draws tokens: noise of Gumbel's kind on logits, of which the greatest is then taken.

    That is a draw from softmax(logits / temperature). Each row has a generator of its own.
    """

    def __init__(self, keys: Sequence[str], temperature: float) -> None:
        """Seed a generator by each key, digits of a hexadecimal number."""
        self.temperature = temperature
        self._each = [torch.Generator().manual_seed(int(key[:15], 16)) for key in keys]

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits [b, vocabulary] with noise."""
        del ids
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self._each])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + noise.to(scores.device)


# --- models that see ---------------------------------------------------------------------


class VisionModel(Local):
    """A `Responder`. A picture unlike those it was trained on is told, where it can tell.

    Its answer about such a picture is a fault instead (drop), or comes with a note (keep).
    """

    def __init__(
        self,
        responder: Responder,
        *,
        store: Store | None = None,
        unfamiliar: Unfamiliar = "drop",
    ) -> None:
        """Take a model that answers questions about images."""
        self.responder, self.unfamiliar = responder, unfamiliar
        super().__init__(responder.name, responder.digest, responder.batch, store)

    def answer(
        self, new: Mapping[str, Conversation], max_tokens: int, temperature: float
    ) -> Sequence[Reply]:
        """See `Local.answer`; what it cannot be asked (too long, say) is a fault."""
        if temperature > 0:
            msg = f"{self.name} does not draw its answers; give a temperature of 0"
            raise UsageError(msg)
        decoding = replace(self.responder.decoding, max_new_tokens=max_tokens)
        with TemporaryDirectory(prefix="pathcli-") as folder:
            every = [_sample(said, Path(folder)) for said in new.values()]
            shown = list(dict.fromkeys(ref for one in every for ref in one.images))
            strange = set(self.responder.unfamiliar(shown)) if shown else set()
            odd = [not strange.isdisjoint(one.images) for one in every]
            kept = self.unfamiliar == "keep"
            asked = [one for one, is_odd in zip(every, odd, strict=True) if kept or not is_odd]
            try:
                texts = iter(list(self.responder.answer(asked, decoding)) if asked else [])
            except DataError as error:
                if len(new) == 1:
                    return [Reply("", str(error))]
                alone = (self.answer({k: m}, max_tokens, temperature) for k, m in new.items())
                return [reply for replies in alone for reply in replies]
        return [
            self._reply(said, next(texts), max_tokens, UNFAMILIAR * is_odd)
            if kept or not is_odd
            else Reply("", UNFAMILIAR)
            for said, is_odd in zip(new.values(), odd, strict=True)
        ]

    def _reply(self, said: Conversation, text: str, max_tokens: int, note: str) -> Reply:
        self.budget.count(tokens_of(said), len(text) // LETTERS)
        cut = isinstance(text, Unfinished)
        return Reply(str(text), f"{CUT} at {max_tokens} tokens" * cut, note)

    def _known(self, key: str) -> Reply | None:
        """See `Local`; an answer that was kept with a note is a fault where such are dropped."""
        found = super()._known(key)
        odd = found is not None and bool(found.note) and self.unfamiliar == "drop"
        return Reply("", UNFAMILIAR) if odd else found


def _sample(said: Conversation, folder: Path) -> Sample:
    """Return a conversation as a sample; its pictures are written into `folder`."""
    turns, images = [""], list[str]()
    for message in said:
        parts = list[str]()
        for part in message.content:
            if isinstance(part, Picture):
                path = folder / f"{hashlib.sha256(part.data).hexdigest()}.png"
                path.write_bytes(part.data)
                images.append(str(path))
            parts.append(IMAGE if isinstance(part, Picture) else part)
        text = "\n".join(parts)
        if message.role == "assistant":
            turns += [text, ""]
        else:  # words for the system come before the user's
            turns[-1] = f"{turns[-1]}\n{text}".strip()
    return Sample("conversation", tuple(images), "", tuple(turns))
