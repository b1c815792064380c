"""What may be spent at endpoints: by several at once, by several models, now and before."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_llm import Reply, Server, ask, client, server, words

from pathcli.endpoints import Budget, Price, spent
from pathcli.errors import ResourceError, UsageError
from pathcli.llm_messages import tokens_of
from pathcli.store.responses import Responses

__all__ = ["server"]

WRITTEN = 40


def counting(server: Server, factor: int = 1) -> None:
    """Let a server count truthfully: a token for four letters, times `factor`."""

    def answer(body: dict[str, Any]) -> Reply:
        time.sleep(0.01)
        usage = {"prompt_tokens": factor * (len(words(body)) // 4 + 1)}
        usage |= {"completion_tokens": WRITTEN}
        return 200, {"choices": [{"message": {"content": "x"}}], "usage": usage}, {}

    server.answer = answer


@pytest.mark.parametrize("workers", [1, 16])
def test_however_many_ask_at_once_no_more_is_spent_than_may_be(
    server: Server, tmp_path: Path, workers: int
) -> None:
    counting(server)
    talks = [ask(f"{i:03} " * 30) for i in range(60)]  # 31 tokens each
    price, each = Price(1, 10), (31 + 10 * WRITTEN) / 1e6
    purse = Budget(usd=10 * each + 1e-9, price=price)
    kept = Responses(tmp_path / "kept.jsonl")
    made = client(server, kept=kept, budget=purse, workers=workers)
    with pytest.raises(ResourceError, match=r"no room for one request more \(10 requests, "):
        list(made.ask_all(talks, max_tokens=WRITTEN))
    assert len(server.bodies) == 10
    assert purse.usd == pytest.approx(10 * each)
    more = Budget(usd=11 * each, price=price)
    with pytest.raises(ResourceError, match=r"\(11 requests, .*; before: 10 requests, "):
        list(
            client(server, kept=Responses(kept.path), budget=more, workers=workers).ask_all(
                talks, max_tokens=WRITTEN
            )
        )
    told = spent([more])
    assert (told["requests"], told["usd"]) == (11, pytest.approx(11 * each))
    assert told["before"] == {
        "requests": 10,
        "tokens_read": 310,
        "tokens_written": 400,
        "usd": pytest.approx(10 * each),
    }


def test_guesses_grow_by_what_the_endpoint_counts(server: Server) -> None:
    counting(server, factor=100)
    talks = [ask(f"{i:03} " * 30) for i in range(60)]
    each = (3100 + WRITTEN) / 1e6
    purse = Budget(usd=20 * each, price=Price(1, 1))
    made = client(server, budget=purse, workers=4)
    with pytest.raises(ResourceError):
        list(made.ask_all(talks, max_tokens=WRITTEN))
    assert len(server.bodies) == 20


def test_one_waits_for_another_to_say_what_it_used() -> None:
    purse, told = Budget(usd=1, price=Price(0, 1)), list[str]()

    def late() -> None:
        with purse.request(0, 600_000) as count:
            told.append("second")
            count(0, 1)

    with purse.request(0, 600_000) as count:
        thread = threading.Thread(target=late)
        thread.start()
        time.sleep(0.05)
        told.append("first")
        count(0, 100_000)
    thread.join()
    assert told == ["first", "second"]
    with pytest.raises(ResourceError), purse.request(0, 950_000):
        pass
    assert purse.aside.requests == 0


def test_several_models_share_what_may_be_spent() -> None:
    among = list[Budget]()
    first = Budget(usd=1, price=Price(1, 1), among=among)
    second = Budget(usd=1, price=Price(2, 2), among=among)
    with first.request(600_000, 0) as count:
        count(600_000, 0)
    with pytest.raises(ResourceError, match="budget of 1 USD"), second.request(300_000, 0):
        pass
    with second.request(200_000, 0) as count:
        count(200_000, 0)
    with pytest.raises(ResourceError, match="budget of 1 USD"), first.request(1, 0):
        pass
    assert spent(among)["usd"] == 1.0


def test_a_request_that_fails_costs_nothing() -> None:
    purse = Budget(requests=2, tokens=100)
    with pytest.raises(ValueError, match="no"), purse.request(60, 10):
        raise ValueError("no")
    with purse.request(60, 10) as count:
        count(60, 10)
    assert (purse.tokens, purse.aside.read) == (70, 0)
    with pytest.raises(ResourceError, match="budget of 2 requests"), purse.request(1, 1):
        pass


def test_money_without_a_price_is_refused_and_unknown_money_is_none() -> None:
    with pytest.raises(UsageError, match="needs a price"):
        Budget(usd=1)
    with pytest.raises(UsageError, match="two numbers from 0 up"):
        Price(-1, 0)
    free = Budget()
    assert spent([free])["usd"] == 0
    free.count(5, 5)
    assert spent([free])["usd"] is None
    assert tokens_of(ask("y" * 400)) == 101
