"""Parts of a loss as forward passes of a network."""

from __future__ import annotations

from torch import Tensor, nn

from mixmask.engine.job import Part


class Parts(nn.Module):
    """Runs one part of the loss as a forward pass: DistributedDataParallel averages gradients of what `forward` computes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Part) -> dict[str, Tensor]:
        """The values of one part, by name."""
        return part()
