"""The house rules: files and functions stay small, public names import, the wheel is whole."""

import ast
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import pathcli

ROOT = Path(__file__).parent.parent
FILES = [*ROOT.glob("pathcli/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")]
MOST_LINES, MOST_FUNCTION = 400, 60


def test_no_file_is_longer_than_400_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = sorted(((len(p.read_text().splitlines()), p) for p in FILES), reverse=True)
    with capsys.disabled():
        worst = ", ".join(f"{p.relative_to(ROOT)} {n}" for n, p in sizes[:10])
        print(f"\nlongest files: {worst}")  # noqa: T201
    assert sizes[0][0] <= MOST_LINES


def test_no_function_is_longer_than_60_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                sizes.append((length, f"{path.relative_to(ROOT)}:{node.name}"))
    sizes.sort(reverse=True)
    with capsys.disabled():
        print(f"\nlongest functions: {', '.join(f'{w} {n}' for n, w in sizes[:10])}")  # noqa: T201
    assert sizes[0][0] <= MOST_FUNCTION


@pytest.mark.parametrize("name", pathcli.__all__)
def test_every_public_name_imports(name: str) -> None:
    assert getattr(pathcli, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        _ = pathcli.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys, pathcli; print(*[m for m in sys.modules if m.startswith('pathcli.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.slow
def test_the_wheel_carries_all_it_needs_and_nothing_else_of_the_checkout(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    folders = (
        *("benchmarks", "chat", "classes", "clover-mini", "curation", "mini-clip"),
        *("questions", "vqa"),
    )
    kinds = ("pathcli/**/*.py", "recipes/*.yaml", *(f"assets/{name}/*" for name in folders))
    mine = {str(p.relative_to(ROOT)) for kind in kinds for p in ROOT.glob(kind)}
    assert {n if n.startswith("pathcli/") else f"pathcli/{n}" for n in mine} <= set(names)
    assert {n.split("/")[0] for n in names} == {
        "pathcli",
        f"pathcli-{pathcli.__version__}.dist-info",
    }
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import pathcli.cli; "
        "assert pathcli.__file__.startswith(sys.path[0]), pathcli.__file__; pathcli.cli.main()"
    )
    listing = [sys.executable, "-P", "-c", code, str(installed), "recipes", "list", "--json"]
    done = subprocess.run(listing, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert {row["name"] for row in json.loads(done.stdout)} == {
        path.stem for path in ROOT.glob("recipes/*.yaml")
    }
