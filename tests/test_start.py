"""Where a stage begins: weights of a finished run, by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file

from pathcli import registry
from pathcli.errors import DataError, ResourceError, UsageError
from pathcli.vlm.start import Start
from pathcli.weights import sha256

PARTS = ("connector.", "language.")


class Stage(torch.nn.Module):
    """A connector, a language model with a frozen layer, and a head of its own."""

    def __init__(self, width: int = 4, *, new: bool = False) -> None:
        super().__init__()
        self.connector = torch.nn.ModuleDict({"query": torch.nn.Linear(2, width)})
        if new:
            self.connector["project"] = torch.nn.Linear(width, 3)
        self.language = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        self.language[0].requires_grad_(requires_grad=False)
        self.head = torch.nn.Linear(3, 2)


def finished(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Make a folder as `runs.finish_run` leaves it."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("version: 1\ntask: align\ntrain: {seed: 1}\n")
    report = {"metrics": {}, "provenance": {"recipe": "clover-stage1", "facts": {}}}
    (folder / "report.json").write_text(json.dumps(report))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    return folder


WEIGHTS = "weights.safetensors"


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def saved(**given: Any) -> dict[str, torch.Tensor]:
    set_seed(1)
    kept = state(Stage(**given))
    return {name: kept[name] for name in kept if not name.startswith("language.0")}


def test_no_run_changes_nothing() -> None:
    module = Stage()
    before = state(module)
    assert Start().fill(module, PARTS) == {}
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_named_parts_are_taken_and_all_else_stays(tmp_path: Path) -> None:
    weights = saved() | {"connector.text.weight": torch.ones(5)}
    run = finished(tmp_path / "run", weights)
    set_seed(2)
    module = Stage(new=True)
    before = state(module)
    facts = Start(run=run).fill(module, PARTS)
    for name, value in module.state_dict().items():
        taken = name in weights and name.startswith(PARTS)
        assert torch.equal(value, weights[name] if taken else before[name]), name
    assert not torch.equal(module.head.weight, weights["head.weight"])
    counted = {"taken": 4, "left": 1, "fresh": 2}  # query, language.1; the text; the projection
    assert facts | counted == facts
    assert facts["recipe"] == "clover-stage1"
    assert facts["weights"] == sha256(run / WEIGHTS)
    moved = run.rename(tmp_path / "moved")
    assert Start(run=moved).fill(Stage(new=True), PARTS) == facts  # known by digest, not by path


def test_other_sizes_are_refused_by_name_and_nothing_is_taken(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", saved())
    module = Stage(width=5)
    before = state(module)
    with pytest.raises(DataError, match=r"2 tensors do not fit \(connector.query.bias is \(4,\)"):
        Start(run=run).fill(module, PARTS)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_weights_without_a_place_are_refused(tmp_path: Path) -> None:
    other = finished(tmp_path / "other", {"head.weight": torch.ones(2, 3)})
    with pytest.raises(DataError, match=r"no tensor is called connector.\* or language.\*"):
        Start(run=other).fill(Stage(), PARTS)
    lora = {"language.base.lora_A": torch.ones(2), "connector.query.bias": torch.ones(4)}
    tuned = finished(tmp_path / "tuned", lora)
    with pytest.raises(DataError, match=r"1 of 1 tensors language.\* have no place here"):
        Start(run=tuned).fill(Stage(), PARTS)
    assert Start(run=tuned).fill(Stage(), PARTS[:1])["taken"] == 1


def test_a_run_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="is no run"):
        Start(run=tmp_path / "none").fill(Stage(), PARTS)
    run = finished(tmp_path / "run", saved())
    (run / WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(DataError, match="damaged weights"):
        Start(run=run).fill(Stage(), PARTS)
    (run / WEIGHTS).unlink()
    with pytest.raises(ResourceError, match="no weights here"):
        Start(run=run).fill(Stage(), PARTS)
    (run / "report.json").unlink()
    with pytest.raises(ResourceError, match="is unfinished"):
        Start(run=run).fill(Stage(), PARTS)


def test_of_a_language_model_nothing_is_left_behind(tmp_path: Path) -> None:
    half = finished(tmp_path / "half", saved() | {"language.2.weight": torch.ones(3, 3)})
    with pytest.raises(DataError, match=r"1 of 3 tensors language.\* .*\(language.2.weight\)"):
        Start(run=half).fill(Stage(), PARTS)


def test_a_model_trained_whole_goes_below_the_adapters_of_the_next_stage(tmp_path: Path) -> None:
    class Adapted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer, self.lora_A = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)

    weights = saved()
    run, module = finished(tmp_path / "run", weights), Stage()
    module.language[1] = Adapted()
    facts = Start(run=run).fill(module, PARTS)
    assert (facts["left"], facts["fresh"]) == (0, 2)
    assert torch.equal(module.language[1].base_layer.weight, weights["language.1.weight"])


# --- the encoder of both stages ----------------------------------------------------------


class Eye:
    """An encoder that is known by its file, its layer and its precision."""

    def __init__(self, *, checkpoint: str, layer: int = -1, precision: str = "float32") -> None:
        self.checkpoint, self.layer, self.precision = Path(checkpoint), layer, precision

    @property
    def id(self) -> str:
        if not self.checkpoint.is_file():
            msg = f"{self.checkpoint}: no such checkpoint"
            raise ResourceError(msg)
        return f"eye-{self.checkpoint.read_text()}-{self.layer}-{self.precision}"


@pytest.fixture
def eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three encoders' files, two of which have the same weights."""
    monkeypatch.setitem(registry.BUILTIN["encoder"], "eye", f"{__name__}:Eye")
    for name, weights in (("a", "abc"), ("copy", "abc"), ("b", "bcd")):
        (tmp_path / name).write_text(weights)
    return tmp_path


