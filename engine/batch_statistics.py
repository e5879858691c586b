"""Batch normalisation over several processes: its running statistics, and statistics over the rows of all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmask.engine.collectives import mean
from mixmask.engine.distributed import world
from mixmask.engine.errors import ConfigError
from mixmask.engine.gradients import without_gradients
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import nn


@without_gradients
def average_statistics(model: nn.Module) -> None:
    """Average the running statistics of BatchNorm layers over ranks; layers in eval mode are left alone.

    Called after every step. Running statistics are linear in the batches' statistics, so the result is what one process
    with one group of images per rank would have (`SplitBatchNorm2d`), and all ranks hold the same buffers.
    """
    if world().size == 1:
        return
    running = [
        buffer
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]
    if not running:
        return
    flat = mean(torch.cat([buffer.flatten() for buffer in running]))
    for buffer, part in zip(running, torch.split(flat, [buffer.numel() for buffer in running]), strict=True):
        buffer.copy_(part.view_as(buffer))


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Replace the BatchNorm layers inside a model by ones whose statistics are over all ranks; with one rank, a no-op.

    On GPUs these are torch's SyncBatchNorm, on CPUs `GlobalBatchNorm`.

    Raises:
        ConfigError: If a layer fuses BatchNorm with something else (timm's BatchNormAct2d).
    """
    if world().size == 1:
        return
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not _is_plain(module):
            raise ConfigError(
                f"sync_bn: this network's {type(module).__name__} does more than batch normalisation, which synchronised "
                f"layers would drop; set sync_bn=false"
            )
    _synchronise(model, device)


def _is_plain(module: nn.Module) -> bool:
    return type(module) in (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)


def _synchronise(model: nn.Module, device: torch.device) -> None:
    from mixmask.engine.global_batch_norm import GlobalBatchNorm

    if device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for name, child in model.named_children():
        if _is_plain(child):
            setattr(model, name, GlobalBatchNorm.like(child))
        else:
            _synchronise(child, device)
