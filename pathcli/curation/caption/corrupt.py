"""Good captions in, examples for the revise agent out: wrong captions and what mends them.

A share is left as it is, so that the agent learns to change nothing. What restores a caption is
found, not written by anybody: making the edits gives back the good one to the letter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pathcli.curation.caption.agents import again, asked, filled, prompts, user
from pathcli.curation.caption.revise import (
    SCHEMA,
    Spoilt,
    read_edits,
    spoil,
    spoil_by_rule,
    written,
)
from pathcli.errors import DataError, UsageError
from pathcli.types import digest
from pathcli.weights import asset
from pathcli.yaml12 import read_mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pathcli.curation.models import Model
    from pathcli.llm import Message
    from pathcli.types import Sample

    Drawn = Callable[[Sample], np.random.Generator | None]

UNTOUCHED = 0.15
"""Share of captions that are left right (ours: what PathGen did is not told)."""

_LIMIT = 600  # tokens of a model's operations


def corrupted(
    samples: Iterable[Sample],
    drop: Callable[[Sample, str], None],
    *,
    model: Model | None = None,
    untouched: float = UNTOUCHED,
    seed: int = 1,
) -> Iterator[Sample]:
    """Yield a sample for each caption: the revise agent's prompt, answered by operations.

    Args:
        samples: images and captions.
        drop: told of a caption that was not spoilt, and why.
        model: makes the mistakes; without it they follow rules (assets/curation/contrasts.yaml).
        untouched: share of captions left right, whose answer is an empty list.
        seed: of every draw; what becomes of a caption depends on it and on its sample alone.

    Raises:
        UsageError: a share outside 0 to 1.
        ResourceError: the model's endpoint or its budget is gone.
    """
    if not 0 <= untouched <= 1:
        msg = f"the share left untouched is 0 to 1, not {untouched:g}"
        raise UsageError(msg)
    words = prompts()

    def drawn(sample: Sample) -> np.random.Generator | None:
        """Return what draws the mistakes of a caption, None where it stays right."""
        rng = np.random.default_rng([seed, int(digest([sample.name, sample.answer]), 16)])
        return rng if rng.random() >= untouched else None

    pairs = _by_rule(samples, drawn) if model is None else _by_model(samples, drawn, model, words)
    for sample, found in pairs:
        if isinstance(found, str):
            drop(sample, found)
            continue
        turn = filled(words["revise"], caption=found.caption)
        yield replace(sample, turns=(turn,), answer=written(found.edits))


def _by_rule(samples: Iterable[Sample], drawn: Drawn) -> Iterator[tuple[Sample, Spoilt | str]]:
    rules = read_mapping(asset("curation/contrasts.yaml"), "must be a mapping")
    for sample in samples:
        found: Spoilt | str = Spoilt(sample.answer)
        if (rng := drawn(sample)) is not None:
            try:
                found = spoil_by_rule(sample.answer, rules["contrasts"], rules["claims"], rng)
            except DataError as error:
                found = str(error)
        yield sample, found


def _by_model(
    samples: Iterable[Sample], drawn: Drawn, model: Model, words: Mapping[str, str]
) -> Iterator[tuple[Sample, Spoilt | str]]:
    def conversation(sample: Sample) -> list[Message] | None:
        ask = [user(filled(words["corrupt"], caption=sample.answer))]
        return None if drawn(sample) is None else ask

    for sample, said, reply in asked(model, samples, conversation, _LIMIT, SCHEMA):
        if reply is None:
            yield sample, Spoilt(sample.answer)
            continue
        found = reply.fault or _spoilt(sample, reply.text)
        if isinstance(found, str) and not reply.fault:
            why = filled(words["again"], fault=found)
            second = again(model, said, reply.text, why, _LIMIT, SCHEMA)
            found = second.fault or _spoilt(sample, second.text)
        yield sample, found


def _spoilt(sample: Sample, reply: str) -> Spoilt | str:
    """Return a caption after a model's mistakes, or what is wrong with them."""
    try:
        edits = read_edits(reply)
        found = spoil(sample.answer, edits)
    except DataError as error:
        return str(error)
    return found if edits else "an empty list spoils nothing"
