"""CONCH, a CoCa of pathology: the two towers whose embeddings meet, without its captioner."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pathcli.cards import CONCH_TOKENIZER as TOKENIZER
from pathcli.encoders.checkpoint import fitting_part, read_state, shape_faults
from pathcli.encoders.preprocess import Preprocess, describe, encoder_id, run
from pathcli.encoders.text import run_texts, scale_of
from pathcli.errors import DataError, ResourceError
from pathcli.slides.tiling import tile_spec
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import cache_root, fetch, local, sha256

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

_TOKENIZER_URL = (
    "https://github.com/mahmoodlab/CONCH/raw/main/conch/open_clip_custom/tokenizers/" + TOKENIZER
)
_CAPTIONER = ("text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption.")
_PAD = 0


@dataclass(frozen=True)
class Sizes:
    """Sizes of CONCH's towers, as it was published; `words` a text may have beside its class."""

    image_px: int = 448
    patch_px: int = 16
    width: int = 768
    layers: int = 12
    heads: int = 12
    pool_heads: int = 8
    vocabulary: int = 32007
    words: int = 127
    out: int = 512


class Conch:
    """CONCH, ViT-B/16 at 448 px, 512-d (Lu et al. 2024, Nature Medicine). An `ImageTextEncoder`.

    A query attends to all of an image's tokens, a class token closes each text; both are
    projected into one space. The weights are gated (hub MahmoodLab/conch), and the tokenizer is
    a file of its repository: neither is ours to ship.
    """

    reentrant = True
    native_source = "CONCH's 448 px input; 0.5 um per pixel (20x), as most pathology encoders use"
    sizes = Sizes()

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        precision: str = "float32",
    ) -> None:
        """Know everything but the weights, without importing torch."""
        self.name = "conch"
        self.checkpoint, self.tokens, self.precision = checkpoint, tokens, precision
        self.input_px = self.sizes.image_px
        self.native = tile_spec(self.input_px)
        self.preprocess = Preprocess(self.input_px)
        self.text_limit = self.sizes.words + 1

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`."""
        how = describe(self.preprocess, tokens=self.tokens, precision=self.precision)
        return encoder_id(self.name, sha256(self._file()), *how)

    def _file(self) -> Path:
        if self.checkpoint is None:
            return fetch("conch")
        return local(self.checkpoint, "model.safetensors", "pytorch_model.bin")

    def load(self, device: str) -> None:
        """See `Encoder.load`."""
        import torch  # noqa: PLC0415

        file = self._file()
        state = {k: v for k, v in read_state(file).items() if not k.startswith(_CAPTIONER)}
        network = _towers(self.sizes)
        if faults := shape_faults(state, network):
            msg = f"{file}: does not fit CONCH ({len(faults)} tensors; first: {faults[0]})"
            raise DataError(msg)
        network.load_state_dict(fitting_part(state, network), strict=False)
        self.network: Any = network.eval().requires_grad_(False).to(device)  # noqa: FBT003
        self.logit_scale = scale_of(state.get("logit_scale"))
        blank = torch.zeros(1, self.input_px, self.input_px, 3, dtype=torch.uint8, device=device)
        self.row_shape = tuple(self.encode(blank).shape[1:])

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        visual = self.network.visual
        seen: torch.Tensor = visual.trunk.forward_features(pixels)
        if self.tokens:
            return seen[:, 1:]
        pooled = visual.ln_contrast(visual.attn_pool_contrast(seen)[:, 0])
        projected: torch.Tensor = pooled @ visual.proj_contrast
        return projected

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Encoder.encode`; as CONCH's `encode_image` without normalising."""
        return run(self._tower, images, self.preprocess, self.precision)

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - tokenizers has no types
        from tokenizers import Tokenizer  # noqa: PLC0415

        kept = cache_root() / "conch" / TOKENIZER
        beside = self._file().parent / TOKENIZER
        file = beside if beside.is_file() else kept
        if not file.is_file():
            msg = (
                f"conch's tokenizer is neither beside its checkpoint nor {kept}; run: "
                f"curl -fL --create-dirs -o {kept} {_TOKENIZER_URL}"
            )
            raise ResourceError(msg)
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing more precise
            msg = f"{file}: not a tokenizer ({error!s:.120})"
            raise DataError(msg) from error
        if (size := tokenizer.get_vocab_size()) != self.sizes.vocabulary:
            msg = f"{file}: knows {size} tokens, CONCH's {self.sizes.vocabulary}"
            raise DataError(msg)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def _tokenise(self, texts: list[str]) -> torch.Tensor:
        """Return int64 [n, words]: cut before the end token, padded behind it."""
        import torch  # noqa: PLC0415

        words = self.sizes.words
        rows = [e.ids for e in self._tokenizer.encode_batch(texts)]
        rows = [ids if len(ids) <= words else [*ids[: words - 1], ids[-1]] for ids in rows]
        return torch.tensor([ids + [_PAD] * (words - len(ids)) for ids in rows])

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ImageTextEncoder.encode_text`; as CONCH's without normalising."""
        device = self.network.visual.proj_contrast.device
        return run_texts(self.network.text, self._tokenise, texts, device, self.precision)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextEncoder.count_tokens`; start, end and class tokens are counted."""
        return [len(e.ids) + 1 for e in self._tokenizer.encode_batch(list(texts))]


def _towers(sizes: Sizes) -> torch.nn.Module:
    """Return modules named as CONCH's checkpoint names its tensors."""
    guard_torchvision()
    import torch  # noqa: PLC0415
    from open_clip.transformer import AttentionalPooler, TextTransformer  # noqa: PLC0415
    from timm.models import VisionTransformer  # noqa: PLC0415

    visual, network = torch.nn.Module(), torch.nn.Module()
    visual.trunk = VisionTransformer(
        img_size=sizes.image_px,
        patch_size=sizes.patch_px,
        embed_dim=sizes.width,
        depth=sizes.layers,
        num_heads=sizes.heads,
        num_classes=0,
    )
    visual.attn_pool_contrast = AttentionalPooler(
        sizes.out, sizes.width, n_head=sizes.pool_heads, n_queries=1
    )
    visual.ln_contrast = torch.nn.LayerNorm(sizes.out)
    visual.proj_contrast = torch.nn.Parameter(torch.empty(sizes.out, sizes.out))
    network.visual = visual
    network.text = TextTransformer(
        context_length=sizes.words,
        vocab_size=sizes.vocabulary,
        width=sizes.width,
        heads=sizes.heads,
        layers=sizes.layers,
        output_dim=sizes.out,
        embed_cls=True,
        pad_id=_PAD,
    )
    return network
