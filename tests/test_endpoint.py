"""A model behind an endpoint as what answers: what is sent, what is said, what is not known."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from PIL import Image
from test_llm import Server, said, server, words
from test_vqa_command import quick
from test_vqa_eval import folder

from pathcli.errors import DataError, UsageError
from pathcli.types import Sample
from pathcli.vlm.endpoint import EndpointResponder
from pathcli.vlm.responders import Decoding, open_responder

__all__ = ["folder", "quick", "server"]


@pytest.fixture
def images(tmp_path: Path, rng: np.random.Generator) -> tuple[str, ...]:
    paths = (str(tmp_path / "a.png"), str(tmp_path / "b.jpg"))
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (5, 4, 3), np.uint8)).save(path)
    return paths


def pictures(body: dict[str, Any]) -> list[np.ndarray]:
    parts = [p for m in body["messages"] if isinstance(m["content"], list) for p in m["content"]]
    urls = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
    raw = [base64.b64decode(url.removeprefix("data:image/png;base64,")) for url in urls]
    return [np.array(Image.open(BytesIO(one))) for one in raw]


def test_its_address_opens_it_and_says_what_it_is(server: Server) -> None:
    found = open_responder(server.url)
    assert isinstance(found, EndpointResponder)
    assert found.name == f"{server.url}#tiny"
    assert "whatever" in found.scope
    assert found.temperature is None
    assert found.digest == EndpointResponder(f"{server.url}/#tiny").digest
    assert found.digest != EndpointResponder(f"{server.url}#other").digest
    assert len(found.digest) == 64


def test_questions_are_answered_in_order_with_their_images(
    server: Server, images: tuple[str, ...]
) -> None:
    found = open_responder(server.url)
    samples = [Sample(str(i), images[:1], turns=(f"What {i}?",), answer="no") for i in range(12)]
    assert list(found.answer(samples)) == [f"?{str(i)[::-1]} tahW" for i in range(12)]
    body = next(body for body in server.bodies if words(body) == "What 3?")
    assert (body["temperature"], body["max_tokens"]) == (0, 512)
    (sent,) = pictures(body)
    assert (sent == np.array(Image.open(images[0]))).all()
    assert list(found.answer(samples[:1], Decoding(max_new_tokens=5))) == ["?0 tahW"]
    assert server.bodies[-1]["max_tokens"] == 5


def test_turns_and_marks_have_their_place(server: Server, images: tuple[str, ...]) -> None:
    found = open_responder(server.url)
    turns = ("Is <image> like <image> ?", "Like <image>, no.", "Why?")
    sample = Sample("two", images, turns=turns)
    assert list(found.answer([sample])) == ["?yhW"]
    first, answer, last = server.bodies[0]["messages"]
    kinds = [p.get("text", "image") for p in first["content"]]
    assert kinds == ["Is", "image", "like", "image", "?"]
    assert (answer["content"], last["content"]) == ("Like < image>, no.", "Why?")
    assert [p.shape for p in pictures(server.bodies[0])] == [(5, 4, 3)] * 2
    assert found.prompt(sample).splitlines() == [
        "user: Is <image> like <image> ?",
        "assistant: Like < image>, no.",
        "user: Why?",
    ]
    assert found.prompt(Sample("s", images, turns=("Q?",))) == "user: <image> <image> Q?"


def test_what_cannot_be_asked_is_refused(server: Server, images: tuple[str, ...]) -> None:
    found = open_responder(server.url)
    for turns, text in (((), "nothing is asked"), (("a", "b"), "not the user's")):
        with pytest.raises(DataError, match=text):
            list(found.answer([Sample("s", images, turns=turns)]))
    with pytest.raises(DataError, match="1 <image> marks for 2 images"):
        list(found.answer([Sample("s", images, turns=("<image> a",))]))
    with pytest.raises(DataError, match="no such file"):
        list(found.answer([Sample("s", ("nowhere.png",), turns=("a",))]))
    with pytest.raises(UsageError, match="without beams"):
        list(found.answer([Sample("s", images, turns=("a",))], Decoding(beams=5)))
    assert not server.bodies


def test_options_of_one_token_have_log_probabilities(
    server: Server, images: tuple[str, ...]
) -> None:
    top = {"Yes": 0.5, " yes": 0.25, "no": 0.125, "The": 0.0625}
    ranked = [{"token": t, "logprob": float(np.log(p))} for t, p in top.items()]
    server.answer = lambda _: said("Yes", logprobs={"content": [{"top_logprobs": ranked}]})
    found = open_responder(server.url)
    sample = Sample("s", images, turns=("Is it?",))
    rows = found.likelihoods([sample, sample], [("yes", "no"), ("A", "no", "the")[:2]])
    assert rows is not None
    assert np.allclose(np.exp(rows[0]), [0.75, 0.125])
    assert np.allclose(np.exp(rows[1]), [0.0625, 0.125])
    asked = len(server.bodies)
    assert found.likelihoods([sample], [("yes", "carcinoma")]) is None
    assert len(server.bodies) == asked
    server.answer = lambda _: said("Yes")
    assert found.likelihoods([sample], [("yes", "no")]) is None


@pytest.mark.usefixtures("quick")
def test_a_budget_stops_an_evaluation_and_nothing_is_paid_twice(
    server: Server, folder: Path, run: Run
) -> None:
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0}
    reply = {"choices": [{"message": {"content": "A"}}], "usage": usage}
    server.answer = lambda _: (200, reply, {})
    whole = ["vqa-eval", str(folder / "q.json"), "--permute", "3", "--out", str(folder / "out")]
    asked = [*whole, "--model", server.url]
    code, _, err = run(*asked, "--budget", "2", "--price", "1,3")
    assert code == 5
    assert "the budget of 2 USD is spent" in err
    assert "kept: raise it and run the same command again" in err
    paid = len(server.bodies)
    assert 1 <= paid < 10  # those sent before the first answer told what one costs
    code, _, err = run(*asked, "--budget", "100", "--price", "1,3")
    assert code == 0, err
    assert f"spent: {10 - paid} requests, " in err
    assert len(server.bodies) == 10
    for given, why in (
        ([*asked, "--budget", "1"], "--budget needs --price READ,WRITTEN"),
        ([*asked, "--price", "cheap"], "--price is two numbers"),
        ([*whole, "--budget", "1", "--price", "1,1"], "neither --model nor --judge is one"),
    ):
        code, _, err = run(*given)
        assert (code, why in err) == (2, True), err
