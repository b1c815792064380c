"""An architecture of open_clip to train, from OpenAI's weights, a run's, or none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from pathcli.cards import OPENAI
from pathcli.encoders.checkpoint import fitting_part, read_state, shape_faults
from pathcli.encoders.clip import OpenClipEncoder, PathGenClip, PathGenClipL
from pathcli.encoders.text import clamped
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch, local, sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WEIGHTS = "weights.safetensors"  # of a run


class OpenClipModel(torch.nn.Module):
    """An `ImageTextModel` of open_clip, as PathGen-CLIP is (Sun et al. 2024, arXiv:2407.00203).

    Its weights are those `pathgen-clip` and `open_clip:NAME` read: the network hangs at
    `module`, a prefix that `read_state` takes off.
    """

    module: torch.nn.Module

    def __init__(
        self,
        *,
        architecture: str,
        init: Literal["openai", "random"] | Path = "openai",
        quick_gelu: bool = True,
        checkpointing: bool = False,
    ) -> None:
        """Look the architecture and the first weights up; nothing is read or drawn yet.

        Args:
            architecture: open_clip's name of it, such as ViT-B-16.
            init: where to begin: openai, random, a checkpoint, or the folder of a run.
            quick_gelu: OpenAI's activation, which all that descends from its weights needs.
            checkpointing: compute activations twice, to hold fewer of them.

        Raises:
            UsageError: there is no such architecture, or OpenAI published no weights of it.
            ResourceError: the file or run to begin with is not here.
        """
        super().__init__()
        self.reader = OpenClipEncoder(model=architecture)  # knows how images and texts are read
        self.preprocess, self.text_limit = self.reader.preprocess, self.reader.text_limit
        self.architecture, self.init = architecture, init
        self.quick_gelu, self.checkpointing = quick_gelu, checkpointing
        if init == "openai" and architecture not in OPENAI:
            msg = f"init: openai is known for {', '.join(OPENAI)}, not for {architecture}: "
            raise UsageError(msg + "give a checkpoint")
        if isinstance(init, Path):
            local(init, WEIGHTS)

    def start(self) -> Mapping[str, Any]:
        """See `ImageTextModel.start`; open_clip's own random numbers stand where none are read."""
        guard_torchvision()
        import open_clip  # noqa: PLC0415

        try:
            network = open_clip.create_model(
                self.architecture,
                pretrained=None,
                load_weights=False,
                force_quick_gelu=self.quick_gelu,
            )
        except OSError as error:
            msg = f"{self.architecture}: its text tower is on the hub, which cannot be reached"
            raise ResourceError(msg) from error
        facts = {"encoder": self.encoder(), "init": "random"}
        if self.init != "random":
            file = self._file()
            _fill(network, file, self.architecture)
            facts["init"] = sha256(file)
        network.set_grad_checkpointing(self.checkpointing)
        self.module = network
        return facts

    def encoder(self) -> str:
        """Return the name by which `--encoder` reads the trained weights."""
        for known in (PathGenClip, PathGenClipL):
            if (known.architecture, known.quick_gelu) == (self.architecture, self.quick_gelu):
                return known.published
        return f"open_clip:{self.architecture}{'-quickgelu' if self.quick_gelu else ''}"

    def _file(self) -> Path:
        if self.init == "openai":
            return fetch(OPENAI[self.architecture])
        return local(self.init, WEIGHTS)

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ImageTextModel.tokens`; int64 [n, text_limit]."""
        tokens: torch.Tensor = self.reader._tokenizer(list(texts))  # noqa: SLF001 - as it reads them
        return tokens

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextModel.count_tokens`."""
        return self.reader.count_tokens(texts)

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """See `ImageTextModel.embed_images`."""
        features: torch.Tensor = self.module.encode_image(self.preprocess(images))  # type: ignore[operator]
        return features

    def embed_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `ImageTextModel.embed_texts`."""
        features: torch.Tensor = self.module.encode_text(tokens)  # type: ignore[operator]
        return features

    def scale(self) -> torch.Tensor:
        """See `ImageTextModel.scale`."""
        return clamped(self.module.logit_scale)  # type: ignore[arg-type]


def _fill(network: torch.nn.Module, file: Path, architecture: str) -> None:
    """Put a checkpoint into a network of its architecture."""
    state = read_state(file)
    if faults := shape_faults(state, network):
        msg = f"{file}: does not fit open_clip's {architecture} ({len(faults)} tensors: "
        raise DataError(msg + f"{faults[0]}); set model.architecture to that of the checkpoint")
    network.load_state_dict(fitting_part(state, network), strict=False)
