"""The list of commands in ``mixmask --help``: in groups, in the order of use, with whole sentences."""

from __future__ import annotations

import re
from typing import Any

import typer
from typer.core import TyperGroup

GROUPS = {
    "Start": ("demo", "doctor", "configs", "bench"),
    "Before a run": ("check-data", "pack", "show-views", "inspect", "zoo"),
    "Run": ("pretrain", "convert", "transfer", "show-detections"),
    "Suites, here or on a cluster": ("estimate", "launch", "status", "logs", "cancel"),
    "Results": ("tables", "results", "compare", "plots", "report", "verify", "card", "push"),
}


class GroupedCommands(TyperGroup):
    """Lists the commands under headings; commands without a group come under "Others"."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every group with the first sentence of each command's help."""
        named = {name for names in GROUPS.values() for name in names}
        rest = tuple(name for name in self.list_commands(ctx) if name not in named)
        width = max(map(len, self.list_commands(ctx)))
        for heading, names in {**GROUPS, "Others": rest}.items():
            rows = [
                (name.ljust(width), self._about(ctx, name)) for name in names if self.get_command(ctx, name) is not None
            ]
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)

    def _about(self, ctx: Any, name: str) -> str:
        text = getattr(self.get_command(ctx, name), "help", None) or ""
        first = " ".join(text.split("\n\n")[0].split())
        sentence = re.match(r".*?[.](?=\s|$)", first)
        return (sentence[0] if sentence else first).rstrip(".")


def show_version(wanted: bool) -> None:
    """Print the versions of mixmask, torch and torchvision, and exit; without ``--version`` do nothing."""
    if not wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    typer.echo(f"mixmask {of('mixmask')} (torch {of('torch')}, torchvision {of('torchvision')})")
    raise typer.Exit
