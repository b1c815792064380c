"""timm's networks as encoders, UNI, and `lite0`, which needs nothing but the package index."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pathcli.cards import Hub
from pathcli.encoders.checkpoint import read_state, shape_faults
from pathcli.encoders.preprocess import Preprocess, describe, encoder_id, run
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch, local, sha256

if TYPE_CHECKING:
    from pathlib import Path

    import torch

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Backbone:
    """A timm network without its classifier, giving pooled features or patch tokens."""

    def __init__(self, network: torch.nn.Module, *, tokens: bool) -> None:
        self.network, self.tokens = network, tokens

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        features = self.network.forward_features(pixels)  # type: ignore[operator]
        if not self.tokens:
            pooled: torch.Tensor = self.network.forward_head(features, pre_logits=True)  # type: ignore[operator]
            return pooled
        if features.ndim == 4:  # noqa: PLR2004 - a map [b, d, h, w] or, channels last, [b, h, w, d]
            last = getattr(self.network, "output_fmt", "NCHW") == "NHWC"
            features = features.permute(0, 3, 1, 2) if last else features
            return features.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
        return features[:, getattr(self.network, "num_prefix_tokens", 0) :]  # type: ignore[no-any-return]


class TimmEncoder:
    """Any network of timm by its name, with its published weights or a local checkpoint."""

    reentrant = True
    native_source = "timm's input size, at the 0.5 um per pixel most pathology encoders use"
    options: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        *,
        model: str,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        precision: str = "float32",
    ) -> None:
        """Look the network up; its weights are read by `load`.

        Raises:
            UsageError: timm has no such network.
        """
        guard_torchvision()
        import timm  # noqa: PLC0415

        self.name = f"timm_{model}"
        self.model, self.checkpoint = model, checkpoint
        self.tokens, self.precision = tokens, precision
        if not timm.is_model(model.split(".", maxsplit=1)[0]):
            near = timm.list_models(f"*{model.split('_', maxsplit=1)[0]}*")[:5]
            msg = f"timm has no network {model!r}; near: {', '.join(near) or 'none'}"
            raise UsageError(msg)
        config = timm.get_pretrained_cfg(model) or timm.models.PretrainedCfg()
        self._hub_id = config.hf_hub_id
        self.input_px = int(config.input_size[-1])
        self.native = tile_spec(self.input_px)
        self.preprocess = Preprocess(
            self.input_px, tuple(config.mean), tuple(config.std), config.interpolation or "bicubic"
        )

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`."""
        how = describe(self.preprocess, tokens=self.tokens, precision=self.precision)
        return encoder_id(self.name, sha256(self._file()), *how)

    def _file(self) -> Path:
        """Return the weights' file, fetching it if need be."""
        if self.checkpoint:
            return local(self.checkpoint)
        if not self._hub_id:
            msg = f"timm publishes no weights of {self.model}; give a file with --checkpoint"
            raise ResourceError(msg)
        return fetch(Hub(self._hub_id, "model.safetensors"))

    def load(self, device: str) -> None:
        """See `Encoder.load`."""
        self.place(self._network(), device)

    def place(self, network: torch.nn.Module, device: str) -> None:
        """Put the network on `device` and learn the shape of what it gives."""
        import torch  # noqa: PLC0415

        network = network.eval().requires_grad_(False).to(device)  # noqa: FBT003
        if torch.device(device).type == "cpu":
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._run = _Backbone(network, tokens=self.tokens)
        blank = torch.zeros(1, self.input_px, self.input_px, 3, dtype=torch.uint8, device=device)
        self.row_shape = tuple(self.encode(blank).shape[1:])

    def _network(self) -> torch.nn.Module:
        guard_torchvision()
        import timm  # noqa: PLC0415
        import torch  # noqa: PLC0415

        state = read_state(self._file())
        network: torch.nn.Module = timm.create_model(self.model, num_classes=0, **self.options)
        with torch.device("meta"):
            whole: torch.nn.Module = timm.create_model(self.model, **self.options)
        head = whole.state_dict().keys() - network.state_dict().keys()
        state = {name: tensor for name, tensor in state.items() if name not in head}
        if faults := shape_faults(state, network):
            msg = f"{self._file()}: does not fit timm's {self.model}: {'; '.join(faults[:3])}"
            raise DataError(msg)
        network.load_state_dict(state)
        return network

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Encoder.encode`."""
        return run(self._run, images, self.preprocess, self.precision)


class Lite0(TimmEncoder):
    """EfficientNet-Lite0 on ImageNet weights: 1280-d, or 7 x 7 tokens; runs anywhere.

    The weights' file names its tensors otherwise than timm does, in the same order.
    """

    native_source = "ImageNet network at its 224 px; 0.5 um per pixel as pathology encoders use"

    def __init__(self, *, tokens: bool = False, precision: str = "float32") -> None:
        """Know everything but the weights, without importing torch."""
        self.name = "lite0"
        self.model = "tf_efficientnet_lite0"
        self.tokens, self.precision = tokens, precision
        self.input_px = 224
        self.native = tile_spec()
        half = (0.5, 0.5, 0.5)
        self.preprocess = Preprocess(self.input_px, half, half)

    def _file(self) -> Path:
        return fetch("lite0")

    def _network(self) -> torch.nn.Module:
        guard_torchvision()
        import timm  # noqa: PLC0415

        network: torch.nn.Module = timm.create_model(self.model, pretrained=False)
        published: dict[str, Any] = read_state(self._file())
        skip = "num_batches_tracked"
        names = [k for k in network.state_dict() if not k.endswith(skip)]
        tensors = [v for k, v in published.items() if not k.endswith(skip)]
        state = dict(zip(names, tensors, strict=True))
        state |= {k: v for k, v in network.state_dict().items() if k.endswith(skip)}
        if faults := shape_faults(state, network):
            msg = f"lite0: this timm names the network's tensors in another order ({faults[0]})"
            raise DataError(msg)
        network.load_state_dict(state)
        network.reset_classifier(0)  # type: ignore[operator]
        return network


class Uni(TimmEncoder):
    """UNI, ViT-L/16 with LayerScale, 1024-d, images alone (Chen et al. 2024, Nature Medicine).

    Its weights are gated (hub MahmoodLab/UNI): the hub asks for agreement to its terms.
    """

    native_source = "UNI's slide tasks: 256 px tiles at 20x, resized to its 224 px input"
    options: ClassVar[dict[str, Any]] = {"init_values": 1e-5}

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        tokens: bool = False,
        precision: str = "float32",
    ) -> None:
        """Know everything but the weights, without importing torch."""
        self.name = "uni"
        self.model, self.checkpoint = "vit_large_patch16_224", checkpoint
        self.tokens, self.precision = tokens, precision
        self.input_px = 224
        self.native = tile_spec(256)
        self.preprocess = Preprocess(self.input_px, IMAGENET_MEAN, IMAGENET_STD, "bilinear")

    def _file(self) -> Path:
        if self.checkpoint is None:
            return fetch("uni")
        return local(self.checkpoint, "model.safetensors", "pytorch_model.bin")
