"""The command line, `ntkdask`."""

from ntkdask.cli.commands import app, main

__all__ = ["app", "main"]
