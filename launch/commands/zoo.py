"""The commands for published checkpoints: zoo, push."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmask.launch.commands.terminal import show

if TYPE_CHECKING:
    from mixmask.transfer.zoo.catalogue import ZooEntry


def zoo(
    name: Annotated[str | None, typer.Argument(help="A checkpoint's name, or a part of it or of its method.")] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the checkpoint of this name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List public checkpoints: where they are published, their licences, and the transfer numbers that are stated.

    Use one as backbone=zoo:NAME. Downloaded files lie in $MIXMASK_ZOO, by default ~/.cache/mixmask/zoo; a machine without
    network needs a copy of that folder.

    \b
    Examples:
      mixmask zoo
      mixmask zoo moco
      mixmask zoo swav-800ep
      mixmask zoo swav-800ep --fetch
      mixmask transfer detect_voc backbone=zoo:swav-800ep data.root=/data/VOCdevkit
    """
    import json

    from mixmask.engine.errors import UserError
    from mixmask.transfer.zoo.catalogue import catalogue, known_checkpoint
    from mixmask.transfer.zoo.references import zoo_file

    if fetch:
        if name is None:
            raise UserError("--fetch: which checkpoint? mixmask zoo NAME --fetch")
        show(zoo_file(known_checkpoint(name)))
        return
    entries = catalogue()
    if name is not None and name not in entries:
        found = {
            key: one for key, one in entries.items() if name.lower() in f"{key} {one.title} {one.framework}".lower()
        }
        entries = found or {name: known_checkpoint(name)}  # of an unknown name, its error lists the closest ones
    elif name is not None:
        entries = {name: entries[name]}
    if as_json:
        show(json.dumps({key: one.model_dump(mode="json") for key, one in entries.items()}, indent=1))
    elif name in entries:
        show(_described(entries[name]))
    else:
        _list(entries)


def _list(entries: dict[str, ZooEntry]) -> None:
    import re

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mixmask.transfer.zoo.references import zoo_path

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in ("name", "method", "network", "epochs", "linear", "VOC AP", "licence", "here"):
        table.add_column(
            heading, justify="right" if heading in ("epochs", "linear", "VOC AP") else "left", no_wrap=True
        )
    for one in entries.values():
        numbers = {number.what: f"{number.value:g}" for number in one.published}
        here = "yes" if zoo_path(one).is_file() else "by hand" if one.by_hand else ""
        linear, detection = numbers.get("ImageNet linear top-1", ""), numbers.get("VOC 2007 box AP", "")
        epochs = f"{one.epochs:g}" if one.epochs is not None else ""
        licence = "none stated" if one.licence.startswith("no ") else re.split(r" \(|; | text", one.licence)[0][:18]
        row = (one.name, one.title, one.arch.removeprefix("timm/"), epochs, linear, detection, licence, here)
        table.add_row(*map(Text, row))
    console = Console(highlight=False)
    console.print(table, crop=False, overflow="ignore", no_wrap=True, width=max(console.width, 110))
    show(
        "\nlinear: ImageNet top-1; VOC AP: Faster R-CNN on VOC 2007; both as published. mixmask zoo NAME shows one of them, "
        "backbone=zoo:NAME uses it."
    )


def _described(entry: ZooEntry) -> str:
    from mixmask.transfer.zoo.references import zoo_path

    path = zoo_path(entry)
    digest = f"sha256 {entry.sha256}" if entry.sha256 else f"md5 {entry.md5}" if entry.md5 else "none"
    short = (entry.sha256 and len(entry.sha256) < 64) or (entry.md5 and len(entry.md5) < 32)
    lines = [
        f"{entry.name}: {entry.title}, {entry.arch}"
        + (f", {entry.epochs:g} epochs" if entry.epochs is not None else "")
        + (f", pretrained on {entry.data}" if entry.data else ""),
        f"published by   {entry.repository}",
        f"address        {entry.url}" + (f"  (by hand: {entry.by_hand})" if entry.by_hand else ""),
        f"digest         {digest}" + (" …  (the first digits are published)" if short else ""),
        f"licence        {entry.licence}",
        f"labels         framework={entry.framework} method={entry.method}",
        f"here           {path if path.is_file() else f'no; mixmask zoo {entry.name} --fetch writes {path}'}",
    ]
    if entry.notes:
        lines.append(f"notes          {entry.notes}")
    if entry.published:
        lines.append("published numbers:")
        for number in entry.published:
            how = f"  {number.how}" if number.how else ""
            check = f"  [measured by {number.config}]" if number.config else ""
            lines.append(f"  {number.value:<6g} {number.what}{how}{check}  ({number.source})")
    return "\n".join(lines)


def push(
    run: Annotated[Path, typer.Argument(help="The folder of a finished pretraining run.")],
    to: Annotated[str, typer.Option("--to", help="OWNER/NAME on the Hugging Face Hub; made if it does not exist.")],
    runs: Annotated[
        Path | None, typer.Option(help="Where to look for transfer runs of it; by default its folder of runs.")
    ] = None,
    license: Annotated[str, typer.Option(help="As model hubs name it: mit, apache-2.0, cc-by-nc-4.0 …")] = "unknown",
    private: Annotated[bool, typer.Option("--private", help="Make a new model private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card; upload nothing.")] = False,
) -> None:
    """Upload a backbone with its model card to the Hugging Face Hub. Others use it as backbone=hf:OWNER/NAME.

    Log in first: `hf auth login`, or set HF_TOKEN. Only safetensors is uploaded.

    \b
    Example:
      mixmask push runs/pretrain/imagenet-mocov2-mixmask-1a2b3c4d5e6f --to our-lab/mixmask-r50 --license mit
    """
    from mixmask.engine.backbones import load_backbone
    from mixmask.evaluate.card import write_card
    from mixmask.pretrain.recipe import BACKBONE_FILE
    from mixmask.transfer.zoo import hub

    card = write_card(run, runs, license)
    load_backbone(run / BACKBONE_FILE)  # a damaged file is reported before anything is uploaded
    if dry_run:
        show(card)
        return
    show(hub.push(run / BACKBONE_FILE, to, card, private, f"{run.name}, by mixmask"))
