"""PA-LLaVA's PLIP, to train and to encode with (BIBM 2024); `plip` is vinid's, another one.

Facts of its code: ViT-B/16 at 224 px and BERT-base; embeddings of 256 from each tower's first
token; momentum 0.995, queues of 57,600, a temperature of 0.07 that is trained within
0.001..0.5; a matching head on the text tower beside the image. The text limit is 30 tokens
there and 100 in the paper.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.nn.utils import parameters_to_vector

from pathcli.encoders.checkpoint import read_state
from pathcli.encoders.pallava_towers import (
    IMAGE_PX,
    Sizes,
    Tokenizer,
    Towers,
    load_bert,
    load_strictly,
    sizes_of,
    text_folder,
    vision_file,
    vision_of,
    vision_part,
    vision_weights,
)
from pathcli.encoders.preprocess import Preprocess, describe, encoder_id, run
from pathcli.errors import DataError, UsageError
from pathcli.objectives import enqueue, momentum_update
from pathcli.slides.tiling import tile_spec
from pathcli.weights import local, sha256

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

COLDEST, HOTTEST = 0.001, 0.5
_BERT = "bert-base-uncased"
_APART = ("match.", ".crossattention.")  # weights that embeddings do not go through


class PallavaPlipModel(nn.Module):
    """PLIP as it is trained: towers, their slow copy, and queues of what the copy gave.

    The slow weights are one vector, of the towers' weights that embeddings go through, and the
    copy is the towers called with them. They and the queues are buffers beside the trained
    temperature, so that a resumed run has them.
    """

    slow: Tensor
    image_queue: Tensor
    text_queue: Tensor
    image_place: Tensor
    text_place: Tensor
    steps: Tensor

    def __init__(
        self,
        *,
        vision: str = "openai",
        text: str = _BERT,
        width: int = 768,
        layers: int = 12,
        patch_px: int = 16,
        dim: int = 256,
        momentum: float = 0.995,
        queue: int = 57_600,
        temperature: float = 0.07,
        alpha: float = 0.4,
        alpha_steps: int = 0,
        text_limit: int = 100,
    ) -> None:
        """Take the sizes; `start` makes the weights.

        `vision` is `openai` (CLIP ViT-B/16), a CLIP's file or folder of the sizes given, or
        `random`; `text` a BERT's folder or hub id, which brings its own sizes. `alpha`, the
        share of soft targets, rises from 0 over the first `alpha_steps` batches.

        Raises:
            UsageError: a number outside its range.
        """
        super().__init__()
        counts = {"layers": layers, "dim": dim, "queue": queue, "width": width}
        wrong = [f"{name} must be at least 1" for name, n in counts.items() if n < 1]
        shares = {"momentum": momentum, "alpha": alpha}
        wrong += [f"{n} must be between 0 and 1" for n, x in shares.items() if not 0 <= x <= 1]
        if not COLDEST <= temperature <= HOTTEST:
            wrong.append(f"temperature must be between {COLDEST} and {HOTTEST}")
        if patch_px < 1 or IMAGE_PX % patch_px:
            wrong.append(f"patch_px must divide {IMAGE_PX}")
        if alpha_steps < 0:
            wrong.append("alpha_steps must be at least 0")
        if wrong:
            raise UsageError(", ".join(wrong))
        self.vision, self.text, self.text_limit = vision, text, text_limit
        self.sizes = Sizes(width=width, layers=layers, patch_px=patch_px, hidden=4 * width, dim=dim)
        self.momentum, self.queue = momentum, queue
        self.alpha, self.alpha_steps = alpha, alpha_steps
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.preprocess = Preprocess(IMAGE_PX)
        self.tokenizer = Tokenizer(text, text_limit)

    def start(self) -> Mapping[str, Any]:
        """Read or draw the first weights; return where they are from, for provenance.

        Raises:
            ResourceError: the weights to begin with are not here.
            DataError: they are of another architecture.
        """
        bert, weights = load_bert(text_folder(self.text))
        self.sizes = sizes = replace(self.sizes, **bert)
        if self.text_limit > sizes.positions or len(self.tokenizer) > sizes.words:
            msg = (
                f"{self.text}: a text tower for {sizes.positions} tokens of {sizes.words} kinds; "
                f"text_limit is {self.text_limit}, its vocabulary {len(self.tokenizer)}"
            )
            raise DataError(msg)
        self.towers = Towers(sizes)
        self.towers.begin_text(weights)
        facts = {"kind": "pallava-plip", "text": self.text, "vision": self.vision}
        if self.vision != "random":
            file = vision_file(self.vision)
            load_strictly(self.towers.visual, vision_weights(file), str(file))
            facts["vision_sha256"] = sha256(file)
        self.register_buffer("slow", parameters_to_vector(self._fast().values()).detach().clone())
        for kind in ("image", "text"):
            rows = normalize(torch.randn(self.queue, sizes.dim), dim=-1)
            self.register_buffer(f"{kind}_queue", rows)
            self.register_buffer(f"{kind}_place", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        return facts | {"sizes": asdict(sizes)}

    # --- image and text --------------------------------------------------------------------

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `ids` and `mask`, int64 [n, t]; what is beyond the text limit is cut off."""
        return self.tokenizer(texts)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has before anything is cut off."""
        return self.tokenizer.count(texts)

    def embed_images(self, images: Tensor) -> Tensor:
        """Return [b, dim], not normalised, for uint8 images [b, h, w, 3]."""
        return self.towers.embed_image(self.towers.see(self.preprocess(images)))

    def embed_texts(self, tokens: Any) -> Tensor:  # noqa: ANN401 - as `tokens` gave them
        """Return [n, dim], not normalised."""
        return self.towers.embed_text(**tokens)

    def clamped(self) -> Tensor:
        """Return the temperature, first put back into its range as the code does.

        Through `data`: called again in one step it changes nothing, and autograd need not know.
        """
        self.temperature.data.clamp_(COLDEST, HOTTEST)
        return self.temperature

    def scale(self) -> Tensor:
        """Return what cosines are multiplied by, a scalar."""
        return 1 / self.clamped()

    # --- momentum --------------------------------------------------------------------------

    def _fast(self) -> dict[str, Tensor]:
        named = self.towers.named_parameters()
        return {name: w for name, w in named if not any(part in name for part in _APART)}

    def _slow(self) -> dict[str, Tensor]:
        fast = self._fast()
        parts = torch.split(self.slow, [w.numel() for w in fast.values()])
        return {n: p.view_as(w) for (n, w), p in zip(fast.items(), parts, strict=True)}

    def follow(self) -> None:
        """Move the slow weights one step towards the trained ones."""
        momentum_update(self._slow().values(), self._fast().values(), self.momentum)

    @torch.no_grad()
    def slow_embeddings(
        self, pixels: Tensor, tokens: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what the slow weights make of pixels and texts, [b, dim] each."""
        given = {"pixels": pixels, **tokens}
        slow: tuple[Tensor, Tensor] = functional_call(self.towers, self._slow(), (), given)
        return slow

    def soft(self) -> Tensor | float:
        """Return the share of soft targets now."""
        if not self.alpha_steps:
            return self.alpha
        return self.alpha * (self.steps / self.alpha_steps).clamp(max=1)

    def remember(self, images: Tensor, texts: Tensor) -> None:
        """Queue slow embeddings [b, dim] of all processes, and count the batch."""
        enqueue(self.image_queue, self.image_place, images)
        enqueue(self.text_queue, self.text_place, texts)
        self.steps += 1


