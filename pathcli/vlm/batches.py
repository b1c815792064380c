"""Samples in, a batch of the task `generate` out: views, words, and where they meet."""

from __future__ import annotations

import logging
from itertools import chain
from multiprocessing import Array
from typing import TYPE_CHECKING, Any

import torch

from pathcli import processes
from pathcli.errors import DataError
from pathcli.types import digest
from pathcli.vlm.model import NOT_LEARNT

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from torch import Tensor

    from pathcli.types import Sample
    from pathcli.vlm.chat import Chat, Encoded
    from pathcli.vlm.connectors import Connector
    from pathcli.vlm.language import HFLanguage
    from pathcli.vlm.towers import Seeing, Shown


log = logging.getLogger("pathcli")

_WARM_UP = 1000
"""Samples before which a share of bad ones says little; as of images."""


class StandIns:
    """Counts samples that cannot be told, too long ones say, and names others in their place.

    Which ones is a function of the bad sample alone, so that a resumed run sees the same. The
    counts are of all that made batches since this process began, loaders' workers among them.
    """

    def __init__(self, samples: Sequence[Sample], most: float) -> None:
        """Draw from `samples`, and bear a share of `most` that cannot be told."""
        self.samples, self.most = samples, most
        self._counts: Any = Array("q", 2)  # bad and tried, shared with the workers
        self._named: set[str] = set()

    @property
    def counts(self) -> tuple[int, int]:
        """How many samples could not be told, and how many were tried, in all processes."""
        here: list[tuple[int, int]] = processes.all_of(tuple(self._counts))
        return sum(bad for bad, _ in here), sum(tried for _, tried in here)

    def others(self, sample: Sample) -> Iterator[Sample]:
        """Yield what may stand in for a sample, one after the other."""
        start = int(digest([sample.name, *sample.turns, sample.answer]), 16)
        count = len(self.samples)
        found = (self.samples[(start + step) % count] for step in range(count))
        return (other for other in found if other != sample)

    def count(self, sample: Sample, error: DataError | None = None) -> None:
        """Count a sample that was tried, with what was wrong with it.

        Raises:
            DataError: more than the share that is borne are bad.
        """
        with self._counts.get_lock():
            self._counts[0] += error is not None
            self._counts[1] += 1
            bad, tried = self._counts
        if error is None:
            return
        if sample.name not in self._named:
            self._named.add(sample.name)
            log.warning("cannot be told, another sample is used instead: %s", error)
        if bad > self.most * max(tried, min(_WARM_UP, len(self.samples))):
            msg = (
                f"{error}; {bad} of {tried} samples cannot be told, more than "
                f"data.max_broken={self.most:g}; raise chat.limit, mend the data, or raise it"
            )
            raise DataError(msg) from error


class Examples:
    """Makes batches; which part of an image is shown, and how it is told, follow from `rng`."""

    def __init__(
        self,
        views: Seeing,
        chat: Chat,
        connector: Connector,
        language: HFLanguage,
        count: int,
        *,
        others: StandIns | None = None,
    ) -> None:
        """Take what reads images and words; an image becomes `count` visual tokens.

        Without `others` a sample that cannot be told is an error.
        """
        self.views, self.chat, self.connector = views, chat, connector
        self.language, self.count, self.others = language, count, others

    def __call__(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Return a batch to learn from, padded on the right.

        Raises:
            DataError: too many images cannot be read, or too many samples be told.
        """
        shown = [self.views(sample, rng) for sample in samples]
        pairs = [self._told(each, rng) for each in shown]
        return self._batch([each for each, _ in pairs], [told for _, told in pairs], left=False)

    def learnt(self, sample: Sample, rng: np.random.Generator) -> Sample:
        """Return the sample itself, or what stands in for it in a batch.

        Raises:
            DataError: as for a batch.
        """
        return self._told(self.views(sample, rng), rng)[0].sample

    def _told(self, shown: Shown, rng: np.random.Generator) -> tuple[Shown, Encoded]:
        """Return a sample as it is shown and told, or another one that can be."""
        if self.others is None:
            return shown, self.encode(shown.sample, rng)
        instead = (self.views(sample, rng) for sample in self.others.others(shown.sample))
        for each in chain([shown], instead):
            if (told := self.tried(each.sample, rng)) is not None:
                return each, told
        msg = f"{shown.sample.name}: cannot be told, nor can any other sample"
        raise DataError(msg)

    def tried(self, sample: Sample, rng: np.random.Generator) -> Encoded | None:
        """Return a sample as it is learnt; None, and it is counted, for one that cannot be told.

        Raises:
            DataError: there are too many of them.
        """
        assert self.others is not None  # noqa: S101 - a call that makes no sense
        try:
            told = self._said(sample, rng)
        except DataError as error:
            self.others.count(sample, error)
            return None
        self.others.count(sample)
        return self._counted(sample, told)

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
        return self._counted(sample, self._said(sample, rng))

    def _said(self, sample: Sample, rng: np.random.Generator) -> Encoded:
        tokenizer, split = self.language.tokenizer, self.language.seq2seq
        return self.chat.encode(sample, tokenizer, self._counts(sample), rng, seq2seq=split)

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
            asked = [words.question for each, words in pairs for _ in each.sample.images]
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
