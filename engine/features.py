"""Features of frozen networks: every image's central crop goes through the network once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mixmask.engine.backbones import channels_of
from mixmask.engine.collectives import gather_dealt
from mixmask.engine.gradients import without_gradients
from mixmask.engine.late import torch
from mixmask.engine.loader import ImageSource, Interpolation, num_batches
from mixmask.engine.normalization import Normalization, normalize
from mixmask.engine.precision import Precision, autocast
from mixmask.engine.progress import track

if TYPE_CHECKING:
    from torch import Tensor, nn


@without_gradients
def outputs_of(
    title: str,
    network: Callable[[Tensor], Tensor],
    source: ImageSource,
    device: torch.device,
    *,
    batch_size: int,
    resize: int | None,
    crop: int,
    precision: Precision,
    normalization: Normalization,
    interpolation: Interpolation,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a network gives for every image's central crop, with the labels, batch by batch; see `extract_features`."""
    batches = source.evaluation(batch_size, resize, crop, interpolation)
    total = num_batches(len(source.images), batch_size)
    for images, labels in track(title, batches, total, batch_size):
        with autocast(device, precision):
            output = network(normalize(images, normalization).contiguous(memory_format=torch.channels_last))
        yield output, labels


@without_gradients
def extract_features(
    title: str,
    trunk: nn.Module,
    source: ImageSource,
    *,
    batch_size: int,
    resize: int | None,
    crop: int,
    precision: Precision,
    normalization: Normalization = "imagenet",
    interpolation: Interpolation = "bilinear",
    gather: bool = True,
) -> tuple[Tensor, Tensor]:
    """Features of every image's central crop. The network runs in eval mode; its mode is restored afterwards.

    Args:
        title: Shown with the progress.
        trunk: Images to features: a trunk, or a trunk and its head.
        source: Which images. With several processes, this one's share (`ImageSet.shard`).
        batch_size: Images per forward pass.
        resize: Short side before the crop, or None.
        crop: Side of the central crop.
        precision: Number format of the forward pass.
        normalization: Data set whose mean and standard deviation the images are normalised with.
        interpolation: How images are resized.
        gather: Whether every process gets the features of all processes, or keeps its own share.

    Returns:
        (N, D) float32 features as the trunk gives them, and the labels: (N,) int64, or (N, C) int8 of multi-label images.
        Both are in the images' order and on the trunk's device.
    """
    modes = {module: module.training for module in trunk.modules()}
    trunk.eval()
    device = next(trunk.parameters()).device
    features, labels, first = torch.empty(0, 0, device=device), source.images.labels.to(device), 0
    batches = outputs_of(
        title, trunk, source, device, batch_size=batch_size, resize=resize, crop=crop, precision=precision,
        normalization=normalization, interpolation=interpolation,
    )  # fmt: skip
    for output, _ in batches:
        if first == 0:  # one buffer from the start: joining batches at the end would hold every feature twice
            features = torch.empty(len(source.images), output.shape[1], device=device)
        features[first : first + len(output)] = output
        first += len(output)
    if first == 0:  # a process without images: the others still have to know how wide its features would be
        probe = torch.zeros(1, channels_of(trunk), crop, crop, device=device)
        features = torch.empty(0, trunk(probe).shape[1], device=device)
    for module, mode in modes.items():
        module.training = mode
    return (gather_dealt(features), gather_dealt(labels)) if gather else (features, labels)
