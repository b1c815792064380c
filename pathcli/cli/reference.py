"""The command reference of the README, generated from the commands themselves.

`python -m pathcli.cli.reference README.md` writes it between the two markers.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from pathcli.cli import app

BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"


def reference() -> str:
    """Return a Markdown table: one row a command, with its arguments and options."""
    root: Any = typer.main.get_command(app)
    lines = ["| command | what it does | options |", "|---|---|---|"]
    for name in root.list_commands(None):
        lines += _rows(f"pathcli {name}", root.get_command(None, name))
    return "\n".join(lines)


def _rows(path: str, command: Any) -> list[str]:  # noqa: ANN401 - typer's own class
    if hasattr(command, "commands"):
        return [
            row for name, sub in command.commands.items() for row in _rows(f"{path} {name}", sub)
        ]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [_option(p) for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *(_argument(p) for p in arguments)])
    told = (command.help or "").split("\n\n")[0].replace("\n", " ")
    return [f"| `{usage}` | {told} | {' '.join(o for o in options if o)} |"]


def _argument(parameter: Any) -> str:  # noqa: ANN401
    name = parameter.name.upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:  # noqa: ANN401
    if "--help" in parameter.opts:
        return ""
    names = "/".join([*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    shown = "" if default is None or isinstance(default, bool) else f" {default}"
    return f"`{names}{shown}`"


def insert(text: str) -> str:
    """Return a page with the reference put between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{reference()}\n{END}{after}"


if __name__ == "__main__":
    page = Path(sys.argv[1])
    page.write_text(insert(page.read_text(encoding="utf-8")), encoding="utf-8")
