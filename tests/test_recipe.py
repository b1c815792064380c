"""Recipes found, set, checked against signatures and resolved; and `pathcli recipes`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import Run

from pathcli import registry
from pathcli.errors import DataError, PathcliError, ResourceError, UsageError
from pathcli.recipe import (
    Recipe,
    build,
    build_part,
    check_recipe,
    list_recipes,
    load_recipe,
    recipes_folder,
    resolve_recipe,
)
from pathcli.yaml12 import parse_yaml

SHIPPED = sorted(path.stem for path in recipes_folder().rglob("*.yaml"))


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text
    assert "\n" not in text
    return text


def mil(*settings: str) -> Recipe:
    return load_recipe("mil-abmil", ["data.labels=labels.csv", *settings])


def faults(*settings: str) -> list[str]:
    return list(check_recipe(mil(*settings)).faults)


# --- finding and --set -------------------------------------------------------------------


def test_set_reads_1e_4_as_a_number_and_lists_and_mappings() -> None:
    recipe = mil("train.lr=1e-4", "train.seed=[3, 4]", "head={kind: max}", "data.slides=~/slides")
    assert recipe.values["train"]["lr"] == 1e-4
    assert recipe.values["train"]["seed"] == [3, 4]
    assert recipe.values["head"] == {"kind": "max"}
    assert recipe.values["data"]["slides"] == "~/slides"
    assert check_recipe(recipe).faults == ()


def test_the_last_set_of_a_key_counts() -> None:
    assert mil("train.epochs=3", "train.epochs=4").values["train"]["epochs"] == 4


def test_set_leaves_the_recipe_it_was_applied_to_alone() -> None:
    recipe = mil()
    recipe.with_values(**{"train.epochs": 1, "head.kind": "max"})
    assert recipe.values["train"]["epochs"] == 50
    assert recipe.values["head"]["kind"] == "abmil"


@pytest.mark.parametrize("setting", ["train.lr", "", "=5"])
def test_a_set_without_a_key_and_a_value_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"not {setting!r}")) as caught:
        mil(setting)
    assert "section.key=value" in one_line(caught.value)


def test_a_set_that_is_no_yaml_is_named() -> None:
    with pytest.raises(DataError) as caught:
        mil("head={kind: max")
    assert one_line(caught.value).startswith("--set 'head={kind: max', line 1: not YAML")


def test_an_unknown_recipe_has_a_did_you_mean() -> None:
    with pytest.raises(UsageError, match="did you mean 'mil-acmil'") as caught:
        load_recipe("mil-acmi")
    assert "ends in .yaml" in one_line(caught.value)


def test_a_file_is_a_recipe_and_named_after_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(load_recipe("mil-abmil").text)
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.values == load_recipe("mil-abmil").values


@pytest.mark.parametrize(
    ("content", "error", "word"),
    [
        (None, ResourceError, "no such recipe"),
        (b"\xff\xfe\x00", DataError, "cannot be read"),
        (b"- a\n- b\n", DataError, "a recipe is a mapping"),
        (b"", DataError, "a recipe is a mapping"),
        (b"version: 1\n\ttask: mil\n", DataError, "line 2"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(
    content: bytes | None, error: type[PathcliError], word: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=word) as caught:
        load_recipe(path)
    assert str(path) in one_line(caught.value)


# --- checking ----------------------------------------------------------------------------


def test_all_faults_are_told_at_once_each_with_its_path() -> None:
    found = faults(
        "version=2",
        "heads.kind=max",
        "head.kind=acmi",
        "encoder.tokens=1",
        "data.vall=0.2",
        "data.val=abc",
        "train.epoch=3",
        "train.lr=abc",
        "tiles.size_px=1.5",
    )
    assert [fault.partition(":")[0] for fault in found] == [
        "version",
        "heads",
        "encoder.tokens",
        "head.kind",
        "data.vall",
        "data.val",
        "train.epoch",
        "train.lr",
        "tiles.size_px",
    ]
    said = "\n".join(found)
    for near in ("head", "acmil", "val", "epochs"):
        assert f"did you mean {near!r}" in said
    assert len(said.splitlines()) == len(found)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.epochs='3'", "train.epochs: should be an integer (it is '3')"),
        ("train.epochs=2.0", "train.epochs: should be an integer (it is 2.0)"),
        ("train.epochs=2.5", "train.epochs: should be an integer (it is 2.5)"),
        ("train.epochs=[3]", "train.epochs: should be an integer (it is [3])"),
        ("train.epochs=true", "train.epochs: should be an integer (it is True)"),
        ("train.lr=abc", "train.lr: should be a number, or should be a list (it is 'abc')"),
        ("train.lr=[1e-4, x]", "train.lr: should be a number (it is [0.0001, 'x'])"),
        ("train.clip=no", "train.clip: should be a number (it is 'no')"),
        ("train.clip='1.0'", "train.clip: should be a number (it is '1.0')"),
        (
            "train.decay_all=yes",
            "train.decay_all: should be a boolean (true or false) (it is 'yes')",
        ),
        (
            "train.schedule=cos",
            "train.schedule: should be 'cosine', 'linear', 'constant' or 'step' (it is 'cos')",
        ),
        (
            "train.betas=[1, 2, 3]",
            "train.betas: tuple should have at most 2 items, not 3 (it is [1, 2, 3])",
        ),
        ("data.labels=5", "data.labels: should be a string (it is 5)"),
        ("head.attention=null", "head.attention: should be 'gated' or 'plain' (it is None)"),
        ("head=max", "head: must be a mapping such as {kind: abmil}, not 'max'"),
        ("train=5", "train: must be a mapping such as {key: value}, not 5"),
        ("tiles.mpp=-1", "tiles: --mpp -1 is outside 0.05-20 um per pixel"),
        ("train.epochs=0", "train: epochs must be at least 1"),
        ("version='1'", "version: must be 1"),
    ],
)
def test_a_wrong_value_is_one_fault_that_says_what_it_should_be(setting: str, said: str) -> None:
    assert faults(setting) == [said]


def test_a_dotted_path_is_no_kind_and_nothing_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_part.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("evil_part:Head", "evil_part.Head", "evil_part"):
        found = check_recipe(mil(f"head.kind='{kind}'"))
        assert [fault.partition(":")[0] for fault in found.faults] == ["head.kind"]
        with pytest.raises(UsageError, match="no head is called"):
            build(mil(f"task='{kind}'").with_values(**{"task": "mil", "head.kind": kind}))
    assert "evil_part" not in sys.modules


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"version": 1}, ["task: name a task: mil"]),
        ({"version": 1, "task": "mill"}, ["task: no task is called 'mill': did you mean 'mil'? "]),
        (
            {"version": 1, "task": "mil"},
            ["encoder: missing", "head: missing", "data: missing", "train: missing"],
        ),
        (
            {"task": "mil", "encoder": {}, "head": {"kind": 3}, "data": None, "train": {}},
            ["version: must be 1", "encoder.kind: name a encoder: lite0", "head.kind: name a head"],
        ),
    ],
)
def test_what_is_missing_is_told(values: dict[str, Any], said: list[str]) -> None:
    found = check_recipe(Recipe("mine", values)).faults
    assert len(found) >= len(said)
    for fault, start in zip(found, said, strict=False):
        assert fault.startswith(start)


def test_what_only_the_user_knows_is_asked_for_and_is_no_fault() -> None:
    recipe = load_recipe("camelyon17-abmil", ["encoder=???", "head.kind=???"])
    found = check_recipe(recipe)
    assert found.faults == ()
    assert found.asked == ("encoder", "head.kind", "data.slides", "data.labels")
    with pytest.raises(UsageError) as caught:
        resolve_recipe(recipe)
    said = one_line(caught.value)
    assert "--set data.slides=... --set data.labels=..." in said


def test_faults_are_told_beside_what_is_asked_for() -> None:
    found = check_recipe(load_recipe("mil-abmil", ["train.lr=x"]))
    assert found.asked == ("data.labels",)
    assert len(found.faults) == 1


def test_a_recipe_with_faults_is_neither_resolved_nor_built() -> None:
    for use in (resolve_recipe, build):
        with pytest.raises(UsageError, match=r"mil-abmil: train.epoch: .*; train.lr: ") as e:
            use(mil("train.lr=x", "train.epoch=1"))
        one_line(e.value)


# --- resolving and building --------------------------------------------------------------


def test_resolving_writes_every_default_out_and_a_second_time_changes_nothing() -> None:
    once = resolve_recipe(mil("encoder={kind: lite0}", "train={epochs: 3}"))
    assert once.values["train"]["batch"] == 1
    assert once.values["train"]["betas"] == [0.9, 0.999]
    assert once.values["data"]["folds"] == 5
    assert once.values["tiles"]["tissue"] == "otsu"
    assert resolve_recipe(once).values == once.values
    assert parse_yaml(once.to_yaml(), "x") == once.values


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_resolves_and_reads_back(name: str) -> None:
    recipe = load_recipe(name)
    given = {"data.labels": "a.csv", "data.slides": None} if recipe.task == "mil" else {}
    asked = dict.fromkeys(check_recipe(recipe).asked, "a.csv")
    recipe = recipe.with_values(**asked | given)
    once = resolve_recipe(recipe)
    again = Recipe(name, parse_yaml(once.to_yaml(), "x"))
    assert resolve_recipe(again).values == once.values


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    values = resolve_recipe(mil("data.slides=~/slides")).values["data"]
    assert values["slides"] == "/home/somebody/slides"
    assert values["labels"] == str(tmp_path / "labels.csv")
    assert values["splits"] is None


class Sum:
    """A head somebody else wrote."""

    def __init__(
        self,
        dim_in: int,
        classes: int,
        *,
        power: float,
        mode: Literal["A", "B"] = "A",
        parts: list[str] | None = None,
    ) -> None:
        if power < 0:
            msg = "power must not be negative"
            raise UsageError(msg)
        self.made = (dim_in, classes, power, mode, parts)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BUILTIN["head"], "sum", f"{__name__}:Sum")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Sum.__module__])


def test_a_plug_in_is_checked_by_its_own_signature(plugin: None) -> None:
    assert faults("head={kind: sum, power: 2}") == []
    assert faults("head={kind: sum}") == ["head.power: missing"]
    assert faults("head={kind: sum, powers: 2, power: 1, mode: C, dim_in: 3, parts: [1]}") == [
        "head.powers: no such key: did you mean 'power'? (known: power, mode, parts)",
        "head.dim_in: no such key: known: power, mode, parts",
        "head.mode: should be 'A' or 'B' (it is 'C')",
        "head.parts: should be a string (it is [1])",
    ]


def test_what_the_data_decide_is_given_when_they_are_known(plugin: None) -> None:
    recipe = resolve_recipe(mil("head={kind: sum, power: 2}"))
    assert recipe.values["head"] == {"kind": "sum", "power": 2.0, "mode": "A", "parts": None}
    assert build_part(recipe, "head")(7, 3).made == (7, 3, 2.0, "A", None)
    assert build(recipe).head(7, 3).made == (7, 3, 2.0, "A", None)


def test_a_recipe_is_read_and_checked_without_torch() -> None:
    code = (
        "import sys, pathcli.recipe as r; r.list_recipes(); r.load_recipe('mil-abmil')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- the command -------------------------------------------------------------------------


def test_every_shipped_recipe_passes_check_and_lists_what_it_asks_for(run: Run) -> None:
    assert len(SHIPPED) >= 8
    for name in SHIPPED:
        code, out, err = run("recipes", "check", name)
        asked = re.findall(r"^  (\w+): \?\?\?", load_recipe(name).text, re.MULTILINE)
        assert code == 0, err
        for key in asked:
            assert re.search(rf"--set \w+\.{key}=\.\.\.", out + err)


def test_a_shipped_recipe_says_in_its_first_lines_what_it_is_and_how_to_run_it() -> None:
    for recipe in list_recipes():
        first, second = recipe.text.splitlines()[:2]
        assert first == f"# {recipe.summary}"
        assert f"pathcli train --recipe {recipe.name} " in second
        assert "cost:" in recipe.text.partition("version:")[0]


def test_the_list_as_json_has_name_task_and_summary(run: Run) -> None:
    code, out, _ = run("recipes", "list", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["name"] for row in rows] == SHIPPED
    assert all(set(row) == {"name", "task", "summary"} and all(row.values()) for row in rows)


def test_show_prints_the_comments_and_with_set_the_values(run: Run) -> None:
    _, out, _ = run("recipes", "show", "mil-acmil")
    assert out == (recipes_folder() / "mil-acmil.yaml").read_text()
    _, out, _ = run("recipes", "show", "mil-acmil", "--set", "train.epochs=3")
    assert parse_yaml(out, "x")["train"]["epochs"] == 3
    _, out, _ = run("recipes", "show", "mil-acmil", "--json", "--set", "train.lr=1e-4")
    assert json.loads(out)["train"]["lr"] == 1e-4


def test_copy_keeps_the_comments_and_never_overwrites(run: Run, tmp_path: Path) -> None:
    code, _, err = run("recipes", "copy", "mil-abmil", "mine.yaml")
    assert code == 0
    assert "pathcli train --recipe mine.yaml" in err
    copied = tmp_path / "mine.yaml"
    assert copied.read_text() == load_recipe("mil-abmil").text
    copied.write_text("# changed\n")
    code, _, err = run("recipes", "copy", "mil-acmil", "mine.yaml")
    assert code == 2
    assert "there already" in err
    assert copied.read_text() == "# changed\n"
    assert run("recipes", "copy", "mil-abmil", "mine.txt")[0] == 2
    (tmp_path / "folder").mkdir()
    assert run("recipes", "copy", "mil-abmil", "folder")[0] == 0
    assert (tmp_path / "folder" / "mil-abmil.yaml").is_file()


def test_check_exits_4_and_prints_every_fault(run: Run) -> None:
    given = ("recipes", "check", "mil-abmil", "--set", "train.lr=x", "--set", "head.kind=acmi")
    code, _, err = run(*given)
    assert code == 4
    assert "head.kind: no head is called 'acmi'" in err
    assert "train.lr: should be" in err
    assert "asks for data.labels" in err
    code, out, _ = run(*given, "--json")
    said = json.loads(out)  # one value and no other
    assert code == 4
    assert (len(said["faults"]), said["asked"]) == (2, ["data.labels"])
