"""A language model's name in; its folder, its configuration or its sizes out.

A GGUF file becomes a folder in transformers' format once and is kept in the cache:
SmolLM2-135M-Instruct comes from the package index as GGUF, which transformers takes half a
minute to read; the folder's float16 safetensors it reads in a second.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import tempfile
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pathcli.cards import CARDS, Hub, Wheel
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.torchvision_guard import guard_torchvision
from pathcli.weights import cache_root, fetch, find, local, sha256

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger("pathcli")


def language_folder(model: str) -> Path:
    """Return the folder of a language model: a card's, the user's own or the hub's.

    Raises:
        UsageError: the name is another download's.
        ResourceError: it is not here and cannot be had; the message names the command.
    """
    if model in CARDS:
        if not CARDS[model].what.startswith("language model: "):
            known = [n for n, c in CARDS.items() if c.what.startswith("language model: ")]
            msg = f"{model!r} is no language model; there is: {', '.join(known)}"
            raise UsageError(msg)
        path = fetch(model)
    else:
        path = local(model) if _is_path(model) else fetch(Hub(model))
    return from_gguf(path) if path.suffix == ".gguf" else path


def _is_path(model: str) -> bool:
    return model.startswith(("/", ".", "~")) or Path(model).exists()


def read_config(folder: Path) -> Any:  # noqa: ANN401 - transformers' own
    """Return the configuration of a language model's folder.

    Raises:
        DataError: it is something else.
    """
    guard_torchvision()
    from transformers import (  # noqa: PLC0415
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
    )

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has many, some of them several lines long
        raise unreadable(folder, "not a model in transformers' format", error) from error
    seq2seq = bool(getattr(config, "is_encoder_decoder", False))
    known = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING
    generates = ("ForConditionalGeneration",) if seq2seq else ("ForCausalLM", "LMHeadModel")
    name = next(iter(getattr(config, "architectures", None) or ["none named"]))
    if type(config) not in known or not name.endswith(generates):
        msg = f"{folder}: not a language model that generates (its architecture: {name})"
        raise DataError(msg)
    return config


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from drawing bars and from advice on files that are as they should be."""
    from transformers.utils import logging as told  # noqa: PLC0415

    told.disable_progress_bar()
    level = told.get_verbosity()
    told.set_verbosity_error()
    try:
        yield
    finally:
        told.set_verbosity(level)


def unreadable(path: Path, what: str, error: Exception) -> DataError:
    """Return the error of a file or folder another library could not read, in one line."""
    line = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return DataError(f"{path}: {what} ({line})")


# --- sizes -------------------------------------------------------------------------------------

Load = Literal["float32", "bfloat16", "float16", "8bit", "4bit"]


@dataclass(frozen=True)
class Shape:
    """A language model's sizes; an encoder-decoder has `layers` in each of the two."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    parameters: int
    seq2seq: bool = False

    def lora(self, r: int) -> int:
        """Return the weights of rank-r adapters beside all linear layers but the output."""
        keys = self.hidden * self.kv_heads // self.heads
        attention = 2 * 2 * self.hidden + 2 * (self.hidden + keys)
        gated = 3 * (self.hidden + self.ffn)
        both = 2 * (attention + gated) + attention if self.seq2seq else attention + gated
        return r * self.layers * both


SHAPES = {
    "vicuna-7b": Shape(32, 4096, 11008, 32, 32, 32000, 6_738_415_616),
    "vicuna-13b": Shape(40, 5120, 13824, 40, 40, 32000, 13_015_864_320),
    "llama-3-8b-instruct": Shape(32, 4096, 14336, 32, 8, 128256, 8_030_261_248),
    "flan-t5-xl": Shape(24, 2048, 5120, 32, 32, 32128, 2_849_757_184, seq2seq=True),
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 134_515_008),
}
"""Sizes of models that need not be here, by their cards' names; from their own config.json."""


