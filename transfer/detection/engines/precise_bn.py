"""PreciseBN: population statistics over many batches, with fixed weights (arXiv:2105.07576, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixmask.engine.collectives import mean as average


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Any], run: Callable[[Any], object]) -> int:
    """Replace every running mean and variance by those over all positions of all batches, in place.

    Each batch counts by the number of positions that the layer saw in it. The variance is the mean square minus the
    squared mean, and each batch's own variance is taken without Bessel's correction. With several ranks, each sees its
    own batches; an all-reduce averages their estimates, so that all ranks have the same network.

    Args:
        model: In training mode; a layer that no batch reaches keeps its statistics.
        batches: The batches.
        run: The forward pass on one of them.

    Returns:
        The number of batches.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    positions: dict[nn.Module, int] = {}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # N · H · W: the values of each channel.
        positions[layer] = inputs[0].numel() // inputs[0].shape[1]

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    totals = [0] * len(layers)
    means = [torch.zeros_like(layer.get_buffer("running_mean")) for layer in layers]
    squares = [torch.zeros_like(mean) for mean in means]
    num_batches = 0
    try:
        for layer in layers:
            layer.momentum = 1.0  # the buffers then hold the statistics of the last batch alone
        for batch in batches:
            positions.clear()
            run(batch)
            num_batches += 1
            for number, layer in enumerate(layers):
                if layer not in positions:
                    continue
                size = positions[layer]
                totals[number] += size
                mean = layer.get_buffer("running_mean")
                # E[x²] of this batch. BatchNorm stores the unbiased variance.
                square = mean.square() + layer.get_buffer("running_var") * ((size - 1) / size)
                means[number] += (mean - means[number]) * (size / totals[number])
                squares[number] += (square - squares[number]) * (size / totals[number])
    finally:
        for hook, layer, momentum in zip(hooks, layers, momenta, strict=True):
            hook.remove()
            layer.momentum = momentum
    for layer, total, mean, square in zip(layers, totals, means, squares, strict=True):
        if total:
            mean, square = average(mean), average(square)
            layer.get_buffer("running_mean").copy_(mean)
            # Rounding can make the difference slightly negative.
            layer.get_buffer("running_var").copy_((square - mean.square()).clamp(min=0))
    return num_batches
