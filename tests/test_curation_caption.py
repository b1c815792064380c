"""Agents that caption patches, scripted: what each may say, what becomes of it, what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fakes import Colours
from test_llm import Reply as ServerReply
from test_llm import Server, server
from test_llm import said as answered

from pathcli.curation.caption import agents
from pathcli.curation.caption.agents import Patch, asked, prompts
from pathcli.curation.caption.texts import attributes_of
from pathcli.curation.models import Reply, open_model
from pathcli.errors import ResourceError
from pathcli.llm import Client, Message
from pathcli.types import Region

__all__ = ["server"]  # a fixture

WORDS = prompts()
GOOD = "red cells"


class Scripted:
    """A model that says what stands in a list, or what a function makes of the last turn."""

    name, digest, takes_schema = "scripted", "0f", False

    def __init__(self, *replies: str | Reply, by: Callable[[str], str] | None = None) -> None:
        self.replies, self.by = list(replies), by
        self.asked: list[Sequence[Message]] = []

    def ask_all(
        self, conversations: Iterable[Sequence[Message]], *, max_tokens: int = 512
    ) -> Iterator[Reply]:
        assert max_tokens > 0
        for said in conversations:
            self.asked.append(said)
            found = self.by(str(said[-1].content[-1])) if self.by else self.replies.pop(0)
            yield found if isinstance(found, Reply) else Reply(found)


class Long(Colours):
    """Reads up to six words."""

    text_limit = 6


@pytest.fixture
def patches(slide_path: Path) -> list[Patch]:
    return [
        Patch("s", "", Region(str(slide_path), (256 + 64 * i, 192), 64), ("diversity",))
        for i in range(3)
    ]


def captions(patches: Iterable[Patch]) -> list[tuple[str, str]]:
    return [(patch.caption, patch.why) for patch in patches]


# --- asking ------------------------------------------------------------------------------


def test_what_is_not_asked_about_keeps_its_place_and_parts_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agents, "_PART", 4)
    model, drawn = Scripted(by=lambda text: text.upper()), []

    def items() -> Iterator[int]:
        for i in range(11):
            drawn.append(i)
            yield i

    found = []
    for item, _, reply in asked(
        model, items(), lambda i: [agents.user(f"q{i}")] if i in {1, 2, 9} else None, 9
    ):
        assert len(drawn) <= item + 4
        found.append((item, reply and reply.text))
    wanted = {1: "Q1", 2: "Q2", 9: "Q9"}
    assert found == [(i, wanted.get(i)) for i in range(11)]
    assert len(model.asked) == 3


# --- describing --------------------------------------------------------------------------


def test_a_description_is_of_the_patchs_own_pixels(patches: list[Patch]) -> None:
    model = Scripted(GOOD, "  blue\n cells ", "green")
    assert captions(agents.described(patches, model, WORDS)) == [
        (GOOD, ""),
        ("blue cells", ""),
        ("green", ""),
    ]
    picture, words = model.asked[1][0].content
    assert picture == agents.picture(patches[1].region)
    assert words == WORDS["describe"]


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        (Reply("", "no answer within 5 s"), "no answer within 5 s"),
        (Reply("so", "cut off"), "cut off"),
        (Reply(" "), "nothing was said"),
        (Reply("I'm sorry, but I can't help with that."), "refused: I'm sorry"),
        (Reply("I cannot describe medical images."), "refused: I cannot"),
    ],
)
def test_a_patch_without_description_is_dropped_and_asked_about_no_more(
    patches: list[Patch], reply: Reply, detail: str
) -> None:
    other = Scripted("[]", "[]")
    described = agents.described(patches, Scripted(GOOD, reply, GOOD), WORDS)
    found = list(agents.revised(described, other, WORDS))
    assert captions(found) == [(GOOD, ""), ("", "no description"), (GOOD, "")]
    assert found[1].detail.startswith(detail)
    assert len(other.asked) == 2


def test_a_patch_that_cannot_be_read_is_dropped(patches: list[Patch], tmp_path: Path) -> None:
    patches[1].region = Region(str(tmp_path / "gone.svs"), (0, 0), 64)
    found = list(agents.described(patches, Scripted(GOOD, GOOD), WORDS))
    assert [patch.why for patch in found] == ["", "the patch cannot be read", ""]


# --- revising ----------------------------------------------------------------------------


def revised(patch: Patch, *replies: str | Reply) -> tuple[Patch, Scripted]:
    patch.caption, model = GOOD, Scripted(*replies)
    return next(iter(agents.revised([patch], model, WORDS))), model


def edit(**values: str) -> str:
    return json.dumps([values])


def test_nothing_to_change_changes_nothing(patches: list[Patch]) -> None:
    patch, model = revised(patches[0], "[]")
    assert patch.caption == GOOD
    assert patch.steps == [
        {"agent": "revise", "model": "scripted", "given": GOOD, "said": ["[]"], "edits": []}
    ]
    (said,) = model.asked[0]
    assert said.content[0] == agents.picture(patch.region)
    assert f"Caption: {GOOD}\n" in str(said.content[1])


def test_operations_are_made(patches: list[Patch]) -> None:
    patch, _ = revised(patches[0], edit(op="modify", text="red", to="blue"))
    assert patch.caption == "blue cells"
    assert patch.steps[0]["edits"] == [{"op": "modify", "text": "red", "to": "blue"}]
    assert "fault" not in patch.steps[0]


@pytest.mark.parametrize(
    ("reply", "fault"),
    [
        ("The caption is fine.", "not JSON"),
        (edit(op="delete", text="stroma"), '"stroma" is not in the caption'),
        (edit(op="delete", text=GOOD), "nothing of the caption would be left"),
        ("I'm sorry, I can't.", "not JSON"),
    ],
)
def test_what_cannot_be_made_is_asked_for_once_more(
    patches: list[Patch], reply: str, fault: str
) -> None:
    patch, model = revised(patches[0], reply, edit(op="add", text="many", after=""))
    assert patch.caption == f"many {GOOD}"
    assert [m.role for m in model.asked[1]] == ["user", "assistant", "user"]
    assert fault in str(model.asked[1][-1].content[0])
    patch, model = revised(patches[1], reply, reply)
    assert (patch.caption, patch.why, len(model.asked)) == (GOOD, "", 2)
    assert patch.steps[0]["said"] == [reply, reply]
    assert patch.steps[0]["fault"].count(fault) == 2
    assert "edits" not in patch.steps[0]


def test_a_fault_of_the_model_leaves_the_caption_and_is_not_asked_again(
    patches: list[Patch],
) -> None:
    patch, model = revised(patches[0], Reply("", "refused"))
    assert (patch.caption, patch.steps[0]["fault"], len(model.asked)) == (GOOD, "refused", 1)
    patch, model = revised(patches[1], "no list", Reply("", "no answer within 9 s"))
    assert patch.caption == GOOD
    assert patch.steps[0]["fault"].endswith("then: no answer within 9 s")


# --- summarising -------------------------------------------------------------------------


def summarised(patch: Patch, text: str, *replies: str | Reply) -> tuple[Patch, Scripted]:
    patch.caption, model = text, Scripted(*replies)
    return next(iter(agents.summarised([patch], model, WORDS, Long()))), model


LONG = "red red red red. blue blue blue."


def test_what_is_short_enough_is_left_as_it_is(patches: list[Patch]) -> None:
    patch, model = summarised(patches[0], "red red red red red red")
    assert (patch.caption, model.asked) == ("red red red red red red", [])
    assert patch.steps[0]["tokens"] == 6


def test_a_summary_is_counted_by_the_encoder_and_asked_for_once_more(patches: list[Patch]) -> None:
    patch, model = summarised(patches[0], LONG, "red and blue")
    assert (patch.caption, patch.why) == ("red and blue", "")
    patch, model = summarised(patches[1], LONG, LONG, "red")
    assert patch.caption == "red"
    assert "7 tokens, and 6 are the most" in str(model.asked[1][-1].content[0])
    patch, _ = summarised(patches[2], LONG, LONG, LONG)
    assert (patch.why, patch.detail) == ("the summary is too long", "7 tokens, 6 are the most")


def test_a_summary_that_is_refused_drops_the_patch(patches: list[Patch]) -> None:
    patch, _ = summarised(patches[0], LONG, Reply("", "refused"))
    assert (patch.why, patch.detail) == ("no summary", "refused")


def test_first_sentences_are_taken_whole(patches: list[Patch]) -> None:
    texts = ["Red red. Blue red red. Green blue.", "red " * 7 + ". Red.", "red red"]
    for patch, text in zip(patches, texts, strict=True):
        patch.caption = text
    found = captions(agents.by_first_sentences(patches, Long()))
    assert found == [
        ("Red red. Blue red red.", ""),
        (texts[1], "the first sentence is too long"),
        ("red red", ""),
    ]


def test_no_caption_is_longer_than_clip_reads() -> None:
    class Wide(Colours):
        text_limit = 256

    assert agents.limit_of(Wide()) == 77
    assert agents.limit_of(Long()) == 6


# --- a scripted endpoint -----------------------------------------------------------------


class Endpoint:
    """A model behind an endpoint: what cannot be had after all tries is a fault of one patch."""

    name, takes_schema = "endpoint", False

    def __init__(self, client: Client) -> None:
        self.client = client

    def ask_all(
        self, conversations: Iterable[Sequence[Message]], *, max_tokens: int = 512
    ) -> Iterator[Reply]:
        for messages in conversations:
            try:
                yield Reply(self.client.ask(messages, max_tokens=max_tokens))
            except ResourceError as error:
                yield Reply("", str(error))


def test_an_endpoint_that_is_busy_slow_or_unwilling_costs_no_other_patch_its_caption(
    server: Server, patches: list[Patch]
) -> None:
    swap = edit(op="modify", text="red", to="blue")
    busy: ServerReply = (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.01"})
    down: ServerReply = (503, "down", {})
    refusal: ServerReply = (200, {"choices": [{"message": {"refusal": "I can't help."}}]}, {})
    model = Endpoint(Client(f"{server.url}#tiny", pause_s=0.001, attempts=2, timeout_s=5))
    server.next = [busy, answered(GOOD), down, down, refusal]
    described = list(agents.described(patches, model, WORDS))
    assert captions(described) == [(GOOD, ""), ("", "no description"), ("", "no description")]
    assert "503" in described[1].detail
    assert described[2].detail == "refused: I can't help."
    url = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url == agents.picture(patches[0].region).url()
    server.next = [answered("not a list"), busy, answered(swap)]
    (mended, *_) = list(agents.revised(described, model, WORDS))
    assert mended.caption == "blue cells"
    assert mended.steps[1]["said"] == ["not a list", swap]

    def slow(_: dict[str, Any]) -> ServerReply:
        time.sleep(0.3)
        return answered("[]")

    server.answer = slow
    model = Endpoint(Client(f"{server.url}#tiny", pause_s=0.001, attempts=2, timeout_s=0.05))
    (still, *_) = list(agents.revised([mended], model, WORDS))
    assert still.caption == "blue cells"
    assert "no answer within 0.05 s" in still.steps[2]["fault"]


def test_an_endpoint_is_given_the_form_of_what_it_is_to_reply(
    server: Server, patches: list[Patch]
) -> None:
    model = open_model(f"{server.url}#tiny", workers=1)
    swap = edit(op="modify", text="red", to="blue")
    server.next = [answered(f'{{"operations": {swap}}}')]
    patches[0].caption = GOOD
    (patch,) = agents.revised(patches[:1], model, WORDS)
    assert (patch.caption, len(server.bodies)) == ("blue cells", 1)
    form = server.bodies[0]["response_format"]["json_schema"]
    assert form["strict"]
    kinds = form["schema"]["properties"]["operations"]["items"]["anyOf"]
    assert [kind["required"] for kind in kinds] == [
        ["op", "text", "after"],
        ["op", "text"],
        ["op", "text", "to"],
    ]
    server.next = [answered('Here they are:\n```json\n["red"]\n```')]
    assert attributes_of("any", model, WORDS) == ("red",)
    assert server.bodies[1]["response_format"]["json_schema"]["schema"]["required"] == ["texts"]
    server.next = [answered(GOOD)]
    list(agents.described(patches[1:2], model, WORDS))
    assert "response_format" not in server.bodies[2]
