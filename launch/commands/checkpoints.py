"""The commands for checkpoints: convert, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mixmask.launch.commands.options import Force
from mixmask.launch.commands.terminal import show

Layout = Annotated[
    str | None, typer.Option("--as", help="The source's layout, if its keys do not tell: moco, simsiam, swav, …")
]
Prefix = Annotated[
    str | None,
    typer.Option(help="The prefix of the backbone's keys in the source, with its containers; '' for none."),
]
Arch = Annotated[
    str | None,
    typer.Option(help="timm/ and the name, if the source is a ConvNet of timm. ResNets are recognised."),
]


def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A checkpoint of a known layout, our backbone.safetensors, zoo:NAME or hf:OWNER/NAME."),
    ],
    out: Annotated[Path, typer.Argument(help="The file to write: .pkl (detectron2), .pth or .safetensors.")],
    to: Annotated[
        Literal["detectron2", "torchvision", "timm", "mixmask"],
        typer.Option(help="The library whose names and format to write."),
    ],
    layout: Layout = None,
    prefix: Prefix = None,
    arch: Arch = None,
    verify: Annotated[
        bool,
        typer.Option(help="Read the file back with the library it is for, and compare its features with the source's."),
    ] = True,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read the source and report; write nothing.")] = False,
) -> None:
    """Write a backbone for another library, with a report on every tensor of the source.

    The layouts of most self-supervised code are recognised by their keys; `--as list` names them. A missing or
    unexplained tensor stops the conversion.

    \b
    Examples:
      mixmask convert runs/pretrain/x/backbone.safetensors backbone.pkl --to detectron2
      mixmask convert checkpoint_0199.pth.tar backbone.safetensors --to timm
      mixmask convert theirs.pth ours.safetensors --to mixmask --prefix state_dict.net.
    """
    from mixmask.engine.storage import require_output_file
    from mixmask.transfer.checkpoints.export import check_export, export
    from mixmask.transfer.checkpoints.source import read_source
    from mixmask.transfer.zoo.references import locate_checkpoint

    require_output_file(out, force)
    located = locate_checkpoint(str(source), download=not dry_run)
    found = read_source(located.path, located.read_as(layout, prefix, arch))
    check_export(found, out, to)
    result = f"would write {out} for {to}" if dry_run else f"written   {export(found, out, to, verify)}"
    show(f"source    {source} ({found.info.arch}, {found.info.stem} stem)\n{found.tensor_report.summary()}\n{result}")


def inspect(
    source: Annotated[Path, typer.Argument(help="A checkpoint; also zoo:NAME or hf:OWNER/NAME.")],
    layout: Layout = None,
    prefix: Prefix = None,
    arch: Arch = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor with what becomes of it.")] = False,
) -> None:
    """Show what a checkpoint holds: its layout, its network, and what a conversion does with every tensor.

    Exit code 2 if `mixmask convert` would refuse it.

    \b
    Example:
      mixmask inspect moco_v2_800ep_pretrain.pth.tar
    """
    from mixmask.transfer.checkpoints.source import inspect as look
    from mixmask.transfer.zoo.references import locate_checkpoint

    located = locate_checkpoint(str(source))
    text, problem = look(located.path, located.read_as(layout, prefix, arch), tensors)
    show(text)
    if problem is not None:
        raise problem
