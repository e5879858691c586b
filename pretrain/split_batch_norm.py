"""BatchNorm in groups: it gives MoCo on one device the separate batch statistics of several devices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics are taken over consecutive groups of the batch.

    With statistics over the whole batch, a query and its key share information through them, and the model can cheat on
    MoCo's pretext task (arXiv:1911.05722, section 3.3). The state dict and the eval mode are those of BatchNorm2d. The
    running statistics are the mean over the groups.

    Args:
        num_features: Channels.
        num_splits: Number of groups; must divide the batch.
    """

    def __init__(self, num_features: int, num_splits: int) -> None:
        super().__init__(num_features)
        self.num_splits = num_splits

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        if not self.training or self.num_splits == 1:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        # F.batch_norm updates running statistics in place, so each group gets a copy of its own.
        means = self.running_mean.repeat(self.num_splits, 1)
        variances = self.running_var.repeat(self.num_splits, 1)
        groups = [
            F.batch_norm(group, mean, variance, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
            for group, mean, variance in zip(input.chunk(self.num_splits), means, variances, strict=True)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(groups)
