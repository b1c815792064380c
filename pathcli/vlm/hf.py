"""Any image-text-to-text model of transformers, of the hub or of a folder, as what answers.

Words are put to it by its own chat template. InstructBLIP and BLIP-2 have none: they read one
question about one image, as their authors put it.
"""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import log_softmax

from pathcli.cards import Hub
from pathcli.data.images import read_image
from pathcli.device import pick_device
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.store.responses import response_key
from pathcli.torchvision_guard import guard_torchvision
from pathcli.vlm.language_files import precision_of, quiet, require, unreadable, version_of
from pathcli.vlm.memory import memory
from pathcli.vlm.remembered import remember
from pathcli.vlm.responders import Decoding, Unfinished, Untaught
from pathcli.vlm.turns import pieces
from pathcli.vlm.written import IMAGE
from pathcli.weights import fetch, local, sha256

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from pathcli.types import Sample
    from pathcli.vlm.responders import Load

PLAIN = {"instructblip": "{}", "blip-2": "Question: {} Answer:"}
"""How a question is put to models without chat template, by their `model_type`."""
SEED = 0
"""Models whose own settings draw words at random draw them anew from it for every question."""


class HFResponder(Untaught):
    """A model of transformers. Its own `generation_config` decides how words are searched for."""

    def __init__(self, name: str, *, device: str = "auto", load: Load = "auto") -> None:
        """Read a hub's id or a folder in transformers' format.

        Args:
            name: the id or the folder.
            device: auto, cpu, cuda, cuda:1 or mps; auto spreads a model over all GPUs and, where
                they do not hold it, main memory.
            load: precision of its numbers; auto is the checkpoint's.

        Raises:
            ResourceError: the model, or the package that 8 and 4 bits need, is not here; or it
                does not fit.
            DataError: the folder is not such a model, or is damaged.
        """
        if load in {"8bit", "4bit"}:
            require("bitsandbytes", f"--load {load}", "bitsandbytes")
        guard_torchvision()
        self.name, self.load, self.batch = name, load, 8
        self.folder = _folder(name)
        self.scope = f"what {name} was trained on, and nobody has measured here"
        self.processor = _processor(self.folder)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.network = _network(self.folder, device, load)
        self._plain = PLAIN.get(self.network.config.model_type)
        if self._plain is None and not getattr(self.processor, "chat_template", None):
            msg = (
                f"{self.folder}: no chat template, so nobody knows how it is asked; put its "
                "authors' chat_template.jinja there"
            )
            raise DataError(msg)
        speaker = self.network if self._plain is None else self.network.language_model
        self._seq2seq = bool(speaker.config.is_encoder_decoder)
        self.tokenizer.padding_side = "right" if self._seq2seq else "left"
        self._own = speaker.generation_config
        self.decoding = Decoding(
            max_new_tokens=self._own.max_new_tokens or Decoding.max_new_tokens,
            min_new_tokens=self._own.min_new_tokens or Decoding.min_new_tokens,
            beams=self._own.num_beams or Decoding.beams,
            length_penalty=self._own.length_penalty or Decoding.length_penalty,
        )
        self.draws = bool(self._own.do_sample) and self._own.top_k != 1
        ends = self._own.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = [e for e in ends if e is not None] or [self.tokenizer.eos_token_id]
        remember(self.network)

    @cached_property
    def digest(self) -> str:
        """See `Responder`; of the hub's models the commit stands for the weights.

        Of tokenizer, preparation of images and settings of generation the files count.
        """
        how = str(self._plain or self.processor.chat_template)
        files = sorted(file for some in _SETTINGS for file in self.folder.glob(some))
        beside = [f"{file.name} {sha256(file)}" for file in files]
        return response_key(version_of(self.folder), how, self.load, *beside)

    # --- what it reads -------------------------------------------------------------------------

    def prompt(self, sample: Sample) -> str:
        """Return what the model is given to read, `<image>` where images stand.

        Raises:
            DataError: nothing is asked, or more than the model can be asked.
        """
        text = self._text(sample)
        if self._plain is not None:
            return IMAGE * len(sample.images) + text
        return text.replace(self._mark, IMAGE)

    @property
    def _mark(self) -> str:
        """The token that stands for an image in the processor's texts."""
        return str(getattr(self.processor, "image_token", IMAGE))

    def _text(self, sample: Sample) -> str:
        turns = pieces(sample)
        if self._plain is not None:
            words = [self._words(piece) for piece in turns[0] if piece != IMAGE]
            if len(turns) > 1 or len(sample.images) != 1:
                msg = f"{sample.name}: {self.name} is asked one question about one image"
                raise DataError(msg)
            return self._plain.format(" ".join(words))
        said = [
            {
                "role": "assistant" if number % 2 else "user",
                "content": [
                    {"type": "image"}
                    if piece == IMAGE
                    else {"type": "text", "text": self._words(piece)}
                    for piece in turn
                ],
            }
            for number, turn in enumerate(turns)
        ]
        return str(
            self.processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        )

    def _words(self, said: str) -> str:
        """Take words apart that would be special tokens: `</s>` becomes `< /s>`."""
        for token in self._special:
            said = said.replace(token, f"{token[0]} {token[1:]}")
        return said

    @cached_property
    def _special(self) -> tuple[str, ...]:
        added = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        return (*self.tokenizer.all_special_tokens, *added, self._mark)

    def _inputs(self, samples: Sequence[Sample], texts: list[str]) -> Any:  # noqa: ANN401
        """Return the processor's tensors for questions that all have images, or all have none."""
        from PIL import Image  # noqa: PLC0415

        images = [[Image.fromarray(read_image(ref)) for ref in s.images] for s in samples]
        shown: Any = [row[0] for row in images] if self._plain is not None else images
        bos = self.tokenizer.bos_token
        begun = bos is not None and texts[0].startswith(bos)
        try:
            found = self.processor(
                images=shown if any(images) else None,
                text=texts,
                padding=True,
                return_tensors="pt",
                **({"add_special_tokens": False} if begun else {}),
            )
        except ValueError as error:  # such as an image that is far longer than wide
            msg = f"{', '.join(s.name for s in samples)}: refused by {self.name} ({error!s:.120})"
            raise DataError(msg) from error
        self._refuse_longer(samples, found)
        return found.to(self.network.device, self.network.dtype)

    @cached_property
    def _limits(self) -> dict[str, int]:
        """Most tokens that fit, by the mask of who reads them: the Q-Former, the language model."""
        config = self.network.config
        readers = {
            "qformer_attention_mask": getattr(config, "qformer_config", None),
            "attention_mask": config.get_text_config(),
        }
        known = {mask: getattr(of, "max_position_embeddings", None) for mask, of in readers.items()}
        return {mask: int(limit) for mask, limit in known.items() if limit}

    def _refuse_longer(self, samples: Sequence[Sample], found: Any) -> None:  # noqa: ANN401
        """Refuse a question of more tokens than the model has places for.

        Raises:
            UsageError: one is longer; the limit is named.
        """
        for mask, limit in self._limits.items():
            lengths = found[mask].sum(1) if mask in found else torch.zeros(1)
            if lengths.max() > limit - (mask == "attention_mask"):  # the answer needs a place
                longest = int(lengths.argmax())
                msg = (
                    f"{samples[longest].name}: {int(lengths[longest])} tokens are asked, and "
                    f"{self.name} reads at most {limit}; ask in fewer words"
                )
                raise UsageError(msg)

    # --- what it says --------------------------------------------------------------------------

    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        """Yield answers in order; see `Responder.answer`.

        A model whose own settings draw words at random answers one question at a time, each
        from the same seed, so that an answer depends on nothing but its question.

        Raises:
            UsageError: a question is longer than what the model reads.
            DataError: an image cannot be read, or a sample asks what cannot be asked.
            ResourceError: the device's memory is too small.
        """
        decoding = decoding or self.decoding
        for part in self._batches(samples):
            texts = [self._text(sample) for sample in part]
            yield from self._generate(self._inputs(part, texts), decoding)

    def _batches(self, samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
        """Yield batches in which all samples have images, or none has."""
        part: list[Sample] = []
        for sample in samples:
            full = len(part) >= (1 if self.draws else self.batch)
            if part and (full or bool(part[0].images) != bool(sample.images)):
                yield part
                part = []
            part.append(sample)
        if part:
            yield part

    @torch.inference_mode()
    def _generate(self, inputs: Any, decoding: Decoding) -> list[str]:  # noqa: ANN401
        search: dict[str, Any] = {"num_beams": decoding.beams}
        if decoding.beams > 1:
            search["length_penalty"] = decoding.length_penalty
        asked = inputs["input_ids"]
        length, most = asked.shape[1], decoding.max_new_tokens
        if not self._seq2seq:
            most = max(1, min(most, self._limits.get("attention_mask", length + most) - length))
        own = copy.deepcopy(self._own)
        own.do_sample = self.draws
        with quiet(), torch.random.fork_rng(), memory(self.name, self.network.device):
            torch.manual_seed(SEED)
            ids = self.network.generate(
                **inputs,
                generation_config=own,
                max_new_tokens=most,
                min_new_tokens=min(decoding.min_new_tokens, most) or None,
                pad_token_id=self.tokenizer.pad_token_id,
                **search,
            )
        if ids.shape[1] >= length and torch.equal(ids[:, :length], asked):
            ids = ids[:, length:]
        ends = torch.tensor(self._ends, device=ids.device)
        full = ~torch.isin(ids, ends).any(1) & (ids.shape[1] >= most)
        kinds = [Unfinished if is_full else str for is_full in full.tolist()]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [kind(text.strip()) for kind, text in zip(kinds, texts, strict=True)]

    @torch.inference_mode()
    def likelihoods(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        """Return for each sample float64 [options]; see `Responder.likelihoods`.

        Raises:
            UsageError: a question is longer than what the model reads.
            DataError: an image cannot be read, or a sample asks what cannot be asked.
            ResourceError: the device's memory is too small.
        """
        import numpy as np  # noqa: PLC0415

        found = []
        for sample, row in zip(samples, options, strict=True):
            text = self._text(sample)
            inputs = self._inputs([sample], [text])
            with quiet(), memory(self.name, self.network.device):
                found.append(np.array([self._likelihood(inputs, text, option) for option in row]))
        return found

    def _likelihood(self, inputs: Any, text: str, option: str) -> float:  # noqa: ANN401
        """Return the log-probability of an option's tokens and of an end, whichever it is."""
        asked = inputs["input_ids"]
        ids = torch.tensor([self._continued(text, option)], device=asked.device)
        if self._seq2seq:
            end = torch.full_like(ids[:, :1], self._ends[0])
            given = {**inputs, "labels": torch.cat([ids, end], 1)}
            logits = self.network(**given).logits[0]
        else:
            longer = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            more = {name: longer.get(name, torch.zeros_like(ids)) for name in _PER_TOKEN}
            given = {n: torch.cat([x, more[n]], 1) if n in more else x for n, x in inputs.items()}
            logits = self.network(**given).logits[0, asked.shape[1] - 1 :]
        each = log_softmax(logits.double(), -1)
        said = each[:-1].gather(1, ids.T).sum() + each[-1, self._ends].logsumexp(0)
        return float(said)

    def _continued(self, text: str, option: str) -> list[int]:
        """Return an option's tokens where they come after the prompt, as the model would say it.

        A space stands between where the prompt ends in a word, as `ASSISTANT:`.
        """

        def tokens(words: str) -> list[int]:
            ids: list[int] = self.tokenizer(words, add_special_tokens=False)["input_ids"]
            return ids

        if not self._seq2seq:
            apart = text[-1:].isspace() or text.endswith(self._special)
            before, both = tokens(text), tokens(f"{text}{'' if apart else ' '}{option}")
            if both[: len(before)] == before:
                return both[len(before) :]
        return tokens(option)


_HERE: Any = {"local_files_only": True, "trust_remote_code": False}  # nor is anybody asked to
_SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


# --- how it is read ------------------------------------------------------------------------------


def _folder(name: str) -> Path:
    """Return a model's folder: the user's own, or the hub's."""
    if name.startswith(("/", ".", "~")) or Path(name).exists():
        return local(name)
    return fetch(Hub(name))


def _processor(folder: Path) -> Any:  # noqa: ANN401 - transformers' own
    from transformers import (  # noqa: PLC0415
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoProcessor,
    )

    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, **_HERE)
    except Exception as error:  # transformers has many, some of them several lines long
        raise unreadable(folder, "not a model of this transformers", error) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        msg = f"{folder}: {config.model_type} is no model that answers questions about images"
        raise DataError(msg)
    try:
        with quiet():
            found = AutoProcessor.from_pretrained(folder, **_HERE)
    except Exception as error:  # likewise
        raise unreadable(folder, "no processor of images and words", error) from error
    if not hasattr(found, "tokenizer") or not hasattr(found, "image_processor"):
        msg = f"{folder}: holds no processor of images and words (preprocessor_config.json?)"
        raise DataError(msg)
    return found


def _network(folder: Path, device: str, load: Load) -> Any:  # noqa: ANN401 - transformers' own
    from transformers import AutoModelForImageTextToText  # noqa: PLC0415

    here = pick_device(device)
    options: dict[str, Any] = {"dtype": "auto"} if load == "auto" else precision_of(load)
    if device == "auto" and here == "cuda":
        options["device_map"] = "auto"
    elif load in {"8bit", "4bit"}:
        options["device_map"] = {"": here}
    try:
        with quiet(), memory(str(folder), here):
            network, told = AutoModelForImageTextToText.from_pretrained(
                folder, output_loading_info=True, **_HERE, **options
            )
    except ResourceError:
        raise
    except Exception as error:  # readers of weights raise whatever the bytes provoke
        raise unreadable(folder, "weights cannot be read", error) from error
    if wrong := [*sorted(told["missing_keys"]), *told["mismatched_keys"]]:
        msg = f"{folder}: {len(wrong)} tensors do not fit config.json ({wrong[0]})"
        raise DataError(msg)
    if "device_map" in options:
        return network.eval()
    with memory(str(folder), here):
        return network.eval().to(here)
