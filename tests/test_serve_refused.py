"""What the endpoint refuses, whom it lets in, and how it begins and ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from test_ask import Parrot
from test_serve import client, openai, place, png, running, said, sent, tiny, whole
from tiny_hf import llava

from pathcli.errors import ResourceError, UsageError
from pathcli.types import NOTICE, Sample
from pathcli.vlm.responders import Decoding, Responder
from pathcli.vlm.serve import server
from pathcli.vlm.serve.limits import Limits, RefusedError
from pathcli.vlm.serve.service import served_as
from pathcli.vlm.serve.wire import read
from pathcli.vlm.serve.worker import Worker

__all__ = ["place", "tiny"]  # fixtures


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"n": 2}, "one answer"),
        ({"temperature": 0.7}, "leave it out or give 0"),
        ({"tools": [{"type": "function"}]}, "no tools"),
        ({"response_format": {"type": "json_object"}}, "plain text"),
        ({"logprobs": True}, "log-probabilities"),
        ({"stop": ["."]}, "end their answers themselves"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater"),
        ({"max_token": 5}, "no such parameter"),
        ({"stream": "often"}, "stream: "),
        ({"messages": said("x" * 9000, png())}, "9000 letters"),
        ({"messages": said("What?", *[png()] * 17)}, "17 images"),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, "instructions of their own"),
        ({"messages": [*said("What?", png()), {"role": "assistant", "content": "a"}]}, "the last"),
        ({"messages": [{"role": "user", "content": "a"}] * 65}, "at most 64"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content: "),
        ({"messages": []}, "messages: "),
    ],
)
def test_what_cannot_be_done_is_refused_and_said(given: dict[str, Any], why: str) -> None:
    with pytest.raises(RefusedError) as caught:
        read(json.dumps(whole(**given)).encode(), Limits())
    assert why in str(caught.value)
    assert caught.value.status == 400
    assert str(caught.value).startswith(str(caught.value.param))


def test_what_changes_no_answer_is_let_pass() -> None:
    given = {"n": 1, "temperature": 0.0, "top_p": 1, "tools": None, "seed": 3, "user": "me"}
    given |= {"response_format": {"type": "text"}, "logprobs": False, "max_tokens": 10**9}
    assert read(json.dumps(whole(**given)).encode(), Limits()).max_tokens == Limits().tokens
    given = {"max_completion_tokens": 7, "stream": True}
    found = read(json.dumps(whole(**given)).encode(), Limits())
    assert (found.max_tokens, found.stream, found.usage) == (7, True, False)


def test_a_body_is_limited_whatever_its_length_is_said_to_be(place: str) -> None:
    host, port = place.removeprefix("http://").removesuffix("/v1").split(":")
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"

    def told(*parts: bytes) -> bytes:
        with socket.create_connection((host, int(port)), timeout=30) as line:
            for part in parts:
                line.sendall(part)
            return line.recv(4096)

    declared = told(f"{head}\r\nContent-Length: 999999999999\r\n\r\n".encode())
    assert declared.startswith(b"HTTP/1.1 413")
    piece = b"%x\r\n" % 300_000 + b" " * 300_000 + b"\r\n"
    chunked = told(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode(), *[piece] * 4)
    assert chunked.startswith(b"HTTP/1.1 413")
    short = told(f"{head}\r\nContent-Length: 5\r\n\r\n".encode() + b'{"model": "x"}')
    assert short.startswith(b"HTTP/1.1 400")
    assert sent(place, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert sent(place, whole())[0] == 200


def test_a_slow_client_blocks_no_other_and_is_told(tiny: Responder) -> None:
    with running(tiny, body_s=1.0) as place:
        host, port = place.removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as line:
            line.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert sent(place, whole())[0] == 200
            assert line.recv(4096).startswith(b"HTTP/1.1 408")


class Slow(Parrot):
    """Waits until it may answer, and knows what it was asked."""

    def __init__(self) -> None:
        super().__init__(None)
        self.go, self.begun = threading.Event(), threading.Event()
        self.asked: list[Sample] = []

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        self.begun.set()
        assert self.go.wait(30)
        yield from super().answer(samples, decoding)


def test_too_many_are_told_to_come_again_and_who_left_is_not_answered() -> None:
    slow = Slow()
    body = json.dumps(whole(model="parrot")).encode()
    with running(slow, waiting=2) as place:
        host, port = place.removeprefix("http://").removesuffix("/v1").split(":")
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode()

        def waiting() -> int:
            line = http.client.HTTPConnection(host, int(port), timeout=30)
            line.request("GET", "/health")
            found: int = json.loads(line.getresponse().read())["waiting"]
            line.close()
            return found

        def until(count: int) -> None:
            end = time.monotonic() + 20
            while waiting() != count:
                assert time.monotonic() < end
                time.sleep(0.02)

        lines = []
        for n in range(3):  # one is being answered, two wait
            lines.append(socket.create_connection((host, int(port)), timeout=30))
            lines[-1].sendall(head + body)
            assert slow.begun.wait(20)
            until(n)
        status, headers, told = sent(place, body)
        assert (status, told["error"]["code"]) == (503, "overloaded")
        assert 1 <= int(headers["retry-after"]) <= 60
        lines[2].close()
        until(1)
        slow.go.set()
        for line in lines[:2]:
            assert line.recv(4096).startswith(b"HTTP/1.1 200")
            line.close()
        assert len(slow.asked) == 2


def test_a_line_that_was_left_empty_is_no_end() -> None:
    slow = Slow()
    sample, decoding = Sample("a", ("a.png",), turns=("What?",)), Decoding()

    async def talk() -> str:
        worker = Worker(slow, 9)
        running = asyncio.create_task(worker.run())
        first = worker.put(sample, decoding)
        await asyncio.to_thread(slow.begun.wait, 20)
        assert worker.drop(worker.put(sample, decoding))
        assert not worker.drop(first)
        slow.go.set()
        await first.reply
        found = await asyncio.wait_for(worker.put(sample, decoding).reply, 20)
        running.cancel()
        return found.text

    assert asyncio.run(talk()) == "yes"


def test_a_model_that_fails_fails_for_one_request_alone() -> None:
    class Sick(Parrot):
        def answer(self, samples: Sequence[Sample], decoding: Any = None) -> Iterator[str]:
            for error in (RuntimeError("secret"), ResourceError("memory is full")):
                if any(type(error).__name__ in s.turns[-1] for s in samples):
                    raise error
            return super().answer(samples, decoding)

    with running(Sick()) as place:
        status, _, told = sent(place, whole(model="parrot", messages=said("RuntimeError?", png())))
        assert (status, told["error"]["type"]) == (500, "server_error")
        assert "secret" not in told["error"]["message"]
        status, _, told = sent(place, whole(model="parrot", messages=said("ResourceError?", png())))
        assert (status, told["error"]["message"]) == (503, "memory is full")
        assert sent(place, whole(model="parrot"))[0] == 200


# --- who is let in -------------------------------------------------------------------------


def test_a_token_is_asked_for_everywhere_but_of_health() -> None:
    with running(Parrot(), token="s3cret") as place:  # noqa: S106 - a test's
        with client(place, "s3cret") as one:
            assert one.models.list().data[0].id == "parrot"
        with client(place, "S3cret") as one, pytest.raises(openai.AuthenticationError) as caught:
            one.models.list()
        assert caught.value.code == "invalid_api_key"
        assert caught.value.type == "invalid_request_error"
        assert sent(place, b"{}")[0] == 401
        host = place.removeprefix("http://").removesuffix("/v1")
        for path, status in (("/health", 200), ("/nothing", 401)):
            line = http.client.HTTPConnection(host, timeout=30)
            line.request("GET", path)
            assert line.getresponse().status == status
            line.close()


def test_without_a_token_only_this_machine_is_meant(place: str) -> None:
    status, _, told = sent(place, whole(), Host="evil.example:80")
    assert (status, told["error"]["code"]) == (403, "wrong_host")
    odd = ("[::bad", "", "a b", "localhost:x", "a{b}.evil.example", 'a"b.example', "127.0.0.1@b")
    for strange in odd:  # a resolver may know such names
        assert sent(place, b"{}", Host=strange)[0] == 403, strange
    for mine in ("localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]", "[::1]:80"):
        assert sent(place, b"{}", Host=mine)[0] == 400, mine
    with client(place) as one, pytest.raises(openai.NotFoundError, match="no model 'other'"):
        one.models.retrieve("other")


def test_other_hosts_need_a_token_before_anything_is_loaded(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATHCLI_TOKEN", raising=False)
    code, _, err = run("serve", "--host", "0.0.0.0", "--model", "nonsense")  # noqa: S104
    assert (code, "set PATHCLI_TOKEN" in err) == (2, True)
    code, _, err = run("serve", "--token", "a b", "--model", "nonsense")
    assert (code, "the token holds a blank" in err) == (2, True)
    monkeypatch.setenv("PATHCLI_TOKEN", "known")
    code, _, err = run("serve", "--host", "0.0.0.0", "--port", "0", "--model", "nonsense")  # noqa: S104
    assert (code, "no model is called 'nonsense'" in err) == (2, True)
    with server.bind("127.0.0.1", 0) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        code, _, err = run("serve", "--port", port, "--model", "nonsense")
        assert (code, "cannot be had" in err) == (5, True)
    hosts = ("localhost", "127.0.0.1", "127.8.8.8", "::1", "0.0.0.0", "::", "10.0.0.1", "a.b")  # noqa: S104
    assert [server.is_loopback(host) for host in hosts] == [True] * 4 + [False] * 4
    with pytest.raises(UsageError, match="no such host"):
        server.bind("no host", 0)


def test_without_the_extra_one_line_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    for name in [name for name in sys.modules if name.startswith("pathcli.vlm.serve.s")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("pathcli.vlm.serve.server")
    code, _, err = run("serve", "--model", "nonsense")
    assert (code, err.count("\n")) == (5, 1)
    assert "pip install 'pathcli[serve]'" in err


def test_a_name_that_is_served_shows_no_place(tmp_path: Path) -> None:
    assert served_as(str(tmp_path)) == tmp_path.name
    assert served_as("http://host/v1#model") == "model"
    assert served_as("llava-hf/llava-1.5") == "llava-hf/llava-1.5"


# --- how it begins and ends ----------------------------------------------------------------


@pytest.mark.slow
def test_the_command_says_where_it_is_and_ends_in_order(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    llava(tmp_path / "tiny")
    command = [sys.executable, "-c", "from pathcli.cli import main; main()", "serve", "--json"]
    command += ["--port", "0", "--model", str(tmp_path / "tiny"), "--device", "cpu"]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    with process, process.stdout as printed:
        told = json.loads(printed.readline())
        assert (told["model"], told["notice"]) == ("tiny", NOTICE)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", told["address"])
        assert sent(told["address"], whole(model="tiny", max_tokens=3))[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert printed.read() == ""
    assert not list(tmp_path.glob("pathcli-serve-*"))
