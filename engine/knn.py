"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv:1805.01978, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixmask.engine.distributed import gather_dealt
from mixmask.engine.loader import ImageSource, num_batches
from mixmask.engine.normalization import Normalization, normalize
from mixmask.engine.precision import Precision, autocast
from mixmask.engine.progress import track


@torch.no_grad()
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
) -> tuple[Tensor, Tensor]:
    """Features of every image's central crop, the network in eval mode (its mode is restored).

    Args:
        title: Shown with the progress.
        trunk: Images to features: a trunk, or a trunk and its head.
        source: Which images; of several processes, each one's share, and all get everyone's features.
        batch_size: Images per forward pass.
        resize: Short side before the crop, or None.
        crop: Side of the central crop.
        precision: Number format of the forward pass.
        normalization: Whose mean and deviation the images are normalised with.

    Returns:
        (N, D) float32 features as the trunk gives them, and (N,) labels, in the images' order, on the trunk's device.
    """
    was_training = trunk.training
    trunk.eval()
    device = next(trunk.parameters()).device
    features, labels = [], []
    batches = source.evaluation(batch_size, resize, crop)
    total = num_batches(len(source.images), batch_size)
    for images, target in track(title, batches, total, batch_size):
        with autocast(device, precision):
            output = trunk(normalize(images, normalization).contiguous(memory_format=torch.channels_last))
        features.append(output.float())
        labels.append(target)
    trunk.train(was_training)
    return gather_dealt(torch.cat(features)), gather_dealt(torch.cat(labels))


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = 512,
) -> Tensor:
    """Vote of the k nearest neighbours by cosine similarity, each weighted with exp(similarity / temperature).

    Args:
        bank: (N, D) features with known labels.
        bank_labels: (N,) int64 in [0, num_classes).
        queries: (M, D) features to classify.
        num_classes: Number of classes.
        k: Number of neighbours; with fewer than k bank features, all of them vote.
        temperature: Softness of the weights, above 0.
        chunk: Queries handled at a time, which bounds memory to chunk × N similarities.

    Returns:
        (M,) int64 predicted labels.
    """
    bank = F.normalize(bank, dim=1)
    queries = F.normalize(queries, dim=1)
    predictions = []
    for part in torch.split(queries, chunk):
        similarity, neighbour = (part @ bank.T).topk(min(k, len(bank)), dim=1)  # (m, k)
        weights = (similarity / temperature).exp()
        votes = torch.zeros(len(part), num_classes, device=part.device, dtype=weights.dtype)
        votes.scatter_add_(1, bank_labels[neighbour], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Share of (N,) predictions that are the (N,) labels, in percent."""
    return 100.0 * float((predicted == labels).double().mean())


def knn_of_sources(
    title: str,
    trunk: nn.Module,
    bank: ImageSource,
    queries: ImageSource,
    *,
    batch_size: int,
    resize: int | None,
    crop: int,
    precision: Precision,
    k: int,
    temperature: float,
    normalization: Normalization = "imagenet",
) -> tuple[Tensor, Tensor]:
    """The classes of the query images by the trunk's features and the bank's labels.

    Args: as `extract_features` and `knn_predict` take them.

    Returns:
        (M,) predicted and (M,) true labels of all processes' queries, in the order of the images.
    """
    (features, labels), (asked, answers) = (
        extract_features(
            f"{title}: kNN features",
            trunk,
            source,
            batch_size=batch_size,
            resize=resize,
            crop=crop,
            precision=precision,
            normalization=normalization,
        )
        for source in (bank, queries)
    )
    num_classes = len(bank.images.classes)
    return knn_predict(features, labels, asked, num_classes=num_classes, k=k, temperature=temperature), answers
