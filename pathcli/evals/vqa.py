"""Questions and a model in, its answers out, each asked once and kept; or a file of answers."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np

from pathcli.data.formats.source import plain
from pathcli.data.formats.tables import pick, read_rows
from pathcli.data.images import read_image
from pathcli.errors import DataError, UsageError
from pathcli.evals.vqa_cards import prompt_of
from pathcli.evals.vqa_data import MISSING, with_images
from pathcli.evals.vqa_judge import WORDS, judge, judge_interval, refuse_unless_open
from pathcli.evals.vqa_scores import Answered, Outcome, Prediction, measure_vqa
from pathcli.evals.vqa_tokens import token_rules
from pathcli.llm import Client
from pathcli.metrics.answers import orders
from pathcli.store.responses import Responses, response_key
from pathcli.types import Sample, silent
from pathcli.weights import sha256

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from pathcli.endpoints import Budget
    from pathcli.evals.vqa_cards import Prompt
    from pathcli.evals.vqa_data import Question, QuestionSet
    from pathcli.metrics.statistics import Interval
    from pathcli.types import ImageRef, Progress
    from pathcli.vlm.responders import Decoding, Responder

TEXT = ("prediction", "predict_ans", "text")
"""What a column of answers may be called: ours, CLOVER's, LLaVA's."""

_CLOSED = "yes"  # told of every closed question: that it is one, never what is right
_OURS = "predictions"  # what each of our reports calls the file: its folder says whose it is
_INT = {"max_new_tokens", "min_new_tokens", "beams"}


def evaluate(
    whole: QuestionSet,
    *,
    limit: int | None = None,
    missing: float = MISSING,
    model: Callable[[], Responder] | None = None,
    responses: Path = Path("responses.jsonl"),
    prompt: str | None = None,
    permute: int = 1,
    blind: bool = False,
    predictions: Path | None = None,
    rival: Path | None = None,
    judged_by: str | None = None,
    budget: Budget | None = None,
    tokens_of: str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Ask a model the questions of a set, or take a file of answers, and measure.

    Args:
        whole: the questions, as `read_questions` returns them.
        limit: so many questions only, the first.
        missing: share of questions whose image may be missing.
        model: opens the model, once the questions are known to be whole; None with `predictions`.
        responses: where answers are kept; see `run_vqa`.
        prompt: a name of assets/vqa/prompts.yaml (default: the model's or the set's own).
        permute: in how many orders options are shown.
        blind: ask once more with other questions' images.
        predictions: a file of answers, instead of a model.
        rival: another file of answers to the same questions, to compare with.
        judged_by: the address of a language model that marks open answers; see `vqa_judge`.
        budget: what the judge may spend.
        tokens_of: a language model whose tokens are counted as well; see `vqa_tokens`.
        progress: called with (answers, of all).

    Raises:
        PathcliError: as `with_images`, `run_vqa` and `read_predictions` do.
    """
    if (model is None) == (predictions is None):
        msg = "give a model, or the file of its answers as --predictions"
        raise UsageError(msg)
    asked = whole.first(limit)
    if model is not None:
        asked = with_images(asked, missing=missing)
        _askable(asked, prompt, permute, blind=blind)
    marker = _marker(asked, judged_by, responses, budget)
    theirs = read_predictions(rival, asked, whole) if rival else None
    blinded, more = None, token_rules(tokens_of)
    if model is not None:
        responder = model()
        words = prompt_of(prompt, whole.card, responder.name)
        facts, given = _facts(asked, responder, words), (asked, responder, responses, words)
        ours = run_vqa(*given, permute=permute, progress=progress)
        blinded = run_vqa(*given, blind=True, progress=progress) if blind else None
    elif predictions is not None:
        ours = read_predictions(predictions, asked, whole)
        facts = {"predictions": str(predictions), "sha256": sha256(predictions)}
    marks, told = _judged(ours := replace(ours, more=more), marker)
    facts |= _of_rival(rival) | told
    return Outcome(ours, measure_vqa(ours) | marks, blinded, theirs, facts)


def _of_rival(path: Path | None) -> dict[str, Any]:
    return {"compared_with_file": str(path), "compared_with_sha256": sha256(path)} if path else {}


def _marker(
    asked: QuestionSet, address: str | None, responses: Path, budget: Budget | None
) -> Client | None:
    """Return what marks open answers; what is wrong with it is said before any model is opened."""
    if address is None:
        return None
    refuse_unless_open(asked)
    return Client(address, kept=Responses(responses), budget=budget)


def _judged(ours: Answered, marker: Client | None) -> tuple[dict[str, Interval], dict[str, Any]]:
    if marker is None:
        return {}, {}
    found = judge(ours, marker)
    told = {"judge": found.judge, "judge_prompt": WORDS, "judge_unread": found.unread}
    return {"judge": judge_interval(ours, found)}, told


