"""The one door to language models: a name in; what answers conversations, and keeps them, out.

http://HOST/v1#NAME   a model behind an OpenAI-compatible endpoint (a vendor's, vLLM, Ollama)
smollm2-135m          a language model of `pathcli models list`
hf:ID, or its folder  a language model of transformers, or one that sees
clover-mini, a run    a vision-language model of ours

What was answered is kept in the store, by digest of model, conversation and parameters.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pathcli.cards import CARDS
from pathcli.endpoints import Budget, Price, host_of
from pathcli.errors import DataError, UsageError
from pathcli.llm import Client, Reply
from pathcli.llm_messages import tokens_of
from pathcli.store.responses import Responses, response_key
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pathcli.llm import Message
    from pathcli.llm_http import Pace
    from pathcli.store import Store

    Conversation = Sequence[Message]
    Schema = Mapping[str, Any]

__all__ = ["Estimate", "Model", "Opened", "Reply", "Unasked", "estimate", "open_model"]

Unfamiliar = Literal["keep", "drop"]
UNFAMILIAR = "outside what the model was trained on"
"""What is said of an answer about a picture unlike those that a model has seen."""

_DATED = re.compile(r"-\d{4}-?\d{2}-?\d{2}$")


class Model(Protocol):
    """A language model that answers many conversations, in their order.

    A `fault` concerns one reply (refused, cut off, no answer in time); an endpoint that is gone
    and a budget that is spent raise. `takes_schema` tells whether a JSON schema binds its answers,
    or would only be words to it.
    """

    name: str
    takes_schema: bool

    def ask_all(
        self,
        conversations: Iterable[Conversation],
        *,
        schema: Schema | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> Iterator[Reply]:
        """Yield a reply to each conversation, of JSON where a schema is given."""
        ...


class Opened(Model, Protocol):
    """A model as `open_model` gives it: it knows what it costs, and what it answered before.

    `price` is None where nobody knows it, and of models of this machine, which cost none;
    `digest` names everything but conversation and parameters that decides an answer.
    """

    budget: Budget
    price: Price | None
    digest: str

    def known(
        self,
        conversation: Conversation,
        *,
        schema: Schema | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> Reply | None:
        """Return the reply that is kept already, None if there is none."""
        ...


def open_model(
    name: str,
    *,
    store: Store | None = None,
    budget: float | None = None,
    workers: int = 4,
    price: Price | None = None,
    pace: Pace | None = None,
    device: str = "auto",
    among: list[Budget] | None = None,
    unfamiliar: Unfamiliar = "drop",
) -> Opened:
    """Return the model of a name (see above).

    Args:
        name: what to open.
        store: where answers are kept; None keeps none.
        budget: USD that may be spent at an endpoint.
        workers: requests under way at once, of an endpoint.
        price: of an endpoint's tokens (default: that of assets/curation/prices.yaml).
        pace: requests and tokens a minute, of an endpoint.
        device: auto, cpu, cuda, cuda:1 or mps, of a model of this machine.
        among: budgets of other endpoints, with which `budget` is shared.
        unfamiliar: what becomes of answers about pictures unlike those that a model of this
            machine was trained on: a fault instead of each (drop), or a note (keep).

    Raises:
        UsageError: the name says nothing, or money is limited and no price is known.
        ResourceError: weights are not here, or the endpoint does not answer.
    """
    if name.startswith(("http://", "https://")):
        return _endpoint(name, store, budget, workers, price, pace, among)
    from pathcli.curation.local import LanguageModel, VisionModel  # noqa: PLC0415 - imports torch
    from pathcli.vlm.responders import open_responder  # noqa: PLC0415

    if words := _language(name):
        return LanguageModel(words, store=store, device=device)
    return VisionModel(open_responder(name, device=device), store=store, unfamiliar=unfamiliar)


def _language(name: str) -> str:
    """Return what a language model is called where it is read, "" for what is none."""
    if name in CARDS:
        return name if CARDS[name].what.startswith("language model: ") else ""
    plain = name.removeprefix("hf:")
    if (
        plain == name
        and not (Path(name) / "config.json").is_file()
        and Path(name).suffix != ".gguf"
    ):
        return ""
    from pathcli.vlm.language_files import language_folder, read_config  # noqa: PLC0415

    try:
        read_config(language_folder(plain))
    except DataError:  # one that sees, or that cannot be read; who opens those tells
        return ""
    return plain


def kept_in(store: Store | None, digest: str) -> Responses | None:
    """Return where answers of a model are kept."""
    return Responses(store.local / "responses" / f"{digest[:12]}.jsonl") if store else None


# --- endpoints ---------------------------------------------------------------------------


class EndpointModel:
    """A `Client` as a `Model`."""

    takes_schema = True

    def __init__(self, client: Client, digest: str, price: Price | None) -> None:
        """Take a client and what its tokens cost."""
        self.client, self.budget, self.digest, self.price = client, client.budget, digest, price
        self.name = f"{client.base}#{client.model}"

    def ask_all(
        self,
        conversations: Iterable[Conversation],
        *,
        schema: Schema | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> Iterator[Reply]:
        """See `Model.ask_all`, and `Client.reply_all` for errors."""
        given = {"max_tokens": max_tokens, "temperature": temperature}
        return self.client.reply_all(conversations, schema=schema, **given)

    def known(
        self,
        conversation: Conversation,
        **settings: Any,  # noqa: ANN401 - as above
    ) -> Reply | None:
        """See `Opened.known`."""
        return self.client.known(conversation, **settings)


def _endpoint(  # noqa: PLR0917 - `open_model`'s own arguments
    name: str,
    store: Store | None,
    usd: float | None,
    workers: int,
    price: Price | None,
    pace: Pace | None,
    among: list[Budget] | None,
) -> EndpointModel:
    client = Client(name, workers=workers, pace=pace)
    price = price or price_of(client.base, client.model)
    if usd is not None and price is None:
        msg = (
            f"what {client.model} costs at {client.base} is not known, so no budget can be kept; "
            "give --price READ,WRITTEN, USD per million tokens"
        )
        raise UsageError(msg)
    client.budget = Budget(usd=usd, price=price, among=among)
    digest = response_key(client.base, client.model)
    client.kept = kept_in(store, digest)
    return EndpointModel(client, digest, price)


def price_of(base: str, model: str) -> Price | None:
    """Return what an endpoint's tokens cost by assets/curation/prices.yaml, None if unknown."""
    told = read_mapping(asset("curation/prices.yaml"), "must map hosts to prices")
    known = told["hosts"].get(host_of(base), {})
    found = known.get(model) or known.get(_DATED.sub("", model))
    return Price(*map(float, found)) if found else None


