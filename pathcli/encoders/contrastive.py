"""The task `contrastive`: images and their texts in, one space for both out (Radford et al. 2021).

`train.choose` may name what `Validation` measures.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from pathcli.data.pairs import Pictures, pictures_of
from pathcli.encoders.augment import Augment
from pathcli.encoders.imageset import centre_square
from pathcli.encoders.pairs import Batches, Loss, Pairs, meaning, moved
from pathcli.errors import DataError, UsageError
from pathcli.metrics.classification import balanced_accuracy
from pathcli.registry import did_you_mean
from pathcli.settings import TrainSettings, order
from pathcli.trainer import Work
from pathcli.types import digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from pathcli.data.corpus import Corpus, CorpusData
    from pathcli.encoders.pairs import ImageTextModel
    from pathcli.store import Store
    from pathcli.types import ByteArray, Progress, Sample

    Started = Callable[[str], Progress]

CHOICES = (
    "balanced_accuracy",
    *(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)),
)
"""What `train.choose` may name: the first for data with prompts, the others for all else."""
VALIDATED = 2_000
"""Validation sees at most so many samples, drawn once."""
COUNTED = 10_000
"""So many training captions, evenly spaced, are looked at for their length and for repeats."""
_REPEATS = 0.01


def objective(*, kind: Loss = "infonce") -> str:
    """Build the section `loss`: `infonce`, or `multi-positive` for captions that repeat."""
    return kind


class ContrastiveTask:
    """Learning images and texts together; the recipe's sections are its arguments."""

    @property
    def judge(self) -> type[Validation]:
        """What validates."""
        return Validation

    def __init__(
        self,
        *,
        model: ImageTextModel,
        data: CorpusData,
        train: TrainSettings,
        augment: Augment = Augment(),  # noqa: B008 - frozen
        loss: Annotated[Loss, objective] = "infonce",
    ) -> None:
        """Keep the parts; nothing is read before `prepare`.

        Raises:
            UsageError: `train.choose` names no metric, or a batch has nothing to contrast.
        """
        if train.choose not in {None, *CHOICES}:
            msg = f"train.choose: {train.choose!r} is no validation metric: "
            raise UsageError(msg + did_you_mean(str(train.choose), list(CHOICES)))
        if train.batch < 2:  # noqa: PLR2004 - an image needs another's text
            msg = f"train.batch: at least 2, as other rows are the negatives, not {train.batch}"
            raise UsageError(msg)
        if train.chunk and train.chunk > train.batch:
            msg = f"train.chunk: pieces of {train.chunk} rows of a batch of {train.batch}"
            raise UsageError(msg)
        self.model, self.data, self.train = model, data, train
        self.augment, self.loss = augment, loss
        self._corpus: Corpus | None = None
        self._seen: dict[str, int] = {}

    @property
    def corpus(self) -> Corpus:
        """The samples in use; known after `prepare`."""
        if self._corpus is None:
            msg = "call prepare first"
            raise RuntimeError(msg)
        return self._corpus

    def prepare(self, store: Store, *, device: str = "auto", progress: Started) -> None:
        """Read the tables of the data, and look how long the captions are; no pixels yet.

        Raises:
            DataError: a table is wrong, or nothing in it tells images apart.
            ResourceError: a file is not there.
        """
        del store, device
        self._corpus = corpus = self.data.corpus()
        if not len(corpus.train):
            msg = "there is no sample to train on" + _why(corpus)
            raise DataError(msg)
        looked = _spread(corpus.train, COUNTED)
        progress("captions")(0, len(looked))
        self._seen = _captions(self.model, corpus, looked)
        told_apart = self.loss == "infonce" and len({sample.answer for sample in looked}) > 1
        if self._seen["kinds"] == 1 and not told_apart:
            first = looked[0]
            what, said = ("labels", first.label) if first.label else ("captions", first.answer)
            msg = f"all {what} are one ({said[:60]!r}): nothing to contrast"
            raise DataError(msg + _why(corpus))

    def begin(self, seed: int) -> Work:
        """Return one seed's run, with a model of its own.

        Raises:
            DataError: the first weights are of another architecture.
            ResourceError: they are not here.
        """
        del seed  # drawn from before, and the data are split once
        model = copy.deepcopy(self.model)
        facts = self._facts(model.start())
        module = self.module_of(model)
        read = pictures_of(self.data, self.corpus.val)
        check = self.judge(module, self.corpus, self.train, read) if len(self.corpus.val) else None
        return Work(
            module,
            self.corpus.train,
            check,
            collate=Batches(
                self.corpus, model, self.augment, pictures_of(self.data, self.corpus.train)
            ),
            identity=digest([facts[name] for name in ("data", "samples", "model")]),
            facts=facts,
        )

    def module_of(self, model: Any) -> Any:  # noqa: ANN401 - a task of other losses has its own
        """Return a started model as the trainer sees it."""
        return Pairs(model, self.loss)

    def _facts(self, model: Mapping[str, Any]) -> dict[str, Any]:
        corpus = self.corpus
        sides = {"train": corpus.train, "val": corpus.val}
        return {
            "model": dict(model),
            "data": corpus.digest,
            "dropped": dict(corpus.dropped),
            "samples": {side: len(samples) for side, samples in sides.items()},
            "groups": {side: len({s.group for s in x} - {""}) for side, x in sides.items()},
            "validated": min(len(corpus.val), VALIDATED),
            "captions": self._seen,
            "warnings": [*corpus.warnings, *self._warnings()],
        }

    def _warnings(self) -> Iterator[str]:
        seen, limit = self._seen, self.model.text_limit
        if seen["too_long"]:
            yield (
                f"{seen['too_long']} of {seen['looked_at']} training captions are longer than the "
                f"{limit} tokens this model reads (by {seen['over_median']} in the middle, "
                f"{seen['over_most']} at most); what is beyond is not learnt from"
            )
        repeated = seen["looked_at"] - seen["kinds"]
        if self.loss == "infonce" and repeated > seen["looked_at"] * _REPEATS:
            yield (
                f"{repeated} of {seen['looked_at']} training captions or labels occur again, and "
                "infonce tells equal ones apart; loss: {kind: multi-positive} does not"
            )
        if len(self.corpus.train) % self.train.batch == 1:
            yield "the last batch of an epoch is one sample, from which nothing is learnt"


