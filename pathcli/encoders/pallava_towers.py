"""The towers of PA-LLaVA's PLIP, and what they begin from: weights of others in, ours out.

Its text tower is BLIP's: a BERT with cross-attention to the image in every layer, which the
same weights can leave out. Where PA-LLaVA's code re-initialises the image tower's last norm
(its name is misspelt there), CLIP's own is kept here; BERT's token type, dropped there, is
added to the positions, so that a text alone is read as BERT reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pathcli.cards import CARDS, Hub
from pathcli.encoders.checkpoint import fitting_part, read_state, shape_faults
from pathcli.errors import DataError, UsageError
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import fetch, local

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    State = dict[str, Tensor]

IMAGE_PX = 224
HEAD_DIM = 64  # of both towers, as in ViT-B/16 and BERT-base; a narrower tower has one head
_MARKS = 2  # [DEC], [ENC]: the rows of the vocabulary behind BERT's own


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of both towers; the defaults are ViT-B/16 and BERT-base, 256-d embeddings."""

    width: int = 768
    layers: int = 12
    patch_px: int = 16
    hidden: int = 3072
    text_width: int = 768
    text_layers: int = 12
    text_hidden: int = 3072
    words: int = 30_524
    positions: int = 512
    dim: int = 256


def sizes_of(state: Mapping[str, Tensor]) -> Sizes:
    """Return the sizes of saved `Towers`; KeyError when a tensor is missing."""

    def layers(prefix: str) -> int:
        return 1 + max(int(n[len(prefix) :].split(".")[0]) for n in state if n.startswith(prefix))

    image, text = "visual.encoder.layers.", "text.encoder.layer."
    words = state["text.embeddings.word_embeddings.weight"]
    return Sizes(
        width=len(state["visual.embeddings.class_embedding"]),
        layers=layers(image),
        patch_px=state["visual.embeddings.patch_embedding.weight"].shape[-1],
        hidden=len(state[f"{image}0.mlp.fc1.weight"]),
        text_width=words.shape[1],
        text_layers=layers(text),
        text_hidden=len(state[f"{text}0.intermediate.dense.weight"]),
        words=len(words),
        positions=len(state["text.embeddings.position_embeddings.weight"]),
        dim=len(state["image_projection.weight"]),
    )


# --- the towers --------------------------------------------------------------------------


def vision_tower(width: int, layers: int, patch_px: int, hidden: int) -> Any:  # noqa: ANN401
    """Return an untrained CLIP image tower for 224 px, in transformers' form."""
    guard_torchvision()
    from transformers import CLIPVisionConfig, CLIPVisionModel  # noqa: PLC0415

    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // HEAD_DIM),
        image_size=IMAGE_PX,
        patch_size=patch_px,
    )
    model = CLIPVisionModel(config)
    return getattr(model, "vision_model", model)  # transformers 4 wraps it once more


