"""The task `mil-outcome`: a head learns a number or a survival time; and what such runs say.

Everything else is as in the task `mil`: bags, splits by patient, the choice on validation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from pathcli.errors import DataError, UsageError
from pathcli.mil.bags import BagData  # noqa: TC001 - builds the section `data`
from pathcli.mil.outcomes import FEW_EVENTS
from pathcli.mil.streams import streams_of
from pathcli.mil.targets import OutcomeTable, read_outcome
from pathcli.mil.task import MilTask, identity_of, read_bags, tensor_of
from pathcli.objectives import gather
from pathcli.recipe import build_part
from pathcli.settings import TrainSettings  # noqa: TC001 - builds the section `train`
from pathcli.slides.tiling import tile_spec
from pathcli.trainer import Work
from pathcli.types import TileSpec  # noqa: TC001 - builds the section `tiles`

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.mil.bags import Bags
    from pathcli.mil.outcomes import Fit, Outcome
    from pathcli.runs import Run
    from pathcli.types import Bag, Encoder, Head

    Floats = NDArray[np.float64]

TASK = "mil-outcome"


class Learner(torch.nn.Module):
    """A head that learns an outcome, as the trainer sees it: bags in, loss out.

    A head's own streams (ACMIL's branches, DSMIL's two) are each learnt with their weight.
    """

    def __init__(
        self, head: Head, outcome: Outcome, fit: Fit, targets: Mapping[str, tuple[float, ...]]
    ) -> None:
        """Take the head, a module itself, and the targets by slide."""
        super().__init__()
        self.head = head
        self.outcome, self.fit, self.targets = outcome, fit, targets

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def loss(self, bags: Sequence[Bag]) -> torch.Tensor:
        """Return the loss of a few bags."""
        return self.loss_of(*self.embed(bags))

    def idle(self, bags: Sequence[Bag]) -> str:
        """Return why a batch teaches nothing, "" if it does: nobody outlived an event in it."""
        rows = [self.targets[bag.slides[0]] for bag in bags]
        if not self.outcome.joint or any(
            event and any(other[0] >= time for j, other in enumerate(rows) if j != i)
            for i, (time, event) in enumerate(rows)
        ):
            return ""
        return (
            f"the loss is 0, and says nothing: among these {len(rows)} patients no event has "
            "another patient still at risk; training compares train.batch of them"
        )

    def embed(self, bags: Sequence[Bag]) -> tuple[torch.Tensor, ...]:
        """Return logits [b, s, k] of all streams, their weights [b, s], penalties [b], targets."""
        device, wide = self.device, torch.float64
        found = [streams_of(self.head, tensor_of(bag, device)) for bag in bags]  # type: ignore[arg-type]
        logits = torch.stack([each.logits.float() for each in found])
        shares = logits.new_tensor([each.shares for each in found])
        penalties = torch.stack([each.penalty.to(logits) for each in found])
        rows = [self.targets[bag.slides[0]] for bag in bags]
        dtype = torch.float32 if device.type == "mps" else wide
        return logits, shares, penalties, torch.tensor(rows, dtype=dtype, device=device)

    def loss_of(
        self,
        logits: torch.Tensor,
        shares: torch.Tensor,
        penalties: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of a batch; where bags are compared, of all processes' together."""
        if self.outcome.joint:
            logits, targets = gather(logits), gather(targets)
        losses = [
            share * self.outcome.loss(stream, targets, self.fit)
            for share, stream in zip(shares[0].tolist(), logits.unbind(1), strict=True)
        ]
        return torch.stack(losses).sum() + penalties.mean()


