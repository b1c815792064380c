"""What stage 1 trains: a Q-Former and three heads, batches in, the sum of three losses out.

Contrast (ITC), matching (ITM) and captioning (ITG), weighted 1 : 1 : 1. Source: BLIP-2
(arXiv:2301.12597), section 3.2, with the label smoothing of its code (LAVIS).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, log_softmax, pad

from pathcli import processes
from pathcli.errors import DataError
from pathcli.objectives import (
    IGNORED,
    gather,
    hard_negatives,
    itg,
    itm,
    query_similarity,
    weighed,
)
from pathcli.vlm.qformer_weights import heads, located
from pathcli.vlm.towers import see

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pathcli.types import Encoder

COLDEST, HOTTEST = 0.001, 0.5
"""The temperature stays between these, as ALBEF's and BLIP's does; BLIP-2's code has no bounds."""
_DIM, _SMOOTHING, _TEMPERATURE = 256, 0.1, 0.07


class WordHead(nn.Module):
    """BERT's head: states in, logits of words out, by way of the word embeddings themselves."""

    def __init__(self, width: int, words: int) -> None:
        """Draw the weights as BERT's are."""
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(words))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """Return logits [..., v] for states [..., d] and word embeddings [v, d]."""
        return linear(self.norm(gelu(self.dense(states))), words, self.bias)


@dataclass(frozen=True)
class Seen:
    """A batch as all three losses need it: b images, and a text for each.

    `tokens` [b, t, d] are the encoder's, `text` is {"ids", "mask"} [b, w], `written` [b, w, h]
    are the text's states as it is written beside the image, `images` [b, q, 256] and `texts`
    [b, 256] stand in the space they share, `labels` int64 [b] is what they mean.
    """

    tokens: Tensor
    text: Mapping[str, Tensor]
    written: Tensor
    images: Tensor
    texts: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Compared:
    """Logits [b, n] of each image with all texts, of each text with all images, and who agrees.

    `same` bool [b, n] marks what means the same, a row's own pair among it.
    """

    to_text: Tensor
    to_image: Tensor
    same: Tensor


