"""One loop for every task: a module that returns its loss in, trained weights on disk out.

A task's module has `loss(batch) -> scalar`; what of it requires a gradient is trained and
saved. Learning rate, order and content of the batches are functions of the step alone, so
that a resumed run goes through the same numbers as one that was never stopped.

Read `Loop` from top to bottom: `run` goes through epochs, `_epoch` through optimiser steps,
`_gradient` through what one batch adds to a step, `_judge` through what follows an epoch.
Several processes run this same loop, each on its share of every batch; what they must agree
on goes through `pathcli.processes`, and the first of them alone writes.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import send_to_device, set_seed
from safetensors.torch import save as save_tensors

from pathcli import processes
from pathcli.batches import Batches, as_list
from pathcli.board import Board, require_tensorboard
from pathcli.errors import DataError, UsageError
from pathcli.gradient_cache import cached_backward
from pathcli.optimizer import make_optimizer, set_rate
from pathcli.registry import did_you_mean
from pathcli.settings import TrainSettings, learning_rate
from pathcli.state import (
    Average,
    fill,
    fill_optimizer,
    kept_here,
    optimizer_state,
    random_state,
    set_random_state,
    trainable_state,
)
from pathcli.store.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from pathcli.types import Progress

log = logging.getLogger("pathcli")

Metrics = Mapping[str, float]
LOG_EVERY = 100  # steps
SAVE_SECONDS, SAVE_EPOCH_SECONDS = 60.0, 2.0  # at most this often, amid an epoch and after one
SAVING_SECONDS = 3.0  # what takes longer to save is saved less often, by as much


@dataclass(frozen=True)
class Work:
    """What one run trains: the module, its examples, and what is validated on.

    `identity` names the data and what training begins with: a stopped run goes on with no other.

    `module.loss(batch)` is called with `collate` of a list of examples, in which tensors (in
    lists, tuples and dictionaries) have come to the device. All that `collate` draws comes
    from the generator it is given, which follows from seed, epoch and batch; it may run in a
    worker. For `train.chunk` the module has `embed(batch)`, a tuple of tensors with a row for
    each example, and `loss_of(*embeddings)`, too, and `collate` makes one piece at a time.

    `lengths` are the examples' own, for `train.by_length`.

    `validate` returns metrics of the module as it stands; all processes call it, with all the
    weights, and the first one's answer counts. `facts` go into `provenance.json`, and so does
    what `conclude` returns once the chosen weights are back in the module.
    """

    module: torch.nn.Module
    examples: Sequence[Any]
    validate: Callable[[], Metrics] | None = None
    collate: Callable[[list[Any], np.random.Generator], Any] = as_list
    lengths: Sequence[int] | None = None
    identity: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    conclude: Callable[[], Mapping[str, Any]] = dict


class _Inside(torch.nn.Module):
    """Calls any function of the module through `forward`, which is where wrappers look.

    Within it the weights are whole and precision is set, however many processes there are.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[..., Any], *given: Any) -> Any:  # noqa: ANN401
        return call(*given)


