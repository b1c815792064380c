"""Two processes of one process group, which import what they need once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FORKED = """
import importlib
import os
import sys

process = importlib.import_module(sys.argv[1]).process
second = os.fork()
process(int(not second), *sys.argv[2:])
if second:
    _, status = os.waitpid(second, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def in_two_processes(module: str, *given: object) -> None:
    """Call `process(rank, *given)` of a test module in two processes at once; both must end well.

    They part after the imports and before anything is computed: no thread is lost by that.
    """
    command = [sys.executable, "-c", FORKED, module, *map(str, given)]
    done = subprocess.run(command, cwd=Path(__file__).parent, timeout=240, check=False)
    assert done.returncode == 0
