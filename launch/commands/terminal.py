"""What a command says on standard output."""

from __future__ import annotations

import typer

from mixmask.engine.wording import printable_lines


def show(text: object, err: bool = False, nl: bool = True) -> None:
    """Print lines; what came from outside (names, keys) cannot move the cursor, change colours or hide."""
    typer.echo(printable_lines(str(text)), err=err, nl=nl)
