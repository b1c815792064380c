"""A model behind an OpenAI-compatible endpoint (vLLM, Ollama) as what answers questions."""

from __future__ import annotations

import math
from functools import lru_cache
from io import BytesIO
from typing import TYPE_CHECKING

from pathcli.data.images import read_image
from pathcli.errors import UsageError
from pathcli.llm import Client, Message, Picture
from pathcli.store.responses import response_key
from pathcli.vlm.responders import Decoding, Untaught
from pathcli.vlm.turns import pieces
from pathcli.vlm.written import IMAGE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pathcli.endpoints import Budget
    from pathcli.store.responses import Responses
    from pathcli.types import ImageRef, Sample

ENCODED = "whole images as PNG, upright, RGB"
"""How images are sent; part of the digest."""
SEEN = 32
"""So many images are kept as they were sent."""


class EndpointResponder(Untaught):
    """A model of an endpoint. Questions and images go to its address and nowhere else."""

    def __init__(
        self, url: str, *, kept: Responses | None = None, budget: Budget | None = None
    ) -> None:
        """Take an address, `http://HOST/v1#NAME`; without #NAME its only model.

        Args:
            url: the address.
            kept: where answers are looked for and kept.
            budget: what may be spent.

        Raises:
            UsageError: not an address, or it serves several models and none is named.
            ResourceError: the endpoint does not answer.
        """
        self.batch = 8
        self.client = Client(url, kept=kept, budget=budget, workers=self.batch)
        self.name = f"{self.client.base}#{self.client.model}"
        served = f"{self.client.base} serves as {self.client.model}"
        self.scope = f"whatever {served}, and nobody has measured here"
        self.digest = response_key(self.client.base, self.client.model, ENCODED)
        self.decoding = Decoding(max_new_tokens=512)
        self._picture = lru_cache(SEEN)(_picture)

    def prompt(self, sample: Sample) -> str:
        """Return the conversation as it is sent, each turn after its role.

        Raises:
            DataError: nothing is asked, or marks and images differ.
        """
        turns = [" ".join(turn) for turn in pieces(sample)]
        roles = ("user", "assistant")
        return "\n".join(f"{roles[n % 2]}: {turn}" for n, turn in enumerate(turns))

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        """Yield answers in order; see `Responder.answer` and, for errors, `Client.ask`.

        Raises:
            UsageError: beams or a least length are asked for, which endpoints do not have.
        """
        decoding = decoding or self.decoding
        if decoding.beams > 1 or decoding.min_new_tokens:
            msg = f"{self.name}: an endpoint answers greedily, without beams and least length"
            raise UsageError(msg)
        said = (self._messages(sample) for sample in samples)
        yield from self.client.ask_all(said, max_tokens=decoding.max_new_tokens)

    def likelihoods(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]] | None:
        """Return log-probabilities of options of one token (yes, no, letters) as first words.

        The ways to write an option (`yes`, ` Yes`) are added up. One that is not among the
        likeliest tokens is taken to be as likely as the last of them, which is the most it can
        be. None where an option is longer, or the endpoint gives no log-probabilities.

        Raises:
            DataError: an image cannot be read.
        """
        import numpy as np  # noqa: PLC0415

        if not all(_single(option) for row in options for option in row):
            return None
        found: list[NDArray[np.float64]] = []
        for sample, row in zip(samples, options, strict=True):
            top = self.client.first_tokens(self._messages(sample))
            if top is None:
                return None
            found.append(np.array([_logprob(option, top) for option in row]))
        return found

    def _messages(self, sample: Sample) -> list[Message]:
        images = iter(sample.images)
        turns: list[Message] = []
        for number, turn in enumerate(pieces(sample)):
            parts = [self._picture(next(images)) if part == IMAGE else part for part in turn]
            turns.append(Message("assistant" if number % 2 else "user", tuple(parts)))
        return turns


def _picture(ref: ImageRef) -> Picture:
    from PIL import Image  # noqa: PLC0415

    file = BytesIO()
    Image.fromarray(read_image(ref)).save(file, "PNG")
    return Picture(file.getvalue())


def _single(option: str) -> bool:
    """Tell whether an option is one token of every vocabulary there is."""
    return option.lower() in {"yes", "no"} or (
        len(option) == 1 and option.isascii() and option.isalnum()
    )


def _logprob(option: str, top: dict[str, float]) -> float:
    alike = [math.exp(v) for token, v in top.items() if token.strip().lower() == option.lower()]
    return math.log(sum(alike)) if alike else min(top.values())
