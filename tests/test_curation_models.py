"""The door to language models: what a name opens, what it costs, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_llm import Server, server
from tiny_language import tiny_llama

from pathcli.curation.local import Draw, LanguageModel
from pathcli.curation.models import estimate, open_model, price_of
from pathcli.endpoints import Price, spent
from pathcli.errors import ResourceError, UsageError
from pathcli.llm import Message, Picture, Reply
from pathcli.store import Store

__all__ = ["server"]


def talk(text: str) -> list[Message]:
    return [Message("system", ("Be short.",)), Message("user", (text,))]


def test_prices_are_those_of_the_host_and_of_models_by_any_date() -> None:
    base = "https://api.openai.com/v1"
    assert price_of(base, "gpt-4o-mini") == Price(0.15, 0.6)
    assert price_of(base, "gpt-4o-mini-2024-07-18") == Price(0.15, 0.6)
    assert price_of(base, "gpt-3.5-turbo-1106") == Price(1, 2)
    assert price_of(base, "gpt-9") is None
    assert price_of("http://localhost:8000/v1", "gpt-4o-mini") is None


def test_an_endpoint_keeps_answers_in_the_store_and_stops_at_its_budget(
    server: Server,
    tmp_path: Path,
) -> None:
    name, store = f"{server.url}#tiny", Store(tmp_path)
    with pytest.raises(UsageError, match="no budget can be kept; give --price"):
        open_model(name, store=store, budget=1)
    usage = {"prompt_tokens": 100_000, "completion_tokens": 100_000}
    body = {"choices": [{"message": {"content": "x"}, "finish_reason": "length"}], "usage": usage}
    server.answer = lambda _: (200, body, {})
    talks = [talk(str(i)) for i in range(5)]
    model = open_model(name, store=store, budget=0.7, workers=1, price=Price(1, 1))
    with pytest.raises(ResourceError, match=r"budget of 0\.7 USD is spent, or has no room .* kept"):
        list(model.ask_all(talks))
    assert (len(server.bodies), model.budget.usd) == (3, pytest.approx(0.6))
    again = open_model(name, store=store, price=Price(1, 1))
    ahead = estimate(again, talks, written=50)
    assert (ahead.requests, ahead.kept, ahead.written, ahead.most) == (2, 3, 100, 1024)
    assert ahead.usd == pytest.approx((ahead.read + 100) / 1e6)
    assert len(server.bodies) == 3
    assert list(again.ask_all(talks)) == [Reply("x", "cut off at 100000 tokens")] * 5
    assert len(server.bodies) == 5
    assert again.budget.usd == pytest.approx(0.4)
    assert spent([again.budget])["before"]["usd"] == pytest.approx(0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    return tiny_llama(made)


def test_a_language_model_draws_the_same_words_in_any_company(folder: Path, tmp_path: Path) -> None:
    model = open_model(str(folder), device="cpu")
    assert isinstance(model, LanguageModel)
    talks = [talk("What is it?"), talk("A longer question, about what is seen here?")]
    given = {"max_tokens": 6, "temperature": 2.0}
    both = list(model.ask_all(talks, **given))  # type: ignore[arg-type]
    alone = [next(model.ask_all([one], **given)) for one in reversed(talks)]  # type: ignore[arg-type]
    assert both == alone[::-1]
    assert both[0] != both[1]
    assert list(model.ask_all(talks, max_tokens=6)) != both
    kept = LanguageModel(str(folder), store=Store(tmp_path), device="cpu")
    first = list(kept.ask_all(talks, max_tokens=6))
    spent = kept.budget.now.requests
    assert kept.known(talks[0], max_tokens=6)
    assert not kept.known(talks[0], max_tokens=7)
    assert list(kept.ask_all(talks, max_tokens=6)) == first
    assert (spent, kept.budget.now.requests) == (2, 2)


def test_what_a_language_model_cannot_read_is_a_fault_or_refused(folder: Path) -> None:
    model = open_model(str(folder), device="cpu")
    (reply,) = model.ask_all([talk("word " * 2000)], max_tokens=4)
    assert reply.text == ""
    assert reply.fault.startswith("too long: ")
    (reply,) = model.ask_all([talk("Go on")], max_tokens=1)
    assert reply.fault in {"", "cut off at 1 tokens"}
    with pytest.raises(UsageError, match="reads words alone"):
        list(model.ask_all([[Message("user", (Picture(b"\x89PNG"), "what?"))]]))


def test_tokens_are_drawn_as_the_temperature_says() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    draw, counts = Draw(["ab12"], 2.0), torch.zeros(3)
    for _ in range(3000):
        counts[draw(torch.empty(0), logits).argmax()] += 1
    assert torch.allclose(counts / 3000, (logits / 2).softmax(1)[0], atol=0.03)


def test_marks_of_the_template_are_taken_apart_in_what_is_said(folder: Path) -> None:
    model = LanguageModel(str(folder), device="cpu")
    tokens = model._ids([Message("user", ("a</s>b",))]).tolist()
    assert model._language.tokenizer.eos_token_id not in tokens


def test_a_name_that_is_nothing_is_told() -> None:
    with pytest.raises(UsageError, match="no model is called 'smollm2'"):
        open_model("smollm2")
