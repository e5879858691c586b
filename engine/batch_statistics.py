"""Batch normalisation over several processes: its running statistics, and statistics over the rows of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmask.engine.distributed import mean, sum_with_gradient, world
from mixmask.engine.errors import ConfigError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d)


@torch.no_grad()
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
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
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
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in PLAIN:
            raise ConfigError(
                f"sync_bn: this network's {type(module).__name__} does more than batch normalisation, which synchronised "
                f"layers would drop; set sync_bn=false"
            )
    _synchronise(model, device)


def _synchronise(model: nn.Module, device: torch.device) -> None:
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return
    for name, child in model.named_children():
        if type(child) in PLAIN:
            setattr(model, name, GlobalBatchNorm.like(child))
        else:
            _synchronise(child, device)


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm whose statistics are over the rows of all ranks, on any device.

    torch's SyncBatchNorm does the same on GPUs only. Ranks may have different numbers of rows. The state dict is that of
    BatchNorm.
    """

    @classmethod
    def like(cls, norm: nn.Module) -> GlobalBatchNorm:
        """A layer with the parameters and buffers (the same tensors) of a BatchNorm layer."""
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        same = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        same.weight, same.bias = norm.weight, norm.bias
        same.running_mean, same.running_var = norm.running_mean, norm.running_var
        same.num_batches_tracked = norm.num_batches_tracked
        return same.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        """(N, C) or (N, C, H, W) to the same shape."""
        if not self.training:
            return super().forward(input)
        rows = input.float()  # half precision is too coarse for sums over a batch
        over = [0, *range(2, input.ndim)]
        shape = [1, -1] + [1] * (input.ndim - 2)
        count = float(sum_with_gradient(rows.new_tensor(rows.numel() / rows.shape[1], dtype=torch.float64)))
        centre = sum_with_gradient(rows.sum(over)) / count
        centred = rows - centre.view(shape)
        variance = sum_with_gradient(centred.square().sum(over)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(centre, share)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), share)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        pass