class PallavaPlip:
    """PLIP as an encoder: embeddings [256] that meet texts, or patch tokens [196, 768].

    `checkpoint` is `weights.safetensors` of a run of ours, or `plip_80w_196token.bin` out of
    `plip.tar.gz` on the hub (OpenFace-CQUPT/Pathology-LLaVA). That one is the image tower
    alone, which gives tokens only. Tokens are those PA-LLaVA reads: of the layer before the
    last, without the class token.
    """

    name = "pallava-plip"
    input_px = IMAGE_PX
    native = tile_spec(IMAGE_PX)
    native_source = "PLIP's input size, at 0.5 um per pixel; its data are of mixed resolution"

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        text: str = _BERT,
        text_limit: int = 100,
        tokens: bool = False,
        precision: str = "float32",
    ) -> None:
        """Take the weights' file, and the folder or hub id that has BERT's vocabulary."""
        self.checkpoint, self.tokens, self.precision = checkpoint, tokens, precision
        self.text_limit, self.preprocess = text_limit, Preprocess(IMAGE_PX)
        self.tokenizer = Tokenizer(text, text_limit)

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`."""
        how = describe(self.preprocess, tokens=self.tokens, precision=self.precision)
        return encoder_id(self.name, sha256(self._file()), *how)

    def _file(self) -> Path:
        if self.checkpoint is None:
            msg = (
                "pallava-plip needs weights: --checkpoint FILE, a run's weights.safetensors or "
                "plip_80w_196token.bin from the hub's OpenFace-CQUPT/Pathology-LLaVA"
            )
            raise UsageError(msg)
        return local(self.checkpoint)

    def load(self, device: str) -> None:
        """See `Encoder.load`.

        Raises:
            DataError: the checkpoint is corrupt, or not of this architecture.
            UsageError: embeddings are asked of an image tower alone.
        """
        file = self._file()
        state = read_state(file)
        self.device, self.towers = device, None
        mine = {n.removeprefix("towers."): w for n, w in state.items() if n.startswith("towers.")}
        if mine:
            self.towers = self._whole(mine, file).to(device)
            self.visual = self.towers.visual
            self.logit_scale = 1 / float(state["temperature"].clamp(COLDEST, HOTTEST))
        elif not self.tokens:
            msg = f"{file}: an image tower alone has no embeddings, only patch tokens (--tokens)"
            raise UsageError(msg)
        else:
            self.visual = vision_of(vision_part(state), str(file)).to(device)
        blank = torch.zeros(1, IMAGE_PX, IMAGE_PX, 3, dtype=torch.uint8, device=device)
        self.row_shape = tuple(self.encode(blank).shape[1:])

    def _whole(self, state: dict[str, Tensor], file: Path) -> Towers:
        try:
            towers = Towers(sizes_of(state))
        except (KeyError, ValueError) as error:
            msg = f"{file}: not the weights of a PLIP ({error} is missing)"
            raise DataError(msg) from error
        load_strictly(towers, state, str(file))
        return towers.eval().requires_grad_(False)  # noqa: FBT003

    def _tower(self, pixels: Tensor) -> Tensor:
        if self.tokens:
            seen = self.visual(pixels, output_hidden_states=True)
            patches: Tensor = seen.hidden_states[-2][:, 1:]
            return patches
        return self._texts().embed_image(self._texts().see(pixels))

    def _texts(self) -> Towers:
        if self.towers is None:
            msg = f"{self.checkpoint}: an image tower alone, it reads no text"
            raise UsageError(msg)
        return self.towers

    def encode(self, images: Tensor) -> Tensor:
        """See `Encoder.encode`."""
        return run(self._tower, images, self.preprocess, self.precision)

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        """See `ImageTextEncoder.encode_text`.

        Raises:
            UsageError: the checkpoint has no text tower.
        """
        towers = self._texts()
        given = {name: part.to(self.device) for name, part in self.tokenizer(texts).items()}
        with torch.inference_mode():
            return towers.embed_text(**given).float()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextEncoder.count_tokens`."""
        return self.tokenizer.count(texts)
