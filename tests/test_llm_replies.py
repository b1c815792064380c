"""Many conversations at once: what is wrong with one alone, schemas, and the pace of all."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from test_llm import Reply, Server, ask, client, said, server, words

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.llm_http import Pace
from pathcli.llm_messages import list_in
from pathcli.store.responses import Responses

__all__ = ["server"]


def test_what_is_wrong_with_one_reply_is_its_own_and_is_kept(
    server: Server,
    tmp_path: Path,
) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        long = {"error": {"message": "This model's maximum context length is 9 tokens."}}
        refused = (200, {"choices": [{"message": {"refusal": "I cannot."}}]}, {})
        return {
            "cut": said("so f", finish_reason="length"),
            "bad": said("", finish_reason="content_filter"),
            "no": refused,
            "long": (400, long, {}),
        }.get(words(body), said("fine", finish_reason="stop"))

    server.answer = answer
    talks = [ask(text) for text in ("cut", "bad", "no", "long", "ok")]
    kept = Responses(tmp_path / "r.jsonl")
    first = list(client(server, kept=kept).reply_all(talks))
    assert [(reply.text, reply.fault[:12]) for reply in first] == [
        ("so f", "cut off at 2"),
        ("", "content filt"),
        ("I cannot.", "refused: I c"),
        ("", "too long: ht"),
        ("fine", ""),
    ]
    again = client(server, kept=Responses(kept.path))
    assert list(again.reply_all(talks)) == first
    assert len(server.bodies) == 6  # what was too long costs nothing and is asked again
    assert again.known(talks[0]) == first[0]
    assert again.known(talks[3]) is None
    server.answer = lambda _: (400, "unknown parameter", {})
    with pytest.raises(UsageError, match="unknown parameter"):
        list(client(server).reply_all([ask()]))


def test_an_endpoint_without_schemas_is_told_in_words_and_it_is_said_once(
    server: Server,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if "response_format" in body:
            return 400, {"error": {"message": "response_format is not supported"}}, {}
        return said("{}")

    schema = {"type": "object", "required": ["pairs"]}
    made = client(server, workers=1)
    assert [reply.text for reply in made.reply_all([ask("ab")], schema=schema)] == ["ba"]
    asked = server.bodies[0]["response_format"]
    assert asked["type"] == "json_schema"
    assert asked["json_schema"]["schema"] == schema
    server.bodies.clear()
    server.answer = answer
    assert [r.text for r in made.reply_all([ask("a"), ask("b")], schema=schema)] == ["{}", "{}"]
    assert ["response_format" in body for body in server.bodies] == [True, False, False]
    assert '"required": ["pairs"]' in words(server.bodies[1])
    assert [r.message for r in caplog.records if "schema" in r.message] == [
        f"{server.url} takes no JSON schema; it is told the form in words"
    ]


def test_requests_and_tokens_keep_their_pace(server: Server) -> None:
    start = time.monotonic()
    made = client(server, workers=4, pace=Pace(requests=60 / 0.05))
    assert len(list(made.ask_all([ask(str(i)) for i in range(7)]))) == 7
    assert time.monotonic() - start >= 6 * 0.05
    pace = Pace(tokens=60_000)  # one in a millisecond
    start = time.monotonic()
    for _ in range(3):
        pace.wait(100)
    assert time.monotonic() - start >= 0.2
    pace.settle(100)
    start = time.monotonic()
    pace.wait(1)
    assert time.monotonic() - start < 0.1
    with pytest.raises(UsageError, match="above 0"):
        Pace(requests=0)


def test_everyone_waits_as_long_as_the_endpoint_asks_one_to(server: Server) -> None:
    times: list[float] = []

    def answer(_: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return (429, "", {"Retry-After": "0.4"}) if len(times) == 1 else said("x")

    server.answer = answer
    made = client(server, workers=1)
    threads = [threading.Thread(target=made.ask, args=(ask(str(i)),)) for i in range(3)]
    threads[0].start()
    while not times:
        time.sleep(0.001)
    time.sleep(0.1)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(times[1:]) - times[0] >= 0.39


def test_one_silence_is_a_fault_and_many_in_a_row_are_the_end(server: Server) -> None:
    slow = threading.Event()

    def answer(body: dict[str, Any]) -> Reply:
        if words(body) == "b" or server.models == ["silent"]:
            slow.wait(5)
        return said("x")

    server.answer = answer
    made = client(server, timeout_s=0.3, attempts=1, workers=2)
    found = list(made.reply_all([ask(text) for text in "abc"]))
    assert [(reply.text, reply.fault != "") for reply in found] == [
        ("x", False),
        ("", True),
        ("x", False),
    ]
    assert "no answer within 0.3 s" in found[1].fault
    server.models = ["silent"]
    with pytest.raises(ResourceError, match="8 in a row"):
        list(made.reply_all([ask(str(i)) for i in range(20)]))
    slow.set()


def test_a_model_that_takes_no_temperature_of_0_is_asked_without_it_once_it_said_so(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if body.get("temperature", 1) != 1:
            told = "Unsupported value: 'temperature' does not support 0 with this model."
            return 400, {"error": {"message": told, "param": "temperature"}}, {}
        return said("fine")

    server.answer = answer
    made = client(server, workers=1)
    assert [reply.text for reply in made.reply_all([ask("a"), ask("b")])] == ["fine"] * 2
    assert [body.get("temperature") for body in server.bodies] == [0, None, None]
    assert sum("temperature of 0" in record.message for record in caplog.records) == 1
    with pytest.raises(UsageError, match="does not support"):  # what a person chose is not dropped
        made.ask(ask("c"), temperature=0.5)


@pytest.mark.parametrize(
    "reply",
    [
        '["a"]',
        '```json\n["a"]\n```',
        'Sure! Here is [1] list:\n["a"]\nAnything else?',
        '{"texts": ["a"]}',
        '<think>["draft", "of", "it"]</think>\n["a"]',
    ],
)
def test_a_list_is_read_wherever_it_stands(reply: str) -> None:
    assert list_in(reply) == ["a"]


@pytest.mark.parametrize("reply", ["", "no list", '"a"', '{"a": 1, "b": 2}', '["a"'])
def test_what_holds_no_list_is_told(reply: str) -> None:
    with pytest.raises(DataError, match="this is not"):
        list_in(reply)
