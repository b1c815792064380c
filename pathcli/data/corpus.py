"""What a recipe's data become: samples to learn from, samples to validate on, and their texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from pathcli.types import Sample


@dataclass(frozen=True)
class Corpus:
    """Images and texts of one run, split so that no group is on both sides.

    `dropped` says why rows were left out, and how many; `digest` names the data; `wordings`
    are the texts a label may be called by, one of which is drawn each time an image is seen
    (samples without a label are called by their `answer`); `prompts` are the texts by which
    validation tells the labels apart.
    """

    train: Sequence[Sample]
    val: Sequence[Sample]
    digest: str
    dropped: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    wordings: Mapping[str, Sequence[str]] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def caption(self, sample: Sample, rng: np.random.Generator) -> str:
        """Return the text an image is shown with this time."""
        texts = self.wordings.get(sample.label) or (sample.answer,)
        return texts[int(rng.integers(len(texts)))]


class CorpusData(Protocol):
    """The section `data` of a recipe on images and texts."""

    def corpus(self) -> Corpus:
        """Read what is to be read once: tables and indices, no pixels.

        Raises:
            DataError: a table is wrong, or nothing is left of it.
            ResourceError: a file is not there.
        """
        ...
