"""`pathcli data`: make, clean, convert, check and review the data that models are trained on."""

from __future__ import annotations

import typer

from pathcli.cli.data_caption import caption, corrupt
from pathcli.cli.data_clean import clean
from pathcli.cli.data_files import check, convert, review
from pathcli.cli.data_instruct import instruct

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Make, clean, convert, check and review data to train on.",
)
for engine in (instruct, caption, corrupt, clean, convert, check, review):
    app.command()(engine)