class Loop:
    """The training of one run in one folder; `run` goes on where the folder stands."""

    def __init__(
        self, work: Work, settings: TrainSettings, folder: Path, device: str = "auto"
    ) -> None:
        """Put the module on the device and the optimiser on the module; call `set_seed` before.

        Raises:
            UsageError: a list of seeds or rates; a loop trains one. A batch that cannot be
                shared out, or a choice without validation.
            DataError: no example to train on.
            ResourceError: the device, or an extra that was asked for, is not here.
        """
        (self.lr,), (self.seed,) = _one(settings.rates), _one(settings.seeds)
        self.work, self.settings, self.folder = work, settings, folder
        if settings.tensorboard:
            require_tensorboard()
        if settings.choose and not work.validate:
            msg = f"train.choose: {settings.choose!r} is measured in validation, and nothing is "
            raise UsageError(msg + "validated here: all is trained on; null keeps the last weights")
        self.accelerator = processes.accelerator(settings, device)
        rank, ranks = processes.rank(), processes.ranks()
        self.feed = Batches(
            work.examples, work.collate, settings, lengths=work.lengths, rank=rank, ranks=ranks
        )
        self.batches = self.feed.count
        self.updates = math.ceil(self.batches / settings.accumulate)
        self.inside = processes.spread(_Inside(work.module), self.accelerator, settings.shard)
        optimizer = make_optimizer(work.module, settings, self.lr, self.accelerator.device)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.average = None if settings.ema is None else Average(work.module, settings.ema)
        self.step = self.epochs_done = self.stale = 0
        self.total, self.count = torch.zeros((), device=self.accelerator.device), 0
        self.best: dict[str, float] = {}
        self.best_epoch, self.best_state = 0, trainable_state(work.module)
        self.lines: list[dict[str, Any]] = []
        self.board: Board | None = None
        self._draw_apart()

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.updates * self.settings.epochs)

    def run(self, progress: Progress, stop_after: int | None = None) -> bool:
        """Train to the end, or for `stop_after` steps; return whether the end was reached."""
        self._resume()
        if self.settings.tensorboard and not processes.rank():
            self.board = Board(self.folder, self.step)
        self.saved, self.saving = time.monotonic(), 0.0
        with (
            closing(self._stream()) as stream,
            closing(self.board) if self.board else nullcontext(),
        ):
            while self.epochs_done < self.settings.epochs and not self._exhausted():
                for _ in self._epoch(stream):
                    progress(self.step, self.steps)
                    if stop_after is not None and self.step >= stop_after:
                        self.save_state()
                        return False
                    self._save_now_and_then(SAVE_SECONDS)
                self.epochs_done += 1
                self._judge()
                self._save_now_and_then(SAVE_EPOCH_SECONDS)
        return True

    def _exhausted(self) -> bool:
        return self.settings.patience is not None and self.stale >= self.settings.patience

    def _stream(self) -> Generator[list[Any]]:
        """Yield all batches that are not trained on yet, each in its pieces."""
        done = self.step - self.epochs_done * self.updates
        on_gpu = self.accelerator.device.type == "cuda"
        return self.feed.stream(self.epochs_done, done * self.settings.accumulate, pinned=on_gpu)

    def _epoch(self, stream: Iterator[list[Any]]) -> Iterator[int]:
        """Make the optimiser steps of one epoch that are not made yet; yield after each."""
        self.inside.train()
        for update in range(self.step - self.epochs_done * self.updates, self.updates):
            rate = learning_rate(self.settings, self.lr, self.step, self.steps)
            set_rate(self.optimizer, rate)
            together = min(
                self.settings.accumulate, self.batches - update * self.settings.accumulate
            )
            for left in reversed(range(together)):
                loss = self._gradient(next(stream), 1 / together, last=not left)
                self.total, self.count = self.total + loss, self.count + 1
            processes.join_scalars(self.inside)
            if self.settings.clip:
                self.accelerator.clip_grad_norm_(self.inside.parameters(), self.settings.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average:
                self.average.update()
            self.step += 1
            if self.step % LOG_EVERY == 0 or update == self.updates - 1:
                self._note(rate)
            yield self.step

    def _gradient(self, pieces: list[Any], weight: float, *, last: bool) -> torch.Tensor:
        """Add one batch's gradient to the step's, `weight` times; return its loss, detached.

        With the `last` one the processes' gradients are averaged.
        """
        if self.accelerator.device.type != "cpu":
            pieces = send_to_device(pieces, self.accelerator.device, non_blocking=True)
        if self.settings.chunk is None:
            with processes.sync(self.inside, last):
                loss: torch.Tensor = self._call(self.work.module.loss, pieces[0])  # type: ignore[arg-type]
                self.accelerator.backward(loss * weight)
            return loss.detach()
        return cached_backward(
            self._call,
            self.work.module,
            pieces,
            backward=lambda loss: self.accelerator.backward(loss * weight),
            sync=lambda on: processes.sync(self.inside, on),
            last=last,
        )

    def _call(self, function: Callable[..., Any], *given: Any) -> Any:  # noqa: ANN401
        """Call a function where the module's weights are whole, in the run's precision."""
        with self.accelerator.autocast():
            return self.inside(function, *given)

    def _note(self, rate: float) -> None:
        """Keep a line with the mean loss, over all processes, since the last one."""
        told = processes.all_of(float(self.total))
        loss = sum(told) / len(told) / self.count
        self.total, self.count = torch.zeros_like(self.total), 0
        if not math.isfinite(loss):
            msg = (
                f"{self.folder}: the loss is {loss} at step {self.step}; try a lower train.lr, "
                "train.clip=1.0, or train.precision=float32"
            )
            raise DataError(msg)
        self._keep({"step": self.step, "epoch": self.epochs_done + 1, "lr": rate, "loss": loss})

    def _keep(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.board:
            self.board.write(line)

    def _judge(self) -> None:
        """Validate, keep the weights if they are the best so far, and write how it went."""
        with self.average.in_place() if self.average else nullcontext():
            found = self._validated()
            if self._better(found):
                self.best, self.best_epoch, self.stale = found, self.epochs_done, 0
                self.best_state = trainable_state(self.work.module)
            else:
                self.stale += 1
        self._write("metrics.jsonl", "".join(json.dumps(x) + "\n" for x in self.lines).encode())

    def _validated(self) -> dict[str, float]:
        if not self.work.validate:
            return {}
        self.inside.eval()
        with torch.no_grad():
            found: dict[str, float] = processes.told(dict(self._call(self.work.validate)))
        known = {n: value if math.isfinite(value) else None for n, value in found.items()}
        self._keep(
            {"step": self.step, "epoch": self.epochs_done}
            | {f"val_{name}": value for name, value in known.items()}
        )
        return found

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
        if not processes.rank():
            write_bytes(self.folder / name, data, lambda _: None, "--out")

    def save_weights(self) -> None:
        """Write the chosen weights, and put them back into the module."""
        fill(self.work.module, self.best_state, "the best epoch")
        self.work.module.eval()
        self._write("weights.safetensors", save_tensors(self.best_state))

    @torch.no_grad()
    def conclude(self) -> Mapping[str, Any]:
        """Return what the work concludes; call after `save_weights`."""
        if not processes.is_shared_out(self.inside):
            return self.work.conclude()
        found: Mapping[str, Any] = self.inside(self.work.conclude)
        return found

    # --- stopping and going on -----------------------------------------------------------

    def _save_now_and_then(self, seconds: float) -> None:
        """Save what was saved so long ago; a state of many gigabytes, less often."""
        began, often = time.monotonic(), seconds * max(1.0, self.saving / SAVING_SECONDS)
        if processes.told(began - self.saved > often):
            self.save_state()
            self.saved = time.monotonic()
            self.saving = self.saved - began

    def save_state(self) -> None:
        """Write everything that `_resume` needs; all processes have to call it.

        The first holds it twice, as tensors on the CPU and as bytes; see `trainable_state`.
        """
        scaler = self.accelerator.scaler
        state = {
            "identity": self.work.identity,
            "updates": self.updates,
            "module": trainable_state(self.work.module),
            "optimizer": optimizer_state(self.optimizer),
            "average": self.average.state() if self.average else {},
            "scaler": scaler.state_dict() if scaler else {},
            **{name: getattr(self, name) for name in _KEPT},
            "lines": json.dumps(self.lines),
            "totals": processes.all_of(self.total.cpu()),
            "rng": processes.all_of(random_state()),
        }
        if processes.rank():  # what is shared out was asked of all, and one writes it
            return
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
        if not processes.rank():
            log.info("%s: going on from step %d of %d", self.folder, self.step, self.steps)

    def _restore(self, state: dict[str, Any], source: str) -> None:
        if state["identity"] != self.work.identity:
            msg = f"{source}: labels, splits or features have changed since, or the weights that "
            raise DataError(msg + "training begins with; give another --out")
        if state["updates"] != self.updates:
            msg = f"{source}: an epoch had {state['updates']} steps in as many processes as there "
            raise DataError(msg + f"were, and has {self.updates} now; start as many as before")
        fill(self.work.module, state["module"], source)
        fill_optimizer(self.optimizer, state["optimizer"])
        if self.average:
            self.average.fill(state["average"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name in _KEPT:
            setattr(self, name, state[name])
        self.best_state = kept_here(self.work.module, self.best_state)
        self.lines = json.loads(state["lines"])
        rank, totals = processes.rank(), state["totals"]
        alike = len(totals) == processes.ranks()
        self.total = totals[rank] if alike else torch.stack(totals).mean()
        self.total = self.total.to(self.accelerator.device)
        if rank < len(state["rng"]):
            set_random_state(state["rng"][rank])
        else:  # a process that was not there: any numbers, but always the same
            self._draw_apart()

    def _draw_apart(self) -> None:
        """Let every process but the first draw random numbers of its own, from this step on."""
        if rank := processes.rank():
            drawn = np.random.SeedSequence([self.seed, rank, self.step]).generate_state(1)
            set_seed(int(drawn[0]))


_KEPT = ("step", "epochs_done", "stale", "best", "best_epoch", "best_state", "count")


def _one(values: list[Any]) -> tuple[Any]:
    if len(values) != 1:
        msg = f"one run has one seed and one lr, not {values}"
        raise UsageError(msg)
    return (values[0],)


def _rank(metrics: Metrics, name: str) -> tuple[float, float]:
    """Return what is compared: the named metric, an undefined one last; then the lower loss."""
    value = metrics[name]
    return (-math.inf if math.isnan(value) else value, -metrics.get("loss", 0.0))