def _facts(asked: QuestionSet, responder: Responder, prompt: Prompt) -> dict[str, Any]:
    return {
        "model": responder.name,
        "model_digest": responder.digest,
        "scope": responder.scope,
        "decoding": decoding_of(responder, prompt).options(),
        "prompt": prompt.name,
        "prompt_about": prompt.about,
        "prompt_source": prompt.source,
        "as_read": {
            kind: {"id": name, "text": text}
            for kind, (name, text) in sample_prompts(asked, responder, prompt).items()
        },
    }


# --- asking ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asking:
    """One asking of a question: what the model is given, and the order of its options."""

    question: Question
    order: tuple[int, ...]
    sample: Sample


def run_vqa(
    asked: QuestionSet,
    responder: Responder,
    responses: Path,
    prompt: Prompt,
    *,
    permute: int = 1,
    blind: bool = False,
    progress: Progress | None = None,
) -> Answered:
    """Ask a model what it was not asked before, and return all its answers.

    Args:
        asked: questions whose images were found.
        responder: the model.
        responses: the JSONL file where answers are kept as they come, by digests of model,
            prompt, images and decoding: an interrupted run goes on, and nothing is asked twice.
        prompt: the words questions are put in.
        permute: in how many orders of its options each question that has any is asked; the
            first is as given, and the next ones shift it, so each option stands at each place.
        blind: show another question's images instead, to see what words alone give away.
        progress: called with (answers, of all).

    Raises:
        UsageError: nothing to permute, or a single image to be blind with.
        DataError: an image cannot be read; the questions answered so far are kept.
    """
    _permutable(asked, permute)
    digests = _digests(dict.fromkeys(q.images for q in asked.questions))
    shown = _others(asked, digests) if blind else {}
    askings = [
        _asking(q, order, prompt, shown.get(q.images, q.images))
        for q in asked.questions
        for order in (orders(len(q.options), permute) if permute > 1 and q.options else [()])
    ]
    decoding = decoding_of(responder, prompt)
    kept, told = Responses(responses), progress or silent
    texts = _answers(askings, digests, responder, kept, decoding, progress=told)
    answers: dict[str, list[Prediction]] = {q.id: [] for q in asked.questions}
    for asking, text in zip(askings, texts, strict=True):
        name = asking.question.id
        answers[name].append(Prediction(name, text, asking.order))
    name = f"{responder.name}, blind" if blind else responder.name
    return Answered(asked, {key: tuple(said) for key, said in answers.items()}, name)


def _askable(asked: QuestionSet, prompt: str | None, permute: int, *, blind: bool) -> None:
    """Refuse what no model could be asked, before one is opened."""
    _permutable(asked, permute)
    prompt_of(prompt, asked.card)
    if blind:
        _refuse_one_image(asked, len({q.images for q in asked.questions}))


def _permutable(asked: QuestionSet, permute: int) -> None:
    if permute > 1 and not any(q.options for q in asked.questions):
        msg = f"--permute: no question of {asked.name} has options to put in another order"
        raise UsageError(msg)
    for question in asked.questions if permute > 1 else ():
        letters = ascii_uppercase[: len(question.options)]
        if bad := [text for text in question.options if text.strip(" .():").upper() in [*letters]]:
            msg = (
                f"--permute: of question {question.id} {bad[0]!r} is an option and the letter of "
                "another; in another order nobody knows which is meant"
            )
            raise UsageError(msg)


def decoding_of(responder: Responder, prompt: Prompt) -> Decoding:
    """Return the model's own settings of generation, with what a prompt's authors set."""
    given = {k: int(v) if k in _INT else v for k, v in prompt.decoding.items()}
    return replace(responder.decoding, **given)  # type: ignore[arg-type]  # checked by name


def sample_prompts(
    asked: QuestionSet, responder: Responder, prompt: Prompt
) -> dict[str, tuple[str, str]]:
    """Return for each kind of question an example's id, and all that the model reads of it."""
    first: dict[str, Question] = {}
    for question in asked.questions:
        first.setdefault(question.kind, question)
    return {
        kind: (q.id, responder.prompt(_asking(q, (), prompt, q.images).sample))
        for kind, q in sorted(first.items())
    }


def _asking(
    question: Question, order: tuple[int, ...], prompt: Prompt, images: tuple[ImageRef, ...]
) -> Asking:
    marker = _CLOSED if question.kind == "closed" else ""
    turns = (prompt.words(question, order),)
    return Asking(question, order, Sample(question.id, images, marker, turns))


def _answers(
    askings: Sequence[Asking],
    digests: Mapping[tuple[ImageRef, ...], str],
    responder: Responder,
    kept: Responses,
    decoding: Decoding,
    *,
    progress: Progress,
) -> list[str]:
    """Return the answer to each asking; those not kept yet are asked image by image."""
    settings = json.dumps(decoding.options(), sort_keys=True)
    keys = [
        response_key(
            responder.digest, responder.prompt(a.sample), digests[a.sample.images], settings
        )
        for a in askings
    ]
    todo = {key: a for key, a in zip(keys, askings, strict=True) if kept.get(key) is None}
    progress(len(keys) - len(todo), len(keys))
    by_image = sorted(todo.items(), key=lambda item: digests[item[1].sample.images])
    said = responder.answer([asking.sample for _, asking in by_image], decoding)
    done = len(keys) - len(todo)
    for (key, asking), text in zip(by_image, said, strict=True):
        kept.put(key, text, id=asking.question.id, model=responder.name, order=asking.order)
        done += 1
        progress(done, len(keys))
    return [kept.get(key) or "" for key in keys]