def shape_of(model: str) -> Shape:
    """Return a language model's sizes, without its weights: of a card, or of a local folder.

    Raises:
        UsageError: it is neither.
        DataError: the folder is not a language model's.
    """
    if model in SHAPES:
        return SHAPES[model]
    cards = {c.source.repo: name for name, c in CARDS.items() if isinstance(c.source, Hub)}
    if (name := cards.get(model)) in SHAPES:
        return SHAPES[name]
    path = local(model) if _is_path(model) else find(Hub(model))
    if path is None:
        msg = f"the sizes of {model!r} are not known before it is here; run: hf download {model}"
        raise UsageError(msg)
    return _shape(read_config(from_gguf(path) if path.suffix == ".gguf" else path))


def _shape(config: Any) -> Shape:  # noqa: ANN401 - transformers' own
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: PLC0415

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):  # sizes without memory
        weights = sum(weight.numel() for weight in kind.from_config(config).parameters())
    if getattr(config, "scale_decoder_outputs", True) is False:  # T5 1.1 and FLAN's own head
        weights += config.vocab_size * config.hidden_size
    heads = config.num_attention_heads
    sizes = (getattr(config, name, None) for name in ("intermediate_size", "d_ff", "n_inner"))
    return Shape(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=next((size for size in sizes if size), 4 * config.hidden_size),
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        vocabulary=config.vocab_size,
        parameters=weights,
        seq2seq=bool(config.is_encoder_decoder),
    )


# --- GGUF --------------------------------------------------------------------------------------


def from_gguf(path: Path) -> Path:
    """Return the folder with a GGUF file's model and tokenizer, converting them on first use.

    Raises:
        ResourceError: the reader of GGUF is not installed, or the cache cannot be written.
        DataError: the file is not a language model transformers can read.
    """
    folder = cache_root() / "converted" / f"{path.stem}-{sha256(path)[:12]}"
    if folder.is_dir():
        return folder
    if find_spec("gguf") is None:
        msg = f"{path}: reading GGUF needs the package gguf; run: pip install gguf"
        raise ResourceError(msg)
    log.info("%s: converted once to %s", path.name, folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        msg = f"{folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME elsewhere"
        raise ResourceError(msg) from error
    try:
        _convert(path, part)
        _put(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _put(part: Path, folder: Path) -> None:
    """Give a finished folder its name, unless another process was faster."""
    try:
        part.chmod(0o755)
        os.replace(part, folder)  # noqa: PTH105 - Path.replace says no more
    except OSError as error:
        if not folder.is_dir():
            msg = f"{folder}: cannot be written ({error.strerror})"
            raise ResourceError(msg) from error


def _convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model, weights in float16, and its tokenizer into `folder`."""
    import torch  # noqa: PLC0415

    guard_torchvision()
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    given = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(), redirect_stderr(io.StringIO()):  # its bar of progress cannot be turned off
            read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **given)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **given)
    except Exception as error:  # readers of weights raise whatever the bytes provoke
        raise unreadable(path, "no language model that transformers reads", error) from error
    config = type(read.config).from_dict(
        {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    )
    plain = type(read)(config)  # `read` takes itself for quantised, and would be saved as such
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def version_of(folder: Path, model: str = "") -> str:
    """Return the card's digest, the hub's commit, or the weights' SHA-256.

    A folder that was made of a card's file may differ in its bytes from machine to machine.
    """
    source = CARDS[model].source if model in CARDS else None
    if isinstance(source, Wheel):
        return source.sha256
    return folder.name if folder.parent.name == "snapshots" else sha256(folder)


def require(package: str, option: str, install: str) -> None:
    """Refuse an option that needs a package.

    Raises:
        ResourceError: it is not installed.
    """
    if find_spec(package) is None:
        msg = f"{option} needs the package {package}; run: pip install {install}"
        raise ResourceError(msg)


def precision_of(load: Load) -> dict[str, Any]:
    """Return transformers' options for a precision; 4 bits are NF4 (arXiv:2305.14314)."""
    import torch  # noqa: PLC0415

    if load == "8bit" or load == "4bit":  # noqa: PLR1714 - narrows the type
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        half = torch.float16 if load == "8bit" else torch.bfloat16
        bits = {"load_in_8bit": True} if load == "8bit" else {"load_in_4bit": True}
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": half}
        return {"dtype": half, "quantization_config": BitsAndBytesConfig(**bits, **nf4)}
    return {"dtype": getattr(torch, load)}