def _spread(samples: Sequence[Sample], most: int) -> list[Sample]:
    """Return at most so many samples, evenly spaced."""
    n = len(samples)
    return [samples[i * n // min(n, most)] for i in range(min(n, most))]


def _captions(model: ImageTextModel, corpus: Corpus, looked: Sequence[Sample]) -> dict[str, int]:
    """Return how many captions differ, how many are too long for the model, and by how much."""
    rng, limit = np.random.default_rng(0), model.text_limit
    counts = np.array(model.count_tokens([corpus.caption(sample, rng) for sample in looked]))
    over = counts[counts > limit] - limit
    return {
        "looked_at": len(looked),
        "kinds": len({(s.label, "" if s.label else s.answer) for s in looked}),
        "too_long": len(over),
        "over_median": int(np.median(over)) if len(over) else 0,
        "over_most": int(over.max(initial=0)),
    }


def _why(corpus: Corpus) -> str:
    lost = ", ".join(f"{n} {why}" for why, n in corpus.dropped.items())
    return f"; left out: {lost}" if lost else ""


# --- validation --------------------------------------------------------------------------


class Validation:
    """A module's metrics on the validation samples, always the same ones, as encoders see them.

    `loss` is that of batches as large as in training. With prompts, `balanced_accuracy` is how
    well the labels are told apart by text; without, `image_to_text_r1` and the like are the
    shares of samples whose own text (or one that means the same) is among the first.
    """

    def __init__(
        self,
        module: Pairs,
        corpus: Corpus,
        settings: TrainSettings,
        pictures: Pictures | None = None,
    ) -> None:
        """Draw the samples."""
        self.module, self.corpus, self.batch = module, corpus, settings.batch
        self.piece = min(settings.chunk or settings.batch, settings.batch)
        self.samples = [corpus.val[i] for i in order(0, 0, len(corpus.val))[:VALIDATED]]
        self.collate = Batches(corpus, module.model, _encoded, pictures or Pictures(corpus.val))

    def __call__(self) -> dict[str, float]:
        """Return the metrics of the module as it stands."""
        rng = np.random.default_rng(0)
        pieces = _cut(self.samples, self.piece)
        embedded = [self.module.embed(self.collate(list(piece), rng)) for piece in pieces]
        images, texts, labels = (torch.cat(part) for part in zip(*embedded, strict=True))
        batches = zip(*(_cut(part, self.batch) for part in (images, texts, labels)), strict=True)
        losses = [self.module.loss_of(*b, joint=False).item() * len(b[0]) for b in batches]
        found = {"loss": sum(losses) / len(self.samples)}
        if self.corpus.prompts:
            return found | {"balanced_accuracy": self._told_apart(images, labels.tolist())}
        similar = _unit(images) @ _unit(texts).T
        same = labels[:, None] == labels[None]
        return found | {
            f"{way}_r{k}": _recall(cosines, same, k)
            for way, cosines in (("image_to_text", similar), ("text_to_image", similar.T))
            for k in (1, 5)
        }

    def _told_apart(self, images: torch.Tensor, labels: list[int]) -> float:
        prompts = self.corpus.prompts
        number = {meaning(name, ""): i for i, name in enumerate(prompts)}
        centres = torch.stack([self._centre(texts) for texts in prompts.values()])
        said = (_unit(images) @ _unit(centres).T).argmax(1).cpu().numpy()
        rows = [row for row, label in enumerate(labels) if label in number]
        return balanced_accuracy(np.array([number[labels[row]] for row in rows], int), said[rows])

    def _centre(self, texts: Sequence[str]) -> torch.Tensor:
        model = self.module.model
        tokens = moved(model.tokens(list(texts)), self.module.device)
        return _unit(model.embed_texts(tokens)).mean(0)


def _encoded(image: ByteArray, size_px: int, rng: np.random.Generator) -> ByteArray:
    """Return the part of an image that `embed_images` shows to an encoder."""
    del rng
    return centre_square(image, size_px)


def _cut(rows: Any, size: int) -> list[Any]:  # noqa: ANN401 - a list or a tensor
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def _recall(cosines: torch.Tensor, same: torch.Tensor, k: int) -> float:
    """Return the share of rows [n, n] with one of the same meaning among the k nearest."""
    nearest = cosines.topk(min(k, len(cosines)), dim=1).indices
    return float(same.gather(1, nearest).any(1).float().mean())
