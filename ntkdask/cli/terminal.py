"""What the command line prints goes through here: names from outside are shown as they are.

A folder may be called `[/red]` and a class `:smile:` or hold control characters: rich must not take them for markup, the terminal
must not act on them.
"""

from __future__ import annotations

from collections.abc import Mapping

import typer
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table

from ntkdask.wording import printable


def plain_console() -> Console:
    """The terminal, with rich's markup, emoji codes and highlighting off."""
    return Console(markup=False, emoji=False, highlight=False)


def say(text: object, err: bool = False) -> None:
    """Print a message of one or more lines, on the error stream for `err`."""
    typer.echo(printable(text, lines=True), err=err)


def facts(title: str, rows: Mapping[str, object]) -> Table:
    """A table of names and values, for a console of `plain_console`."""
    table = Table(title=printable(title), show_header=False)
    for name, value in rows.items():
        table.add_row(printable(name), printable(value))
    return table


def text_column(format: str) -> TextColumn:
    """A column of a progress bar, without markup."""
    return TextColumn(format, markup=False)
