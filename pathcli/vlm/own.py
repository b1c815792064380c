"""A trained run, a converted checkpoint, or the shipped clover-mini: the `Responder` of pathcli."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import OrderedDict
from copy import copy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from pathcli.data.images import read_image
from pathcli.device import pick_device
from pathcli.encoders.checkpoint import read_state
from pathcli.errors import UsageError
from pathcli.recipe import Recipe, build
from pathcli.runs import read_run
from pathcli.state import fill
from pathcli.types import Sample
from pathcli.vlm.batches import Examples
from pathcli.vlm.convert import settled
from pathcli.vlm.memory import in_parts, memory, place
from pathcli.vlm.model import VisionLanguage
from pathcli.vlm.responders import SHIPPED, Decoding, Load, Unfinished
from pathcli.vlm.towers import Shown, ready, sent
from pathcli.weights import fetch, local, sha256
from pathcli.yaml12 import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from pathcli.encoders.mini_clip import MiniClip
    from pathcli.types import Encoder, ImageRef
    from pathcli.vlm.chat import Encoded
    from pathcli.vlm.towers import Cutter

SCOPE = (
    "clover-mini was trained on patches of benign lung, lung adenocarcinoma and lung squamous "
    "cell carcinoma of one data set, and on a few of colon; it can say which tissue it is, and "
    "whether it is benign or malignant; of lettered choices and of two patches compared it is "
    "often wrong, and it knows little else"
)
KEPT = 256 * 2**20  # bytes of image tokens that are kept for the next question


class RunResponder:
    """A vision-language model of a recipe that answers. Research use only; not for diagnosis."""

    def __init__(
        self, recipe: Recipe, weights: Path, *, device: str = "auto", load: Load = "auto"
    ) -> None:
        """Build a run's model from its recipe, and put its trained weights in.

        Raises:
            UsageError: the recipe is of another task.
            ResourceError: the weights, or those of a frozen part, are not here; or they do not
                fit into memory.
            DataError: the weights are damaged, or of another model.
        """
        if recipe.task != "generate":
            msg = f"recipe {recipe.name}: task {recipe.task} learns no answers; "
            raise UsageError(msg + "name a run of the task generate")
        task = build(_loaded_as(recipe, load))
        here = pick_device(device)
        with memory(weights.parent.name, here):
            encoder = ready(task.encoder, here)
            facts = task.language.start()
            connector = task.connector(encoder.row_shape[-1], task.language.width)
            self.module = VisionLanguage(encoder, connector, task.language).eval()
            state = {name: tensor.float() for name, tensor in read_state(local(weights)).items()}
            fill(self.module, state, str(weights))
            connector.to(here)
            place(task.language.network, torch.device(here))
        self.seen = Seen(connector, encoder, here)
        count = connector.count(encoder.row_shape[0])
        given = (self.seen, task.chat, connector, task.language, count)
        self.examples, self.options = Examples(*given), _Options(*given)
        self.name, self.chat, self.device = weights.parent.name, task.chat, torch.device(here)
        self.scope = f"what {weights.parent} was trained on, and nobody has measured here"
        self.decoding, self.batch = task.decoding, 16
        self.temperature: float | None = None
        self.taught: Sequence[Sequence[str]] = ()
        self.judge: MiniClip | None = None
        parts = ("connector", "chat", "language")
        said = {name: dict(recipe.values.get(name, {})) for name in parts}
        del said["language"]["model"]  # a place; what it is follows
        known = [said, facts["source"], encoder.id, sha256(weights), load]
        self.digest = hashlib.sha256(json.dumps(known, default=str).encode()).hexdigest()

    @classmethod
    def of(cls, run: Path, *, device: str = "auto", load: Load = "auto") -> RunResponder:
        """Return the model of a finished run's folder.

        Raises:
            ResourceError: the run is not there or unfinished, or weights are not here.
        """
        recipe = settled(read_run(run).recipe, run)
        return cls(recipe, run / "weights.safetensors", device=device, load=load)

    @classmethod
    def shipped(cls, *, device: str = "auto", load: Load = "auto") -> RunResponder:
        """Return clover-mini; its temperature holds for the numbers it was fitted in, alone.

        Of five lung patches asked whether they are malignant, probabilities in float32 differ by
        0.01 to 0.07 from those in the recipe's bfloat16: under another `load` none is given.

        Raises:
            ResourceError: its frozen parts are not here and cannot be fetched.
        """
        weights = fetch(SHIPPED)
        path = weights.with_name("recipe.yaml")
        values = dict(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
        found = cls(Recipe(SHIPPED, values), weights, device=device, load=load)
        found.name, found.scope = SHIPPED, SCOPE
        facts = json.loads(path.with_name("calibration.json").read_text(encoding="utf-8"))
        found.taught = facts["answers"]
        if load in {"auto", values["language"]["load"]}:
            found.temperature = facts["temperature"]
        found.judge = cast("MiniClip", found.module.encoder)
        return found

    def prompt(self, sample: Sample) -> str:
        """Return what the language model reads, `<image>` where visual tokens stand."""
        tokenizer, split = self.examples.language.tokenizer, self.examples.language.seq2seq
        counts = [self.examples.count] * len(sample.images)
        read: str = self.chat.ask(sample, tokenizer, counts, seq2seq=split).text
        return read

    @torch.inference_mode()
    def unfamiliar(self, images: Sequence[ImageRef]) -> list[ImageRef]:
        """Return which images mini-clip finds unlike those clover-mini was trained on.

        Raises:
            DataError: an image cannot be read.
        """
        if self.judge is None:
            return []
        familiar = self.judge.familiar
        with memory(self.name, self.device):
            known = list(
                in_parts(
                    images,
                    self.batch,
                    lambda part: familiar(torch.cat(self.seen.tokens(part))).tolist(),
                )
            )
        return [ref for ref, is_known in zip(images, known, strict=True) if not is_known]

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample], decoding: Decoding | None = None) -> Iterator[str]:
        """Yield the answer to each sample's last question; see `Responder`.

        Raises:
            DataError: an image cannot be read.
            ResourceError: one question alone does not fit into memory.
        """
        language = self.examples.language
        decoding = decoding or self.decoding
        search = decoding.options() | {"stop": self.chat.stop(language.tokenizer)}

        def said(part: Sequence[Sample]) -> list[str]:
            asked = self.examples.ask(part, np.random.default_rng(0))
            ids = self.module.generate(sent(asked, self.device), **search)
            texts = language.tokenizer.batch_decode(ids, skip_special_tokens=True)
            full = [len(row) >= decoding.max_new_tokens for row in ids]
            kinds = [Unfinished if is_full else str for is_full in full]
            return [kind(text.strip()) for kind, text in zip(kinds, texts, strict=True)]

        with memory(self.name, self.device):
            yield from in_parts(samples, self.batch, said)

    @torch.inference_mode()
    def likelihoods(
        self, samples: Sequence[Sample], options: Sequence[Sequence[str]]
    ) -> list[NDArray[np.float64]]:
        """Return float64 [options] of each sample: log-probabilities of answers; see `Responder`.

        Raises:
            DataError: an image cannot be read.
            ResourceError: one option alone does not fit into memory.
        """
        rows = [
            Sample(s.name, s.images, option, s.turns, group=s.group)
            for s, some in zip(samples, options, strict=True)
            for option in some
        ]

        def weighed(part: Sequence[Sample]) -> list[float]:
            told = self.options(part, np.random.default_rng(0))
            logs: list[float] = self.module.likelihoods(sent(told, self.device)).double().tolist()
            return logs

        with memory(self.name, self.device):
            found = list(in_parts(rows, self.batch, weighed))
        ends = np.cumsum([0, *map(len, options)])
        return [np.array(found[a:b]) for a, b in pairwise(ends.tolist())]


class _Options(Examples):
    """Makes batches of what `answer` is given to read, and after it the sample's own answer.

    Of too long a talk the beginning goes, and the answer, which alone is learnt, stays whole.
    """

    def _said(self, sample: Sample, rng: np.random.Generator) -> Encoded:
        tokenizer, split = self.language.tokenizer, self.language.seq2seq
        chat, counts = copy(self.chat), self._counts(sample)
        asked = chat.ask(sample, tokenizer, counts, seq2seq=split)
        chat.limit, chat.place = sys.maxsize, "first"
        before = chat.ask(sample, tokenizer, counts, seq2seq=split)
        whole = chat.encode(sample, tokenizer, counts, rng, seq2seq=split)
        rest = () if split else whole.tokens[len(before.tokens) :]
        return replace(whole, tokens=(*asked.tokens, *rest))


class Seen:
    """Reads images and encodes each once: the tokens of the last ones, up to `KEPT`, are kept."""

    def __init__(self, connector: Cutter, encoder: Encoder, device: str) -> None:
        """Take what cuts an image into views, and an encoder loaded on a device."""
        self.connector, self.encoder, self.device = connector, encoder, device
        self._kept: OrderedDict[tuple[ImageRef, int], Tensor] = OrderedDict()

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Shown:
        """Return a sample; its images are read with the batch."""
        del rng
        return Shown(sample, [])

    def batch(self, shown: Sequence[Shown]) -> dict[str, Tensor]:
        """Return the `tokens` [v, t, d] of all images of a batch, and `of` [v]; {} without any.

        Raises:
            DataError: an image cannot be read.
        """
        found = self.tokens([ref for each in shown for ref in each.sample.images])
        if not found:
            return {}
        of = np.repeat(np.arange(len(found)), [len(image) for image in found])
        return {"tokens": torch.cat(found), "of": torch.from_numpy(of)}

    def tokens(self, images: Sequence[ImageRef]) -> list[Tensor]:
        """Return each image's tokens [v, t, d]; those not seen lately are read and encoded.

        Raises:
            DataError: an image cannot be read.
        """
        keys = [(ref, _changed(ref)) for ref in images]
        new = [key for key in dict.fromkeys(keys) if key not in self._kept]
        if new:
            side = self.encoder.input_px
            views = [np.stack(self.connector.views(read_image(ref), side)) for ref, _ in new]
            pixels = torch.from_numpy(np.concatenate(views)).to(self.device)
            seen = torch.split(self.encoder.encode(pixels), [len(some) for some in views])
            self._kept |= zip(new, seen, strict=True)
        for key in keys:
            self._kept.move_to_end(key)
        found = [self._kept[key] for key in keys]
        self._forget()
        return found

    def _forget(self) -> None:
        """Drop what was used longest ago, until the rest fits."""
        size = sum(tokens.nbytes for tokens in self._kept.values())
        while size > KEPT and len(self._kept) > 1:
            size -= self._kept.popitem(last=False)[1].nbytes


def _changed(ref: ImageRef) -> int:
    """Return when a file was written, in ns: another image under a name is another image."""
    return Path(ref).stat().st_mtime_ns if isinstance(ref, str) and Path(ref).exists() else 0


def _loaded_as(recipe: Recipe, load: Load) -> Recipe:
    """Return a recipe whose language model is read in other numbers, where any are asked for."""
    if load == "auto":
        return recipe
    values = dict(recipe.values)
    values["language"] = {**values["language"], "load": load}
    return replace(recipe, values=values)
