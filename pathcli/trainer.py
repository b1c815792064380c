"""One loop for every task: a module that returns its loss in, trained weights on disk out.

A task's module has `loss(batch) -> scalar`; what of it requires a gradient is trained and
saved. Learning rate and order of examples are functions of the step alone, so that a
resumed run goes through the same numbers as one that was never stopped.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save as save_tensors

from pathcli.device import pick_device
from pathcli.registry import did_you_mean
from pathcli.settings import TrainSettings, learning_rate, order
from pathcli.state import fill, random_state, set_random_state, trainable_state
from pathcli.store.files import write_bytes
from pathcli.types import DataError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from pathcli.types import Progress

log = logging.getLogger("pathcli")

Metrics = Mapping[str, float]
LOG_EVERY = 100  # steps
SAVE_SECONDS, SAVE_EPOCH_SECONDS = 60.0, 2.0  # at most this often, amid an epoch and after one
_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Work:
    """What one run trains: the module, its examples, and what is validated on.

    `identity` names the data: a stopped run goes on with the same data only.

    `module.loss(batch)` is called with `collate` of a list of examples; `validate` returns
    metrics of the module as it stands. `facts` go into `provenance.json`, and so does what
    `conclude` returns once the chosen weights are back in the module.
    """

    module: torch.nn.Module
    examples: Sequence[Any]
    validate: Callable[[], Metrics] | None = None
    collate: Callable[[list[Any]], Any] = list
    identity: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    conclude: Callable[[], Mapping[str, Any]] = dict


def parameter_groups(module: torch.nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the optimiser's groups: biases and norms (fewer than 2 dimensions) do not decay."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decays = [p for p in trained if settings.decay_all or p.ndim > 1]
    rest = [p for p in trained if not (settings.decay_all or p.ndim > 1)]
    groups = [(decays, settings.weight_decay), (rest, 0.0)]
    return [{"params": part, "weight_decay": decay} for part, decay in groups if part]


class _Step(torch.nn.Module):
    """Calls `loss` through `forward`, which is what data-parallel wrappers see."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> torch.Tensor:  # noqa: ANN401 - the task's own batch
        loss: torch.Tensor = self.module.loss(batch)  # type: ignore[operator]
        return loss


