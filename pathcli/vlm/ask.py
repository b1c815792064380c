"""Images and a question in, an answer out, with what it is worth beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pathcli.data.images import image_name
from pathcli.errors import UsageError
from pathcli.types import Answer, Sample
from pathcli.vlm.asked import YES_NO, allowed, matched, probabilities
from pathcli.vlm.responders import SHIPPED, open_responder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pathcli.types import ImageRef
    from pathcli.vlm.responders import Decoding, Responder

AT_ONCE = 16  # questions: what is encoded of their images is still there for all of it
UNKNOWN = "outside what this model was trained on"


def ask(
    images: Sequence[str | Path],
    question: str,
    *,
    model: str | Path = SHIPPED,
    device: str = "auto",
    load: str = "auto",
    max_new_tokens: int | None = None,
) -> Answer:
    """Return the answer of a vision-language model to one question. Research use only.

    Args:
        images: files of images, shown together; a model may have been trained on one at a time.
        question: in plain words.
        model: clover-mini, a run's folder, hf:ID or an endpoint; see `pathcli.vlm.responders`.
        device: auto, cpu, cuda, cuda:1 or mps.
        load: the language model's numbers.
        max_new_tokens: most tokens of the answer.

    Raises:
        UsageError: nothing is asked, or the model is none.
        DataError: an image is not there, or cannot be read.
        ResourceError: a run or weights are not here.
    """
    refs = tuple(str(image) for image in images)
    if not refs or not question.strip():
        msg = "ask takes an image and a question: pathcli ask img.png 'what tissue?'"
        raise UsageError(msg)
    responder = open_responder(str(model), device=device, load=load)
    return Talk(refs, responder, max_new_tokens)(question)


class Talk:
    """Questions about the same images, each told with those before it and their answers."""

    def __init__(
        self, images: Sequence[str], responder: Responder, max_new_tokens: int | None = None
    ) -> None:
        """Begin without history."""
        self.images, self.responder, self.turns = tuple(images), responder, tuple[str, ...]()
        self.decoding = limited(responder.decoding, max_new_tokens)

    def __call__(self, question: str) -> Answer:
        """Return the answer to the next question; one that is not given is not remembered.

        Raises:
            DataError: an image cannot be read.
        """
        sample = Sample(self.images[0], self.images, turns=(*self.turns, question))
        (found,) = answers([sample], self.responder, self.decoding)
        if found.text and not found.abstained:
            self.turns = (*sample.turns, found.text)
        return found


def limited(decoding: Decoding, max_new_tokens: int | None) -> Decoding:
    """Return a model's settings with at most so many tokens, where a number is given."""
    if max_new_tokens is None:
        return decoding
    least = min(decoding.min_new_tokens, max_new_tokens)
    return replace(decoding, max_new_tokens=max_new_tokens, min_new_tokens=least)


def answers(
    samples: Sequence[Sample], responder: Responder, decoding: Decoding | None = None
) -> list[Answer]:
    """Return an answer to each sample's last question, or the reason that there is none.

    A model that can tell abstains where an image is unlike those it was trained on. Where the
    question says which answers it allows, or the answer is one of those the model was taught,
    the probabilities of all of them are given. A calibrated model then says the most probable
    one, and how sure it is: but of one image, and without questions before, as it was calibrated.

    Raises:
        DataError: an image cannot be read.
    """
    parts = [samples[i : i + AT_ONCE] for i in range(0, len(samples), AT_ONCE)]
    return [found for part in parts for found in _answers(part, responder, decoding)]


def _answers(
    samples: Sequence[Sample], responder: Responder, decoding: Decoding | None
) -> list[Answer]:
    refs = list(dict.fromkeys(ref for sample in samples for ref in sample.images))
    strange = set(responder.unfamiliar(refs))
    samples = [told(sample, responder.taught) for sample in samples]
    known = [sample for sample in samples if strange.isdisjoint(sample.images)]
    texts = dict(zip(map(id, known), responder.answer(known, decoding), strict=True))
    options = {id(s): _options(s, texts[id(s)], responder.taught) for s in known}
    weighed = [s for s in known if options[id(s)]]
    found = probabilities(responder, weighed, [options[id(s)] for s in weighed]) or []
    scores = {id(s): row.tolist() for s, row in zip(weighed, found, strict=False)}

    def of(sample: Sample) -> Answer:
        if id(sample) not in texts:
            seen = _names([ref for ref in sample.images if ref in strange])
            return Answer(UNKNOWN, abstained=True, scope=responder.scope, evidence=seen)
        text, allow = texts[id(sample)], options[id(sample)]
        each = dict(zip(allow, scores.get(id(sample), ()), strict=False))
        sure, seen = None, _names(sample.images)
        if responder.temperature and each and len(sample.turns) == len(sample.images) == 1:
            text = max(each, key=lambda option: each[option])
            sure = each[text]
        return Answer(text, False, responder.scope, seen, sure, each)  # noqa: FBT003

    return [of(sample) for sample in samples]


def told(sample: Sample, taught: Sequence[Sequence[str]]) -> Sample:
    """Return a sample that says, where it is so, that yes or no is wanted; never what is right.

    Models that were taught so are told it in words, as CLOVER is.
    """
    closed = allowed(sample.turns[-1], taught) == YES_NO
    return replace(sample, answer=YES_NO[0]) if closed else sample


def _options(sample: Sample, text: str, taught: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Return the answers that a question allows, or among which a model that was taught chose."""
    if options := allowed(sample.turns[-1], taught):
        return options
    return next((tuple(some) for some in taught if matched(text, some)), ())


def _names(refs: Sequence[ImageRef]) -> tuple[str, ...]:
    return tuple(image_name(ref) for ref in refs)