class OutcomeTask(MilTask):
    """A slide's or patient's number, or survival time, by attention over tiles."""

    def __init__(
        self,
        *,
        encoder: Encoder,
        head: Callable[[int, int], Head],
        outcome: Outcome,
        data: BagData,
        train: TrainSettings,
        tiles: Annotated[TileSpec | None, tile_spec] = None,
    ) -> None:
        """Keep the parts; nothing is read before `prepare`.

        Raises:
            UsageError: an argument out of its range; a head that learns from classes only;
                data with classes; a batch of one patient where patients are compared.
        """
        self.outcome, self.choices = outcome, outcome.choices
        for name in ("benchmark", "target", "classes"):
            if getattr(data, name):
                msg = f"data.{name} is of classes; {TASK} reads data.labels, and the columns of "
                raise UsageError(msg + f"the section outcome ({', '.join(outcome.columns)})")
        if outcome.joint and train.batch == 1:
            msg = "train.batch=1: this loss compares the patients of a batch; set train.batch=32, "
            raise UsageError(msg + "and train.chunk=1 to hold one bag at a time")
        super().__init__(
            encoder=encoder, head=head, data=outcome_data(data, outcome), train=train, tiles=tiles
        )
        if why := getattr(head(8, outcome.logits), "of_classes", ""):
            raise UsageError(why)

    def begin(self, seed: int) -> Work:
        """Return one seed's run: its own split, a fresh head, and no bag of a test slide.

        Raises:
            DataError: the train part cannot be learnt from, or no event is in a part.
        """
        split, learn, check = self._parts(seed)
        table = self.cohort.table
        assert isinstance(table, OutcomeTable)  # noqa: S101 - `outcome_data` reads no other
        fit = self.outcome.fit(table.of(learn.rows))
        head = self.head(learn.dim, self.outcome.logits)
        module = Learner(head, self.outcome, fit, table.targets)
        facts = self._facts(learn, check, split)
        events = fit.get("events", FEW_EVENTS)
        few = f"only {events} patients to learn from have an event: the risk is uncertain"
        learnt = {"columns": list(self.outcome.columns), "unit": self.outcome.unit, **fit}
        known: dict[str, Any] = {
            "outcome": learnt,
            "logits": self.outcome.logits,
            "classes": [],
            "strata": list(table.classes),
            "warnings": [
                *facts["warnings"],
                *[few] * (events < FEW_EVENTS),
            ],
        }

        def conclude() -> dict[str, Any]:
            of_train = said_of(head, learn, module.device)
            more = self.outcome.conclude(table.of(learn.rows), of_train, fit)
            of_val = said_of(head, check, module.device)
            said = {"targets": table.of(check.rows).tolist(), "logits": of_val.tolist()}
            return {"outcome": learnt | more, "validation": said}

        return Work(
            module,
            learn,
            lambda: validate(module, check),
            identity=identity_of(facts | known),
            facts=facts | known,
            conclude=conclude,
        )


def outcome_data(data: BagData, outcome: Outcome) -> BagData:
    """Return bags whose table has an outcome's numbers."""
    return data.of(lambda d: read_outcome(d.labels or "", outcome, slides=d.slide_table, bag=d.bag))


def said_of(head: Head, bags: Sequence[Bag], device: torch.device) -> Floats:
    """Return the logits of bags, float64 [n, k].

    Raises:
        DataError: one is not finite.
    """
    found = np.stack([logits for _, logits, _ in read_bags(head, bags, device)])
    if not np.isfinite(found).all():
        msg = "the head gives nan or infinity; try a lower train.lr or train.clip=1.0"
        raise DataError(msg)
    return found


def validate(module: Learner, bags: Bags) -> dict[str, float]:
    """Return the metrics of a head on the validation bags, and the loss of all of them together."""
    targets = np.array([module.targets[row.slide] for row in bags.rows])
    logits = said_of(module.head, bags, module.device)
    loss = module.outcome.loss(torch.from_numpy(logits), torch.from_numpy(targets), module.fit)
    return module.outcome.measure(targets, logits, module.fit) | {"loss": float(loss)}


# --- finished runs -----------------------------------------------------------------------


def run_outcome(run: Run) -> tuple[Outcome, Fit]:
    """Return what a finished run has learnt, and the numbers it took from its train part."""
    outcome: Outcome = build_part(run.recipe, "outcome")()
    fit: Fit = run.facts["outcome"]
    return outcome, fit


@dataclass(frozen=True)
class Said:
    """What a run says of one bag: the value or risk, and of survival what goes with it.

    `group` is high or low, by the train part's median risk; `median` is None where the curve
    stays above one half, `curve` is (time, survival) at its knots, in `steps` or linear.
    """

    value: float
    unit: str
    group: str = ""
    median: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    steps: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        unit = f" {self.unit}" * bool(self.unit)
        if not self.group:
            return f"{self.value:.4g}{unit}"
        half = "not reached" if self.median is None else f"{self.median:.4g}{unit}"
        return f"{self.group} risk ({self.value:+.3f}), median {half}"


def say(run: Run, logits: Floats) -> Said:
    """Return what a run says where its head gives logits [k]."""
    outcome, fit = run_outcome(run)
    row = logits[None]
    value = float(outcome.predicted(row, fit)[0])
    said = Said(value, outcome.unit)
    if not outcome.survival:
        outside = not fit["low"] <= value <= fit["high"]
        told = f"the value lies outside of what was learnt from ({fit['low']:g} to {fit['high']:g})"
        return replace(said, warnings=(told,) * outside)
    survival: Any = outcome
    times, curve = survival.knots(row, fit)
    return replace(
        said,
        group="high" if value > fit["cut"] else "low",
        median=survival.median(row, fit)[0],
        steps=survival.steps,
        curve=tuple(zip(times.tolist(), curve[0].tolist(), strict=True)),
    )


def scope(run: Run) -> str:
    """Return the sentence that says of what a run's numbers are."""
    fit, facts = run.facts["outcome"], run.facts
    unit = f" {fit['unit']}" * bool(fit["unit"])
    learnt = f"{'/'.join(fit['columns'])}, learnt from {len(facts['train'])} bags"
    if "events" in fit:
        return (
            f"{learnt} with {fit['events']} events, followed up to {fit['last']:g}{unit}; the risk "
            "compares with those patients and is no probability"
        )
    return f"{learnt} of {fit['low']:g} to {fit['high']:g}{unit}"