def _digests(shown: Iterable[tuple[ImageRef, ...]]) -> dict[tuple[ImageRef, ...], str]:
    """Return the SHA-256 over the pixels of images that are shown together.

    Raises:
        DataError: an image cannot be read; no question has been asked by then.
    """
    of_image: dict[ImageRef, str] = {}
    found: dict[tuple[ImageRef, ...], str] = {}
    for images in shown:
        for ref in images:
            of_image[ref] = of_image.get(ref) or image_digest(ref)
        found[images] = " ".join(of_image[ref] for ref in images)
    return found


def image_digest(ref: ImageRef) -> str:
    """Return the SHA-256 over an image's size and pixels.

    Raises:
        DataError: it cannot be read.
    """
    pixels = read_image(ref)
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def _others(
    asked: QuestionSet, digests: Mapping[tuple[ImageRef, ...], str]
) -> dict[tuple[ImageRef, ...], tuple[ImageRef, ...]]:
    """Return for each question's images others, of other pixels, each picture used once.

    Raises:
        UsageError: there is one image alone.
    """
    pictures = {digests[q.images]: q.images for q in asked.questions}
    _refuse_one_image(asked, len(pictures))
    known = list(pictures)
    mixed = [known[i] for i in np.random.default_rng(0).permutation(len(known))]
    after = dict(zip(mixed, [*mixed[1:], mixed[0]], strict=True))
    return {q.images: pictures[after[digests[q.images]]] for q in asked.questions}


def _refuse_one_image(asked: QuestionSet, pictures: int) -> None:
    if pictures == 1:
        msg = f"--blind: {asked.name} has one image; another is needed to take its place"
        raise UsageError(msg)


# --- files of answers --------------------------------------------------------------------


def read_predictions(path: Path, asked: QuestionSet, whole: QuestionSet | None = None) -> Answered:
    """Return what any model wrote: a table {id, prediction}, and {order} where it was permuted.

    Where `asked` is a part of the `whole` set, answers to the rest of it are passed over.

    Raises:
        ResourceError: it is not there.
        DataError: an id the set does not have, or one that is missing or told twice.
    """
    known = {q.id: q for q in asked.questions}
    answers: dict[str, dict[tuple[int, ...], Prediction]] = {name: {} for name in known}
    rest, strange = {q.id for q in whole.questions} if whole else set(), list[str]()
    for number, row in enumerate(read_rows(path), start=1):
        name, text = plain(pick(row, ("id", "question_id", "qid"))), pick(row, TEXT)
        if not name or text is None:
            msg = f"{path}: record {number} needs id and prediction, it has {', '.join(row)}"
            raise DataError(msg)
        if name not in known:
            strange += [name] if name not in rest else []
            continue
        order = _order(row.get("order"), known[name], path)
        if order in answers[name]:
            msg = f"{path}: id {name!r} has two predictions; keep one"
            raise DataError(msg)
        answers[name][order] = Prediction(name, str(text), order)
    lacks = [name for name, said in answers.items() if not said]
    if strange or lacks:
        told = [
            f"{len(some)} ids {what} (the first: {some[0]!r})"
            for some, what in ((strange, f"are not of {asked.name}"), (lacks, "have no prediction"))
            if some
        ]
        rule = f"ids are those of {asked.source}, else its rows counted from 0"
        msg = f"{path}: {', and '.join(told)}; {rule}"
        raise DataError(msg)
    model = path.resolve().parent.name if path.stem == _OURS else path.stem
    return Answered(asked, {key: tuple(said.values()) for key, said in answers.items()}, model)


def _order(told: object, question: Question, path: Path) -> tuple[int, ...]:
    """Return the order that a file tells, as a list or in JSON."""
    if told is None or told == "":
        return ()
    with suppress(ValueError):
        told = json.loads(told) if isinstance(told, str) else told
    places = isinstance(told, list) and all(type(place) is int for place in told)
    if places and sorted(told) in ([], [*range(len(question.options))]):  # type: ignore[call-overload]
        return tuple(told)  # type: ignore[arg-type]
    msg = f"{path}: id {question.id!r}: order {told!r} is none of its options, from 0 on"
    raise DataError(msg)


def prediction_lines(answered: Answered) -> Iterator[str]:
    """Yield a line of JSON an answer: what `read_predictions` reads, and what was asked."""
    for question in answered.questions:
        for said in answered.answers[question.id]:
            row: dict[str, object] = {"id": said.id, "prediction": said.text}
            row |= {"order": list(said.order)} if said.order else {}
            row |= {"question": question.question, "answer": question.answer}
            yield json.dumps(row, ensure_ascii=False)
