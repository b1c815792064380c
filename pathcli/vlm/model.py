"""encoder -> connector -> language model: images and words in, the next words out.

The encoder is frozen and no part of the module; what of the connector and of the language
model requires a gradient is trained. A batch is a dictionary:

`views` uint8 [v, s, s, 3], or `tokens` [v, t, d] from the store: every view of m images;
`of` int64 [v]: the image, 0..m-1 and ascending, a view is of; neither where there are none;
`ids` int64 and `mask`, `image` bool [b, t]: words, which of them are there, and where the
visual embeddings stand, in the order of the images;
`labels` int64: what is learnt, -100 for nothing. Beside `ids` [b, t], or, for a language model
with an encoder of its own, what its decoder says [b, u];
`text` {"ids", "mask"} [m, q]: the question, where the connector reads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pathcli.objectives import weighed
from pathcli.vlm.towers import see

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pathcli.types import Encoder

NOT_LEARNT = -100
"""The label of a word that no loss is taken of."""


class VisionLanguage(nn.Module):
    """A vision-language model (LLaVA, arXiv:2304.08485; BLIP-2, arXiv:2301.12597)."""

    def __init__(self, encoder: Encoder, connector: Any, language: Any) -> None:  # noqa: ANN401
        """Join a loaded encoder, a started `Connector`, and a started `HFLanguage`."""
        super().__init__()
        self.encoder, self.connector, self.language = encoder, connector, language

    def visual(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the visual embeddings [m, n, width] of the batch's images."""
        seen: Tensor = self.connector(see(self.encoder, batch), batch["of"], batch.get("text"))
        return seen

    def embeds(self, batch: Mapping[str, Any]) -> Tensor:
        """Return what the language model reads [b, t, width]: words, and images among them."""
        words: Tensor = self.language.embed(batch["ids"])
        if "of" not in batch:
            return words
        places = batch["image"][..., None].expand_as(words)
        return words.masked_scatter(places, self.visual(batch).to(words.dtype))

    def logits(self, batch: Mapping[str, Any]) -> Tensor:
        """Return logits [b, t, vocabulary], or [b, u, vocabulary] of a decoder."""
        found: Tensor = self.language.logits(self.embeds(batch), batch["mask"], batch["labels"])
        return found

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the mean cross-entropy of all learnt words of the batch, a scalar.

        Weighted so that its mean over processes is that of the joint batch.
        """
        labels = batch["labels"]
        found: Tensor = self.language.loss(self.embeds(batch), batch["mask"], labels)
        said = labels if self.language.seq2seq else labels[:, 1:]  # nothing says the first word
        return weighed(found, (said != NOT_LEARNT).sum())

    def likelihoods(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the log-probability [b] of what each row's labels say, were it the answer."""
        found: Tensor = self.language.likelihoods(
            self.embeds(batch), batch["mask"], batch["labels"]
        )
        return found

    def generate(self, batch: Mapping[str, Any], **decoding: Any) -> list[list[int]]:  # noqa: ANN401
        """Return the ids of each row's answer; `decoding` is that of `HFLanguage.generate`.

        Rows of unequal length are padded on the left.
        """
        found: list[list[int]] = self.language.generate(
            self.embeds(batch), batch["mask"], **decoding
        )
        return found