# --- what it would cost ------------------------------------------------------------------


@dataclass
class Estimate:
    """What a run would ask and cost; `kept` answers are there already and cost nothing.

    Tokens are estimated, one for four letters; `most` is what may be written at most. Money is
    None where no price is known.
    """

    requests: int = 0
    kept: int = 0
    read: int = 0
    written: int = 0
    most: int = 0
    usd: float | None = None
    usd_most: float | None = None


class Unasked:
    """A model that is not asked: what it would be asked is counted, what it said is taken."""

    def __init__(self, model: Opened, written: int) -> None:
        """Take a model, and how many tokens its answers are thought to have."""
        self.name, self.takes_schema = model.name, model.takes_schema
        self.digest, self._model, self._written = model.digest, model, written
        self.estimate = Estimate()

    def ask_all(
        self,
        conversations: Iterable[Conversation],
        *,
        schema: Schema | None = None,
        max_tokens: int = 512,
        temperature: float = 0.0,
    ) -> Iterator[Reply]:
        """Yield the replies that are kept, and a fault where there is none."""
        given: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        found, price = self.estimate, self._model.price
        for said in conversations:
            if reply := self._model.known(said, schema=schema, **given):
                found.kept += 1
                yield reply
                continue
            found.requests += 1
            found.read += tokens_of(said)
            found.written += min(self._written, max_tokens)
            found.most += max_tokens
            yield Reply("", "not asked")
        if price:
            found.usd = price.usd(found.read, found.written)
            found.usd_most = price.usd(found.read, found.most)


def estimate(
    model: Opened,
    conversations: Iterable[Conversation],
    *,
    written: int,
    **asking: Any,  # noqa: ANN401
) -> Estimate:
    """Return what asking would cost, if an answer has `written` tokens; nothing is asked.

    `asking` are arguments of `Model.ask_all`.
    """
    unasked = Unasked(model, written)
    for _ in unasked.ask_all(conversations, **asking):
        pass
    return unasked.estimate
