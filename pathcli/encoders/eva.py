"""EVA-CLIP's ViT-g/14 as BLIP-2 uses it: patch tokens before any final norm."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pathcli.encoders.checkpoint import read_state, shape_faults
from pathcli.encoders.preprocess import Preprocess, describe, encoder_id, run
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.slides.tiling import tile_spec
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch, local, sha256

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    State = dict[str, torch.Tensor]

IMAGE_PX, HEAD_DIM = 224, 88
BLOCKS = 39
"""BLIP-2 leaves out the last of EVA-CLIP's 40 blocks; a file that has it is read without."""


class EvaClipG:
    """EVA-CLIP ViT-g/14 (arXiv:2211.07636), tokens [257, 1408] of 39 blocks for a Q-Former.

    The class token is kept, and comes first; the norm that follows is the Q-Former's to train
    (BLIP-2, arXiv:2301.12597). `checkpoint` is LAVIS's `eva_vit_g.pth`, a checkpoint of LAVIS
    that has `visual_encoder.` in it, or BLIP-2 in transformers' form, a file or its folder.
    Its matrices are kept in the precision of its arithmetic, as LAVIS keeps them.
    """

    name = "eva-clip-g"
    input_px = IMAGE_PX
    native = tile_spec(IMAGE_PX)
    native_source = "EVA-CLIP's 224 px input; 0.5 um per pixel (20x), as most encoders use"

    def __init__(
        self,
        *,
        checkpoint: Path | str | None = None,
        tokens: bool = True,
        precision: str = "float16",
    ) -> None:
        """Know everything but the weights; those of the hub unless `checkpoint` is given.

        Raises:
            UsageError: one vector per image is asked for.
        """
        if not tokens:
            msg = "eva-clip-g gives patch tokens only: --tokens (in a recipe: tokens: true)"
            raise UsageError(msg)
        self.checkpoint, self.tokens, self.precision = checkpoint, tokens, precision
        self.preprocess = Preprocess(IMAGE_PX)

    @cached_property
    def id(self) -> str:
        """See `Encoder.id`."""
        how = describe(self.preprocess, tokens=True, precision=self.precision)
        return encoder_id(self.name, sha256(self._source()), *how)

    def _source(self) -> Path:
        return local(self.checkpoint) if self.checkpoint else fetch(self.name)

    def load(self, device: str) -> None:
        """See `Encoder.load`.

        Raises:
            DataError: the checkpoint is corrupt, or has no such tower.
        """
        import torch  # noqa: PLC0415

        source = self._source()
        state: State = {}
        for file in _files(source):
            state |= vision_part(read_state(file))
        network = _tower(state, source)
        lower = getattr(torch, self.precision)
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.to(lower)
        self.network = network.eval().requires_grad_(False).to(device)  # noqa: FBT003
        blank = torch.zeros(1, IMAGE_PX, IMAGE_PX, 3, dtype=torch.uint8, device=device)
        self.row_shape = tuple(self.encode(blank).shape[1:])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """See `Encoder.encode`; what the last block gives."""

        def tower(pixels: torch.Tensor) -> torch.Tensor:
            tokens: torch.Tensor = self.network(pixels).last_hidden_state
            return tokens

        return run(tower, images, self.preprocess, self.precision)


def _files(source: Path) -> list[Path]:
    """Return the files of weights in a folder as transformers saves it, or the one file."""
    if not source.is_dir():
        return [source]
    found = sorted(source.glob("*.safetensors")) or sorted(source.glob("pytorch_model*.bin"))
    if not found:
        msg = f"{source}: holds no *.safetensors or pytorch_model*.bin"
        raise ResourceError(msg)
    return found


def _tower(state: State, source: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """Return the network of the weights' own sizes, filled, without its final norm."""
    import torch  # noqa: PLC0415

    guard_torchvision()
    from transformers import Blip2VisionConfig, Blip2VisionModel  # noqa: PLC0415

    try:
        width, _, _, patch_px = state["embeddings.patch_embedding.weight"].shape
        hidden = len(state["encoder.layers.0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        msg = f"{source}: holds no EVA-CLIP image tower, of LAVIS or of transformers' BLIP-2"
        raise DataError(msg) from error
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=1 + max(block for name in state if (block := _block(name)) is not None),
        num_attention_heads=max(1, width // HEAD_DIM),
        image_size=IMAGE_PX,
        patch_size=patch_px,
        layer_norm_eps=1e-6,
        hidden_act="gelu",
        qkv_bias=True,
    )
    with torch.device("meta"):
        network = Blip2VisionModel(config)
        network.post_layernorm = torch.nn.Identity()
    if faults := shape_faults(state, network):
        msg = f"{source}: no EVA-CLIP for {IMAGE_PX} px ({faults[0]}; {len(faults)} tensors in all)"
        raise DataError(msg)
    network.load_state_dict({name: x.float() for name, x in state.items()}, assign=True)
    return network


# --- weights -----------------------------------------------------------------------------

_LAVIS = (
    (r"^cls_token", "embeddings.class_embedding"),
    (r"^pos_embed", "embeddings.position_embedding"),
    (r"^patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^blocks", "encoder.layers"),
    (r"\.norm(\d)", r".layer_norm\1"),
    (r"\.attn\.proj", ".self_attn.projection"),
    (r"\.attn\.", ".self_attn."),
)


def vision_part(state: State) -> State:
    """Return the image tower of a state dict in transformers' names, without its final norm."""
    prefixes = ("visual_encoder.", "vision_model.", "")
    prefix = next(p for p in prefixes if not p or any(name.startswith(p) for name in state))
    part = {n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}
    renamed = {}
    for name, tensor in _joined(part).items():
        bare = name
        for theirs, ours in _LAVIS:
            bare = re.sub(theirs, ours, bare)
        renamed[bare] = tensor
    kept = ("embeddings.", "encoder.layers.")
    return {n: x for n, x in renamed.items() if n.startswith(kept) and (_block(n) or 0) < BLOCKS}


def _joined(part: State) -> State:
    """Return the part with LAVIS's biases of queries and values as one; keys have none."""
    import torch  # noqa: PLC0415

    joined = {n: x for n, x in part.items() if not n.endswith((".q_bias", ".v_bias"))}
    for name, query in part.items():
        if name.endswith(".q_bias") and (value := part.get(f"{name[:-6]}v_bias")) is not None:
            joined[f"{name[:-6]}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined


def _block(name: str) -> int | None:
    """Return the number of the block a tensor is of."""
    found = re.match(r"encoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None
