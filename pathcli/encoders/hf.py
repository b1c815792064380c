"""A CLIP in transformers' form, from a folder or the hub, as an encoder."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pathcli.cards import Hub
from pathcli.encoders.preprocess import (
    OPENAI_MEAN,
    OPENAI_STD,
    Preprocess,
    describe,
    encoder_id,
    run,
    token_layer,
)
from pathcli.encoders.text import run_texts, scale_of
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch, local, sha256

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

_RESAMPLE = {2: "bilinear", 3: "bicubic"}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        msg = f"{path.parent}: no {path.name}; a transformers CLIP folder has one"
        raise DataError(msg) from None
    except ValueError as error:
        msg = f"{path}: not JSON ({error})"
        raise DataError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path}: not a configuration"
        raise DataError(msg)
    return found


def _pixels(value: Any) -> int:  # noqa: ANN401 - as the files have it
    """Return a size that may stand as 224, {"shortest_edge": 224} or {"height": 224, ...}."""
    return int(next(iter(value.values())) if isinstance(value, dict) else value)


def _preprocessing(folder: Path) -> dict[str, Any]:
    """Return how images are prepared, from either of the files transformers writes.

    Raises:
        DataError: images are not to be normalised or scaled, as they would be here.
    """
    name = "preprocessor_config.json"
    if (folder / name).is_file() or not (folder / "processor_config.json").is_file():
        how = _read_json(folder / name)
    else:
        how = _read_json(folder / "processor_config.json").get("image_processor", {})
    for flag in ("do_resize", "do_rescale", "do_normalize"):
        if how.get(flag) is False:
            msg = f"{folder}: {flag} is off; tiles are always resized, scaled and normalised here"
            raise DataError(msg)
    return how


class HFClipEncoder:
    """A transformers CLIP: images give projected embeddings [d], or patch tokens [t, width].

    Tokens are `hidden_states[layer]` without the class token: what that block gives, -1 the
    last, before the tower's final norm; LLaVA-1.5 reads -2. Texts give embeddings [d] of the
    same space. An `ImageTextEncoder`.
    """

    native_source = "the folder's own input size, at 0.5 um per pixel"

    def __init__(
        self, *, model: str, tokens: bool = False, layer: int = -1, precision: str = "float32"
    ) -> None:
        """Read the folder's configuration, without importing torch.

        Raises:
            DataError: not a CLIP folder, or one prepared otherwise than is done here.
            ResourceError: neither a folder nor to be had from the hub.
            UsageError: no such layer.
        """
        self.folder = Path(model) if Path(model).is_dir() else fetch(Hub(model))
        self.name = "hf_clip" if Path(model).is_dir() else model.replace("/", "_")
        self._keep(tokens, layer, precision)
        self.native = tile_spec(self.input_px)

    def _keep(self, tokens: bool, layer: int, precision: str) -> None:
        self.tokens, self.precision = tokens, precision
        self.layer = token_layer(layer, tokens=tokens)

    @cached_property
    def folder(self) -> Path:
        """The folder; of a published model it is fetched when it is first needed."""
        return fetch(self.name)

    @cached_property
    def _config(self) -> dict[str, Any]:
        config = _read_json(self.folder / "config.json")
        kind = config.get("model_type")
        if kind != "clip":
            msg = f"{self.folder}: a {kind!r} model; only transformers' 'clip' is read here"
            raise DataError(msg)
        return config

    @cached_property
    def preprocess(self) -> Preprocess:
        """How images are prepared, as the folder says."""
        _ = self._config  # what is no CLIP is refused first
        how = _preprocessing(self.folder)
        return Preprocess(
            _pixels(how.get("crop_size") or how.get("size") or 224),
            tuple(how.get("image_mean") or OPENAI_MEAN),
            tuple(how.get("image_std") or OPENAI_STD),
            _RESAMPLE.get(how.get("resample", 3), "unknown"),
        )

    @cached_property
    def input_px(self) -> int:
        """See `Encoder.input_px`."""
        return self.preprocess.size

    @cached_property
    def text_limit(self) -> int:
        """See `ImageTextEncoder.text_limit`."""
        return int((self._config.get("text_config") or {}).get("max_position_embeddings", 77))

    @property
    def _words(self) -> int:
        return int((self._config.get("text_config") or {}).get("vocab_size", 49408))

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`."""
        how = describe(
            self.preprocess, tokens=self.tokens, precision=self.precision, layer=self.layer
        )
        return encoder_id(self.name, sha256(self.folder), *how)

    def load(self, device: str) -> None:
        """See `Encoder.load`.

        Raises:
            DataError: the weights are corrupt or do not fit their own configuration.
            UsageError: no such layer.
        """
        import torch  # noqa: PLC0415

        guard_torchvision()
        from transformers import CLIPModel  # noqa: PLC0415
        from transformers.utils import logging  # noqa: PLC0415

        logging.disable_progress_bar()
        try:
            network, told = CLIPModel.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True, dtype="float32"
            )
        except Exception as error:  # readers of weights raise whatever the bytes provoke
            line = (str(error).splitlines() or [type(error).__name__])[0][:120]
            msg = f"{self.folder}: weights cannot be read ({line})"
            raise DataError(msg) from error
        missing = set(told["missing_keys"])
        wrong = [*sorted(missing - {"logit_scale"}), *told["mismatched_keys"]]
        if wrong:
            msg = f"{self.folder}: {len(wrong)} tensors do not fit config.json ({wrong[0]})"
            raise DataError(msg)
        blocks = network.config.vision_config.num_hidden_layers
        token_layer(self.layer, tokens=self.tokens, blocks=blocks)
        self.network = network.eval().requires_grad_(False).to(device)  # noqa: FBT003
        self.logit_scale = scale_of(None if "logit_scale" in missing else network.logit_scale)
        blank = torch.zeros(1, self.input_px, self.input_px, 3, dtype=torch.uint8, device=device)
        try:
            self.row_shape = tuple(self.encode(blank).shape[1:])
        except ValueError as error:
            msg = (
                f"{self.folder}: the model takes other images than its preprocessor makes ({error})"
            )
            raise DataError(msg) from error

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        inner = self.layer != -1
        seen = self.network.vision_model(pixel_values=pixels, output_hidden_states=inner)
        features: torch.Tensor
        if self.tokens:
            features = (seen.hidden_states[self.layer] if inner else seen.last_hidden_state)[:, 1:]
        else:
            features = self.network.visual_projection(seen.pooler_output)
        return features

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Encoder.encode`; as `get_image_features`."""
        return run(self._tower, images, self.preprocess, self.precision)

    @cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - transformers has no types
        guard_torchvision()
        from transformers import AutoTokenizer  # noqa: PLC0415

        kinds = (("tokenizer.json",), ("vocab.json", "merges.txt"))
        if not any(all((self.folder / name).is_file() for name in kind) for kind in kinds):
            msg = (
                f"{self.folder}: no tokenizer in it (tokenizer.json, or vocab.json and merges.txt)"
            )
            raise ResourceError(msg)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # its readers raise whatever the file provokes
            msg = f"{self.folder}: its tokenizer cannot be read ({error!s:.120})"
            raise DataError(msg) from error
        if len(tokenizer) > self._words:
            msg = f"{self.folder}: its tokenizer knows {len(tokenizer)} tokens, not {self._words}"
            raise DataError(msg)
        return tokenizer

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """See `ImageTextEncoder.encode_text`; as `get_text_features`."""

        def tokenise(batch: list[str]) -> Any:  # noqa: ANN401 - transformers has no types
            return self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=self.text_limit,
                return_tensors="pt",
            )

        def tower(tokens: Any) -> torch.Tensor:  # noqa: ANN401 - transformers has no types
            seen = self.network.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            features: torch.Tensor = self.network.text_projection(seen.pooler_output)
            return features

        return run_texts(tower, tokenise, texts, self.network.device, self.precision)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """See `ImageTextEncoder.count_tokens`."""
        return [len(ids) for ids in self._tokenizer(list(texts), verbose=False)["input_ids"]]


class PathGenClipLHF(HFClipEncoder):
    """PathGen-CLIP-L in transformers' form (hub jamessyx/pathgenclip-vit-large-patch14-hf)."""

    native_source = "PathGen-CLIP-L's 336 px input; 0.5 um per pixel (20x)"

    def __init__(
        self, *, tokens: bool = False, layer: int = -1, precision: str = "float32"
    ) -> None:
        """Know the model; its folder is fetched when it is first needed, by `load` at the latest.

        Raises:
            UsageError: no such layer.
        """
        self.name, self.native = "pathgen-clip-l-hf", tile_spec(336)
        self._keep(tokens, layer, precision)


class Plip(HFClipEncoder):
    """PLIP, ViT-B/32 at 224 px, 512-d (Huang et al. 2023, Nature Medicine; hub vinid/plip)."""

    native_source = "PLIP's 224 px input; 0.5 um per pixel (20x), as most pathology encoders use"
    vision: ClassVar[dict[str, int]] = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
    }

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        layer: int = -1,
        precision: str = "float32",
    ) -> None:
        """Take a folder of one's own, or the hub's, which is fetched when it is first needed.

        Raises:
            UsageError: the checkpoint is a file.
            DataError: it is no CLIP folder.
            ResourceError: it is not here.
        """
        self.name, self.native = "plip", tile_spec(224)
        self._keep(tokens, layer, precision)
        if checkpoint is None:
            return
        folder = local(checkpoint)
        if not folder.is_dir():
            msg = f"{folder}: plip needs the whole folder, with config.json beside the weights"
            raise UsageError(msg)
        self.folder = folder
        self.native = tile_spec(self.input_px)

    def load(self, device: str) -> None:
        """See `Encoder.load`."""
        super().load(device)
        found = {name: getattr(self.network.config.vision_config, name) for name in self.vision}
        if found != self.vision:
            msg = f"{self.folder}: not PLIP's ViT-B/32 but {found}; use --encoder hf:{self.folder}"
            raise DataError(msg)
