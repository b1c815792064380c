"""The task `mil`: a recipe's bags and head in, what the trainer trains out; and back again."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch

from pathcli.errors import DataError, UsageError
from pathcli.metrics.classification import CLASSIFICATION
from pathcli.mil.bags import Bags
from pathcli.recipe import build_part
from pathcli.registry import did_you_mean
from pathcli.settings import TrainSettings  # noqa: TC001 - builds the section `train`
from pathcli.slides.tiling import tile_spec
from pathcli.state import load_trainable
from pathcli.trainer import Work
from pathcli.types import Bag, TileSpec, digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from pathcli.mil.bags import BagData, Cohort, Started
    from pathcli.mil.splits import Split
    from pathcli.runs import Run
    from pathcli.store import Store
    from pathcli.types import Encoder, Head


_WIDE = 1536
CHOICES = (*CLASSIFICATION, "auroc+f1")
"""What `train.choose` may name."""
_IDENTITY = ("classes", "split", "bag", "encoder", "tiles_digest", "features_digest")


class Classifier(torch.nn.Module):
    """A head as the trainer sees it: bags in, loss out."""

    def __init__(self, head: Head) -> None:
        """Take the head, a module itself."""
        super().__init__()
        self.head = head

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def loss(self, bags: Sequence[Bag]) -> torch.Tensor:
        """Return the mean loss of a few bags."""
        losses = []
        for bag in bags:
            label = torch.tensor(bag.label, device=self.device)
            losses.append(self.head.loss(tensor_of(bag, self.device), label))
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Prediction:
    """What a head says of one bag: float64 probabilities [c], float32 attention [n]."""

    bag: Bag
    probabilities: NDArray[np.float64]
    attention: NDArray[np.float32]


def predict_bags(head: Head, bags: Iterable[Bag], device: torch.device) -> Iterator[Prediction]:
    """Yield what a head, in evaluation mode, says of each bag."""
    for bag, logits, attention in read_bags(head, bags, device):
        yield Prediction(bag, softmax(logits), attention)


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probabilities of logits [c]."""
    chances: NDArray[np.float64] = torch.softmax(torch.from_numpy(logits), -1).numpy()
    return chances


def read_bags(
    head: Head, bags: Iterable[Bag], device: torch.device
) -> Iterator[tuple[Bag, NDArray[np.float64], NDArray[np.float32]]]:
    """Yield each bag with the logits [k] and attention [n] a head, in evaluation mode, gives."""
    for bag in bags:
        with torch.no_grad():
            said = head(tensor_of(bag, device))
        yield bag, said.logits.double().cpu().numpy(), said.attention.float().cpu().numpy()


def tensor_of(bag: Bag, device: torch.device) -> torch.Tensor:
    """Return a bag's features, float32 [n, d] on a device.

    Raises:
        DataError: it has no tile.
    """
    if not len(bag.features):
        msg = f"{bag.name}: a bag without tiles"
        raise DataError(msg)
    return torch.from_numpy(bag.features).to(device).float()


