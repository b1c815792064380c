"""mini-clip, the embedded image-text encoder: lite0's network, tuned, beside frozen MiniLM.

It was trained on benign lung, lung adenocarcinoma and squamous cell carcinoma; what looks
like nothing it was trained on it calls unfamiliar. assets/mini-clip/README.md is its card.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import normalize

from pathcli.encoders.checkpoint import read_state
from pathcli.encoders.minilm import LIMIT, WIDTH, MiniLM
from pathcli.encoders.preprocess import describe, encoder_id, run
from pathcli.encoders.text import clamped
from pathcli.encoders.timm import Lite0
from pathcli.errors import DataError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.state import fill
from pathcli.weights import card, fetch, local, sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_POOLED, _GRID, _NEAREST = 1280, 7, 5
_JUDGE = "familiar."


class MiniClipModel(nn.Module):
    """The registry's model `mini-clip`: an `ImageTextModel` whose weights `start` makes."""

    text_limit = LIMIT
    network: Any

    def __init__(self, *, frozen: int = 3, width: int = 256, dropout: float = 0.2) -> None:
        """Keep the sizes.

        Args:
            frozen: how many of lite0's seven groups of blocks keep ImageNet's weights.
            width: dimensions of the space that images and texts share.
            dropout: share of the pooled image features dropped in training.

        Raises:
            UsageError: more frozen groups than there are.
        """
        super().__init__()
        if not 0 <= frozen <= 7:  # noqa: PLR2004 - lite0's groups
            msg = f"model.frozen is between 0 and 7 groups of blocks, not {frozen}"
            raise UsageError(msg)
        self.frozen = frozen
        self.preprocess = Lite0().preprocess
        self.language = MiniLM()
        self.drop = nn.Dropout(dropout)
        self.image_projection = nn.Linear(_POOLED, width, bias=False)
        self.text_projection = nn.Linear(WIDTH, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def start(self) -> Mapping[str, Any]:
        """See `ImageTextModel.start`: lite0's weights, and projections drawn at random."""
        self.language.load()
        self.assemble()
        for layer in (self.image_projection, self.text_projection):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        return {"init": "lite0", "language": "all-MiniLM-L6-v2, frozen"}

    def assemble(self) -> None:
        """Read lite0's weights, and mark what is trained."""
        net: Any = Lite0()._network()  # noqa: SLF001 - the one place that builds it
        self.network = net
        net.requires_grad_(False)  # noqa: FBT003
        for part in [*net.blocks[self.frozen :], net.conv_head, net.bn2]:
            part.requires_grad_(True)  # noqa: FBT003

    def train(self, mode: bool = True) -> MiniClipModel:
        """Switch dropout; the network's batch statistics stay those of ImageNet."""
        super().train(mode)
        self.network.eval()
        return self

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Return MiniLM's vectors float32 [n, 384]: it is frozen, so a text is read once."""
        return self.language(texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextModel.count_tokens`."""
        return self.language.count_tokens(texts)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return [b, width] for uint8 images [b, h, w, 3]."""
        return self.embed_pixels(self.preprocess(images))

    def embed_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return [b, width] for prepared images float32 [b, 3, 224, 224]."""
        found: torch.Tensor = self.image_projection(self.drop(self.states(pixels).mean((2, 3))))
        return found

    def states(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the network's last map [b, 1280, 7, 7] for prepared images."""
        net = self.network
        if pixels.device.type == "cpu":
            pixels = pixels.to(memory_format=torch.channels_last)
        states = net.bn1(net.conv_stem(pixels))
        for group in net.blocks:
            states = group(states)
        found: torch.Tensor = net.bn2(net.conv_head(states))
        return found

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [n, width] for MiniLM's vectors [n, 384]."""
        found: torch.Tensor = self.text_projection(tokens)
        return found

    def scale(self) -> torch.Tensor:
        """See `ImageTextModel.scale`."""
        return clamped(self.logit_scale)


@dataclass(frozen=True)
class Familiarity:
    """An out-of-distribution score: how near training images an embedding is, and must be.

    `bank` [m, d] holds unit embeddings of training images; the score is the mean cosine to
    the nearest five (nearest neighbours as in Sun et al. 2022, arXiv:2204.06507).
    """

    bank: torch.Tensor
    threshold: float

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Return float32 [n] for embeddings [n, d]."""
        near = features.to(self.bank.device, torch.float32)
        cosines = normalize(near, dim=-1) @ self.bank.T
        return cosines.topk(min(_NEAREST, len(self.bank)), dim=1).values.mean(1)

    def to_state(self) -> dict[str, torch.Tensor]:
        """Return what stands in the weights' file."""
        return {_JUDGE + "bank": self.bank, _JUDGE + "threshold": torch.tensor(self.threshold)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Familiarity:
        """Rebuild from `to_state`."""
        bank = normalize(state[_JUDGE + "bank"], dim=-1)
        return cls(bank, float(state[_JUDGE + "threshold"]))


class MiniClip:
    """The shipped weights, or those of a run, as an encoder: 256-d, or 7 x 7 tokens of 1280."""

    input_px = 224
    native = tile_spec()
    reentrant = True
    native_source = "LC25000's lung patches, shown at 224 px; their resolution is not published"
    text_limit = LIMIT
    name = "mini-clip"
    trained_on: ClassVar[dict[str, str]] = {
        "lc-lung": "the train groups of assets/benchmarks/lung-split.csv",
        "lc-colon": "31 of its images",
    }

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        precision: str = "float32",
    ) -> None:
        """Know everything but the weights.

        Args:
            checkpoint: weights.safetensors of a run, instead of the shipped weights.
            tokens: give image tokens [49, 1280] instead of one embedding [256].
            precision: float32, bfloat16 or float16 arithmetic.
        """
        self.checkpoint, self.tokens, self.precision = checkpoint, tokens, precision
        self._language = MiniLM()

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`; the frozen part is named by the file it comes from."""
        base = str(card("lite0").source)
        how = describe(Lite0().preprocess, tokens=self.tokens, precision=self.precision)
        return encoder_id(self.name, sha256(self._file()), base, *how)

    def _file(self) -> Path:
        return local(self.checkpoint) if self.checkpoint else fetch("mini-clip")

    def load(self, device: str) -> None:
        """See `Encoder.load`.

        Raises:
            DataError: the checkpoint is corrupt or of another model.
        """
        file = self._file()
        state = {name: tensor.float() for name, tensor in read_state(file).items()}
        judge = {k: state.pop(k).to(device) for k in list(state) if k.startswith(_JUDGE)}
        groups = [int(k.split(".")[2]) for k in state if k.startswith("network.blocks.")]
        projection = state.get("image_projection.weight")
        if projection is None:
            msg = f"{file}: not mini-clip's weights (no image_projection.weight)"
            raise DataError(msg)
        model = MiniClipModel(frozen=min(groups, default=7), width=len(projection))
        model.assemble()
        model.language = self._language
        fill(model, state, str(file))
        self.model = model.eval().requires_grad_(False).to(device)  # noqa: FBT003
        self.familiarity = Familiarity.from_state(judge) if judge else None
        self.logit_scale = float(self.model.scale())
        self.row_shape = (_GRID * _GRID, _POOLED) if self.tokens else (len(projection),)

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        if not self.tokens:
            return self.model.embed_pixels(pixels)
        return self.model.states(pixels).flatten(2).transpose(1, 2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Encoder.encode`."""
        return run(self._tower, images, self.model.preprocess, self.precision)

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ImageTextEncoder.encode_text`."""
        model = self.model
        with torch.inference_mode():
            return model.embed_texts(model.tokens(texts).to(model.logit_scale.device))

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextEncoder.count_tokens`."""
        return self._language.count_tokens(texts)

    def familiar(self, features: torch.Tensor) -> torch.Tensor:
        """Return bool [n]: which embeddings [n, d] or tokens [n, t, 1280] look like training's.

        Weights that were never given a threshold (a run's own) find everything familiar.
        """
        if self.familiarity is None:
            return torch.ones(len(features), dtype=torch.bool, device=features.device)
        if features.ndim == 3:  # noqa: PLR2004 - tokens: of these an embedding is made
            features = self.model.image_projection(features.mean(1))
        return self.familiarity.score(features) >= self.familiarity.threshold