class Loop:
    """The training of one run in one folder; `run` goes on where the folder stands."""

    def __init__(
        self, work: Work, settings: TrainSettings, folder: Path, device: str = "auto"
    ) -> None:
        """Put the module on the device and the optimiser on the module; call `set_seed` before.

        Raises:
            UsageError: a list of seeds or rates; a loop trains one.
            DataError: no example to train on.
            ResourceError: the device is not here.
        """
        (self.lr,), (self.seed,) = _one(settings.rates), _one(settings.seeds)
        self.work, self.settings, self.folder = work, settings, folder
        if not len(work.examples):
            msg = "there is no example to train on"
            raise DataError(msg)
        self.accelerator = accelerator(settings, device)
        step = _Step(work.module)
        kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
        groups = parameter_groups(work.module, settings)
        fused = self.accelerator.device.type in {"cpu", "cuda"}
        optimizer = kind(groups, lr=self.lr, betas=settings.betas, fused=fused)
        self.step_module, self.optimizer = self.accelerator.prepare(step, optimizer)
        self.step = self.epochs_done = self.stale = 0
        self.total, self.count = torch.zeros((), device=self.accelerator.device), 0
        self.best: dict[str, float] = {}
        self.best_epoch, self.best_state = 0, trainable_state(work.module)
        self.lines: list[dict[str, Any]] = []
        self.batches = math.ceil(len(work.examples) / settings.batch)
        self.updates = math.ceil(self.batches / settings.accumulate)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.updates * self.settings.epochs)

    def run(self, progress: Progress, stop_after: int | None = None) -> bool:
        """Train to the end, or for `stop_after` steps; return whether the end was reached."""
        self._resume()
        saved = time.monotonic()
        while self.epochs_done < self.settings.epochs and not self._exhausted():
            for _ in self._epoch(self.epochs_done):
                progress(self.step, self.steps)
                if stop_after is not None and self.step >= stop_after:
                    self.save_state()
                    return False
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save_state()
                    saved = time.monotonic()
            self.epochs_done += 1
            self._judge()
            if time.monotonic() - saved > SAVE_EPOCH_SECONDS:
                self.save_state()
                saved = time.monotonic()
        return True

    def _exhausted(self) -> bool:
        return self.settings.patience is not None and self.stale >= self.settings.patience

    def _epoch(self, epoch: int) -> Iterator[int]:
        """Make the optimiser steps of one epoch that are not made yet; yield after each."""
        self.step_module.train()
        done = self.step - epoch * self.updates
        loader = self._loader(epoch, done * self.settings.accumulate)
        for number, batch in enumerate(loader, start=1 + done * self.settings.accumulate):
            together = self.settings.accumulate
            ends = number % together == 0 or number == self.batches
            together = min(together, self.batches - (number - 1) // together * together)
            rate = learning_rate(self.settings, self.lr, self.step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            with self.accelerator.autocast():
                loss = self.step_module(batch)
            self.accelerator.backward(loss / together)
            self.total, self.count = self.total + loss.detach(), self.count + 1
            if not ends:
                continue
            if self.settings.clip:
                self.accelerator.clip_grad_norm_(self.step_module.parameters(), self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            if self.step % LOG_EVERY == 0 or self.step == (epoch + 1) * self.updates:
                self._note(epoch, rate)
            yield self.step

    def _loader(self, epoch: int, start: int) -> Iterator[Any]:
        """Yield the batches of one epoch from batch `start` on."""
        size, indices = self.settings.batch, order(self.seed, epoch, len(self.work.examples))
        cut = [indices[i : i + size] for i in range(0, len(indices), size)][start:]
        if not self.settings.workers:
            for rows in cut:
                yield self.work.collate([self.work.examples[i] for i in rows])
            return
        yield from torch.utils.data.DataLoader(
            self.work.examples,  # type: ignore[arg-type]  # a sequence is a map-style data set
            batch_sampler=cut,
            collate_fn=self.work.collate,
            num_workers=self.settings.workers,
            generator=torch.Generator().manual_seed(self.seed + epoch),
        )

    def _note(self, epoch: int, rate: float) -> None:
        loss = float(self.total) / self.count
        self.total, self.count = torch.zeros_like(self.total), 0
        if not math.isfinite(loss):
            msg = (
                f"{self.folder}: the loss is {loss} at step {self.step}; try a lower train.lr, "
                "train.clip=1.0, or train.precision=float32"
            )
            raise DataError(msg)
        self.lines.append({"step": self.step, "epoch": epoch + 1, "lr": rate, "loss": loss})

    def _judge(self) -> None:
        """Validate, keep the weights if they are the best so far, and save where we are."""
        found: dict[str, float] = {}
        if self.work.validate:
            self.step_module.eval()
            with torch.no_grad(), self.accelerator.autocast():
                found = dict(self.work.validate())
            known = {n: value if math.isfinite(value) else None for n, value in found.items()}
            self.lines.append(
                {"step": self.step, "epoch": self.epochs_done}
                | {f"val_{name}": value for name, value in known.items()}
            )
        if self._better(found):
            self.best, self.best_epoch, self.stale = found, self.epochs_done, 0
            self.best_state = trainable_state(self.work.module)
        else:
            self.stale += 1
        self._write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in self.lines).encode())

    def _better(self, found: Metrics) -> bool:
        name = self.settings.choose
        if name is None:
            return True
        if name not in found:
            msg = f"train.choose: no validation metric is called {name!r}: "
            msg += did_you_mean(name, list(found)) if found else "nothing is validated here"
            raise UsageError(msg)
        return not self.best or _rank(found, name) > _rank(self.best, name)

    def _write(self, name: str, data: bytes) -> None:
        write_bytes(self.folder / name, data, lambda _: None, "--out")

    def save_weights(self) -> None:
        """Write the chosen weights, and put them back into the module."""
        fill(self.work.module, self.best_state, "the best epoch")
        self.work.module.eval()
        self._write("weights.safetensors", save_tensors(self.best_state))

    def save_state(self) -> None:
        """Write everything that `_resume` needs."""
        scaler = self.accelerator.scaler
        state = {
            "identity": self.work.identity,
            "module": trainable_state(self.work.module),
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "step": self.step,
            "epochs_done": self.epochs_done,
            "stale": self.stale,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "total": self.total.cpu(),
            "count": self.count,
            "lines": json.dumps(self.lines),
            "rng": random_state(),
        }
        memory = io.BytesIO()
        torch.save(state, memory)
        self._write("state/state.pt", memory.getvalue())

    def _resume(self) -> None:
        path = self.folder / "state" / "state.pt"
        if not path.is_file():
            return
        try:
            self._restore(torch.load(path, map_location="cpu", weights_only=True), str(path))
        except DataError:
            raise
        except Exception as error:  # many kinds, all of them mean a damaged file
            msg = f"{path}: damaged ({type(error).__name__}); remove it to start the run again"
            raise DataError(msg) from error
        log.info("%s: going on from step %d of %d", self.folder, self.step, self.steps)

    def _restore(self, state: dict[str, Any], source: str) -> None:
        if state["identity"] != self.work.identity:
            msg = f"{source}: labels, splits or features have changed since; give another --out"
            raise DataError(msg)
        fill(self.work.module, state["module"], source)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in ("step", "epochs_done", "stale", "best", "best_epoch", "best_state"):
            setattr(self, name, state[name])
        self.total, self.count = state["total"].to(self.accelerator.device), state["count"]
        self.lines = json.loads(state["lines"])
        set_random_state(state["rng"])


def accelerator(settings: TrainSettings, device: str) -> Accelerator:
    """Return accelerate's handle on a device and a precision; several in one process are fine."""
    device = pick_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    AcceleratorState._reset_state(reset_partial_state=True)  # noqa: SLF001 - one per process, else
    found = Accelerator(cpu=device == "cpu", mixed_precision=_PRECISIONS[settings.precision])
    if found.num_processes > 1:
        msg = "training in several processes is not there yet; start one a seed: train.seed=[1]"
        raise UsageError(msg)
    return found


def _one(values: list[Any]) -> tuple[Any]:
    if len(values) != 1:
        msg = f"one run has one seed and one lr, not {values}"
        raise UsageError(msg)
    return (values[0],)


def _rank(metrics: Metrics, name: str) -> tuple[float, float]:
    """Return what is compared: the named metric, an undefined one last; then the lower loss."""
    value = metrics[name]
    return (-math.inf if math.isnan(value) else value, -metrics.get("loss", 0.0))
