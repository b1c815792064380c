"""A trained run, or the shipped clover-mini, in; answers to questions about images out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pathcli.data.images import read_image
from pathcli.data.pairs import Pictures
from pathcli.device import pick_device
from pathcli.encoders.augment import Augment
from pathcli.encoders.checkpoint import read_state
from pathcli.errors import UsageError
from pathcli.recipe import Recipe, build
from pathcli.runs import read_run
from pathcli.state import fill
from pathcli.vlm.batches import Examples
from pathcli.vlm.generate import answers
from pathcli.vlm.model import VisionLanguage
from pathcli.vlm.towers import Views, ready
from pathcli.weights import fetch, local
from pathcli.yaml12 import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from pathcli.types import ByteArray, Sample

SHIPPED = "clover-mini"


class _AsTheyAre(Pictures):
    """Reads images, and lets none stand in for a broken one."""

    def all(self, sample: Sample) -> tuple[Sample, list[ByteArray]]:
        return sample, [read_image(ref) for ref in sample.images]


class Responder:
    """A vision-language model that answers. Research use only; not for diagnosis."""

    def __init__(self, recipe: Recipe, weights: Path, device: str = "auto") -> None:
        """Build a run's model from its recipe, and put its trained weights in.

        Raises:
            UsageError: the recipe is of another task.
            ResourceError: the weights, or those of a frozen part, are not here.
            DataError: the weights are damaged, or of another model.
        """
        if recipe.task != "generate":
            msg = f"recipe {recipe.name}: task {recipe.task} learns no answers; "
            raise UsageError(msg + "name a run of the task generate")
        task = build(recipe)
        here = pick_device(device)
        self.recipe, self.chat = recipe, task.chat
        encoder = ready(task.encoder, here)
        task.language.start()
        connector = task.connector(encoder.row_shape[-1], task.language.width)
        self.module = VisionLanguage(encoder, connector, task.language)
        state = {name: tensor.float() for name, tensor in read_state(local(weights)).items()}
        fill(self.module, state, str(weights))
        self.module.eval().to(here)
        views = Views(_AsTheyAre(()), connector, Augment(), encoder.input_px)
        count = connector.count(encoder.row_shape[0])
        self.examples = Examples(views, self.chat, connector, task.language, count)

    @classmethod
    def of(cls, run: Path | None = None, device: str = "auto") -> Responder:
        """Return the model of a finished run's folder, or by default the shipped clover-mini.

        Raises:
            ResourceError: the run is not there or unfinished, or weights are not here.
        """
        if run is not None:
            return cls(read_run(run).recipe, run / "weights.safetensors", device)
        weights = fetch(SHIPPED)
        path = weights.with_name("recipe.yaml")
        values = dict(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
        return cls(Recipe(SHIPPED, values), weights, device)

    @torch.inference_mode()
    def __call__(
        self,
        samples: Sequence[Sample],
        *,
        batch: int = 16,
        **decoding: Any,  # noqa: ANN401 - of HFLanguage.generate
    ) -> Iterator[str]:
        """Yield the answer to each sample's last question, greedy unless `decoding` says else.

        A sample's `turns` are question, answer, question...; its own `answer` is not read.

        Raises:
            DataError: an image cannot be read.
        """
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            yield from answers(self.module, self.examples, part, **decoding)