class Align(nn.Module):
    """A Q-Former and its heads as the trainer sees them: batches in, the sum of the losses out."""

    def __init__(self, encoder: Encoder, connector: Any) -> None:  # noqa: ANN401 - a QFormer
        """Take what gives tokens, and a started Q-Former; the heads are drawn."""
        super().__init__()
        self.encoder, self.connector = encoder, connector
        words, width = connector.word_embeddings.shape
        self.vision_proj, self.text_proj = nn.Linear(width, _DIM), nn.Linear(width, _DIM)
        self.itm_head, self.word_head = nn.Linear(width, 2), WordHead(width, words)
        self.temperature = nn.Parameter(torch.tensor(_TEMPERATURE))

    def begin_heads(self, init: str) -> dict[str, Any]:
        """Take what heads the Q-Former's first weights come with; return which, the rest is drawn.

        Raises:
            DataError: they are of other sizes.
        """
        if init == "random":
            return {"taken": []}
        path, own = located(init), self.state_dict()
        found = heads(path, len(self.connector.word_embeddings))
        for name, value in found.items():
            if value.shape != own[name].shape:
                msg = f"{path}: {name} is {tuple(value.shape)}, not {tuple(own[name].shape)}"
                raise DataError(msg)
        self.load_state_dict(found, strict=False)
        return {"taken": sorted(found)}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.temperature.device

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss of one batch, a scalar."""
        return torch.stack(self.losses(self.see(batch))).sum()

    def losses(self, seen: Seen) -> tuple[Tensor, Tensor, Tensor]:
        """Return contrast, matching and captioning of a batch, over the rows of all processes."""
        compared = self.compare(seen)
        logits, truth = self.matches(seen, compared)
        words = seen.text["mask"][:, 1:].sum()
        return (
            contrast(compared),
            weighed(itm(logits, truth), torch.tensor(len(truth), device=truth.device)),
            weighed(self.captions(seen), words),
        )

    def see(self, batch: Mapping[str, Any]) -> Seen:
        """Return what the losses need of `views` or `tokens`, `text` and `labels`."""
        tokens, text = see(self.encoder, batch), batch["text"]
        looked, written = self.connector.look_and_write(tokens, text)
        texts = self.text_proj(self.connector.read(text)[:, 0])
        return Seen(tokens, text, written, self.vision_proj(looked), texts, batch["labels"])

    # --- contrast --------------------------------------------------------------------------

    def scale(self) -> Tensor:
        """Return what cosines are multiplied by, a scalar."""
        return 1 / self.temperature.clamp(COLDEST, HOTTEST)

    def compare(self, seen: Seen, *, joint: bool = True) -> Compared:
        """Return how like a batch's rows are to those of all processes, or of this one.

        An image is as like a text as the best of its queries.
        """
        all_of = gather if joint else _alone
        return Compared(
            self.scale() * query_similarity(seen.images, all_of(seen.texts)),
            self.scale() * query_similarity(all_of(seen.images), seen.texts).T,
            seen.labels[:, None] == all_of(seen.labels)[None],
        )

    # --- matching --------------------------------------------------------------------------

    def matches(
        self,
        seen: Seen,
        compared: Compared,
        *,
        joint: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return logits [n, q, 2] and what they should say, int64 [n]: pairs, then negatives.

        Each text is held against an image that is hard to tell from its own, each image
        against such a text. What means the same is no negative; a row without any has its own
        pair alone.
        """
        all_of = gather if joint else _alone
        ids, mask = _padded(seen.text, all_of)
        rows = (~compared.same.all(1)).nonzero().squeeze(1)
        text = hard_negatives(compared.to_text[rows], generator, compared.same[rows])
        image = hard_negatives(compared.to_image[rows], generator, compared.same[rows])
        states = self.connector.together(
            torch.cat([seen.tokens, all_of(seen.tokens)[image], seen.tokens[rows]]),
            {
                "ids": torch.cat([ids, ids[rows], all_of(ids)[text]]),
                "mask": torch.cat([mask, mask[rows], all_of(mask)[text]]),
            },
        )
        truth = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        truth[: len(seen.tokens)] = 1
        return self.itm_head(states), truth

    # --- captioning ------------------------------------------------------------------------

    def logits(self, seen: Seen) -> Tensor:
        """Return logits [b, w, v]: at each place of a text what its next word is."""
        found: Tensor = self.word_head(seen.written, self.connector.word_embeddings)
        return found

    def captions(self, seen: Seen) -> Tensor:
        """Return the loss of next words, padding passed over."""
        return itg(self.logits(seen), learnt(seen.text), smoothing=_SMOOTHING)


def contrast(compared: Compared, *, joint: bool = True) -> Tensor:
    """Return the smoothed contrast, in which all that means the same is positive alike.

    With texts all different it is `pathcli.objectives.query_itc`.
    """
    same = compared.same.float()
    count = same.shape[1]
    targets = (1 - _SMOOTHING) * same / same.sum(1, keepdim=True) + _SMOOTHING / count
    said = log_softmax(compared.to_text, -1) + log_softmax(compared.to_image, -1)
    return -(said * targets).sum() / 2 * ((processes.ranks() if joint else 1) / count)


def learnt(text: Mapping[str, Tensor]) -> Tensor:
    """Return what is predicted of texts, int64 [b, w]: their words, -100 where there is none."""
    return text["ids"].masked_fill(text["mask"] == 0, IGNORED)


def _alone(rows: Tensor) -> Tensor:
    return rows


def _padded(text: Mapping[str, Tensor], all_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return ids and mask, as wide as those of the widest process."""
    here = text["ids"].shape[1]
    room = int(all_of(torch.tensor([here], device=text["ids"].device)).max())
    return [pad(text[name], [0, room - here]) for name in ("ids", "mask")]
