"""What the command line imports before it is told what to do."""

import subprocess
import sys
from pathlib import Path

import pytest

from pathcli.cli import COMMANDS

HEAVY = {"torch", "numpy", "pydantic", "rich", "h5py", "cv2", "PIL", "openslide"}


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_the_root_imports_nothing_heavy(flag: str) -> None:
    code = (
        "import sys\nfrom pathcli.cli import main\n"
        f"try: main(['{flag}'])\nexcept SystemExit: pass\n"
        "print('|', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.rpartition("|")[2].split())
    assert "pathcli" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_no_torch(command: str) -> None:
    code = (
        "import sys\nfrom pathcli.cli import main\n"
        f"try: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
        "print('|', *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "rich", "h5py"} & set(done.stdout.rpartition("|")[2].split())
    assert COMMANDS[command] in " ".join(done.stdout.split())  # one sentence, said the same twice


def test_every_file_of_commands_is_listed() -> None:
    folder = Path(sys.modules["pathcli.cli"].__file__ or "").parent
    parts = {"__init__", "options", "show", "batch", "reference"}
    assert {p.stem for p in folder.glob("*.py")} - parts == set(COMMANDS)
