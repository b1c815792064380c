"""The folder of one run: written while it trains, and all that is needed to rebuild it.

`recipe.yaml` (resolved), `provenance.json`, `metrics.jsonl`, `weights.safetensors`
(trainable parameters only), `state/` while it is unfinished, `report.json` and
`report.html`. A run is finished when `report.json` is there.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed

from pathcli import processes
from pathcli.batches import Batches
from pathcli.board import require_tensorboard
from pathcli.charts import Line, chart
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.recipe import Recipe, build, resolve_recipe
from pathcli.report import Section, html_page, json_text, metric, pairs, versions
from pathcli.store import Store
from pathcli.store.files import write_bytes
from pathcli.trainer import Loop, Work
from pathcli.types import Progress, Report, silent
from pathcli.yaml12 import parse_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pathcli.settings import TrainSettings

log = logging.getLogger("pathcli")


@dataclass(frozen=True)
class Run:
    """A finished run: its recipe, the chosen epoch's validation metrics, and where it came from."""

    folder: Path
    recipe: Recipe
    metrics: Mapping[str, float]
    provenance: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what the task wrote down of its data."""
        facts: Mapping[str, Any] = self.provenance["facts"]
        return facts

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.recipe.values["train"]["seed"])

    @property
    def standing(self) -> tuple[float, float]:
        """How runs of one seed compete on validation: the metric chosen by, then minus the loss."""
        name = self.recipe.values["train"].get("choose") or ""
        return self.metrics.get(name, 0.0), -self.metrics.get("loss", 0.0)


def read_run(folder: Path) -> Run:
    """Return a finished run.

    Raises:
        ResourceError: there is none, or it is unfinished.
        DataError: its files are damaged.
    """
    try:
        recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        name = str(report["provenance"]["recipe"])
        values = dict(parse_yaml(recipe, str(folder / "recipe.yaml")))
        metrics = {k: float(v["value"]) for k, v in report["metrics"].items()}
        return Run(folder, Recipe(name, values, recipe), metrics, report["provenance"])
    except (FileNotFoundError, NotADirectoryError) as error:
        begun = (folder / "recipe.yaml").is_file()
        state = "is unfinished; the same train command goes on" if begun else "is no run"
        msg = f"{folder} {state} ({Path(str(error.filename)).name} is not there)"
        raise ResourceError(msg) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{folder}: damaged run ({type(error).__name__}: {error})"
        raise DataError(msg) from error


def find_runs(root: Path) -> list[Run]:
    """Return all finished runs in or below a folder, by path; damaged ones are left out, aloud."""
    runs = []
    for folder in sorted(p.parent for p in root.rglob("report.json")):
        try:
            runs += [read_run(folder)] if (folder / "recipe.yaml").is_file() else []
        except DataError as error:
            log.warning("%s; left out", error)
    return runs


def chosen(runs: Sequence[Run]) -> list[Run]:
    """Return for each seed the run that was best on validation, ties by the lower loss."""
    best: dict[int, Run] = {}
    for run in runs:
        rival = best.get(run.seed)
        if rival is None or run.standing > rival.standing:
            best[run.seed] = run
    return [best[seed] for seed in sorted(best)]


def finish_run(
    folder: Path,
    recipe: Recipe,
    best: Mapping[str, float],
    lines: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> Run:
    """Write the reports of a run, remove what only an unfinished one needs, and return it."""
    known = {"recipe": recipe.name, **provenance, "versions": versions(), "git": git_commit()}
    report = Report(
        title=f"{recipe.name}, seed {recipe.values['train']['seed']}",
        metrics={name: metric(value) for name, value in best.items() if value == value},  # noqa: PLR0124 - not NaN
        rows=tuple(lines),
        provenance=known,
    )
    page = html_page(report.title, _LEAD, _sections(recipe, report, lines))
    write_bytes(folder / "report.html", page.encode(), lambda _: None, "--out")
    text = json.dumps(known, indent=1, default=str) + "\n"
    write_bytes(folder / "provenance.json", text.encode(), lambda _: None, "--out")
    write_bytes(folder / "report.json", json_text(report).encode(), lambda _: None, "--out")
    shutil.rmtree(folder / "state", ignore_errors=True)
    return read_run(folder)


_LEAD = "How one run went: training and validation only; no example of a test split was read."


def _sections(recipe: Recipe, report: Report, lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    train = [row for row in lines if "loss" in row]
    checks = [row for row in lines if "loss" not in row]
    names = [n for n in (checks[0] if checks else {}) if n.startswith("val_")]
    losses = [Line("training", [r["step"] for r in train], [r["loss"] for r in train])]
    if "val_loss" in names:
        y = [r["val_loss"] for r in checks]
        losses.append(Line("validation", [r["step"] for r in checks], y))
    others = [
        Line(name.removeprefix("val_"), [r["epoch"] for r in checks], [r[name] for r in checks])
        for name in names
        if name != "val_loss"
    ]
    charts = [chart(losses, x="optimiser step", y="loss")]
    if others:
        charts.append(chart(others, x="epoch", y="validation metric"))
    values = [{"metric": k, "value": f"{v['value']:.4f}"} for k, v in report.metrics.items()]
    facts = {k: v for k, v in report.provenance.items() if not isinstance(v, dict | list)}
    warnings = [{"warning": text} for text in report.provenance["facts"].get("warnings", ())]
    missing = report.provenance["facts"].get("missing", {})
    warnings += [{"warning": f"{name}: {why}"} for name, why in missing.items()]
    return [
        *([Section("Mind this", rows=warnings)] if warnings else []),
        Section("The chosen weights, on the validation split", rows=values),
        Section("How it went", charts=charts),
        Section("The run", rows=pairs(facts)),
        Section("The recipe, resolved", code=recipe.to_yaml()),
    ]


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, `+` when changed; or None."""
    here = Path(__file__).parent
    try:
        done = [
            subprocess.run(["git", "-C", str(here), *command], capture_output=True, check=True)  # noqa: S603, S607
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", str(here)])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    commit, changes = (d.stdout.decode().strip() for d in done)
    return commit + ("+" if changes else "")


# --- a recipe's runs ---------------------------------------------------------------------


def train(
    recipe: Recipe,
    *,
    out: Path,
    store: Store | None = None,
    device: str = "auto",
    progress: Callable[[str], Progress] | None = None,
) -> list[Run]:
    """Train every seed and learning rate of a recipe, each in its own folder below `out`.

    Finished runs are kept as they are, a stopped one goes on. Under torchrun or accelerate
    launch every process calls this with the same arguments and gets the same runs; the first
    one writes them and tells progress, so `out` must be a folder that all can read.

    Args:
        recipe: what to train.
        out: folder of runs; a run is in `out/<recipe>/seed-<s>[/lr-<rate>]`.
        store: where features are found or put (default: the user's store).
        device: auto, cpu, cuda, cuda:1 or mps.
        progress: called with a name, gives the callback of one part of the work.

    Raises:
        UsageError: the recipe is wrong or incomplete, or `out` holds another recipe's runs.
        DataError: the data cannot be trained on.
        ResourceError: weights, features or the device are not here.
    """
    processes.join(device)
    started = progress if progress and not processes.rank() else (lambda _: silent)
    task = build(recipe)
    settings: TrainSettings = task.train
    if settings.tensorboard:
        require_tensorboard()
    planned: list[tuple[Path, Recipe]] = []
    for seed in settings.seeds:
        for rate in settings.rates:
            folder = out / recipe.name / f"seed-{seed}"
            folder = folder / f"lr-{rate:g}" if len(settings.rates) > 1 else folder
            one = recipe.with_values(**{"train.seed": seed, "train.lr": rate})
            planned.append((folder, resolve_recipe(one)))
            _refuse_another(*planned[-1])
    with processes.first_alone():
        task.prepare(store or Store(), device=device, progress=started)
    return [
        _train_one(
            task,
            one,
            folder,
            device,
            started(f"{recipe.name} {folder.relative_to(out / recipe.name)}"),
        )
        for folder, one in planned
    ]


_TRIED = 4


def try_batch(recipe: Recipe, *, store: Store | None = None) -> dict[str, Any]:
    """Read the data of a recipe's first seed and take one loss on the CPU; return what was seen.

    The loss is of a batch of at most 4 rows, however large the recipe's is; of a module that
    can say why a batch teaches nothing (`idle(batch)`, "" if it does), of the first that does.

    Raises:
        PathcliError: as `train` does.
    """
    task = build(recipe)
    task.prepare(store or Store(), device="cpu", progress=lambda _: silent)
    set_seed(task.train.seeds[0])
    work: Work = task.begin(task.train.seeds[0])
    few = replace(task.train, batch=min(_TRIED, task.train.batch), chunk=None)
    batches = Batches(work.examples, work.collate, few)
    idle: Callable[[Any], str] = getattr(work.module, "idle", lambda _: "")
    for number in range(batches.count):
        (piece,) = batches[0, number]
        if not (why := idle(piece)):
            break
    work.module.train()
    loss = work.module.loss(piece)  # type: ignore[operator]
    weights = sum(p.numel() for p in work.module.parameters() if p.requires_grad)
    seen = {"examples": len(work.examples), "trainable weights": weights, "loss": loss.item()}
    seen |= {k: len(v) for k, v in work.facts.items() if isinstance(v, list) or k == "missing"}
    return seen | {"warnings": "; ".join([*work.facts.get("warnings", ()), *[why] * bool(why)])}


def sample_view(recipe: Recipe) -> list[tuple[str, str]]:
    """Return one training sample of a recipe's first seed as pieces of text, each with its role.

    Roles are `read`, `learnt` and `image`; `counts`, the last, sums up. Nothing is trained,
    and nothing goes into a store.

    Raises:
        UsageError: the recipe's task learns no words.
        PathcliError: as `train` does.
    """
    task = build(recipe)
    if not hasattr(task, "sample_view"):
        msg = f"recipe {recipe.name}: task {recipe.task} learns no words, so it has none to show"
        raise UsageError(msg)
    return list(task.sample_view(task.train.seeds[0]))


def _train_one(
    task: Any,  # noqa: ANN401 - tasks share no base class
    recipe: Recipe,
    folder: Path,
    device: str,
    progress: Progress,
) -> Run:
    """Train one seed with one learning rate, or find it done."""
    began = time.monotonic()
    values = recipe.values["train"]
    settings = replace(task.train, seed=values["seed"], lr=values["lr"])
    set_seed(settings.seed)
    work: Work = task.begin(settings.seed)
    if (folder / "report.json").is_file():
        there = read_run(folder)
        if there.provenance["data"] != work.identity:
            msg = f"{folder} was trained on other labels, splits or features, or began with other "
            raise UsageError(msg + "weights; give another --out")
        if not processes.rank():
            log.info("%s: is there already", folder)
        return there
    if not processes.rank():
        text = recipe.to_yaml().encode()
        write_bytes(folder / "recipe.yaml", text, lambda _: None, "--out")
    loop = Loop(work, settings, folder, device)
    loop.run(progress)
    loop.save_weights()
    facts = {
        "seconds": round(time.monotonic() - began, 1),
        "device": str(loop.accelerator.device),
        "processes": processes.ranks(),
        "chosen_epoch": loop.best_epoch,
        "epochs": loop.epochs_done,
        "steps": loop.step,
        "examples": len(work.examples),
        "data": work.identity,
        "facts": {**work.facts, **loop.conclude()},
    }
    with processes.first_alone():
        if not processes.rank():
            finish_run(folder, recipe, loop.best, loop.lines, facts)
    return read_run(folder)


def _refuse_another(folder: Path, recipe: Recipe) -> None:
    """Refuse a folder that holds something of a run of another recipe."""
    saved = folder / "recipe.yaml"
    if saved.is_file() and any(
        (folder / n).exists() for n in ("state", "report.json", "metrics.jsonl")
    ):
        there = parse_yaml(saved.read_text(encoding="utf-8"), str(saved))
        with suppress(UsageError):  # what an earlier version did not know has its default
            there = resolve_recipe(Recipe(recipe.name, dict(there), "")).values
        if there != recipe.values:
            msg = (
                f"{folder} holds a run of another recipe ({_difference(there, recipe.values)}); "
                "give another --out, or remove it"
            )
            raise UsageError(msg)


def _difference(there: Any, here: Any, path: str = "") -> str:  # noqa: ANN401 - YAML values
    """Return the first value in which two recipes differ, with its path."""
    if isinstance(there, dict) and isinstance(here, dict):
        no = "nothing"
        key = next(k for k in {**here, **there} if there.get(k, no) != here.get(k, no))
        below = f"{path}.{key}" if path else str(key)
        return _difference(there.get(key, no), here.get(key, no), below)
    return f"{path or 'all of it'}: {there!r} there, {here!r} here"
