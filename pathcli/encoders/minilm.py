"""Sentences in, vectors out: MiniLM, a small language encoder kept frozen (Wang et al. 2020)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from pathcli.encoders.checkpoint import fitting_part, read_state, shape_faults
from pathcli.errors import DataError
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT, WIDTH = 128, 384
_SIZES = {  # all-MiniLM-L6-v2's config.json
    "vocab_size": 30522,
    "hidden_size": WIDTH,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}


class MiniLM:
    """all-MiniLM-L6-v2: one unit vector of 384 a text, the mean over its tokens."""

    def __init__(self) -> None:
        """Fetch nothing yet."""
        self._known: dict[str, torch.Tensor] = {}

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - tokenizers has no types
        from tokenizers import Tokenizer  # noqa: PLC0415

        made = Tokenizer.from_file(str(fetch("minilm-tokenizer")))
        made.no_truncation()
        made.no_padding()
        return made

    @cached_property
    def _network(self) -> torch.nn.Module:
        guard_torchvision()
        from transformers import BertConfig, BertModel  # noqa: PLC0415

        network: torch.nn.Module = BertModel(BertConfig(**_SIZES), add_pooling_layer=False)
        file = fetch("minilm")
        state = {k: v for k, v in read_state(file).items() if not k.startswith("pooler.")}
        if faults := shape_faults(state, network):
            msg = f"{file}: not all-MiniLM-L6-v2 ({faults[0]})"
            raise DataError(msg)
        network.load_state_dict(fitting_part(state, network), strict=False)
        return network.eval().requires_grad_(False)  # noqa: FBT003

    def load(self) -> None:
        """Read the weights now rather than with the first text.

        Raises:
            ResourceError: they are not here and cannot be fetched.
        """
        _ = self._network, self._tokenizer

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, the two special ones included."""
        return [len(e.ids) for e in self._tokenizer.encode_batch(list(texts))]

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Return float32 [n, 384] on the CPU; a text seen before costs nothing."""
        for text in dict.fromkeys(texts):
            if text not in self._known:
                self._known[text] = self._embed(text)
        return torch.stack([self._known[text] for text in texts])

    def _embed(self, text: str) -> torch.Tensor:
        ids = self._tokenizer.encode(text).ids
        ids = ids if len(ids) <= LIMIT else [*ids[: LIMIT - 1], ids[-1]]
        with torch.no_grad():
            states = self._network(input_ids=torch.tensor([ids])).last_hidden_state[0]
        return normalize(states.mean(0), dim=0)
