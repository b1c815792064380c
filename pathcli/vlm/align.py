"""The task `align`: BLIP-2's first stage, a Q-Former that learns to pick out what texts say.

CLOVER's stage 1. What is trained is the Q-Former, `connector.` by name, which a later stage
starts from, and heads beside it, which it leaves behind; `train.choose` may name what `Check`
measures of images and texts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pathcli.data.pairs import pictures_of
from pathcli.encoders.augment import Augment
from pathcli.encoders.contrastive import VALIDATED, ContrastiveTask
from pathcli.encoders.pairs import meaning
from pathcli.errors import UsageError
from pathcli.metrics.classification import balanced_accuracy
from pathcli.objectives import itm, query_similarity
from pathcli.settings import TrainSettings, order
from pathcli.trainer import Work
from pathcli.types import digest
from pathcli.vlm.align_losses import Align, contrast
from pathcli.vlm.start import Start
from pathcli.vlm.tokens import CacheSettings, refuse_unless_still
from pathcli.vlm.towers import Views, prepared, refuse_pooled, sent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pathcli.data.corpus import Corpus, CorpusData
    from pathcli.store import Store
    from pathcli.types import Encoder, Progress, Sample
    from pathcli.vlm.tokens import TokenCache

    Started = Callable[[str], Progress]

_ROWS = 64  # of a table of similarities made at once
_TRIAL = 8


# --- batches -----------------------------------------------------------------------------


class Batches:
    """Samples in, a batch out: `views` or `tokens` and `of`, `text`, and int64 `labels` [b].

    `labels` are equal where samples mean the same, as in `pathcli.encoders.pairs`.
    """

    def __init__(self, corpus: Corpus, views: Views, connector: Any) -> None:  # noqa: ANN401
        """Take what captions are drawn by, what reads images, and what reads texts."""
        self.corpus, self.views, self.connector = corpus, views, connector

    def __call__(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Read and stack; `rng` decides crops and wordings.

        Raises:
            DataError: too many images cannot be read; one is named.
        """
        shown = [self.views(sample, rng) for sample in samples]
        texts = [self.corpus.caption(each.sample, rng) for each in shown]
        meant = [meaning(e.sample.label, text) for e, text in zip(shown, texts, strict=True)]
        text = self.connector.tokens(texts)
        return self.views.batch(shown) | {"text": text, "labels": torch.tensor(meant)}


# --- validation --------------------------------------------------------------------------


class Check:
    """A module's metrics on the validation samples, always the same ones, images as they are.

    `itc_loss`, `itm_loss` and `itg_loss` are means over batches as large as in training, `loss`
    is their sum. `itm_accuracy` is of pairs and hard negatives. With prompts,
    `balanced_accuracy` is how well labels are told apart by text; without, `image_to_text_r1`
    and the like are the shares of samples whose own text is among the first.
    """

    def __init__(
        self, module: Align, collate: Batches, samples: Sequence[Sample], batch: int
    ) -> None:
        """Draw the samples."""
        self.module, self.collate, self.batch = module, collate, batch
        self.samples = [samples[i] for i in order(0, 0, len(samples))[:VALIDATED]]

    def __call__(self) -> dict[str, float]:
        """Return the metrics of the module as it stands."""
        module, rng = self.module, np.random.default_rng(0)
        draws = torch.Generator(module.device).manual_seed(0)
        losses, kept, right = [], [], []
        for start in range(0, len(self.samples), self.batch):
            part = self.samples[start : start + self.batch]
            seen = module.see(sent(self.collate(part, rng), module.device))
            compared = module.compare(seen, joint=False)
            logits, truth = module.matches(seen, compared, joint=False, generator=draws)
            three = [contrast(compared, joint=False), itm(logits, truth), module.captions(seen)]
            losses.append(torch.stack(three).float() * (len(part) / len(self.samples)))
            right.append(logits.mean(1).argmax(1) == truth)
            kept.append((seen.images.float(), seen.texts.float(), seen.labels))
        names = ("itc_loss", "itm_loss", "itg_loss")
        found = dict(zip(names, torch.stack(losses).sum(0).tolist(), strict=True))
        found["loss"] = sum(found.values())
        found["itm_accuracy"] = float(torch.cat(right).float().mean())
        return found | self._told(*(torch.cat(part) for part in zip(*kept, strict=True)))

    def _told(self, images: Tensor, texts: Tensor, labels: Tensor) -> dict[str, float]:
        prompts = self.collate.corpus.prompts
        if prompts:
            number = {meaning(name, ""): i for i, name in enumerate(prompts)}
            centres = torch.stack([self._centre(said) for said in prompts.values()])
            said = _table(images, centres).argmax(1).cpu().numpy()
            rows = [row for row, label in enumerate(labels.tolist()) if label in number]
            true = np.array([number[int(labels[row])] for row in rows], int)
            return {"balanced_accuracy": balanced_accuracy(true, said[rows])}
        same, similar = labels[:, None] == labels[None], _table(images, texts)
        return {
            f"{way}_r{k}": _recall(cosines, same, k)
            for way, cosines in (("image_to_text", similar), ("text_to_image", similar.T))
            for k in (1, 5)
        }

    def _centre(self, texts: Sequence[str]) -> Tensor:
        module = self.module
        text = sent(module.connector.tokens(list(texts)), module.device)
        read = module.text_proj(module.connector.read(text)[:, 0])
        return normalize(read.float(), dim=-1).mean(0)


