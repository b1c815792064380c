"""The task `itc-itm`: PLIP's training, contrast with momentum plus matching, weighted 1 : 1.

Source: PA-LLaVA's code (BIBM 2024), after ALBEF (arXiv:2107.07651) and BLIP (arXiv:2201.12086).
Its training script is not published; the plain sum of the two losses is that of ALBEF and BLIP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from pathcli.encoders.augment import Augment
from pathcli.encoders.contrastive import ContrastiveTask, Validation
from pathcli.encoders.pairs import Pairs
from pathcli.encoders.pallava_plip import PallavaPlipModel
from pathcli.errors import UsageError
from pathcli.objectives import gather, hard_negatives, itm, momentum_itc
from pathcli.settings import TrainSettings  # noqa: TC001 - builds the section `train`

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pathcli.data.corpus import CorpusData
    from pathcli.encoders.pairs import ImageTextModel


class ItcItm(Pairs):
    """PLIP as the trainer sees it: batches in, the sum of both losses out."""

    model: PallavaPlipModel

    def __init__(self, model: PallavaPlipModel) -> None:
        """Take the model; where no gradient is wanted its contrast is `multi_positive`."""
        super().__init__(model, "multi-positive")

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of one batch; in training, slow weights and queues move on."""
        model, device = self.model, self.device
        pixels = model.preprocess(batch["images"].to(device))
        tokens = {name: part.to(device) for name, part in batch["texts"].items()}
        seen = model.towers.see(pixels)
        pair = model.towers.embed_image(seen), model.towers.embed_text(**tokens)
        if self.training:
            model.follow()
        slow = model.slow_embeddings(pixels, tokens)
        queues, temperature = (model.image_queue, model.text_queue), model.clamped()
        contrast = momentum_itc(*pair, slow, queues, temperature, alpha=model.soft())
        if self.training:
            model.remember(*slow)
        return contrast + itm(*self.matches(seen, tokens, pair, batch["labels"].to(device)))

    def matches(
        self,
        seen: Tensor,
        tokens: Mapping[str, Tensor],
        pair: tuple[Tensor, Tensor],
        labels: Tensor,
        *,
        joint: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits [n, 2] and what they should say, int64 [n]: pairs, then negatives.

        Each image is held against a text that is hard to tell from its own, each text against
        such an image, both drawn from the rows of all processes, or of this one if not `joint`.
        Rows that mean the same (`labels` int64 [b]) are no negatives; an image without any is
        held against its own text alone.
        """
        together = gather if joint else _alone
        room = int(together(torch.tensor([tokens["ids"].shape[1]], device=seen.device)).max())
        ids, mask = (
            pad(tokens[name], [0, room - tokens[name].shape[1]]) for name in ("ids", "mask")
        )
        images, texts = (normalize(part.detach().float(), dim=-1) for part in pair)
        scale = self.model.scale().detach()
        to_text, to_image = scale * images @ together(texts).T, scale * texts @ together(images).T
        same = labels[:, None] == together(labels)[None]
        rows = (~same.all(1)).nonzero().squeeze(1)
        text = hard_negatives(to_text[rows], generator, same[rows])
        image = hard_negatives(to_image[rows], generator, same[rows])
        logits = self.model.towers.compare(
            torch.cat([ids, ids[rows], together(ids)[text]]),
            torch.cat([mask, mask[rows], together(mask)[text]]),
            torch.cat([seen, together(seen)[image], seen[rows]]),
        )
        truth = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        truth[: len(seen)] = 1
        return logits, truth


def _alone(rows: Tensor) -> Tensor:
    return rows


class Check(Validation):
    """The metrics of `Validation`, and of matching: `itm_loss`, `itm_accuracy`.

    `loss` is the sum of both losses; the contrast in it is that of a batch, without queue and
    soft targets, so that it can be compared between epochs.
    """

    module: ItcItm

    def __call__(self) -> dict[str, float]:
        """Return the metrics of the module as it stands."""
        found = super().__call__()
        rng = np.random.default_rng(0)
        draws = torch.Generator(self.module.device).manual_seed(0)
        logits, truth = [], []
        for start in range(0, len(self.samples), self.batch):
            batch = self.collate(self.samples[start : start + self.batch], rng)
            said, true = self._matches(batch, draws)
            logits.append(said)
            truth.append(true)
        said, true = torch.cat(logits).float(), torch.cat(truth)
        right = (said.argmax(1) == true).float().mean()
        found |= {"itm_loss": itm(said, true).item(), "itm_accuracy": right.item()}
        return found | {"loss": found["loss"] + found["itm_loss"]}

    def _matches(self, batch: Mapping[str, Any], draws: torch.Generator) -> tuple[Tensor, Tensor]:
        module, device = self.module, self.module.device
        tokens = {name: part.to(device) for name, part in batch["texts"].items()}
        seen = module.model.towers.see(module.model.preprocess(batch["images"].to(device)))
        pair = module.model.towers.embed_image(seen), module.model.towers.embed_text(**tokens)
        labels = batch["labels"].to(device)
        return module.matches(seen, tokens, pair, labels, joint=False, generator=draws)


class ItcItmTask(ContrastiveTask):
    """PLIP's training on images and texts; the recipe's sections are its arguments."""

    model: PallavaPlipModel

    def __init__(
        self,
        *,
        model: ImageTextModel,
        data: CorpusData,
        train: TrainSettings,
        augment: Augment = Augment(),  # noqa: B008 - frozen
    ) -> None:
        """Keep the parts; nothing is read before `prepare`.

        Raises:
            UsageError: the model is another, `train.choose` names no metric, a batch has
                nothing to contrast, or `train.chunk` or `shard` is set.
        """
        if not isinstance(model, PallavaPlipModel):
            msg = f"model: the task itc-itm trains pallava-plip, not {type(model).__name__}"
            raise UsageError(msg)
        if train.chunk is not None:
            msg = "train.chunk: matching needs the whole batch at once; leave it out for itc-itm"
            raise UsageError(msg)
        if train.shard != "none":
            msg = "train.shard: the slow weights are kept whole; itc-itm takes shard=none"
            raise UsageError(msg)
        super().__init__(
            model=model, data=data, train=train, augment=augment, loss="multi-positive"
        )

    @property
    def judge(self) -> type[Check]:
        """What validates."""
        return Check

    def module_of(self, model: Any) -> ItcItm:  # noqa: ANN401 - as its base has it
        """Return a started model as the trainer sees it."""
        return ItcItm(model)