def seen(folder: Path, facts: dict[str, Any], **section: Any) -> Start:
    """Return a start from a run that was trained behind an encoder."""
    run = finished(folder / "run", saved())
    named = json.dumps({"kind": "eye", **section})
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"encoder: {named}\n")
    report = {"metrics": {}, "provenance": {"recipe": "clover-stage1", "facts": facts}}
    (run / "report.json").write_text(json.dumps(report))
    return Start(run=run)


@pytest.mark.parametrize("facts", [{"encoder": "X"}, {"model": {"encoder": "X"}}, {}])
def test_another_encoder_than_the_former_stages_is_refused(
    facts: dict[str, Any], eyes: Path
) -> None:
    first = Eye(checkpoint=str(eyes / "a"), layer=-2)
    facts = json.loads(json.dumps(facts).replace("X", first.id))
    start = seen(eyes, facts, checkpoint=str(eyes / "a"), layer=-2, precision="float32")
    start.refuse_another(first)
    start.refuse_another(Eye(checkpoint=str(eyes / "copy"), layer=-2))
    start.refuse_another(Eye(checkpoint=str(eyes / "a"), layer=-2, precision="float16"))
    for name, layer in (("b", -2), ("a", -1)):
        other = Eye(checkpoint=str(eyes / name), layer=layer)
        with pytest.raises(UsageError) as told:
            start.refuse_another(other)
        assert f"kind: eye, checkpoint: {eyes / 'a'}, layer: -2" in str(told.value)
        assert f"this stage has {other.id} (layer {layer})" in str(told.value)
        assert ("eye-abc--2-float32 {" in str(told.value)) == bool(facts)


def test_an_encoder_whose_file_has_moved_is_known_by_what_was_noted(eyes: Path) -> None:
    start = seen(eyes, {"encoder": "eye-abc--1-float32"}, checkpoint=str(eyes / "gone"))
    start.refuse_another(Eye(checkpoint=str(eyes / "a")))
    with pytest.raises(UsageError, match="was trained behind the encoder eye-abc--1-float32"):
        start.refuse_another(Eye(checkpoint=str(eyes / "b")))
    Start().refuse_another(Eye(checkpoint="none"))
