"""What the README promises: commands that run, a tree that exists, a current reference."""

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from pathcli import registry
from pathcli.cli import COMMANDS, app, main
from pathcli.cli.reference import insert

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(r"^pathcli .*$", README.replace("\\\n", ""), flags=re.MULTILINE)


def test_the_command_reference_is_current() -> None:
    assert insert(README) == README, "run: make format"


@pytest.mark.parametrize("line", LINES)
def test_every_command_of_the_readme_parses(line: str) -> None:
    name, *arguments = shlex.split(line, comments=True)[1:]
    root: Any = typer.main.get_command(app)
    root.get_command(None, name).make_context(name, arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("lite0")
@pytest.mark.parametrize("line", [x for x in LINES if x.split()[1] in {"tile", "embed"}])
def test_every_command_of_the_embedded_parts_runs(line: str, slide_path: Path) -> None:
    shutil.copy(slide_path, "slide.svs")
    Path("slides").mkdir()
    shutil.copy(slide_path, "slides/a.svs")
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(line, comments=True)[1:])
    assert caught.value.code in (0, None)


@pytest.mark.slow
@pytest.mark.usefixtures("lite0")
def test_the_python_of_the_readme_runs(slide_path: Path) -> None:
    shutil.copy(slide_path, "slide.svs")
    code = README.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)  # noqa: S102 - our own page
    assert names["features"].values.shape[1] == 1280


def test_there_are_five_examples_of_the_real_commands() -> None:
    examples = README.partition("## Five examples")[2].partition("\n## ")[0]
    assert len(re.findall(r"^pathcli ", examples, flags=re.MULTILINE)) == 5
    assert {line.split()[1] for line in LINES} <= set(COMMANDS)


def test_an_option_the_readme_uses_exists() -> None:
    known = set(re.findall(r"--[a-z-]+", insert(README).partition("## Every command")[2]))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known <= {
        "--debug",
        *("--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"),  # torchrun's
    }


def test_the_tree_and_the_table_name_files_that_exist() -> None:
    named = re.findall(r"`(pathcli/[\w/]+\.py)`", README)
    assert len(named) > 8
    tree = README.partition("```\npathcli/\n")[2].partition("\n```")[0].splitlines()
    inside = [line.split()[0] for line in tree if line.startswith("  ")]
    beside = [line.split()[0] for line in tree if not line.startswith("  ")]
    named += [f"pathcli/{name}" for name in inside] + beside
    for name in named:
        assert (ROOT / name).exists(), name
    here = {p.name + "/" * p.is_dir() for p in (ROOT / "pathcli").iterdir()}
    assert here - set(inside) <= {"__main__.py", "__pycache__/"}


def test_every_encoder_is_named() -> None:
    for name in registry.BUILTIN["encoder"]:
        assert f"`{name}`" in README or f"`{name}:" in README


def test_pictures_are_there() -> None:
    for place in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / place).stat().st_size < 500_000