class MilTask:
    """Slide classification by attention over tiles; the recipe's sections are its arguments."""

    choices: tuple[str, ...] = CHOICES

    def __init__(
        self,
        *,
        encoder: Encoder,
        head: Callable[[int, int], Head],
        data: BagData,
        train: TrainSettings,
        tiles: Annotated[TileSpec | None, tile_spec] = None,
    ) -> None:
        """Keep the parts; nothing is read before `prepare`.

        Raises:
            UsageError: an argument of the head is out of its range, `train.choose` names no
                metric, or two seeds mean one fold.
        """
        if train.choose not in {None, *self.choices}:
            msg = f"train.choose: {train.choose!r} is no validation metric: "
            raise UsageError(msg + did_you_mean(str(train.choose), list(self.choices)))
        self._folds = data.check_seeds(train.seeds)
        head(_WIDE, 2)  # a trial, so that a wrong argument shows before features are made
        self.encoder, self.head, self.data, self.train = encoder, head, data, train
        self.spec = tiles or encoder.native
        self._cohort: Cohort | None = None

    @property
    def cohort(self) -> Cohort:
        """The slides in use; known after `prepare`."""
        if self._cohort is None:
            msg = "call prepare first"
            raise RuntimeError(msg)
        return self._cohort

    def prepare(self, store: Store, *, device: str = "auto", progress: Started) -> None:
        """Find the features of all slides, or make them.

        Raises:
            DataError: the label table is wrong.
            ResourceError: weights or slides are not here.
        """
        self._cohort = self.data.cohort(
            store, self.encoder, self.spec, device=device, progress=progress
        )

    def begin(self, seed: int) -> Work:
        """Return one seed's run: its own split, a fresh head, and no bag of a test slide.

        Raises:
            DataError: a class is missing among the slides that can be used.
        """
        split, learn, check = self._parts(seed)
        module = Classifier(self.head(learn.dim, len(self.cohort.table.classes)))
        facts = self._facts(learn, check, split)
        return Work(
            module,
            learn,
            lambda: validate(module, check),
            identity=identity_of(facts),
            facts=facts,
            conclude=lambda: {"validation": _said(module, check)},
        )

    def _parts(self, seed: int) -> tuple[Split, Bags, Bags]:
        """Return one seed's split, and its bags to learn from and to validate on.

        Raises:
            DataError: one of them lacks what it needs.
        """
        split = self.data.partition(seed)
        learn = Bags(self.cohort, split.train, self.data.bag)
        check = Bags(self.cohort, split.val, self.data.bag)
        table = self.cohort.table
        for part, bags in (("train", learn), ("validation", check)):
            present = {table.classes[i] for i in bags.labels}
            absent = [name for name in table.needed if name not in present]
            if absent or not len(bags):
                of = f" of class {', '.join(absent)}" * bool(absent)
                msg = f"seed {seed}: no {part} slide{of} can be used"
                raise DataError(msg + self._why())
        return split, learn, check

    def _why(self) -> str:
        rows, missing = self.cohort.table.rows, self.cohort.missing
        some = next((f", {slide}: {why}" for slide, why in missing.items()), "")
        return f"; of {len(rows)} slides {len(missing)} are missing{some}"

    def _facts(self, learn: Bags, check: Bags, split: Split) -> dict[str, Any]:
        table, keys = self.cohort.table, self.cohort.keys
        used = {s: asdict(keys[s]) for s in (*split.train, *split.val) if s in keys}
        return {
            "classes": list(table.classes),
            "dim": learn.dim,
            "encoder": self.encoder.id,
            "tiles": self.spec.to_json(),
            "tiles_digest": self.spec.digest,
            "labels": {"source": table.source, "digest": table.digest},
            "features_digest": digest(used),
            "store": {slide: key.stem for slide, key in keys.items()},
            "missing": dict(self.cohort.missing),
            "warnings": [*table.warnings, *split.warnings, *self._folds],
            "bag": self.data.bag,
            "split": {"name": split.name, **{k: list(v) for k, v in split.parts().items()}},
            "train": learn.names,
            "val": check.names,
            "patients": sorted({*learn.patients, *check.patients}),
        }


def identity_of(facts: Mapping[str, Any]) -> str:
    """Return the name of what a run learns from."""
    return digest([facts["labels"]["digest"], *(facts[name] for name in _IDENTITY)])


def _said(module: Classifier, bags: Bags) -> dict[str, Any]:
    """Return labels and probabilities of the validation bags, on which thresholds are fixed."""
    chances = [p.probabilities for p in predict_bags(module.head, bags, module.device)]
    return {"labels": bags.labels.tolist(), "probabilities": np.stack(chances).tolist()}


def validate(module: Classifier, bags: Bags) -> dict[str, float]:
    """Return the metrics of a head on the validation bags; `auroc+f1` is the seeds' choice."""
    said = list(predict_bags(module.head, bags, module.device))
    chances, labels = np.stack([p.probabilities for p in said]), bags.labels
    found = {name: measure(labels, chances) for name, measure in CLASSIFICATION.items()}
    true = chances[np.arange(len(labels)), labels]
    found["loss"] = float(-np.log(np.maximum(true, 1e-12)).mean())
    return found | {"auroc+f1": found["auroc"] + found["macro_f1"]}


# --- finished runs -----------------------------------------------------------------------


def run_encoder(run: Run, encoder: Encoder | None = None) -> Encoder:
    """Return the encoder whose features a run reads: its recipe's, or the one given.

    Raises:
        DataError: what is here is not the encoder the run was trained on.
        ResourceError: its weights are not here.
    """
    built: Encoder = encoder or build_part(run.recipe, "encoder")()
    if built.id != run.facts["encoder"]:
        msg = (
            f"{run.folder} was trained on features of {run.facts['encoder']}, here is "
            f"{built.id}: other weights, preprocessing or precision"
        )
        raise DataError(msg)
    return built


def load_head(run: Run, device: str = "cpu") -> Head:
    """Return the trained head of a run, in evaluation mode on a device.

    Raises:
        DataError: the weights are damaged or of another head.
        ResourceError: they are not there.
    """
    outputs = run.facts.get("logits") or len(run.facts["classes"])
    head: Head = build_part(run.recipe, "head")(run.facts["dim"], outputs)
    module = Classifier(head)
    load_trainable(module, run.folder / "weights.safetensors")
    module.to(device).eval()
    return head


def fingerprint(stem: str) -> str:
    """Return the digits of a slide's content in `<name>-<digits>@<mpp>`: a file may be renamed."""
    return stem.rpartition("@")[0].rpartition("-")[2]
