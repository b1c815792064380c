"""A recipe in, an estimate of its training out: weights, tokens, memory, hours; nothing is loaded.

Networks are built without memory (torch's meta device), language models are known by their
sizes. Arithmetic after Kaplan et al. 2020 (arXiv:2001.08361): a token costs two operations a
weight forwards, two more backwards for its own gradient and two for what it learns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pathcli.errors import ResourceError, UsageError
from pathcli.recipe import build, check_recipe
from pathcli.registry import did_you_mean
from pathcli.slides.plan import unwritten_store
from pathcli.store.store import default_root
from pathcli.torchvision_guard import guard_torchvision
from pathcli.vlm.lengths import Lengths, lengths_of
from pathcli.vlm.sizes import GPUS, TOWERS, Gpu, Tower, forward, lora_weights
from pathcli.vlm.tokens import CacheSettings, require_space

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from pathcli.recipe import Recipe


_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.0, "4bit": 0.5}
_LAYER = 34
"""Bytes a layer keeps of each token and unit of width for the way back, at 16 bits, attention's
own matrix not among them (Korthikanti et al. 2022, arXiv:2205.05198, equation 2)."""
_GIB = 2**30
_BAGS = {"mil", "mil-outcome"}


class Part(NamedTuple):
    """One part of a model: its weights and their bytes, and for one sample what it costs.

    `forward` and `backward` are operations; `kept` are bytes of activations.
    """

    name: str
    trained: int
    frozen: int
    trained_bytes: float = 4
    frozen_bytes: float = 4
    forward: float = 0
    backward: float = 0
    kept: float = 0


@dataclass(frozen=True)
class Plan:
    """What training would take; every number is an estimate, None what is not known yet.

    `numbers` are for one seed: `memory_gib` by kind for each GPU, `hours` with as many
    GPUs; `hours_per_1000_steps` where the steps are not known. `notes` say what was assumed.
    """

    recipe: str
    gpu: str
    parts: tuple[Part, ...]
    numbers: Mapping[str, Any]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        parts = [{"part": p.name, "trained": p.trained, "frozen": p.frozen} for p in self.parts]
        known = {"recipe": self.recipe, "estimate": True, "gpu": self.gpu, "parts": parts}
        return known | dict(self.numbers) | {"notes": list(self.notes)}


def plan(recipe: Recipe, gpu: str = "a100-80g", store: Path | str | None = None) -> Plan:
    """Return what training a recipe would take, on `gpu`: a name, or as in 8xa100-80g several.

    What the recipe still asks for may be missing, and so may weights and data. `store` is the
    one that image tokens would be kept in (default: the user's store).

    Raises:
        UsageError: the recipe is wrong, or no GPU is called so.
        ResourceError: the store's disk has no room for the tokens.
        DataError: a language model's folder is none, or a sample cannot be told.
    """
    count, name = re.fullmatch(r"(?:([1-9]\d*)x)?(.*)", gpu, re.DOTALL).groups()  # type: ignore[union-attr]
    if name not in GPUS:
        msg = f"--gpu: {name!r} is none of those known: {did_you_mean(name, sorted(GPUS))}"
        raise UsageError(msg)
    asked = check_recipe(recipe).asked
    later = {path: "random" if path.endswith(".init") else "(given later)" for path in asked}
    task = _drafted(recipe.with_values(**later))
    draft = _Draft(recipe, task, int(count or 1), GPUS[name], asked)
    draft.store = store or default_root()
    draft.add_parts()
    if asked:
        draft.notes.append(f"{len(asked)} values are still asked for: {', '.join(asked)}")
    return Plan(recipe.name, gpu, tuple(draft.parts), draft.numbers(), tuple(draft.notes))


def _drafted(recipe: Recipe) -> Any:  # noqa: ANN401 - tasks share no base class
    """Return the recipe's task; the encoder's own files need not be here."""
    try:
        return build(recipe)
    except ResourceError:
        if "encoder" not in recipe.values:
            raise
        stand_in = {"kind": "lite0", "tokens": bool(recipe.values["encoder"].get("tokens"))}
        return build(replace(recipe, values={**recipe.values, "encoder": stand_in}))


class _Draft:
    """One walk over a task that collects parts, numbers and notes."""

    def __init__(
        self,
        recipe: Recipe,
        task: Any,  # noqa: ANN401 - tasks share no base class
        gpus: int,
        gpu: Gpu,
        asked: Sequence[str],
    ) -> None:
        self.recipe, self.task, self.train = recipe, task, task.train
        self.gpus, self.gpu = gpus, gpu
        self.given = not any(path.startswith("data") for path in asked)
        self.parts: list[Part] = []
        self.notes: list[str] = []
        self.store: Path | str = default_root()
        self.lengths: Lengths | None = None
        self.tower = self._tower()
        self.cache: CacheSettings = getattr(task, "cache", CacheSettings())
        self.size = 4.0 if self.train.precision == "float32" else 2.0

    def _tower(self) -> Tower | None:
        kind = self.recipe.values.get("encoder", {}).get("kind")
        if kind is None and self.recipe.task == "generate":
            return Tower(0, 0, 0, 0, 0)  # words alone
        if kind in TOWERS:
            return TOWERS[kind]
        shape = getattr(getattr(self.task, "encoder", None), "row_shape", None)
        if shape is None:
            return None
        self.notes.append(f"what {kind} itself takes is not known, and not counted")
        return Tower(shape[0] if len(shape) > 1 else 1, shape[-1], shape[-1], 0, 0)

    def add_parts(self) -> None:
        """Take the task apart."""
        task = self.recipe.task
        if task in {"align", "generate"} and self.tower:
            self._read_and_say(language=getattr(self.task, "language", None))
            return
        if task in {"align", "generate"}:
            self.notes.append("the encoder's tokens are not known, so little can be estimated")
        elif (part := self._other()) is not None:
            self.parts.append(part)
        self.notes.append(f"memory and hours of the task {task} are not estimated")
        self._steps_alone()

    # --- image, connector, language model ---------------------------------------------------

    def _read_and_say(self, language: Any) -> None:  # noqa: ANN401 - an HFLanguage or None
        import torch  # noqa: PLC0415

        tower = self.tower
        assert tower is not None  # noqa: S101 - looked at before
        shape = None
        if language is not None:
            from pathcli.vlm.language import shape_of  # noqa: PLC0415

            shape = shape_of(language.model)
        with torch.device("meta"):
            connector = self.task.connector(tower.width, shape.hidden if shape else None)
        visual = connector.count(tower.tokens)
        views = len(connector.views(np.zeros((896, 896, 3), np.uint8), 224))
        self.lengths = lengths = lengths_of(self.task, visual, given=self.given)
        self.notes += lengths.notes
        if "encoder" in self.recipe.values:
            self._add_encoder(tower, views)
        self._add_connector(connector, tower, views, seq=visual if shape else None)
        if shape is not None:
            self._add_language(language, shape, lengths)

    def _add_encoder(self, tower: Tower, views: int) -> None:
        own = getattr(self.task.encoder, "precision", "float32")
        size = _BYTES[self.recipe.values["encoder"].get("precision", own)]
        cached = self.cache.tokens != "off"
        seen = 0 if cached else views * tower.flops
        self.parts.append(Part("encoder", 0, tower.weights, frozen_bytes=size, forward=seen))
        if cached:
            self.notes.append("the encoder's tokens come from the store; filling it is not counted")

    def _add_connector(self, connector: Any, tower: Tower, views: int, seq: int | None) -> None:  # noqa: ANN401
        """Add the connector: linear layers of the encoder's width read its tokens."""
        import torch  # noqa: PLC0415

        module, passes, tokens = connector, 1, seq
        lengths = self.lengths
        assert lengths is not None  # noqa: S101 - measured before
        if seq is None:  # stage 1: images, and pairs, a text, then beside two others, and written
            from pathcli.vlm.align_losses import Align  # noqa: PLC0415

            with torch.device("meta"):
                module = Align(self.task.encoder, connector)
            passes, tokens = 5, lengths.visual + lengths.longest
        elif connector.reads:
            tokens = seq + int(self.task.connector.keywords.get("text_limit", 32))
        assert tokens is not None  # noqa: S101 - either of both
        flops = kept = 0.0
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                rows = views * tower.tokens if layer.in_features == tower.width else tokens
                flops += 2 * passes * rows * layer.weight.numel()
                kept += passes * rows * (layer.in_features + layer.out_features) * self.size
        weights = sum(w.numel() for w in module.parameters() if w.requires_grad)
        frozen = sum(w.numel() for w in module.parameters()) - weights
        self.parts.append(
            Part("connector", weights, frozen, forward=flops, backward=2 * flops, kept=kept)
        )

    def _add_language(self, language: Any, shape: Any, lengths: Lengths) -> None:  # noqa: ANN401
        size = _BYTES[language.load]
        unit = self.size if language.load == "float32" else 2.0
        whole = language.tune == "full"
        lora = lora_weights(shape, language.lora) if language.tune == "lora" else 0
        read, said = (lengths.mean, lengths.learnt) if shape.seq2seq else (lengths.mean, 0.0)
        half = 0.5 if shape.seq2seq else 1.0
        flops = forward(half * shape.parameters, read, shape.layers, shape.hidden)
        if said:
            flops += forward(half * shape.parameters, said, shape.layers, shape.hidden)
        learnt = 2 * lora * (read + said)
        backward = flops * (2 if whole else 1) + 2 * learnt + flops * language.checkpointing
        layer = lengths.longest * shape.hidden * _LAYER * unit / 2
        kept = layer * shape.layers * (2 if shape.seq2seq else 1)
        if language.checkpointing:
            kept = layer + lengths.longest * shape.hidden * shape.layers * unit
        kept += lengths.learnt * shape.vocabulary * 10  # logits in 16 and 32 bits, their gradient
        trained = shape.parameters if whole else lora
        frozen = 0 if whole else shape.parameters
        sizes = (size if whole else 4.0, size)
        self.parts.append(Part("language", trained, frozen, *sizes, flops + learnt, backward, kept))

    # --- other tasks -------------------------------------------------------------------------

    def _other(self) -> Part | None:
        """Return what a task without a language model trains, where that is known before."""
        import torch  # noqa: PLC0415

        model: Any = getattr(self.task, "model", None)
        with torch.device("meta"):
            if self.recipe.task in _BAGS and self.tower:
                outputs = getattr(getattr(self.task, "outcome", None), "logits", 2)
                name, module = "head", self.task.head(self.tower.pooled, outputs)
            elif hasattr(model, "architecture"):
                guard_torchvision()
                import open_clip  # noqa: PLC0415

                name = "model"
                module = open_clip.create_model(
                    model.architecture, pretrained=None, load_weights=False, device="meta"
                )
            else:
                self.notes.append("trained weights: pathcli recipes check --batch counts them")
                return None
        weights = sum(w.numel() for w in module.parameters() if w.requires_grad)
        return Part(name, weights, sum(w.numel() for w in module.parameters()) - weights)

    def _steps_alone(self) -> None:
        if self.recipe.task in _BAGS:
            return
        self.lengths = lengths_of(self.task, 0, given=self.given, counted=False)
        self.notes += self.lengths.notes

    # --- what follows ------------------------------------------------------------------------

    def numbers(self) -> dict[str, Any]:
        """Return all numbers, None for what is not known."""
        train, lengths = self.train, self.lengths
        rows = train.batch * train.accumulate
        samples = lengths.samples if lengths else None
        steps = None
        if samples:
            batches = -(-samples // train.batch)
            steps = train.epochs * -(-batches // train.accumulate)
        found: dict[str, Any] = {
            "gpus": self.gpus,
            "trained": sum(p.trained for p in self.parts) if self.parts else None,
            "frozen": sum(p.frozen for p in self.parts) if self.parts else None,
            "samples": samples,
            "samples_per_step": rows,
            "steps": steps,
        }
        if not any(p.forward for p in self.parts) or lengths is None:
            return found
        flops = rows * sum(p.forward + p.backward for p in self.parts)
        found |= {
            "visual_tokens_per_sample": lengths.visual,
            "text_tokens_per_sample": round(lengths.mean - lengths.visual),
            "tokens_per_step": round(rows * lengths.tokens),
            "flops_per_step": flops,
            "memory_gib": self._memory(),
        }
        return found | self._hours(flops, steps) | self._cached(lengths)

    def _memory(self) -> dict[str, float]:
        train = self.train
        shared = self.gpus if train.shard == "full" else 1
        sums = dict.fromkeys(("weights", "gradients", "optimizer", "activations"), 0.0)
        for part in self.parts:
            among = 1 if part.name == "encoder" else shared
            trained = part.trained * part.trained_bytes / among
            sums["weights"] += trained + part.frozen * part.frozen_bytes / among
            sums["gradients"] += trained
            sums["optimizer"] += trained * (2 if train.ema is None else 3)
            sums["activations"] += part.kept * train.batch / self.gpus
        found = {name: round(size / _GIB, 2) for name, size in sums.items()}
        found["total"] = round(sum(sums.values()) / _GIB, 2)
        if found["total"] > self.gpu.memory:
            self.notes.append(
                f"{found['total']:.0f} GiB do not fit into {self.gpu.memory:g}: a smaller "
                "train.batch and a larger train.accumulate, more GPUs (--gpu 8xh100; with "
                "train.shard=full they share weights), or language.checkpointing"
            )
        return found

    def _hours(self, flops: float, steps: int | None) -> dict[str, float]:
        gpu = self.gpu
        hours = flops / (self.gpus * gpu.tflops * 1e12 * gpu.share) / 3600
        self.notes.append(
            f"hours assume {gpu.share:.0%} of {gpu.tflops:g} TFLOP/s in {gpu.bits} on each of "
            f"{self.gpus}, and data that are never waited for"
        )
        if self.train.precision == "float32" != gpu.bits:
            self.notes.append("train.precision is float32: several times as many hours")
        if steps is None:
            return {"hours_per_1000_steps": _short(1000 * hours)}
        return {"hours": _short(steps * hours)}

    def _cached(self, lengths: Lengths) -> dict[str, float]:
        if self.cache.tokens == "off" or self.tower is None:
            return {}
        each = self.cache.row_bytes((self.tower.tokens, self.tower.width))
        found: dict[str, float] = {"cache_mb_per_image": round(each / 1e6, 3)}
        if lengths.images is not None:
            found["cache_gb"] = _short(each * lengths.images / 1e9)
            shape = self.tower.tokens, self.tower.width
            kept = sum(self._entries())
            require_space(self.store, lengths.images, shape, self.cache, kept)
        return found

    def _entries(self) -> Iterator[int]:
        """Yield the bytes of what the store has of this kind of encoder, of whatever weights."""
        kind, entries = self.recipe.values["encoder"]["kind"], unwritten_store(self.store).features
        yield from (entries.size(key) for key in entries if str(key.encoder).startswith(f"{kind}-"))


def _short(number: float) -> float:
    return float(f"{number:.3g}")


# --- to be read --------------------------------------------------------------------------------


def table(plan: Plan) -> list[dict[str, str]]:
    """Return a plan as rows for people, each `what`, `estimate`."""
    rows = [
        (f"weights of the {p.name}", f"{_count(p.trained)} trained, {_count(p.frozen)} frozen")
        for p in plan.parts
    ]
    numbers = dict(plan.numbers)
    memory = numbers.pop("memory_gib", {})
    for name in ("trained", "frozen", "gpus"):
        numbers.pop(name)
    for name, value in numbers.items():
        what = name.replace("_per_", " per ").replace("_", " ")
        rows.append((what, "not known" if value is None else _count(value)))
    rows += [(f"GiB a GPU: {name}", f"{size:.1f}") for name, size in memory.items()]
    return [{"what": what, "estimate": value} for what, value in rows]


def _count(number: float) -> str:
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.4g}" if number != int(number) else f"{int(number):,}"
