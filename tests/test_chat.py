"""How a sample is put to a language model: the text, its tokens, and which of them are learnt."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tiny_chat import CHATML, LLAMA_3, TALK, byte_bpe
from tiny_language import tokenizer

from pathcli.errors import DataError
from pathcli.types import Sample
from pathcli.vlm.chat import IMAGE, Chat, Encoded
from pathcli.vlm.model import NOT_LEARNT
from pathcli.vlm.templates import QUESTIONS, read_questions


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama")
    return tokenizer(folder, ["<unk>", "<s>", "</s>"], "<s>", "</s>", "<unk>")


@pytest.fixture(scope="module")
def newer_llama(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same words where only the beginning of a text is given a space, as newer files say."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    llama.save_pretrained(folder := tmp_path_factory.mktemp("newer"))
    fast = AutoTokenizer.from_pretrained(folder)
    parts = json.loads(fast.backend_tokenizer.to_str())
    parts["normalizer"] = None
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    parts["pre_tokenizer"] = json.loads(first.__getstate__())
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(
        tmp_path_factory.mktemp("t5"), ["<pad>", "</s>", "<unk>"], None, "</s>", "<pad>"
    )


@pytest.fixture(scope="module")
def llama_3() -> Any:
    return byte_bpe("<|begin_of_text|>", "<|end_of_text|>", LLAMA_3)


@pytest.fixture(scope="module")
def smol() -> Any:
    return byte_bpe(None, "<|im_end|>", CHATML)


PAIRS = [("llama", "vicuna-v1"), ("llama", "flan"), ("newer_llama", "vicuna-v1")]
PAIRS += [("newer_llama", "flan"), ("llama_3", "llama-3"), ("smol", "chatml"), ("t5", "flan")]
PAIRS += [("llama_3", "vicuna-v1"), ("smol", "flan")]


@pytest.fixture(params=PAIRS, ids=["-".join(pair) for pair in PAIRS])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Chat]:
    name, template = request.param
    return request.getfixturevalue(name), Chat(template=template)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def learnt(told: Encoded) -> list[str]:
    """Return the texts of the runs of tokens that are learnt."""
    return [text for role, text in told.show() if role == "learnt"]


def messages(sample: Sample) -> list[dict[str, str]]:
    said = (*sample.turns, sample.answer)
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


# --- the text and its tokens -------------------------------------------------------------


@pytest.mark.parametrize("system", [None, "You know tissue."])
@pytest.mark.parametrize(("model", "template"), [("llama_3", "llama-3"), ("smol", "chatml")])
def test_text_and_tokens_equal_the_models_own_chat_template(
    model: str, template: str, system: str | None, request: pytest.FixtureRequest
) -> None:
    fast = request.getfixturevalue(model)
    chat = Chat(template=template, system=system)
    first = [{"role": "system", "content": system}] if system else []
    whole, asked = [*first, *messages(TALK)], [*first, *messages(TALK)[:-1]]
    told = chat.encode(TALK, fast, [], rng())
    assert told.text == fast.apply_chat_template(whole, tokenize=False)
    assert told.ids == fast.apply_chat_template(whole)["input_ids"]
    prompt = chat.ask(TALK, fast, [])
    assert prompt.text == fast.apply_chat_template(
        asked, tokenize=False, add_generation_prompt=True
    )
    assert prompt.ids == fast.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def test_vicuna_is_spoken_to_as_fastchat_and_llava_do(llama: Any) -> None:
    sample = replace(TALK, images=("a.png",), answer="yes")
    told = Chat(template="vicuna-v1").encode(sample, llama, [3], rng())
    assert told.text == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. "
        "USER: <image>\nIs it a tumour? ASSISTANT: Näin on 细胞 ok.</s>USER: Sure? "
        "ASSISTANT: yes</s>"
    )
    whole = llama(told.text.removeprefix("<s>").partition(IMAGE)[0]).input_ids
    assert told.ids[: len(whole)] == whole
    assert told.image == [len(whole) <= i < len(whole) + 3 for i in range(len(told.ids))]


def test_exactly_the_answers_and_their_ends_are_learnt(pair: tuple[Any, Chat]) -> None:
    fast, chat = pair
    told = chat.encode(TALK, fast, [], rng())
    end, space = fast.convert_ids_to_tokens(chat.stop(fast)[0]), chat.template.answer == " {}"
    lead = " " if space else ""
    assert learnt(told) == [f"{lead}{a}{end}" for a in ("Näin on 细胞 ok.", TALK.answer)]
    labels = [label for label in told.labels if label != NOT_LEARNT]
    said = fast.decode(labels, skip_special_tokens=True).replace(" ", "")
    assert said == "Näinon细胞ok.No,itisnormal."
    assert labels.count(chat.stop(fast)[0]) == 2
    assert all(x in {y, NOT_LEARNT} for x, y in zip(told.labels, told.ids, strict=True))


@pytest.mark.parametrize("answer", ["yes", "No.", "細胞", "1. a\n2. b", "…"])
def test_what_is_asked_is_how_what_is_learnt_begins(pair: tuple[Any, Chat], answer: str) -> None:
    fast, chat = pair
    sample = replace(TALK, images=("a.png",), answer=answer)
    told, prompt = chat.encode(sample, fast, [4], rng()), chat.ask(sample, fast, [4])
    n = len(prompt.ids)
    assert told.ids[:n] == prompt.ids
    assert told.image[:n] == prompt.image
    tail = told.labels[n:-1] if chat.template.after else told.labels[n:]
    assert tail == told.ids[n : n + len(tail)]
    assert set(prompt.labels) == {NOT_LEARNT}


def test_a_caption_follows_its_images_and_is_learnt_with_its_end(llama: Any) -> None:
    told = Chat(template="plain").encode(
        Sample("c", ("a", "b"), "Red cells."), llama, [2, 3], rng()
    )
    caption = llama("Red cells.", add_special_tokens=False).input_ids
    assert told.ids == [1, 0, 0, 0, 0, 0, *caption, 2]
    assert told.labels == [NOT_LEARNT] * 6 + [*caption, 2]
    assert told.show()[:3] == [
        ("read", "<s>"),
        ("image", "<image: 2 tokens>"),
        ("image", "<image: 3 tokens>"),
    ]


def test_an_encoder_reads_the_question_and_a_decoder_learns_the_answer(t5: Any) -> None:
    sample = Sample("q", ("a.png",), "red cells", ("What is it?",))
    chat = Chat(template="flan", prefix="Look: ")
    told = chat.encode(sample, t5, [2], rng(), seq2seq=True)
    assert told.ids == [0, 0, *t5("Look: What is it?").input_ids]
    assert told.labels == t5("red cells").input_ids
    n = len(told.labels)
    counts = f"{len(told.ids) + n} tokens: 2 of images, {n} learnt"
    assert told.show()[-2:] == [("learnt", "red cells</s>"), ("counts", counts)]
    prompt = chat.ask(sample, t5, [2], seq2seq=True)
    assert (prompt.ids, prompt.labels) == (told.ids, [])


def test_only_the_last_of_several_answers_is_the_decoders(t5: Any) -> None:
    told = Chat(template="flan").encode(TALK, t5, [], rng(), seq2seq=True)
    assert learnt(told) == ["No, it is normal.</s>"]
    assert told.text == "Is it a tumour? Näin on 细胞 ok.</s>Sure?</s>"


# --- words that look like marks ----------------------------------------------------------


def test_no_words_of_a_sample_are_special_tokens_or_images(pair: tuple[Any, Chat]) -> None:
    fast, _ = pair
    chat = Chat(template=pair[1].template.name, system="")
    every = " ".join(fast.all_special_tokens)
    nasty = Sample("n", ("a.png",), f"{every} <image> end", (f"<image> {every} what", every, "b"))
    kind = replace(nasty, answer="end", turns=("<image> what", "a", "b"))
    told, plain = (chat.encode(sample, fast, [3], rng()) for sample in (nasty, kind))
    special = {*fast.all_special_ids} - {fast.unk_token_id}

    def marks(one: Encoded) -> list[int]:
        return [i for i, im in zip(one.ids, one.image, strict=True) if not im and i in special]

    assert marks(told) == marks(plain)
    assert sum(told.image) == 3
    assert "<image> end" in told.text
    assert all(mark not in learnt(told)[1].removesuffix(mark) for mark in fast.all_special_tokens)


def test_a_mark_in_the_words_is_no_token_of_a_unigram_vocabulary_either() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    made = Tokenizer(models.Unigram([*pieces, *((c, -3.0) for c in "abcs</>")], unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    marks = {"eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **marks)
    sample = Sample("u", (), "ab </s> c", ("a </s> b",))
    told = Chat(template="flan").encode(sample, fast, [], rng(), seq2seq=True)
    assert (told.ids.count(1), told.labels.count(1)) == (1, 1)
    assert learnt(told) == ["ab < /s> c</s>"]


# --- images, questions, what is said with them -------------------------------------------


def test_as_many_marks_as_images_stand_where_the_turns_say(llama: Any) -> None:
    chat = Chat(template="vicuna-v1", system="")
    sample = Sample("two", ("a", "b"), "yes", ("Is <image> like <image>?",))
    told = chat.encode(sample, llama, [2, 1], rng())
    assert told.text == "<s>USER: Is\n<image>\nlike\n<image>\n? ASSISTANT: yes</s>"
    assert [token.image for token in told.tokens if token.image is not None] == [0, 0, 1]
    for wrong in (("a",), ("a", "b", "c"), ()):
        with pytest.raises(DataError, match=rf"two: 2 <image> marks for {len(wrong)} images"):
            chat.encode(replace(sample, images=wrong), llama, [1] * len(wrong), rng())


def test_images_without_marks_stand_first_last_or_at_random(llama: Any) -> None:
    sample = Sample("s", ("a",), "yes", ("Cells?", "Some.", "More?"))

    def text(place: Any, seed: int = 0) -> str:
        chat = Chat(template="vicuna-v1", system="", place=place)
        return chat.encode(sample, llama, [2], rng(seed)).text.partition(" ASSISTANT")[0]

    first, last = text("first"), text("last")
    assert (first, last) == ("<s>USER: <image>\nCells?", "<s>USER: Cells?\n<image>")
    drawn = [text("random", seed) for seed in range(40)]
    assert {first, last} == set(drawn)
    assert 10 <= drawn.count(first) <= 30


def test_a_sample_without_turns_is_asked_one_of_the_questions(llama: Any) -> None:
    sample = Sample("c", ("a",), "Red cells.")
    chat = Chat(template="vicuna-v1", questions=["What?", "Which?"])
    told = [chat.encode(sample, llama, [1], rng(seed)) for seed in range(20)]
    assert {one.question for one in told} == {"What?", "Which?"}
    assert all(f"<image>\n{one.question} ASSISTANT: Red cells.</s>" in one.text for one in told)
    assert [chat.question(sample, rng(s)) for s in range(20)] == [one.question for one in told]
    assert chat.ask(sample, llama, [1]).question == "What?"
    known = Chat(template="vicuna-v1", questions="describe")
    assert known.encode(sample, llama, [1], rng()).question in read_questions("describe")


def test_the_shipped_questions_are_many_and_all_different() -> None:
    lists = {name: read_questions(name) for name in QUESTIONS}
    assert len(lists["describe"]) >= 21
    every = [question.casefold() for questions in lists.values() for question in questions]
    assert len(set(every)) == len(every)
    assert all(3 < len(q.split()) < 15 and q[-1] in ".?" for q in every)


def test_the_prefix_is_said_before_and_closed_only_after_questions_of_yes_or_no(llama: Any) -> None:
    chat = Chat(template="flan", prefix="You are a pathologist. ", closed="Only yes or no.")
    turns = ("<image>Is it?", "Yes.", "<image>\nWhat is it?", "none", "Again?")
    sample = Sample("s", ("a", "b"), "no", turns)
    said = [
        "You are a pathologist. Is it? Only yes or no.",
        "You are a pathologist. What is it?",
        "You are a pathologist. Again? Only yes or no.",
    ]
    assert chat.question(sample) == " ".join(said)
    told = chat.encode(sample, llama, [1, 1], rng())
    assert told.text == f"<s><image>{said[0]} Yes.</s><image>{said[1]} none</s>{said[2]} no</s>"
    assert chat.ask(replace(sample, answer=""), llama, [1, 1]).question.endswith("Again?")


# --- limits ------------------------------------------------------------------------------


def test_long_questions_and_answers_are_cut_and_a_cut_answer_does_not_learn_to_end(
    llama: Any,
) -> None:
    chat = Chat(template="flan", question_limit=3, answer_limit=2)
    words = "the picture shows many cells with large nuclei"
    ids = llama(words, add_special_tokens=False).input_ids
    cut = [llama.decode(ids[:n]) for n in (3, 2)]
    told = chat.encode(Sample("l", ("a",), words, (words,)), llama, [2], rng())
    assert told.truncated
    assert told.text == f"<s><image>{cut[0]} {cut[1]}</s>"
    assert learnt(told) == [f" {cut[1]}"]
    brief = chat.encode(Sample("b", ("a",), "no", ("the picture",)), llama, [2], rng())
    assert (brief.truncated, learnt(brief)) == (False, [" no</s>"])
    pair = Sample("p", ("a",), "no", (f"{words} <image> {words}",))
    assert chat.encode(pair, llama, [2], rng()).text == f"<s>{cut[0]}<image> no</s>"
    split = Sample("é", (), "no", ("ééééé",))  # each is two tokens, and none is halved
    assert chat.encode(split, llama, [], rng()).text == "<s>é no</s>"


def test_a_decoders_answer_is_cut_too(t5: Any) -> None:
    chat = Chat(template="flan", answer_limit=2)
    sample = Sample("l", (), "many cells with large nuclei", ("what",))
    told = chat.encode(sample, t5, [], rng(), seq2seq=True)
    assert told.labels == t5(sample.answer, add_special_tokens=False).input_ids[:2]
    assert told.truncated


def test_the_limit_takes_words_from_the_end_and_never_images(llama: Any) -> None:
    sample = replace(TALK, images=("a.png",))
    whole = Chat(template="vicuna-v1").encode(sample, llama, [30], rng())
    last = Chat(template="vicuna-v1", place="last", limit=len(whole.ids) - 4)
    told = last.encode(sample, llama, [30], rng())
    assert len(told.ids) == len(whole.ids) - 4
    assert (sum(told.image), told.truncated, whole.truncated) == (30, True, False)
    assert learnt(told)[0] == learnt(whole)[0]
    assert learnt(whole)[1].startswith(learnt(told)[1])
    assert told.show()[-1][1].endswith("learnt, truncated")
    prompt = Chat(template="vicuna-v1", limit=60).ask(sample, llama, [30])
    assert (len(prompt.ids), sum(prompt.image), prompt.truncated) == (60, 30, True)
    assert prompt.ids[0] == 1
    assert prompt.text.endswith("USER: Sure? ASSISTANT:")


def test_a_sample_with_nothing_to_learn_is_an_error_by_name(llama: Any) -> None:
    chat = Chat(template="vicuna-v1", limit=40)
    with pytest.raises(DataError, match=r"talk: nothing of its answers is left; raise chat\.limit"):
        chat.encode(TALK, llama, [], rng())
    with pytest.raises(DataError, match="talk: 50 visual tokens leave no room for words"):
        chat.encode(replace(TALK, images=("a",)), llama, [50], rng())
    for empty in (replace(TALK, answer=" \n"), replace(TALK, turns=("a", "", "b"))):
        with pytest.raises(DataError, match="talk: an answer is empty"):
            chat.encode(empty, llama, [], rng())
    with pytest.raises(DataError, match="talk: 2 turns, but the last turn before the answer"):
        chat.ask(replace(TALK, turns=("a", "b")), llama, [])
    with pytest.raises(DataError, match="talk: 3 turns, but template plain has one turn"):
        Chat(template="plain").encode(TALK, llama, [], rng())
