"""The command line: parse, call the library, print. Commands are imported when they are run."""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pathcli import __version__
from pathcli.errors import PathcliError, UsageError
from pathcli.registry import did_you_mean

COMMANDS = {
    "tile": "Cut slides into tiles on tissue, and show where.",
    "embed": "Turn the tiles of slides into features, kept in the store.",
    "recipes": "List, show, copy and check the recipes that `train` follows.",
    "train": "Train what a recipe describes, one run for every seed.",
    "mil-eval": "Evaluate trained heads on a benchmark or on labels of your own.",
    "zeroshot": "Tell the classes of labelled images by text alone, and measure how well.",
    "probe": "Learn classes from an encoder's features of images, and test on other groups.",
    "vqa-eval": "Measure answers to questions about images, by rules that state what they count.",
    "search": "Find the tiles of slides that a text describes best.",
    "ask": "Ask a vision-language model about patches, or a slide.",
    "chat": "Ask follow-up questions about the same images.",
    "serve": "Answer questions about images over HTTP, as OpenAI's endpoints do.",
    "predict": "Say what a trained run makes of slides, and where it looked.",
    "data": "Make, clean, convert, check and review data to train on.",
    "store": "List, check, clean, export and import features.",
    "models": "List, describe, fetch and bundle downloads, and convert published models.",
    "doctor": "Say what works on this machine, and what to do about the rest.",
    "demo": "Take one slide all the way: tiles, features, a map, a report.",
}
"""Name and one line of help; `pathcli/cli/<name>.py` holds the command, `-` as `_`."""


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and imports one when it is run."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - typer's own context
        """Return the commands in the order of `COMMANDS`."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401
        """Import and return one command.

        Raises:
            UsageError: there is none of this name.
        """
        del ctx
        if cmd_name not in COMMANDS:
            msg = f"no command is called {cmd_name!r}: {did_you_mean(cmd_name, list(COMMANDS))}"
            raise UsageError(msg)
        command = typer.main.get_command(
            import_module(f"pathcli.cli.{cmd_name.replace('-', '_')}").app
        )
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=LazyGroup,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Research use only; not for diagnosis.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"pathcli {__version__}")
        raise typer.Exit


@app.callback()
def root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    _debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere in the line).")
    ] = False,
) -> None:
    """Computational pathology from slide to answer."""


class Told(SystemExit):
    """A command's end whose reasons were printed already, as JSON too."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 ok, 2 usage, 3 part failed, 4 bad data, 5 missing.

    This is the one place where an error becomes a line on stderr and an exit code.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in given
    given = [a for a in given if a != "--debug"]
    _listen(debug=debug)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files can hold any bytes
            stream.reconfigure(errors="backslashreplace")
    as_json = "--json" in given
    try:
        app(args=given, prog_name="pathcli")
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            sys.stderr.write("interrupted; what was finished is kept, the same command goes on\n")
        if stop.code == UsageError.exit_code and as_json and not isinstance(stop, Told):
            _print_error("wrong usage; stderr says how", UsageError.exit_code)
        raise
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:  # noqa: BLE001 - the one place that turns errors into exit codes
        if debug:
            traceback.print_exc()
        _fail(error, as_json=as_json)


_INTERRUPTED = 130


def _listen(*, debug: bool) -> None:
    """Show the library's own messages on stderr, and those of other libraries only to debug."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    # other libraries never at DEBUG: they print headers, and a header can name a patient
    logging.getLogger().setLevel(logging.WARNING if debug else logging.CRITICAL)
    logging.getLogger("pathcli").setLevel(logging.DEBUG if debug else logging.INFO)


def _fail(error: Exception, *, as_json: bool) -> None:
    known = isinstance(error, PathcliError)
    code = error.exit_code if isinstance(error, PathcliError) else 1
    text = str(error) if known else f"internal error: {explain(error)}"
    if as_json:
        _print_error(text, code)
    sys.stderr.write(f"error: {text}\n")
    sys.exit(code)


def _print_error(text: str, code: int) -> None:
    sys.stdout.write(json.dumps({"error": text, "exit_code": code}) + "\n")


def explain(error: Exception) -> str:
    """Return an unforeseen error in one line that says what to do."""
    first = (str(error).splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {first} (a bug in pathcli: please report it with --debug)"
