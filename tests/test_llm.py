"""The client of endpoints, against a real server that speaks their form, refusals among it."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.llm import Client, Message, Picture
from pathcli.llm_http import wait_s
from pathcli.store.responses import Responses

PNG = Picture(b"\x89PNG\r\n\x1a\n and so on")
Reply = tuple[int, Any, dict[str, str]]


def said(text: str | None, **more: Any) -> Reply:
    choice = {"message": {"role": "assistant", "content": text}, **more}
    return 200, {"choices": [choice], "usage": {"total_tokens": 7}}, {}


class Server(ThreadingHTTPServer):
    """Answers with the question backwards, but first with what stands in `next`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.next: list[Reply] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models = ["tiny"]
        self.answer: Callable[[dict[str, Any]], Reply] = lambda body: said(
            words(body)[::-1] or "nothing"
        )
        self.turn = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, *_: Any) -> None:
        """Keep quiet of clients that did not wait."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


def words(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
    return "".join(parts)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data = [{"id": name} for name in self.server.models]
        known = self.path == "/v1/models"
        self.reply(*((200, {"data": data}, {}) if known else (404, "no such page", {})))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.turn:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            planned = self.server.next.pop(0) if self.server.next else None
        self.reply(*(planned or self.server.answer(body)))

    def reply(self, code: int, value: Any, headers: dict[str, str]) -> None:
        raw = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("PATHCLI_API_KEY", raising=False)
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def client(server: Server, **given: Any) -> Client:
    return Client(f"{server.url}#tiny", **{"pause_s": 0.001} | given)


def test_what_is_asked_twice_at_once_is_paid_once(server: Server, tmp_path: Path) -> None:
    def slowly(body: dict[str, Any]) -> Reply:
        time.sleep(0.05)
        return said(words(body))

    server.answer = slowly
    made = client(server, kept=Responses(tmp_path / "kept.jsonl"))
    assert list(made.ask_all([ask("a")] * 4)) == ["a"] * 4
    assert len(server.bodies) == made.budget.now.requests == 1


def ask(*parts: str | Picture) -> list[Message]:
    return [Message("user", parts or ("abc",))]


def test_a_conversation_is_sent_in_the_endpoints_form(server: Server) -> None:
    talk = [Message("system", ("Be short.",)), Message("user", (PNG, "What is it?"))]
    talk += [Message("assistant", ("Skin.",)), Message("user", ("Sure?",))]
    assert client(server).ask(talk, max_tokens=9, seed=1) == "?eruS"
    body = server.bodies[0]
    assert {k: body[k] for k in ("model", "temperature", "max_tokens", "seed")} == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 9,
        "seed": 1,
    }
    url = "data:image/png;base64," + base64.b64encode(PNG.data).decode()
    assert body["messages"] == [
        {"role": "system", "content": "Be short."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What is it?"},
            ],
        },
        {"role": "assistant", "content": "Skin."},
        {"role": "user", "content": "Sure?"},
    ]
    assert Picture(b"\xff\xd8\xff").url().startswith("data:image/jpeg;base64,")


def test_a_busy_endpoint_is_asked_again_and_its_own_wait_is_kept(server: Server) -> None:
    server.next = [(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})]
    server.next += [(503, "starting", {}), (500, "", {})]
    start = time.monotonic()
    assert client(server).ask(ask()) == "cba"
    assert time.monotonic() - start >= 0.2
    assert len(server.bodies) == 4


def test_tries_are_bounded_and_a_long_wait_is_not_waited(server: Server) -> None:
    server.answer = lambda _: (500, {"error": "out of memory"}, {})
    with pytest.raises(ResourceError, match=r"500 out of memory.*3 tries"):
        client(server, attempts=3).ask(ask())
    assert len(server.bodies) == 3
    server.answer = lambda _: (429, "", {"Retry-After": "3600"})
    with pytest.raises(ResourceError, match="asks for 3600 s"):
        client(server).ask(ask())
    assert len(server.bodies) == 4


def test_waits_are_numbers_or_dates() -> None:
    assert wait_s("2.5") == 2.5
    assert 25 < (wait_s(formatdate(time.time() + 30, usegmt=True)) or 0) <= 31
    assert wait_s(formatdate(0, usegmt=True)) == 0
    assert wait_s("soon") is None is wait_s(None)


def test_an_endpoint_that_is_too_slow_is_asked_again(server: Server) -> None:
    slow = threading.Event()

    def answer(_: dict[str, Any]) -> Reply:
        if len(server.bodies) == 1:
            slow.wait(5)
        return said("late")

    server.answer = answer
    assert client(server, timeout_s=0.2).ask(ask()) == "late"
    slow.set()
    assert len(server.bodies) == 2


def test_refusals_name_the_address_and_what_to_do(server: Server) -> None:
    cases = [
        (401, {"error": {"message": "no key"}}, ResourceError, "no key.*PATHCLI_API_KEY"),
        (404, {"message": "The model does not exist."}, ResourceError, "no model tiny.*tiny"),
        (400, {"detail": "no images here"}, UsageError, "no images here"),
        (302, "", UsageError, "302"),
        (200, "<html>hello</html>", DataError, "not the answer of an OpenAI.*hello.*/v1"),
        (200, {"choices": []}, DataError, "not the answer"),
        (200, [1], DataError, "not the answer"),
    ]
    for code, value, kind, text in cases:
        server.next = [(code, value, {"Location": f"{server.url}/elsewhere"})]
        with pytest.raises(kind, match=text) as caught:
            client(server).ask(ask())
        assert server.url in str(caught.value)
    assert len(server.bodies) == len(cases)


def test_nobody_there_is_said_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    start = time.monotonic()
    with pytest.raises(ResourceError, match=rf"{url} cannot be reached.*is the server running"):
        Client(f"{url}#tiny").ask(ask())
    assert time.monotonic() - start < 0.9
    for wrong in ("ftp://host/v1", "http:///v1#a", "host/v1", "http://h:x/v1", "http://[::1/v1#a"):
        with pytest.raises(UsageError, match="http://HOST/v1#NAME"):
            Client(wrong)


def test_the_only_model_is_taken_and_several_are_listed(server: Server) -> None:
    assert Client(server.url).model == "tiny"
    server.models = ["a", "b"]
    with pytest.raises(UsageError, match="serves a, b; name one"):
        _ = Client(server.url).model
    with pytest.raises(ResourceError, match=r"404, nothing there.*/v1"):
        _ = Client(server.url.removesuffix("/v1")).model


def test_the_key_is_sent_and_never_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client(server).ask(ask())
    assert "Authorization" not in server.headers[-1]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    monkeypatch.setenv("PATHCLI_API_KEY", "sk-secret")
    server.next = [(500, "sk-secret is busy", {}), (401, "wrong key sk-secret", {})]
    with pytest.raises(ResourceError) as caught:
        client(server).ask(ask())
    assert server.headers[-1]["Authorization"] == "Bearer sk-secret"
    assert "***" in str(caught.value)
    assert "sk-secret" not in str(caught.value) + caplog.text
    monkeypatch.delenv("PATHCLI_API_KEY")
    client(server).ask(ask())
    assert server.headers[-1]["Authorization"] == "Bearer sk-other"


def test_a_key_that_messages_would_show_is_refused(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("http://me:sk-secret@host/v1", "http://host/v1?key=sk-secret#a"):
        with pytest.raises(UsageError, match="PATHCLI_API_KEY") as caught:
            Client(address)
        assert "sk-secret" not in str(caught.value)
    for key in ("sk-secret\nsk-other", "sk-secr\u20act"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(UsageError, match="OPENAI_API_KEY is no key") as caught:
            client(server).ask(ask())
        assert "sk-" not in str(caught.value)


def test_what_was_asked_once_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    for _ in range(2):
        made = client(server, kept=Responses(path))
        assert made.ask(ask(PNG, "abc")) == "cba"
        assert made.ask(ask(PNG, "abc")) == "cba"
    assert len(server.bodies) == 1
    line = json.loads(path.read_text())
    known = {"text": "cba", "model": "tiny", "read": 6, "written": 1}
    assert line == {"key": line["key"], **known}
    assert base64.b64encode(PNG.data).decode() not in path.read_text()
    made.ask(ask(Picture(PNG.data + b"."), "abc"))
    made.ask(ask(PNG, "abc"), max_tokens=3)
    made.ask(ask(PNG, "abc"), temperature=1)
    made.ask([Message("system", ("x",)), *ask(PNG, "abc")])
    Client(f"{server.url}#other", kept=Responses(path)).ask(ask(PNG, "abc"))
    assert len(server.bodies) == 6


def test_answers_come_in_order_whichever_was_first(server: Server) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        time.sleep(0.03 if words(body) in {"0", "5"} else 0)
        return said(words(body) * 2)

    server.answer = answer
    drawn: list[int] = []

    def conversations() -> Iterator[list[Message]]:
        for i in range(20):
            drawn.append(i)
            yield ask(str(i))

    found = client(server, workers=3).ask_all(conversations())
    assert next(found) == "00"
    assert len(drawn) < 10
    assert list(found) == [str(i) * 2 for i in range(1, 20)]


def test_an_endpoint_that_counts_no_tokens_is_counted_for(server: Server) -> None:
    server.answer = lambda _: (200, {"choices": [{"message": {"content": "x" * 400}}]}, {})
    made = client(server)
    made.ask(ask("y" * 400))
    assert 200 <= made.budget.tokens < 250


def test_a_newer_name_of_the_limit_is_learnt(server: Server) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        if "max_tokens" in body:
            message = "Unsupported: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {"error": {"message": message}}, {}
        return said("ok")

    server.answer = answer
    made = client(server)
    assert [made.ask(ask(text), max_tokens=5) for text in "ab"] == ["ok", "ok"]
    assert [body.get("max_completion_tokens") for body in server.bodies] == [None, 5, 5]


def test_first_tokens_are_read_where_there_are_any(server: Server, tmp_path: Path) -> None:
    top = [{"token": "Yes", "logprob": -0.5}, {"token": " no", "logprob": -1.5}]
    server.answer = lambda _: said("Yes", logprobs={"content": [{"top_logprobs": top}]})
    made = client(server, kept=Responses(tmp_path / "r.jsonl"))
    assert made.first_tokens(ask()) == made.first_tokens(ask()) == {"Yes": -0.5, " no": -1.5}
    assert len(server.bodies) == 1
    assert server.bodies[0]["top_logprobs"] == 20
    for reply in (said("Yes"), said("Yes", logprobs=None), (400, "no logprobs", {})):
        server.next = [reply]
        assert client(server).first_tokens(ask()) is None


def test_no_answer_at_all_is_an_empty_one(server: Server) -> None:
    server.next = [said(None), (200, {"choices": [{"message": {"refusal": "I cannot."}}]}, {})]
    assert client(server).ask(ask()) == ""
    assert client(server).ask(ask()) == "I cannot."


def test_pictures_are_named_by_their_bytes_in_short() -> None:
    short = json.dumps(Message("user", (PNG,)).to_json(short=True))
    assert hashlib.sha256(PNG.data).hexdigest() in short
