"""Batch normalisation with statistics over the rows of all ranks, on any device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixmask.engine.differentiable import sum_with_gradient


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
