"""BatchNorm in groups: it gives MoCo on one device the separate batch statistics of several devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self, override


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
        self.apart: _Apart | None = None
        self.register_state_dict_pre_hook(_folded)  # type: ignore[no-untyped-call]

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W)."""
        if not self.training or self.num_splits == 1:
            if not torch.compiler.is_compiling():
                self.fold()
            return super().forward(input)
        return self.together(input) if input.is_cuda else self.one_by_one(input)

    def one_by_one(self, input: Tensor) -> Tensor:
        """A batch norm for every group: on CPUs half the time of `together`, whose copies cost more than calls."""
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

    def together(self, input: Tensor) -> Tensor:
        """One batch norm with the groups as further channels: on GPUs five operations instead of three for each group.

        The result has the memory format of the input. Each group's running statistics stay apart until `fold` is called.
        """
        groups, (num, channels, height, width) = self.num_splits, input.shape
        each = num // groups
        last = input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        if last:
            rows = input.permute(0, 2, 3, 1).reshape(groups, each, height, width, channels)
            rows = rows.permute(1, 2, 3, 0, 4).reshape(each, height, width, groups * channels).permute(0, 3, 1, 2)
        else:
            rows = input.reshape(groups, each, channels, height, width).transpose(0, 1)
            rows = rows.reshape(each, groups * channels, height, width)
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        if torch.compiler.is_compiling():  # it joins small operations itself, and must not see state that changes
            means, variances = (buffer.repeat(groups) for buffer in _running(self))
            rows = F.batch_norm(rows, means, variances, weight, bias, True, self.momentum or 0.0, self.eps)
            with torch.no_grad():
                for buffer, found in zip(_running(self), (means, variances), strict=True):
                    buffer.copy_(found.view(groups, channels).mean(0))
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
        else:
            apart = self._apart()
            rows = F.batch_norm(rows, apart.mean, apart.variance, weight, bias, True, self.momentum or 0.0, self.eps)
            apart.batches += 1
        if last:
            rows = rows.permute(0, 2, 3, 1).reshape(each, height, width, groups, channels).permute(3, 0, 1, 2, 4)
            return rows.reshape(num, height, width, channels).permute(0, 3, 1, 2)
        return rows.reshape(each, groups, channels, height, width).transpose(0, 1).reshape(input.shape)

    def fold(self) -> None:
        """Bring the running statistics up to date; a no-op if they are."""
        fold_statistics([self])

    def _apart(self) -> _Apart:
        """Every group's running statistics, made from the common ones if these have changed in the meantime."""
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.apart is None or self.apart.stale(self):
            self.apart = _Apart.of(
                self, self.running_mean.repeat(self.num_splits), self.running_var.repeat(self.num_splits)
            )
        return self.apart

    @override
    def train(self, mode: bool = True) -> Self:
        self.fold()
        return super().train(mode)


@dataclass
class _Apart:
    """Running statistics of every group, (groups · channels,) each, of ``batches`` batches not yet counted in the layer.

    The layer's own buffers and their versions tell whether somebody else has written to them, such as a checkpoint.
    """

    mean: Tensor
    variance: Tensor
    source: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    batches: int = 0

    @classmethod
    def of(cls, layer: SplitBatchNorm2d, mean: Tensor, variance: Tensor) -> _Apart:
        source = _running(layer)
        return cls(mean, variance, source, _versions(source))

    def stale(self, layer: SplitBatchNorm2d) -> bool:
        now = _running(layer)
        return any(a is not b for a, b in zip(now, self.source, strict=True)) or _versions(now) != self.versions


def _running(layer: SplitBatchNorm2d) -> tuple[Tensor, Tensor]:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


def _versions(tensors: tuple[Tensor, Tensor]) -> tuple[int, int]:
    return tensors[0]._version, tensors[1]._version


def split_layers(model: nn.Module) -> list[SplitBatchNorm2d]:
    """The layers of a model that normalise in groups."""
    return [module for module in model.modules() if isinstance(module, SplitBatchNorm2d)]


def _folded(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    assert isinstance(module, SplitBatchNorm2d)
    module.fold()


@torch.no_grad()
def fold_statistics(layers: Sequence[SplitBatchNorm2d]) -> list[SplitBatchNorm2d]:
    """Write the mean over the groups into the layers' running statistics: a handful of operations for all layers.

    Returns:
        The layers that had statistics of groups; none on CPUs, and none of a compiled trunk.
    """
    found = []
    for layer in layers:
        apart, layer.apart = layer.apart, None
        if apart is not None and apart.batches and not apart.stale(layer):
            found.append((layer, apart))
    if not found:
        return []
    groups = {layer.num_splits for layer, _ in found}
    assert len(groups) == 1, "layers of one model have the same number of groups"
    parts = [part.view(*groups, -1) for _, apart in found for part in (apart.mean, apart.variance)]
    running = [buffer for layer, _ in found for buffer in _running(layer)]
    means = torch.cat(parts, dim=1).mean(0)
    torch._foreach_copy_(running, list(torch.split(means, [len(buffer) for buffer in running])))
    counted = [layer.num_batches_tracked for layer, _ in found if layer.num_batches_tracked is not None]
    torch._foreach_add_(counted, [apart.batches for _, apart in found])
    return [layer for layer, _ in found]


@torch.no_grad()
def spread_statistics(layers: Sequence[SplitBatchNorm2d]) -> None:
    """Give every group the common running statistics, for all layers in one operation. The next step does so otherwise."""
    if not layers:
        return
    repeated = [buffer for layer in layers for buffer in _running(layer) for _ in range(layer.num_splits)]
    sizes = [layer.num_splits * layer.num_features for layer in layers for _ in range(2)]
    blocks = torch.split(torch.cat(repeated), sizes)
    for layer, mean, variance in zip(layers, blocks[::2], blocks[1::2], strict=True):
        layer.apart = _Apart.of(layer, mean, variance)
