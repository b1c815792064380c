"""What the command line imports before it is told what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from pathcli.cli import COMMANDS

HEAVY = {"torch", "numpy", "pydantic", "rich", "h5py", "cv2", "PIL", "openslide"}


def run(*arguments: str) -> tuple[str, set[str]]:
    """Run the command line in a process of its own; return what it prints and imports."""
    code = (
        "import sys\nfrom pathcli.cli import main\n"
        f"try: main({list(arguments)})\nexcept SystemExit: pass\n"
        "print('|', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed, _, modules = done.stdout.rpartition("|")
    return printed, set(modules.split())


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_root_imports_nothing_heavy(flag: str) -> None:
    printed, modules = run(flag)
    assert not HEAVY & modules
    assert "pathcli" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_no_torch(command: str) -> None:
    printed, modules = run(command, "--help")
    assert not {"torch", "numpy", "rich", "h5py"} & modules
    assert COMMANDS[command] in " ".join(printed.split())  # one sentence, said the same twice


def test_every_file_of_commands_is_listed() -> None:
    folder = Path(sys.modules["pathcli.cli"].__file__ or "").parent
    parts = {"--init--", "options", "show", "batch", "reference", "ask-slides", "store-exchange"}
    parts |= {"data-caption", "data-clean", "data-files", "data-instruct"}
    files = {p.stem.replace("_", "-") for p in folder.glob("*.py")}
    assert files - parts == set(COMMANDS)
