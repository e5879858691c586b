"""Linear classifiers side by side on the features of one frozen trunk."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.backbones import width_of
from mixmask.engine.collectives import mean
from mixmask.engine.distributed import world
from mixmask.engine.precision import Precision, autocast
from mixmask.transfer.probe import Probe

LARGEST = 1e30  # a logit beyond it, or one that is not a number, shows that a probe has diverged


class FeatureNorm(nn.Module):
    """BatchNorm of frozen features, without affine parameters (a linear classifier follows).

    Batch statistics are taken over the rows of all processes. The features have no gradient, so exchanging means is enough.
    """

    def __init__(self, num_features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """(N, D) features to normalised ones, with the batch's statistics in training."""
        running_mean, running_var = self.get_buffer("running_mean"), self.get_buffer("running_var")
        features = features.float()
        if self.training:
            centre = mean(features.mean(0))
            variance = mean((features - centre).square().mean(0))  # of every process the same number of rows
            num = len(features) * world().size
            running_mean.lerp_(centre, self.momentum)
            running_var.lerp_(variance * num / max(num - 1, 1), self.momentum)
        else:
            centre, variance = running_mean, running_var
        normed: Tensor = (features - centre) / (variance + self.eps).sqrt()
        return normed

    @torch.no_grad()
    def set_to(self, features: Tensor) -> None:
        """Take the statistics of (N, D) features as they are."""
        self.get_buffer("running_mean").copy_(features.mean(0))
        self.get_buffer("running_var").copy_(features.var(0, unbiased=False))


class Probes(nn.Module):
    """A frozen trunk and a linear classifier for each probe, all with the same start.

    A probe that diverges drops out: its loss, its gradient and its weights become zero (`bury`), and the others train on
    undisturbed. If there is only one probe, its divergence ends the run like that of any training.
    """

    alive: Tensor

    def __init__(self, trunk: nn.Module, num_classes: int, probes: Sequence[Probe]) -> None:
        super().__init__()
        self.trunk, self.probes = trunk.requires_grad_(False), tuple(probes)
        first = nn.Linear(width_of(trunk), num_classes)
        nn.init.normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        self.heads = nn.ModuleList([first, *(nn.Linear(first.in_features, num_classes) for _ in self.probes[1:])])
        for head in self.heads:
            head.load_state_dict(first.state_dict())
        normed = any(probe.batch_norm for probe in self.probes)
        self.norm = FeatureNorm(first.in_features) if normed else None
        self.register_buffer("alive", torch.ones(len(self.probes), dtype=torch.bool))

    def train(self, mode: bool = True) -> Probes:
        """As `nn.Module.train`, but the trunk stays in eval mode."""
        super().train(mode)
        self.trunk.eval()
        return self

    @torch.no_grad()
    def bury(self, step: int) -> None:
        """Set the weights of probes that have diverged to zero; after every step, as momentum and decay still move them."""
        if len(self.probes) > 1:
            parameters = [[*head.parameters()] for head in self.heads]
            largest = torch._foreach_norm([one for of_head in parameters for one in of_head], torch.inf)
            self.alive &= torch.stack(largest).isfinite().view(len(self.heads), -1).all(dim=1)
            for dead, of_head in zip((~self.alive).unbind(), parameters, strict=True):
                for parameter in of_head:
                    parameter.masked_fill_(dead, 0.0)

    def features(self, images: Tensor) -> Tensor:
        """(N, D) features of (N, 3, H, W) normalised images, without gradient."""
        with torch.no_grad():
            features: Tensor = self.trunk(images)
        return features

    def forward(self, features: Tensor) -> list[Tensor]:
        """(N, classes) logits of every probe, from (N, D) features."""
        normed = self.norm(features) if self.norm is not None else features
        if len(self.probes) == 1:
            return [self.heads[0](normed)]
        with torch.autocast(features.device.type, enabled=False):  # fp16 would overflow where one rate is far too high
            return [
                head(normed.float() if probe.batch_norm else features.float())
                for probe, head in zip(self.probes, self.heads, strict=True)
            ]

    def logits(self, number: int, features: Tensor) -> Tensor:
        """(N, classes) logits of one probe."""
        if len(self.probes) == 1:
            (only,) = self.forward(features)
            return only
        with torch.autocast(features.device.type, enabled=False):
            normed = self.norm(features) if self.norm is not None and self.probes[number].batch_norm else features
            logits: Tensor = self.heads[number](normed.float())
        return logits

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """The sum of the probes' cross-entropies: each probe's gradient is its own, whatever the others do."""
        every = self(features)
        if len(self.probes) == 1:
            return F.cross_entropy(every[0].float(), labels)
        # The logits are silenced, not the loss: zero times a gradient that is not a number would not be zero.
        sound = torch.stack([logits.detach().abs().amax() < LARGEST for logits in every])
        self.alive &= mean(sound.float()) == 1
        silent = [torch.where(alive, logits, 0.0) for alive, logits in zip(self.alive, every, strict=True)]
        each = torch.stack([F.cross_entropy(logits, labels) for logits in silent])
        return torch.where(self.alive, each, 0.0).sum()

    @torch.no_grad()
    def answers(
        self, features: Iterable[tuple[Tensor, Tensor]], number: int, precision: Precision
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits of one probe for batches of features, with their labels; ``precision`` is a single probe's."""
        self.eval()
        for batch, labels in features:
            with autocast(batch.device, precision):
                logits = self.logits(number, batch)
            yield logits, labels


@torch.no_grad()
def count_right(
    model: Probes, features: Iterable[tuple[Tensor, Tensor]], precision: Precision, everyone: bool = False
) -> list[float]:
    """How many images each probe classifies correctly, over all processes; a probe that has diverged classifies none."""
    model.eval()
    right = torch.zeros(len(model.probes))
    for batch, labels in features:
        with autocast(batch.device, precision):
            every = model(batch)
        for number, logits in enumerate(every):
            good = (logits.argmax(dim=1) == labels) & logits.isfinite().all(dim=1)
            right[number] += good.sum().cpu()
    if world().size > 1 and not everyone:
        right = mean(right.to(model.alive.device)).cpu() * world().size
    return [round(count) if alive else 0 for count, alive in zip(right.tolist(), model.alive.tolist(), strict=True)]
