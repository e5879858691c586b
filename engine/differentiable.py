"""Exchange of tensors between the processes of a run, with gradients; torch's own such functions are deprecated."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from mixmask.engine.collectives import gather
from mixmask.engine.distributed import world


def gather_with_gradient(rows: Tensor) -> Tensor:
    """Like `gather`, with gradient: the gradients of a row from all ranks are summed on the rank that made it."""
    if world().size == 1:
        return rows
    gathered: Tensor = _GatherWithGradient.apply(rows)
    return gathered


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        torch.distributed.all_reduce(total)
        return total[world().share(len(total))]


def sum_with_gradient(values: Tensor) -> Tensor:
    """All-reduce with gradient: a rank's gradient is the sum of the gradients of all ranks' results."""
    if world().size == 1:
        return values
    total: Tensor = _SumWithGradient.apply(values)
    return total


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total
