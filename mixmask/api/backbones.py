"""Backbones: from checkpoints to networks, and to other formats."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from mixmask.api import Place
from mixmask.engine.backbones import build_trunk
from mixmask.engine.errors import ConfigError
from mixmask.engine.storage import require_output_file
from mixmask.engine.wording import did_you_mean
from mixmask.transfer.checkpoints.export import TARGETS, Target, check_export, export
from mixmask.transfer.checkpoints.source import read_source
from mixmask.transfer.zoo.references import Located, is_reference, locate_checkpoint


def load_backbone(
    path: Place, *, layout: str | None = None, prefix: str | None = None, arch: str | None = None
) -> nn.Module:
    """Load the trunk of a checkpoint, of this project or any other, in eval mode.

    Args:
        path: ``backbone.safetensors``, a checkpoint of a known layout (``mixmask inspect`` lists what is in it),
            ``zoo:NAME`` (``mixmask zoo`` lists the names) or ``hf:OWNER/NAME``; the last two are downloaded once.
        layout: Its layout, if it cannot be recognised by its keys: ``moco``, ``simsiam``, ``swav`` …
        prefix: Prefix of the trunk's keys in the file.
        arch: ``timm/`` and a name, if it is a ConvNet of timm; ResNets are recognised.

    Returns:
        A network from (N, 3, H, W) images to (N, ``num_features``) features. Its ``normalization`` is the data set whose
        mean and standard deviation it was trained with.

    Warns:
        UserWarning: If something in the file is suspicious, such as batch normalisations without statistics.

    Raises:
        UserError: If the file is damaged, or a tensor is missing or unexpected.

    >>> model = load_backbone(backbone)
    >>> model(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 512])
    """
    located = _located(path)
    source = read_source(located.path, located.read_as(layout, prefix, arch))
    for text in source.tensor_report.warnings:
        warnings.warn(f"{source.path}: {text}", stacklevel=2)
    trunk: Any = build_trunk(source.info.recipe)
    trunk.load_state_dict(source.state, strict=True)
    trunk.normalization = source.info.normalization
    network: nn.Module = trunk.eval()
    return network


def convert(source: Place, out: Place, *, to: Target, force: bool = False, verify: bool = True) -> Path:
    """Write a backbone in the format of another library, and check that the library reads it.

    Args:
        source: As `load_backbone` takes it.
        out: The file to write: ``.pkl`` for Detectron2, else ``.safetensors`` or ``.pth``.
        to: ``detectron2``, ``torchvision``, ``timm`` or ``mixmask``.
        force: Replace an existing file.
        verify: Read the file back and compare the features.

    Raises:
        UserError: If the source cannot be read, or ``out`` exists and ``force`` is not set.

    >>> convert(backbone, folder / "r18.pth", to="torchvision").name
    'r18.pth'
    """
    if to not in TARGETS:
        raise ConfigError(f"to={to!r}: valid: {', '.join(TARGETS)}. {did_you_mean(to, TARGETS)}".rstrip())
    out = _file(out)
    require_output_file(out, force)
    located = _located(source)
    found = read_source(located.path, located.reading)
    check_export(found, out, to)
    export(found, out, to, verify)
    return out


def _file(path: Place) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"a checkpoint's path was expected, got {type(path).__name__}")
    return Path(path).expanduser()


def _located(path: Place) -> Located:
    return locate_checkpoint(path) if isinstance(path, str) and is_reference(path) else Located(_file(path))
