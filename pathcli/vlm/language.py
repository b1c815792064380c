"""A language model of transformers: embeddings in, the loss of an answer or its words out.

Causal models (LLaMA, Vicuna, SmolLM2) and encoder-decoders (T5) alike; frozen, with LoRA, or
trained whole. A frozen part has no gradients and no dropout, whatever mode the rest is in.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from pathcli.errors import DataError, UsageError
from pathcli.registry import did_you_mean
from pathcli.vlm.language_files import (
    SHAPES,
    Load,
    Shape,
    language_folder,
    precision_of,
    quiet,
    read_config,
    require,
    shape_of,
    unreadable,
    version_of,
)
from pathcli.vlm.memory import full, is_full

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

__all__ = ["SHAPES", "HFLanguage", "Lora", "Shape", "shape_of"]

IGNORED = -100
"""The label of what is not learnt."""

Tune = Literal["frozen", "lora", "full"]
Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside linear layers (arXiv:2106.09685), scaled by `alpha / r`.

    `targets` are ends of the layers' names, such as `q_proj`; all-linear spares the output.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")  # a recipe's misspelt key is a fault

    r: int = 16
    alpha: int = 32
    dropout: float = 0.05
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class HFLanguage(nn.Module):
    """A language model that reads embeddings; `start` reads its weights, as `self.network`.

    What is trained is named as in transformers below `network.`; an adapter's weights as
    `network.<layer>.lora_A.default.weight` and `lora_B`, for no wrapper of peft is kept.
    """

    network: Any

    def __init__(
        self,
        *,
        model: str,
        tune: Tune = "frozen",
        lora: Lora = Lora(),
        load: Load = "float32",
        checkpointing: bool = False,
        attention: Attention = "auto",
    ) -> None:
        """Take a hub's id, a folder, a GGUF file or the name of a card, and how it is used.

        `load` is the precision of weights that are not trained; what is trained is float32, for
        in fewer bits its steps would be rounded away. `checkpointing` recomputes each layer in
        the backward pass.

        Raises:
            UsageError: options that do not go together, or a number outside its range.
            ResourceError: 8 or 4 bits, or flash attention, without the package for it.
        """
        super().__init__()
        wrong = []
        if tune == "full" and load != "float32":
            why = "its steps would be rounded away"
            wrong.append(f"load: {load} cannot be trained whole ({why}); tune: lora, or float32")
        if lora.r < 1 or not 0 <= lora.dropout < 1:
            wrong.append("lora.r must be at least 1 and lora.dropout in [0, 1)")
        if wrong:
            raise UsageError(", ".join(wrong))
        if load in {"8bit", "4bit"}:
            require("bitsandbytes", f"load: {load}", "bitsandbytes")
        if attention == "flash_attention_2":
            require("flash_attn", f"attention: {attention}", "flash-attn --no-build-isolation")
        self.model, self.tune, self.lora = model, tune, lora
        self.load, self.checkpointing, self.attention = load, checkpointing, attention

    # --- known before the weights are read ---------------------------------------------------

    @cached_property
    def folder(self) -> Path:
        """The model's folder, fetched if need be; see `language_folder`."""
        return language_folder(self.model)

    @cached_property
    def config(self) -> Any:  # noqa: ANN401 - transformers' own
        """The model's configuration."""
        return read_config(self.folder)

    @property
    def seq2seq(self) -> bool:
        """Whether an encoder reads and a decoder answers."""
        return bool(self.config.is_encoder_decoder)

    @property
    def width(self) -> int:
        """Numbers in an embedding."""
        return int(self.config.hidden_size)

    @cached_property
    def tokenizer(self) -> Any:  # noqa: ANN401 - transformers' own
        """The model's fast tokenizer; without a padding token, the end token pads.

        Raises:
            DataError: the folder has none, or one of more words than the model.
        """
        from transformers import AutoTokenizer  # noqa: PLC0415

        limit = self.config.vocab_size
        try:
            found = AutoTokenizer.from_pretrained(
                self.folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # readers of tokenizers raise whatever the files provoke
            raise unreadable(self.folder, "no tokenizer that can be read", error) from error
        if not found.is_fast or len(found) > limit or found.eos_token_id is None:
            msg = f"{self.folder}: no fast tokenizer of at most {limit} tokens that has an end"
            raise DataError(msg)
        if found.pad_token_id is None:
            found.pad_token = found.eos_token
        return found

    # --- reading -----------------------------------------------------------------------------

    def start(self) -> Mapping[str, Any]:
        """Read the weights and draw the adapters; return facts for provenance.

        Raises:
            ResourceError: the model is not here and cannot be had.
            DataError: it is no language model, or its weights are corrupt.
            UsageError: adapters for layers it does not have.
        """
        self.network = self._read()
        self._ends = _ends(self.network, self.tokenizer)
        self._takes_positions = "position_ids" in inspect.signature(self.network.forward).parameters
        self.network.generation_config = _greedy(self.network.config)
        if self.tune != "full":
            self.network.requires_grad_(False)  # noqa: FBT003
        if self.tune == "lora":
            _adapt(self.network, self.lora)
        if self.checkpointing:
            _recompute(self.network)
        self.train(self.training)
        sizes = {True: 0, False: 0}
        for weight in self.network.parameters():
            sizes[weight.requires_grad] += weight.numel()
        facts: dict[str, Any] = {
            "kind": "hf",
            "model": self.model,
            "source": version_of(self.folder, self.model),
        }
        facts |= {"tune": self.tune, "load": self.load}
        return facts | {"frozen": sizes[False], "trained": sizes[True]}

    def _read(self) -> Any:  # noqa: ANN401 - transformers' own
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: PLC0415

        kind = AutoModelForSeq2SeqLM if self.seq2seq else AutoModelForCausalLM
        options = {"attn_implementation": self._attention(), **precision_of(self.load)}
        try:
            with quiet():
                network, told = kind.from_pretrained(
                    self.folder, local_files_only=True, output_loading_info=True, **options
                )
        except Exception as error:  # readers of weights raise whatever the bytes provoke
            if is_full(error):
                where = "cuda" if isinstance(error, torch.OutOfMemoryError) else "cpu"
                raise full(str(self.folder), where) from error
            raise unreadable(self.folder, "weights cannot be read", error) from error
        if wrong := [*sorted(told["missing_keys"]), *told["mismatched_keys"]]:
            msg = f"{self.folder}: {len(wrong)} tensors do not fit config.json ({wrong[0]})"
            raise DataError(msg)
        return network

    def _attention(self) -> str | None:
        """Return the attention asked for; None lets transformers take SDPA where it can."""
        if self.attention != "auto":
            return self.attention
        half = self.load in {"bfloat16", "float16"} and torch.cuda.is_available()
        flash = half and not self.seq2seq and find_spec("flash_attn")
        return "flash_attention_2" if flash else None

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; what is frozen stays without dropout."""
        super().train(mode)
        if self.tune != "full" and "network" in self._modules:
            self.network.eval()
            for name, part in self.network.named_modules():
                if name.endswith("lora_dropout"):
                    part.train(mode)
        return self

    # --- use ---------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """Return float [.., width] for token ids int64 [..]."""
        found: Tensor = self.network.get_input_embeddings()(ids)
        return found

    def logits(self, embeds: Tensor, mask: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return [b, t, vocabulary] for embeddings [b, t, width] where `mask` bool [b, t] holds.

        An encoder-decoder gives what its decoder says, [b, t2, vocabulary], to `labels` [b, t2].
        """
        given = self._inputs(embeds, mask)
        if self.seq2seq:
            assert labels is not None, "an encoder-decoder has logits of labels only"  # noqa: S101
            given["decoder_input_ids"] = self.network.prepare_decoder_input_ids_from_labels(labels)
        elif self._takes_positions:
            given["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        found: Tensor = self.network(**given, use_cache=False).logits
        return found

    def loss(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy, in float32, over the batch's learnt tokens.

        `labels` int64 are the tokens themselves [b, t], shifted here, or the decoder's [b, t2];
        -100 is not learnt. The vocabulary's logits are made where something is learnt, alone.

        Raises:
            DataError: nothing is learnt.
        """
        wanted, logits = self._said(embeds, mask, labels)
        if not len(logits):
            msg = "a batch in which no token is learnt: answers are empty, or were cut off"
            raise DataError(msg)
        return cross_entropy(logits, wanted[wanted != IGNORED])

    def likelihoods(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return float32 [b]: the log-probability of each row's labels, summed over its tokens."""
        wanted, logits = self._said(embeds, mask, labels)
        learnt = wanted != IGNORED
        each = cross_entropy(logits, wanted[learnt], reduction="none")
        rows = torch.zeros(wanted.shape, device=each.device).masked_scatter(learnt, -each)
        return rows.sum(1)

    def _said(self, embeds: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return which token comes next [b, t], and float32 logits [n, v] where it counts."""
        wanted = labels if self.seq2seq else pad(labels[:, 1:], (0, 1), value=IGNORED)
        learnt = wanted != IGNORED
        head = self.network.get_output_embeddings()
        with head.register_forward_pre_hook(lambda _, given: (given[0][learnt],)):
            return wanted, self.logits(embeds, mask, labels).float()

    @torch.no_grad()
    def generate(
        self,
        embeds: Tensor,
        mask: Tensor,
        *,
        max_new_tokens: int = 64,
        beams: int = 1,
        min_new_tokens: int = 0,
        length_penalty: float = 1.0,
        stop: Sequence[int] = (),
        draw: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> list[list[int]]:
        """Return each prompt's likeliest next token ids, up to an end, which is left out.

        The model's own end tokens and `stop` end an answer. Prompts may be padded on either
        side. With beams the sum of log-probabilities is divided by length ** length_penalty.
        `draw` changes the logits [b, vocabulary] behind tokens [b, t] before one is chosen.
        """
        if not self.seq2seq:
            embeds, mask = _right_aligned(embeds, mask)
        ends = sorted({*self._ends, *stop})
        search: dict[str, Any] = {"logits_processor": [draw]} if draw else {}
        if beams > 1:
            search |= {"num_beams": beams, "length_penalty": length_penalty}
        found = self.network.generate(
            **self._inputs(embeds, mask),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            **search,
        )
        rows: list[list[int]] = found[:, 1:].tolist() if self.seq2seq else found.tolist()
        return [
            row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in rows
        ]

    def _inputs(self, embeds: Tensor, mask: Tensor) -> dict[str, Any]:
        dtype = self.network.get_input_embeddings().weight.dtype
        return {"inputs_embeds": embeds.to(dtype), "attention_mask": mask.long()}


# --- how it is loaded and changed --------------------------------------------------------------


def _ends(network: Any, tokenizer: Any) -> set[int]:  # noqa: ANN401 - transformers' own
    """Return the ids that end an answer, as the tokenizer or the model has them."""
    own = network.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}


def _greedy(config: Any) -> Any:  # noqa: ANN401 - transformers' own
    """Return how to generate without the model's own sampling."""
    from transformers import GenerationConfig  # noqa: PLC0415

    first = getattr(config, "decoder_start_token_id", None)
    return GenerationConfig(do_sample=False, decoder_start_token_id=first)


def _adapt(network: Any, lora: Lora) -> None:  # noqa: ANN401 - transformers' own
    """Put adapters, drawn anew and in float32, beside a frozen network's linear layers."""
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    leaves = sorted({n.split(".")[-1] for n, m in network.named_modules() if _is_linear(m)})
    for name in targets if isinstance(targets, list) else ():
        if name.split(".")[-1] not in leaves:
            msg = f"lora.targets: no linear layer is called {name!r}: {did_you_mean(name, leaves)}"
            raise UsageError(msg)
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )
    inject_adapter_in_model(config, network)
    for weight in network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _recompute(network: Any) -> None:  # noqa: ANN401 - transformers' own
    """Let each layer keep its input alone; transformers' own switch is off in eval mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer  # noqa: PLC0415

    layers = [m for m in network.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        msg = f"checkpointing: the layers of {type(network).__name__} cannot be recomputed"
        raise UsageError(msg)
    for layer in layers:
        layer.forward = partial(_recomputed, layer.forward)


def _recomputed(forward: Any, *given: Any, **named: Any) -> Any:  # noqa: ANN401
    if not torch.is_grad_enabled():
        return forward(*given, **named)
    return checkpoint(forward, *given, use_reentrant=False, **named)


def _right_aligned(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return prompts with their padding before them, tokens in their order."""
    order = mask.long().argsort(dim=1, stable=True)
    return embeds.take_along_dim(order[..., None], 1), mask.take_along_dim(order, 1)
