"""What a recipe may say of a chat, and how a sample is shown."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run as Call
from tiny_chat import CHATML, LLAMA_3, TALK, byte_bpe
from tiny_language import tokenizer

from pathcli import registry
from pathcli.cli import show
from pathcli.errors import DataError, UsageError
from pathcli.recipe import Recipe, check_recipe
from pathcli.runs import sample_view
from pathcli.types import Sample
from pathcli.vlm.chat import Chat
from pathcli.vlm.templates import TEMPLATES, read_questions, read_template


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    return tokenizer(folder, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def llama_3() -> Any:
    return byte_bpe("<|begin_of_text|>", "<|end_of_text|>", LLAMA_3)


@pytest.fixture(scope="module")
def smol() -> Any:
    return byte_bpe(None, "<|im_end|>", CHATML)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- what a recipe may say ---------------------------------------------------------------


def test_what_cannot_be_said_is_refused_when_the_recipe_is_read(llama: Any) -> None:
    with pytest.raises(UsageError, match=r"'vicuna' .*vicuna-v1"):
        Chat(template="vicuna")
    with pytest.raises(UsageError, match="template plain says no questions"):
        Chat(template="plain", questions="describe")
    with pytest.raises(UsageError, match="template plain has no words for the system"):
        Chat(template="plain", system="Be kind.")
    with pytest.raises(UsageError, match="at least 1 token, not 0"):
        Chat(template="flan", answer_limit=0)
    with pytest.raises(UsageError, match=r"chatml needs <\|im_start\|>, which this language"):
        Chat(template="chatml").encode(TALK, llama, [], rng())


def test_a_template_and_questions_of_ones_own_are_files_of_the_same_form(
    tmp_path: Path, llama: Any
) -> None:
    path, asked = tmp_path / "mine.yaml", tmp_path / "asked.yaml"
    path.write_text('version: 1\nbos: false\nuser: "Q {}"\nanswer: " A {}"\nend: "{eos}"\n')
    asked.write_text("questions: [why]")
    chat = Chat(template=str(path), questions=str(asked))
    assert chat.encode(Sample("m", (), "so"), llama, [], rng()).text == "Q why A so</s>"
    path.write_text(path.read_text() + "tail: x\n")
    with pytest.raises(DataError, match=r"mine\.yaml: tail: .*assets/chat show the form"):
        read_template(str(path))
    path.write_text('version: 1\nbos: false\nuser: ""\nanswer: "{}"\nend: "###"\n')
    with pytest.raises(DataError, match=r"mine\.yaml: .* end is \{eos\} or one of special"):
        read_template(str(path))
    asked.write_text("questions: why")
    with pytest.raises(DataError, match=r"asked\.yaml: questions must be a list of texts"):
        read_questions(str(asked))


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_shipped_template_says_where_answers_end(template: str) -> None:
    assert read_template(template).end in {"{eos}", "<|eot_id|>", "<|im_end|>"}


def test_generation_stops_at_the_templates_end_and_at_the_models_own(
    llama: Any, llama_3: Any, smol: Any
) -> None:
    assert Chat(template="vicuna-v1").stop(llama) == [2]
    ends = llama_3.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])
    assert Chat(template="llama-3").stop(llama_3) == ends
    assert Chat(template="chatml").stop(smol) == [smol.convert_tokens_to_ids("<|im_end|>")]


# --- shown -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seeds:
    seeds: Sequence[int]


class Teller:
    """A task that learns words."""

    def __init__(self, *, train: Seeds, chat: Chat) -> None:
        self.train, self.chat = train, chat

    def sample_view(self, seed: int) -> list[tuple[str, str]]:
        assert seed == 3
        return [("read", "Q\n"), ("image", "<image: 4 tokens>"), ("learnt", " yes</s>"),
                ("counts", "9 tokens")]  # fmt: skip


class Mute(Teller):
    sample_view = property()


def recipe(task: str) -> Recipe:
    words: dict[str, Any] = {"template": "vicuna-v1", "questions": ["What?"], "place": "random"}
    return Recipe("mine", {"version": 1, "task": task, "train": {"seeds": [3]}, "chat": words})


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "talking", sys.modules[__name__])
    monkeypatch.setitem(registry.BUILTIN["task"], "teller", "talking:Teller")
    monkeypatch.setitem(registry.BUILTIN["task"], "mute", "talking:Mute")


def test_a_recipes_section_is_checked_against_the_constructor() -> None:
    assert check_recipe(recipe("teller")).faults == ()
    wrong = recipe("teller").with_values(**{"chat.place": "middle", "chat.limit": 0})
    assert [fault.partition(":")[0] for fault in check_recipe(wrong).faults] == ["chat.place"]
    named = recipe("teller").with_values(**{"chat.questions": "describe"})
    assert check_recipe(named).faults == ()
    unknown = recipe("teller").with_values(**{"chat.template": "alpaca"})
    assert "'alpaca'" in check_recipe(unknown).faults[0]


def test_check_shows_what_of_a_sample_is_learnt(run: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(recipe("teller").to_yaml())
    code, out, err = run("recipes", "check", "mine.yaml", "--show-sample")
    assert code == 0, err
    assert out == "Q\n<image: 4 tokens>[[ yes</s>]]\n\n9 tokens\n"
    code, out, err = run("recipes", "check", "mine.yaml", "--show-sample", "--json")
    assert code == 0, err
    assert json.loads(out)["sample"][2] == {"role": "learnt", "text": " yes</s>"}
    with pytest.raises(UsageError, match="task mute learns no words"):
        sample_view(recipe("mute"))


def test_a_terminal_shows_what_is_learnt_in_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    show.sample([("read", "Q"), ("learnt", "yes")])
    assert "\x1b[2mQ\x1b[0m\x1b[1;32myes\x1b[0m" in terminal.getvalue()
