"""Questions over HTTP: answered as `ask` answers them, and refused in OpenAI's words."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_ask import Parrot, shipped
from tiny_hf import llava

from pathcli.types import NOTICE, Answer, Sample
from pathcli.vlm.ask import UNKNOWN, Talk, answers
from pathcli.vlm.endpoint import EndpointResponder
from pathcli.vlm.responders import Decoding, Responder, open_responder
from pathcli.vlm.serve import server
from pathcli.vlm.serve.limits import Limits
from pathcli.vlm.serve.wire import read

__all__ = ["shipped"]  # a fixture

openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Responder:
    """A model of transformers that answers in five tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llava"
    folder.mkdir()
    llava(folder)
    made = open_responder(str(folder), device="cpu", load="float32")
    made.decoding = Decoding(5)
    return made


@contextmanager
def running(responder: Any, token: str | None = None, **limits: Any) -> Iterator[str]:
    """Serve in a thread; yield the address."""
    bound = server.bind("127.0.0.1", 0)
    app = server.application(responder, token=token, limits=Limits(**limits))
    bound.listen()
    made = server.server(app)
    thread = threading.Thread(target=made.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        yield server.address(bound)
    finally:
        made.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def place(tiny: Responder) -> Iterator[str]:
    with running(tiny, body=1_000_000) as found:
        yield found


def client(place: str, key: str = "none", retries: int = 0) -> Any:
    return openai.OpenAI(base_url=place, api_key=key, max_retries=retries)


def png(seed: int = 0, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shown(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(question: str, *images: bytes) -> list[dict[str, Any]]:
    words = {"type": "text", "text": question}
    return [{"role": "user", "content": [*map(shown, images), words]}]


def asked(tiny: Responder, tmp_path: Path, question: str, *images: bytes) -> Answer:
    """What `ask` says of the same."""
    files = [tmp_path / f"{n}.png" for n in range(len(images))]
    for file, data in zip(files, images, strict=True):
        file.write_bytes(data)
    return Talk([str(file) for file in files], tiny)(question)


def sent(
    place: str, body: bytes | dict[str, Any], **headers: str
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Send bytes as they are; return the status, the headers and the JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    host = place.removeprefix("http://").removesuffix("/v1")
    line = http.client.HTTPConnection(host, timeout=30)
    try:
        head = {"Content-Type": "application/json"} | headers
        line.request("POST", "/v1/chat/completions", raw, head)
        reply = line.getresponse()
        return reply.status, dict(reply.getheaders()), json.loads(reply.read())
    finally:
        line.close()


# --- what is answered ----------------------------------------------------------------------


def test_the_public_client_is_answered_as_ask_answers(
    place: str, tiny: Responder, tmp_path: Path
) -> None:
    with client(place) as one:
        (model,) = one.models.list().data
        assert model.id == "tiny-llava"
        assert model.pathcli["notice"] == NOTICE
        assert one.models.retrieve("tiny-llava").id == model.id
        wanted = asked(tiny, tmp_path, "Is it a tumour?", png())
        raw = one.chat.completions.with_raw_response.create(
            model=model.id, messages=said("Is it a tumour?", png()), temperature=0
        )
        found = raw.parse()
        assert found.choices[0].message.content == wanted.text != ""
        assert found.choices[0].finish_reason == "length"  # it may say five tokens
        assert found.pathcli["scope"] == tiny.scope
        assert found.pathcli["scores"] == pytest.approx(dict(wanted.scores))
        assert list(found.pathcli["scores"]) == ["yes", "no"]
        assert found.pathcli["evidence"] == ["image 1"]
        assert json.loads(raw.headers["X-Pathcli"]) == {
            "abstained": False,
            "confidence": None,
            "scope": tiny.scope,
            "notice": NOTICE,
        }
        two = one.chat.completions.create(
            model=model.id, messages=said("Which is red?", png(1), png(2)), max_tokens=3
        )
        wanted = asked(tiny, tmp_path, "Which is red?", png(1), png(2))
        assert two.choices[0].message.content != ""
        assert wanted.text.startswith(two.choices[0].message.content)


def test_a_conversation_goes_on_as_a_talk_does(place: str, tiny: Responder, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    talk = Talk([str(tmp_path / "a.png")], tiny)
    messages: list[Any] = said("What is this?", png())
    with client(place) as one:
        for question in ("What is this?", "Are you sure?", "Is it a tumour?"):
            if len(messages) > 1:
                messages.append({"role": "user", "content": question})
            found = one.chat.completions.create(model="tiny-llava", messages=messages)
            assert found.choices[0].message.content == talk(question).text
            messages.append(found.choices[0].message)  # as the client's users do


def test_an_answer_is_streamed_in_chunks(place: str, tiny: Responder, tmp_path: Path) -> None:
    wanted = asked(tiny, tmp_path, "What is it?", png())
    with client(place) as one:
        *events, last = one.chat.completions.create(
            model="tiny-llava",
            messages=said("What is it?", png()),
            stream=True,
            stream_options={"include_usage": True},
        )
    assert "".join(e.choices[0].delta.content or "" for e in events) == wanted.text
    assert [e.choices[0].finish_reason for e in events] == [None, "length"]
    assert events[-1].pathcli["notice"] == NOTICE
    assert (last.choices, last.usage) == ([], None)  # nobody knows how many an image took
    assert len({e.id for e in events}) == 1


def test_no_answer_is_said_as_such_and_a_confidence_is_told() -> None:
    odd = Parrot()
    odd.unfamiliar = lambda images: list(images[1:])  # type: ignore[method-assign]
    with running(odd) as place, client(place) as one:
        found = one.chat.completions.create(model="parrot", messages=said("Is it?", png()))
        assert found.choices[0].message.content == "yes"
        assert found.pathcli["confidence"] == pytest.approx(0.75)
        found = one.chat.completions.create(model="parrot", messages=said("It?", png(), png(1)))
        assert found.choices[0].message.content == f"no answer: {UNKNOWN}"
        assert found.pathcli["abstained"] is True
        assert found.pathcli["evidence"] == ["image 2"]


def test_our_own_client_of_endpoints_asks_it(
    place: str, tiny: Responder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PATHCLI_API_KEY", raising=False)
    wanted = asked(tiny, tmp_path, "Is it a tumour?", png())
    sample = Sample("a", (str(tmp_path / "0.png"),), turns=("Is it a tumour?",))
    (found,) = answers([sample], EndpointResponder(f"{place}#tiny-llava"), Decoding(5))
    assert (found.text, found.scores) == (wanted.text, {})  # it gives no log-probabilities


def test_images_stand_where_the_message_has_them() -> None:
    words = [{"type": "text", "text": t} for t in ("first <image>", "then")]
    a, b = shown(png()), shown(png(1))

    def turns(*contents: Any) -> tuple[str, ...]:
        roles = ("user", "assistant")
        messages = [{"role": roles[n % 2], "content": c} for n, c in enumerate(contents)]
        return read(json.dumps({"model": "m", "messages": messages}).encode(), Limits()).turns

    assert turns([a, b, *words]) == turns([*words, a, b]) == ("first < image>\nthen",)
    assert turns([words[0], a, words[1], b]) == ("first < image>\n<image>\nthen\n<image>",)
    assert turns([a], "yes", [b, words[1]]) == ("<image>", "yes", "<image>\nthen")
    assert turns([a, {"type": "text", "text": " " * 5000 + "?"}]) == (" " * 32 + "?",)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.usefixtures("shipped")
def test_the_shipped_model_answers_about_a_lung_patch_and_counts_tokens(data: Path) -> None:
    patch = next((data / "lc25000-lung" / "images" / "lung_n").glob("*.jpeg"))
    responder: Any = open_responder(device="cpu")
    with running(responder) as place, client(place) as one:
        messages = said("What tissue is this?", patch.read_bytes())
        found = one.chat.completions.create(model="clover-mini", messages=messages)
    assert found.choices[0].message.content == "benign lung tissue"
    assert found.choices[0].finish_reason == "stop"
    sample = Sample("a", (str(patch),), turns=("What tissue is this?",))
    (wanted,) = answers([sample], responder)
    assert found.pathcli["confidence"] == pytest.approx(wanted.confidence)
    batch = responder.examples.ask([sample], np.random.default_rng(0))
    tokenizer = responder.examples.language.tokenizer
    assert found.usage.prompt_tokens == int(batch["mask"].sum())
    assert found.usage.completion_tokens == len(tokenizer("benign lung tissue")["input_ids"])
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


# --- what is refused -----------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(side: int) -> bytes:
    """A PNG that says it is huge."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def whole(**given: Any) -> dict[str, Any]:
    return {"model": "tiny-llava", "messages": said("What is it?", png())} | given


def with_url(url: str) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": url}}
    words = {"type": "text", "text": "What?"}
    return whole(messages=[{"role": "user", "content": [image, words]}])


MALFORMED: list[tuple[Any, int, str]] = [
    (with_url("data:image/png;base64,@@@"), 400, "broken base64"),
    (with_url("data:image/png;base64,iVBOR"), 400, "broken base64"),
    (whole(messages=said("What?", b"no image at all")), 400, "not an image"),
    (whole(messages=said("What?", b"")), 400, "not an image"),
    (whole(messages=said("What?", b"%!PS-Adobe-3.0 EPSF-3.0\n")), 400, "not an image"),
    (whole(messages=said("What?", png()[:2000])), 400, "not a whole image"),
    (whole(messages=said("What?", bomb(8_000))), 413, "too many pixels"),
    (whole(messages=said("What?", bomb(100_000))), 413, "too many pixels"),
    (b'{"model": "tiny-llava", "messages": [', 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[1]", 400, "not a JSON object"),
    ({"model": "tiny-llava"}, 400, "messages: Field required"),
    ({"messages": said("What?", png())}, 400, "model: Field required"),
    (with_url("http://169.254.169.254/latest/meta-data"), 400, "fetches nothing"),
    (with_url("file:///etc/passwd"), 400, "fetches nothing"),
    (whole(model="gpt-9"), 404, "this server has 'tiny-llava'"),
    (whole(messages=said("What?", os.urandom(1_000_000))), 413, "more than 1 MB"),
    (whole(messages=[{"role": "user", "content": "What?"}]), 400, "no image"),
    (whole(messages=said(" ", png())), 400, "asks nothing"),
    (whole(messages=[{"role": "user", "content": [{"type": "video"}]}]), 400, "messages[0]"),
]


def test_of_a_hundred_at_once_eighty_are_answered_and_twenty_refused(
    place: str, tiny: Responder, tmp_path: Path
) -> None:
    rights = [(f"What is {n}?" if n % 2 else "Is it a tumour?", png(n)) for n in range(16)] * 5
    wanted = [asked(tiny, tmp_path, *right) for right in rights[:16]] * 5

    async def all_at_once() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(base_url=place, api_key="-", max_retries=0) as one:
            good = [
                one.chat.completions.create(model="tiny-llava", messages=said(*right))
                for right in rights
            ]
            bad = [asyncio.to_thread(sent, place, body) for body, *_ in MALFORMED]
            mixed = [one for pair in zip(good, bad, strict=False) for one in pair]
            found = await asyncio.gather(*mixed, *good[20:])
            return [*found[:40:2], *found[40:]], found[1:40:2]

    good, bad = asyncio.run(all_at_once())
    assert [one.choices[0].message.content for one in good] == [one.text for one in wanted]
    for one, want in zip(good, wanted, strict=True):
        assert one.pathcli["scores"] == pytest.approx(dict(want.scores), rel=1e-4)
    for (_, status, why), (got, _, told) in zip(MALFORMED, bad, strict=True):
        assert (got, set(told["error"])) == (status, {"message", "type", "param", "code"})
        assert why in told["error"]["message"]
        assert told["error"]["type"] == "invalid_request_error"
        assert "pathcli-serve" not in told["error"]["message"]  # nor any place of this machine
    assert sent(place, whole())[0] == 200
