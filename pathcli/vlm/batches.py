"""Samples in, a batch of the task `generate` out: views, words, and where they meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pathcli.errors import DataError
from pathcli.vlm.model import NOT_LEARNT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

    from pathcli.types import Sample
    from pathcli.vlm.chat import Chat, Encoded
    from pathcli.vlm.connectors import Connector
    from pathcli.vlm.language import HFLanguage
    from pathcli.vlm.towers import Shown, Views


class Examples:
    """Makes batches; which part of an image is shown, and how it is told, follow from `rng`."""

    def __init__(
        self, views: Views, chat: Chat, connector: Connector, language: HFLanguage, count: int
    ) -> None:
        """Take what reads images and words; an image becomes `count` visual tokens."""
        self.views, self.chat, self.connector = views, chat, connector
        self.language, self.count = language, count

    def __call__(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Return a batch to learn from, padded on the right.

        Raises:
            DataError: too many images cannot be read, or a sample has nothing to learn.
        """
        shown = [self.views(sample, rng) for sample in samples]
        told = [self.encode(each.sample, rng) for each in shown]
        return self._batch(shown, told, left=False)

    def ask(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Return a batch to generate answers from, padded on the left.

        Raises:
            DataError: an image cannot be read: another one would be another question.
        """
        shown = [self.views(sample, rng) for sample in samples]
        for sample, each in zip(samples, shown, strict=True):
            if each.sample != sample:
                msg = f"{sample.name}: its image cannot be read, so nothing can be asked of it"
                raise DataError(msg)
        return self._batch(shown, [self._ask(sample) for sample in samples], left=True)

    def encode(self, sample: Sample, rng: np.random.Generator) -> Encoded:
        """Return a sample as it is learnt.

        Raises:
            DataError: nothing of it is learnt, or its marks and images do not agree.
        """
        tokenizer, split = self.language.tokenizer, self.language.seq2seq
        told = self.chat.encode(sample, tokenizer, self._counts(sample), rng, seq2seq=split)
        return self._counted(sample, told)

    def _ask(self, sample: Sample) -> Encoded:
        tokenizer, split = self.language.tokenizer, self.language.seq2seq
        told = self.chat.ask(sample, tokenizer, self._counts(sample), seq2seq=split)
        return self._counted(sample, told)

    def _counts(self, sample: Sample) -> list[int]:
        return [self.count] * len(sample.images)

    def _counted(self, sample: Sample, told: Encoded) -> Encoded:
        """Refuse words whose places for images are not as many as the visual tokens."""
        places, wanted = sum(told.image), sum(self._counts(sample))
        if places != wanted:
            msg = f"{sample.name}: {places} places for {wanted} visual tokens"
            raise DataError(msg)
        return told

    def _batch(
        self, shown: Sequence[Shown], told: Sequence[Encoded], *, left: bool
    ) -> dict[str, Any]:
        there = [[True] * len(one.ids) for one in told]
        batch: dict[str, Any] = {
            "ids": padded([one.ids for one in told], 0, left=left),
            "mask": padded(there, 0, left=left).bool(),
            "image": padded([one.image for one in told], 0, left=left).bool(),
            "labels": padded([one.labels for one in told], NOT_LEARNT, left=left),
        }
        if self.connector.reads:
            pairs = zip(shown, told, strict=True)
            asked = [words.question for each, words in pairs for _ in each.images]
            batch["text"] = self.connector.tokens(asked)
        return batch | self.views.batch(shown)


def padded(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    """Return rows as int64 [n, longest], `value` where a row has ended (or not begun)."""
    longest = max(map(len, rows))
    filled = torch.full((len(rows), longest), value)
    for row, given in zip(filled, rows, strict=True):
        place = slice(longest - len(given), None) if left else slice(len(given))
        row[place] = torch.tensor(given, dtype=torch.int64)
    return filled