def text_tower(sizes: Sizes) -> Any:  # noqa: ANN401 - transformers is untyped
    """Return an untrained BERT that can also look at an image: BLIP's, in transformers' form."""
    guard_torchvision()
    from transformers import BlipTextConfig  # noqa: PLC0415
    from transformers.models.blip.modeling_blip_text import BlipTextModel  # noqa: PLC0415

    config = BlipTextConfig(
        vocab_size=sizes.words,
        hidden_size=sizes.text_width,
        encoder_hidden_size=sizes.width,
        intermediate_size=sizes.text_hidden,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=max(1, sizes.text_width // HEAD_DIM),
        max_position_embeddings=sizes.positions,
        hidden_dropout_prob=0.1,  # bert-base-uncased's
        attention_probs_dropout_prob=0.1,
        bos_token_id=sizes.words - _MARKS,
        sep_token_id=None,
    )
    return BlipTextModel(config, add_pooling_layer=False)


class Towers(nn.Module):
    """Both towers, their projections and the matching head, untrained."""

    def __init__(self, sizes: Sizes) -> None:
        """Draw the first weights."""
        super().__init__()
        self.visual = vision_tower(sizes.width, sizes.layers, sizes.patch_px, sizes.hidden)
        self.text = text_tower(sizes)
        self.image_projection = nn.Linear(sizes.width, sizes.dim)
        self.text_projection = nn.Linear(sizes.text_width, sizes.dim)
        self.match = nn.Linear(sizes.text_width, 2)

    def begin_text(self, bert: State) -> None:
        """Put BERT's weights in; cross-attention and the two last words stay as drawn."""
        words = "embeddings.word_embeddings.weight"
        own = self.text.state_dict()
        grown = torch.cat([bert[words], own[words][len(bert[words]) :]])
        self.text.load_state_dict(own | bert | {words: grown})

    def see(self, pixels: Tensor) -> Tensor:
        """Return [b, 1 + patches, width] of pixels [b, 3, 224, 224]; the class token is first."""
        seen: Tensor = self.visual.post_layernorm(self.visual(pixels).last_hidden_state)
        return seen

    def _read(self, ids: Tensor, mask: Tensor, seen: Tensor | None = None) -> Tensor:
        said: Tensor = self.text(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=seen
        ).last_hidden_state[:, 0]
        return said

    def embed_image(self, seen: Tensor) -> Tensor:
        """Return the embeddings [b, dim] of what `see` gave, not normalised."""
        image: Tensor = self.image_projection(seen[:, 0])
        return image

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the embeddings [n, dim] of texts alone, not normalised."""
        text: Tensor = self.text_projection(self._read(ids, mask))
        return text

    def compare(self, ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        """Return logits [n, 2] of whether texts belong to what `see` gave; 1 is yes."""
        beside = ids.clone()
        beside[:, 0] = self.text.config.vocab_size - 1  # [ENC] for [CLS]
        said: Tensor = self.match(self._read(beside, mask, seen))
        return said

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embeddings [b, dim] of images and of texts, not normalised."""
        return self.embed_image(self.see(pixels)), self.embed_text(ids, mask)


# --- first weights -----------------------------------------------------------------------


def vision_file(source: str) -> Path:
    """Return the file of an image tower's weights: OpenAI's, a file's own path, or a folder's.

    Raises:
        ResourceError: it is not here.
    """
    if source == "openai":
        return fetch("openai-clip-b16")
    return local(source, "model.safetensors", "pytorch_model.bin")


def vision_weights(path: Path) -> State:
    """Return the image tower in a file, as `vision_tower` names it.

    A file of transformers or open_clip, or PA-LLaVA's own `plip_80w_196token.bin`; the rest
    of a CLIP is left out.

    Raises:
        DataError: it holds no image tower.
    """
    state = vision_part(read_state(path))
    if not state:
        msg = f"{path}: holds no CLIP image tower, neither in transformers' nor in open_clip's form"
        raise DataError(msg)
    return state


def vision_part(state: State) -> State:
    """Return the image tower of a state dict, in transformers' names without prefix."""
    if "visual.conv1.weight" in state:
        state = _from_open_clip(state)
    first = "embeddings.class_embedding"
    prefix = next((p for p in ("", "vision_model.", "visual.") if p + first in state), None)
    if prefix is None:
        return {}
    part = {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}
    renamed = {n.replace("post_layrnorm", "post_layernorm"): x for n, x in part.items()}
    return {n: x for n, x in renamed.items() if not n.endswith("position_ids")}


_OPEN_CLIP = (
    (r"conv1", "embeddings.patch_embedding"),
    (r"class_embedding", "embeddings.class_embedding"),
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"ln_pre", "pre_layrnorm"),
    (r"ln_post", "post_layernorm"),
    (r"transformer\.resblocks", "encoder.layers"),
    (r"ln_(\d)", r"layer_norm\1"),
    (r"attn\.out_proj", "self_attn.out_proj"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
)


def _from_open_clip(state: State) -> State:
    """Return the `visual.` part of an open_clip state dict in transformers' names."""
    found = {}
    for name, tensor in state.items():
        if not name.startswith("visual.") or name == "visual.proj":
            continue
        bare = name.removeprefix("visual.")
        for theirs, ours in _OPEN_CLIP:
            bare = re.sub(rf"(?<![a-z_]){theirs}(?![a-z])", ours, bare)
        if ".attn.in_proj_" in bare:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                place = f".self_attn.{letter}_proj."
                found[bare.replace(".attn.in_proj_", place)] = part
        else:
            found[bare] = tensor
    return found


def load_strictly(module: nn.Module, state: State, source: str) -> None:
    """Put weights into a module; DataError names the first tensor that does not fit."""
    if faults := shape_faults(state, module):
        msg = f"{source}: does not fit this tower ({faults[0]}; {len(faults)} tensors in all)"
        raise DataError(msg)
    module.load_state_dict(fitting_part(state, module), strict=False)


def load_bert(folder: Path) -> tuple[dict[str, int], State]:
    """Return a BERT folder's sizes, as `Sizes` has them, and weights as `text_tower` names them.

    Raises:
        DataError: it is no BERT, weights are missing, or its heads are of another size.
    """
    guard_torchvision()
    from transformers import BertModel  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()
    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # BERT's own heads are left out on purpose
    try:
        bert, told = BertModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, add_pooling_layer=False
        )
    except Exception as error:  # readers of weights raise whatever the bytes provoke
        line = (str(error).splitlines() or [type(error).__name__])[0][:120]
        msg = f"{folder}: no BERT can be read here ({line})"
        raise DataError(msg) from error
    finally:
        logging.set_verbosity(loud)
    config, absent = bert.config, sorted([*told["missing_keys"], *told["mismatched_keys"]])
    heads = max(1, config.hidden_size // HEAD_DIM)
    if absent or config.num_attention_heads != heads or config.hidden_act != "gelu":
        why = absent[0] if absent else f"it needs {heads} heads and gelu"
        msg = f"{folder}: not a BERT as PLIP's text tower needs it ({why})"
        raise DataError(msg)
    state = bert.state_dict()
    kinds = state.pop("embeddings.token_type_embeddings.weight")
    places = "embeddings.position_embeddings.weight"
    sizes = {
        "text_width": config.hidden_size,
        "text_layers": config.num_hidden_layers,
        "text_hidden": config.intermediate_size,
        "words": config.vocab_size + _MARKS,
        "positions": config.max_position_embeddings,
    }
    return sizes, state | {places: state[places] + kinds[0]}


def text_folder(text: str) -> Path:
    """Return the folder of a BERT and its vocabulary: a local one, or the hub's."""
    if Path(text).is_dir():
        return Path(text)
    return fetch(text if text in CARDS else Hub(text))


def vision_of(state: State, source: str) -> Any:  # noqa: ANN401 - transformers is untyped
    """Return the image tower that `vision_part` found in a file, ready to encode with.

    Raises:
        DataError: there is none, or it is not one for 224 px.
    """
    try:
        patches, first = state["embeddings.patch_embedding.weight"], "encoder.layers."
        layers = 1 + max(int(n.split(".")[2]) for n in state if n.startswith(first))
        hidden = len(state[f"{first}0.mlp.fc1.weight"])
    except (KeyError, ValueError) as error:
        msg = f"{source}: neither PLIP nor an image tower of CLIP's form"
        raise DataError(msg) from error
    tower = vision_tower(len(patches), layers, patches.shape[-1], hidden)
    load_strictly(tower, state, source)
    return tower.eval().requires_grad_(False)  # noqa: FBT003


class Tokenizer:
    """Texts in, BERT's tokens out; the vocabulary is read when it is first needed."""

    def __init__(self, text: str, limit: int) -> None:
        """Take a folder or hub id, and the most tokens a text may have.

        Raises:
            UsageError: no room for a word.
        """
        if limit < 3:  # noqa: PLR2004 - [CLS], a word, [SEP]
            msg = f"text_limit must be at least 3, not {limit}"
            raise UsageError(msg)
        self.text, self.limit = text, limit

    @cached_property
    def _network(self) -> Any:  # noqa: ANN401 - transformers is untyped
        from transformers import AutoTokenizer  # noqa: PLC0415

        folder = text_folder(self.text)
        try:
            return AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # whatever the files provoke
            msg = f"{folder}: no tokenizer can be read here ({type(error).__name__})"
            raise DataError(msg) from error

    def __len__(self) -> int:
        """Return the size of the vocabulary."""
        return len(self._network)

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Return `ids` and `mask`, int64 [n, t], padded to the longest, cut at the limit."""
        given = self._network(
            list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt"
        )
        return {"ids": given["input_ids"], "mask": given["attention_mask"]}

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has, [CLS] and [SEP] included, before any is cut."""
        return [len(ids) for ids in self._network(list(texts), verbose=False)["input_ids"]]
