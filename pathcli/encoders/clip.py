"""open_clip's models as encoders: PathGen-CLIP, QuiltNet, any architecture with a checkpoint."""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pathcli.encoders.checkpoint import fitting_part, read_state, shape_faults
from pathcli.encoders.preprocess import (
    OPENAI_MEAN,
    OPENAI_STD,
    Preprocess,
    Triple,
    describe,
    encoder_id,
    run,
    token_layer,
)
from pathcli.encoders.text import run_texts, scale_of
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.registry import did_you_mean
from pathcli.slides.tiling import tile_spec
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch, local, sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def architectures() -> dict[str, dict[str, Any]]:
    """Return open_clip's model configurations by name, without importing it."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        msg = "open_clip is not installed; run: pip install open_clip_torch"
        raise UsageError(msg)
    folder = Path(spec.origin).parent / "model_configs"
    return {
        p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))
    }


class OpenClipEncoder:
    """An open_clip model: images give projected embeddings [d], or patch tokens [t, width].

    Tokens are without the class token: at layer -1 those of the last block after the tower's
    final norm, as open_clip gives them; at -2 and below those of that block, not normed, as
    transformers' `hidden_states[layer]` (LLaVA-1.5 reads -2). Texts give embeddings [d] of the
    same space; both towers are loaded and checked together, so that a checkpoint is what it
    says it is. An `ImageTextEncoder`.
    """

    reentrant = True
    native_source = "the architecture's input size, at 0.5 um per pixel"
    quick_gelu = False

    def __init__(
        self,
        *,
        model: str,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        layer: int = -1,
        precision: str = "float32",
    ) -> None:
        """Look the architecture up; weights are read by `load`.

        Raises:
            UsageError: open_clip has no such architecture, or it no such layer.
        """
        known = architectures()
        if model not in known:
            near = difflib.get_close_matches(model, known, n=8, cutoff=0.4) or list(known)[:8]
            msg = f"open_clip has no architecture {model!r}: {did_you_mean(model, near)}"
            raise UsageError(msg)
        self.name = f"open_clip_{model}"
        self.model, self.checkpoint = model, checkpoint
        self.tokens, self.precision = tokens, precision
        self.layer = token_layer(layer, tokens=tokens)
        size = known[model]["vision_cfg"].get("image_size", 224)
        self.input_px = int(size if isinstance(size, int) else size[0])
        self.native = tile_spec(self.input_px)
        self.preprocess = Preprocess(self.input_px, *published_normalisation(model))
        self.text_limit = int(known[model].get("text_cfg", {}).get("context_length", 77))

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`; which activation is used counts too."""
        how = describe(
            self.preprocess, tokens=self.tokens, precision=self.precision, layer=self.layer
        )
        return encoder_id(self.name, sha256(self._file()), self.quick_gelu, *how)

    def _file(self) -> Path:
        if self.checkpoint is None:
            msg = f"open_clip:{self.model} needs weights: --checkpoint FILE"
            raise UsageError(msg)
        return local(self.checkpoint)

    def load(self, device: str) -> None:
        """See `Encoder.load`.

        Raises:
            DataError: the checkpoint is corrupt, or fits another architecture, which is named.
            UsageError: tokens of a tower that has none, or a layer it has not.
        """
        import torch  # noqa: PLC0415

        guard_torchvision()
        import open_clip  # noqa: PLC0415

        if self.tokens and self.model.startswith("coca"):
            msg = f"--tokens: {self.model} pools its patches before it gives them"
            raise UsageError(msg)
        file = self._file()
        state = read_state(file)
        try:
            network = open_clip.create_model(
                self.model, pretrained=None, load_weights=False, force_quick_gelu=self.quick_gelu
            )
        except OSError as error:
            msg = f"open_clip:{self.model}: its text tower is on the hub, which cannot be reached"
            raise ResourceError(msg) from error
        if faults := shape_faults(state, network):
            raise DataError(self._mismatch(file, state, faults))
        network.load_state_dict(fitting_part(state, network), strict=False)
        network = network.eval().requires_grad_(False).to(device)  # noqa: FBT003
        if self.tokens and not hasattr(network.visual, "output_tokens"):
            msg = f"--tokens: open_clip's {self.model} has no patch tokens"
            raise UsageError(msg)
        if self.tokens:
            blocks = len(network.visual.transformer.resblocks)
            token_layer(self.layer, tokens=True, blocks=blocks)
            network.visual.output_tokens = True
        self.network = network
        self.logit_scale = scale_of(state.get("logit_scale"))
        blank = torch.zeros(1, self.input_px, self.input_px, 3, dtype=torch.uint8, device=device)
        self.row_shape = tuple(self.encode(blank).shape[1:])

    def _mismatch(self, file: Path, state: dict[str, torch.Tensor], faults: list[str]) -> str:
        fitting = architecture_of(state)
        told = f"its shapes are those of {fitting}" if fitting else "no architecture here fits it"
        ours = [e.published for e in (PathGenClip, PathGenClipL) if e.architecture == fitting]
        use = "".join(f": use --encoder {name} for PathGen's own weights, else" for name in ours)
        use = f"{use or ': use'} --encoder open_clip:{fitting}" if fitting else ""
        return f"{file}: does not fit open_clip's {self.model} ({faults[0]}); {told}{use}"

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.layer != -1:
            inner: torch.Tensor = self.network.visual.forward_intermediates(
                pixels, [self.layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
            )["image_intermediates"][0]
            return inner
        given = self.network.visual(pixels)  # CoCa and towers with tokens give (pooled, tokens)
        if isinstance(given, tuple):
            given = given[1] if self.tokens else given[0]
        features: torch.Tensor = given
        return features

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Encoder.encode`; as open_clip's `encode_image` without normalising."""
        return run(self._tower, images, self.preprocess, self.precision)

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - open_clip has several, without a base
        guard_torchvision()
        import open_clip  # noqa: PLC0415

        try:
            return open_clip.get_tokenizer(self.model)
        except (OSError, ValueError) as error:
            text = architectures()[self.model].get("text_cfg", {})
            repo = text.get("hf_tokenizer_name", self.model)
            msg = (
                f"open_clip:{self.model}: its tokenizer is on the hub, which cannot be reached; "
                f"on a machine with network run: hf download {repo} and copy the hub cache"
            )
            raise ResourceError(msg) from error

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ImageTextEncoder.encode_text`; as open_clip's without normalising."""

        def tower(tokens: torch.Tensor) -> torch.Tensor:
            features: torch.Tensor = self.network.encode_text(tokens, normalize=False)
            return features

        device = next(self.network.parameters()).device
        return run_texts(tower, self._tokenizer, texts, device, self.precision)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextEncoder.count_tokens`."""
        tokenizer = self._tokenizer
        whole = getattr(tokenizer, "tokenizer", None)  # transformers' own, where it is one
        if whole is None:
            return [len(tokenizer.encode(text)) + 2 for text in texts]  # and start, and end
        clean = [tokenizer.clean_fn(text) for text in texts]
        return [len(ids) for ids in whole(clean, verbose=False)["input_ids"]]


def published_normalisation(model: str) -> tuple[Triple, Triple, str]:
    """Return mean, std and interpolation that open_clip's published weights of `model` need.

    A checkpoint of one's own is taken to be trained as those were; the plain ViT and ResNet
    architectures use OpenAI's numbers, the others are looked up in open_clip's own table.
    """
    if re.match(r"(ViT|RN)", model) and not re.search(r"SigLIP|CLIPA", model):
        return OPENAI_MEAN, OPENAI_STD, "bicubic"
    guard_torchvision()
    import open_clip  # noqa: PLC0415

    tags = open_clip.list_pretrained_tags_by_model(model)
    how = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}
    mean, std = how.get("mean") or OPENAI_MEAN, how.get("std") or OPENAI_STD
    return tuple(mean), tuple(std), how.get("interpolation") or "bicubic"


def architecture_of(state: dict[str, torch.Tensor]) -> str | None:
    """Return the open_clip architecture whose image and text towers have these shapes.

    The few that the sizes in their configuration do not rule out are built without memory
    and compared tensor by tensor.
    """
    guard_torchvision()
    import open_clip  # noqa: PLC0415
    import torch  # noqa: PLC0415

    possible = [name for name, config in architectures().items() if _plausible(config, state)]
    for name in sorted(possible, key=lambda n: ("quickgelu" in n, len(n), n)):
        try:
            with torch.device("meta"):  # open_clip's own argument draws all weights first
                network = open_clip.create_model(
                    name, pretrained=None, load_weights=False, device="meta"
                )
        except (OSError, RuntimeError, NotImplementedError):
            continue  # its text tower is on the hub, or it cannot be built without memory
        if not shape_faults(state, network):
            return name
    return None


def _plausible(config: dict[str, Any], state: dict[str, torch.Tensor]) -> bool:
    """Tell from sizes alone whether a checkpoint can be of a configuration."""
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    resnet = isinstance(vision.get("layers"), list)
    kinds = {
        "visual.trunk.": "timm_model_name" in vision,
        "visual.layer1.": resnet,
        "text.transformer.embeddings.": "hf_model_name" in text,
        "text_decoder.": "multimodal_cfg" in config,
    }
    for prefix, has in kinds.items():
        if has != any(name.startswith(prefix) for name in state):
            return False
    words = state.get("token_embedding.weight", state.get("text.token_embedding.weight"))
    if words is not None and words.shape[1] != text.get("width", 512):
        return False
    first = state.get("visual.conv1.weight")
    if first is None or resnet:
        return True
    return tuple(first.shape[::3]) == (vision.get("width"), vision.get("patch_size"))


class PathGenClip(OpenClipEncoder):
    """PathGen-CLIP, ViT-B/16, 512-d (Sun et al. 2024, arXiv:2407.00203; hub jamessyx/PathGen-CLIP).

    Trained from OpenAI's weights, so it needs their QuickGELU, as the authors' scripts do.
    """

    native_source = "PathGen-CLIP's input size; 0.5 um per pixel (20x), as its MIL runs use"
    quick_gelu = True
    published, architecture = "pathgen-clip", "ViT-B-16"

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        layer: int = -1,
        precision: str = "float32",
    ) -> None:
        """Know the architecture; the weights come from the hub unless `checkpoint` is given."""
        super().__init__(
            model=self.architecture,
            checkpoint=checkpoint,
            tokens=tokens,
            layer=layer,
            precision=precision,
        )
        self.name = self.published

    def _file(self) -> Path:
        return local(self.checkpoint) if self.checkpoint else fetch(self.published)


class PathGenClipL(PathGenClip):
    """PathGen-CLIP-L, ViT-L/14 at 336 px, 768-d (hub jamessyx/PathGen-CLIP-L).

    The hub page names ViT-B-16 beside it; the weights are those of ViT-L-14-336.
    """

    native_source = "PathGen-CLIP-L's 336 px input; 0.5 um per pixel (20x)"
    published, architecture = "pathgen-clip-l", "ViT-L-14-336"


class QuiltNet(OpenClipEncoder):
    """QuiltNet, ViT-B/32 or B/16, 512-d (Ikezogwo et al. 2023, arXiv:2306.11207; hub wisdomik).

    The activation is that of the `open_clip_config.json` its authors publish beside the
    weights; without that file it is open_clip's default for the architecture.
    """

    native_source = "QuiltNet's input size; 0.5 um per pixel (20x), as most pathology encoders use"
    sizes: ClassVar[dict[str, str]] = {"B-32": "ViT-B-32", "B-16": "ViT-B-16"}

    def __init__(
        self,
        *,
        model: str = "B-32",
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        layer: int = -1,
        precision: str = "float32",
    ) -> None:
        """Know the architecture; the weights come from the hub unless `checkpoint` is given.

        Raises:
            UsageError: a size that does not exist.
        """
        if model not in self.sizes:
            msg = f"quilt-net comes as {' and '.join(self.sizes)}, not {model!r}"
            raise UsageError(msg)
        super().__init__(
            model=self.sizes[model],
            checkpoint=checkpoint,
            tokens=tokens,
            layer=layer,
            precision=precision,
        )
        self.name = "quilt-net" if model == "B-32" else f"quilt-net:{model}"

    def _file(self) -> Path:
        if self.checkpoint is None:
            return fetch(self.name)
        return local(self.checkpoint, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")

    @cached_property
    def quick_gelu(self) -> bool:  # type: ignore[override]
        """Whether the published configuration asks for OpenAI's activation."""
        config = self._file().parent / "open_clip_config.json"
        if not config.is_file():
            return False
        try:
            return bool(json.loads(config.read_text("utf-8"))["model_cfg"].get("quick_gelu"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            msg = f"{config}: not open_clip's configuration ({error!r})"
            raise DataError(msg) from error
