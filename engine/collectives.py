"""Exchange of tensors between the processes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixmask.engine.distributed import world
from mixmask.engine.gradients import without_gradients
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


@without_gradients
def gather(rows: Tensor) -> Tensor:
    """All-gather without gradient, in rank order: (n, …), with the same n on every rank, to (world size · n, …)."""
    if world().size == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world().size)]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@without_gradients
def gather_dealt(rows: Tensor) -> Tensor:
    """Gather rows that were distributed round-robin (every n-th to a rank), and restore the order they had before."""
    if world().size == 1:
        return rows
    counts = gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    # all_gather needs the same shape on every rank, but the last round may not have reached all of them.
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    parts = gather(padded).chunk(world().size)
    together = rows.new_empty(sum(counts), *rows.shape[1:])
    for rank, (part, count) in enumerate(zip(parts, counts, strict=True)):
        together[rank :: world().size] = part[:count]
    return together


def mean(values: Tensor) -> Tensor:
    """Mean of each value over all ranks (all-reduce); with several ranks, ``values`` is overwritten."""
    if world().size > 1:
        torch.distributed.all_reduce(values)
        values /= world().size
    return values


@without_gradients
def broadcast_buffers(model: nn.Module) -> None:
    """Broadcast rank 0's buffers."""
    if world().size > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


def parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a module in DistributedDataParallel, which averages gradients over ranks; with one process, a no-op.

    Buffers are not broadcast: queues are computed alike on all ranks, and `average_statistics` sees to the running
    statistics.

    Args:
        module: Its forward pass computes everything that the loss depends on.
        device: Where it is.

    DistributedDataParallel rebuilds its gradient buckets after its first step, so the first step after a resume sums
    gradients in another order. With three or more ranks, a resumed run therefore equals an uninterrupted one only up to
    rounding.
    """
    if world().size == 1:
        return module
    # All buffers are ignored instead of `broadcast_buffers=False`, which torch renames.
    mark = torch.nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    mark(module, [name for name, _ in module.named_buffers()])  # type: ignore[no-untyped-call]
    return torch.nn.parallel.DistributedDataParallel(
        module, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