def _table(images: Tensor, texts: Tensor) -> Tensor:
    """Return the similarities [n, m] of query embeddings [n, q, d] with texts [m, d]."""
    return torch.cat([query_similarity(part, texts) for part in torch.split(images, _ROWS)])


def _recall(cosines: Tensor, same: Tensor, k: int) -> float:
    """Return the share of rows [n, n] with one of the same meaning among the k nearest."""
    nearest = cosines.topk(min(k, len(cosines)), dim=1).indices
    return float(same.gather(1, nearest).any(1).float().mean())


# --- the task ----------------------------------------------------------------------------


class AlignTask(ContrastiveTask):
    """A Q-Former's first stage on images and texts; the recipe's sections are its arguments."""

    def __init__(
        self,
        *,
        encoder: Encoder,
        connector: Callable[..., Any],
        data: CorpusData,
        train: TrainSettings,
        augment: Augment = Augment(),  # noqa: B008 - frozen
        start: Start = Start(),  # noqa: B008 - frozen
        cache: CacheSettings = CacheSettings(),  # noqa: B008 - frozen
    ) -> None:
        """Keep the parts; nothing is read before `prepare`.

        Raises:
            UsageError: the encoder gives no tokens, the connector reads no captions,
                `train.choose` names no metric, a batch has nothing to contrast or comes in
                pieces, or tokens are to be kept of images that change.
        """
        refuse_pooled(encoder)
        if train.chunk is not None:
            msg = "train.chunk: matching needs the whole batch at once; leave it out for align"
            raise UsageError(msg)
        with torch.device("meta"):  # a trial: it takes no memory, and reads texts already
            reader = connector(_TRIAL, None)
        if not hasattr(reader, "write") or reader.reads:
            msg = "connector: the task align trains qformer, with instruct: false"
            raise UsageError(msg)
        if cache.tokens != "off":
            refuse_unless_still(augment, connector)
        super().__init__(
            model=reader, data=data, train=train, augment=augment, loss="multi-positive"
        )
        self.encoder, self.connector, self.start, self.cache = encoder, connector, start, cache
        self._tokens: TokenCache | None = None
        self._shape: tuple[int, ...] = ()

    def prepare(self, store: Store, *, device: str = "auto", progress: Started) -> None:
        """Read the tables of the data, load the encoder, and fill the store with its tokens.

        Raises:
            UsageError: the former stage had another encoder.
            DataError: a table is wrong, or nothing in it tells images apart.
            ResourceError: weights, files or space are missing.
        """
        super().prepare(store, device=device, progress=progress)
        self.start.refuse_another(self.encoder)
        self._tokens, self._shape = prepared(
            self.corpus, self.encoder, store, self.cache, device=device, progress=progress
        )

    def begin(self, seed: int) -> Work:
        """Return one seed's run, with a module of its own.

        Raises:
            DataError: first weights are of another architecture.
            ResourceError: they are not here.
        """
        del seed  # drawn from before, and the data are split once
        corpus = self.corpus
        connector = self.connector(self._shape[-1], None)
        model = {"connector": dict(connector.start()), "encoder": self.encoder.id}
        module = Align(self.encoder, connector)
        model["heads"] = module.begin_heads(connector.init)
        parts = [*(f"{name}." for name, _ in module.named_children()), "temperature"]
        model["start"] = dict(self.start.fill(module, parts))
        facts = self._facts(model)
        learn, check = (self._batches(connector, side) for side in (corpus.train, corpus.val))
        return Work(
            module,
            corpus.train,
            Check(module, check, corpus.val, self.train.batch) if len(corpus.val) else None,
            collate=learn,
            identity=digest([facts[name] for name in ("data", "samples", "model")]),
            facts=facts,
        )

    def _batches(self, connector: Any, samples: Sequence[Sample]) -> Batches:  # noqa: ANN401
        """Return what makes batches of one side; validation sees every image as it is."""
        augment = Augment() if samples is self.corpus.val else self.augment
        pictures, side = pictures_of(self.data, samples), self.encoder.input_px
        views = Views(pictures, connector, augment, side, self._tokens)
        return Batches(self.corpus, views, connector)
