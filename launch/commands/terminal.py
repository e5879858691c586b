"""Output of the commands to the terminal."""

from __future__ import annotations

import typer

from mixmask.engine.wording import printable_lines


def show(text: object, err: bool = False, nl: bool = True) -> None:
    """Print lines, control characters as codes: names and keys from outside cannot move the cursor or hide text."""
    typer.echo(printable_lines(str(text)), err=err, nl=nl)
