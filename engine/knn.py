"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., arXiv:1805.01978, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixmask.engine.collectives import gather
from mixmask.engine.distributed import world
from mixmask.engine.features import extract_features
from mixmask.engine.late import torch
from mixmask.engine.loader import ImageSource, Interpolation
from mixmask.engine.normalization import Normalization
from mixmask.engine.precision import Precision

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK = 512  # queries at a time
BLOCK = 1 << 16  # bank features at a time: with CHUNK, 128 MiB of similarities

Votes = dict[tuple[int, float], "Tensor"]  # from k and temperature to (M,) int64 predicted labels


@dataclass(frozen=True)
class Neighbours:
    """The nearest bank features of each query.

    Attributes:
        similarity: (M, k) cosine similarities, the largest first; -inf where there are fewer than k neighbours.
        labels: (M, k) int64 labels of the neighbours.
    """

    similarity: Tensor
    labels: Tensor

    def vote(self, k: int, temperature: float, num_classes: int) -> Tensor:
        """(M,) int64 predicted labels: each of the first k neighbours votes with exp(similarity / temperature)."""
        # Relative to the nearest neighbour: exp(1 / temperature) would overflow for low temperatures.
        weights = ((self.similarity[:, :k] - self.similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(weights), num_classes, device=weights.device, dtype=weights.dtype)
        votes.scatter_add_(1, self.labels[:, :k], weights)
        return votes.argmax(dim=1)


def nearest(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> Neighbours:
    """The exact k nearest neighbours, of all processes' shares of the bank.

    Args:
        bank: (n, D) this process's share of the bank, L2-normalised.
        bank_labels: (n,) int64.
        queries: (m, D), L2-normalised, the same on every process.
        k: Number of neighbours; of a smaller bank, all.
    """
    similarity, labels = _nearest_here(bank, bank_labels, queries, k)
    size = world().size
    if size > 1:  # each process has found the best of its share; the best of all are among them
        short = k - similarity.shape[1]
        similarity, labels = (
            torch.nn.functional.pad(similarity, (0, short), value=-torch.inf),
            torch.nn.functional.pad(labels, (0, short)),
        )
        similarity, labels = (
            gather(part).reshape(size, len(queries), -1).transpose(0, 1).flatten(1) for part in (similarity, labels)
        )
        similarity, order = similarity.topk(k, dim=1)
        labels = labels.gather(1, order)
    return Neighbours(similarity, labels)


def _nearest_here(bank: Tensor, bank_labels: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best, labels = queries.new_empty(len(queries), 0), bank_labels.new_empty(len(queries), 0)
    for start in range(0, len(bank), BLOCK):
        block = bank[start : start + BLOCK]
        similarity, neighbour = (queries @ block.T).topk(min(k, len(block)), dim=1)  # (m, k)
        found = bank_labels[start : start + BLOCK][neighbour]
        if start == 0:
            best, labels = similarity, found
            continue
        best, order = torch.cat([best, similarity], dim=1).topk(min(k, start + len(block)), dim=1)
        labels = torch.cat([labels, found], dim=1).gather(1, order)
    return best, labels


def knn_votes(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int],
    temperatures: Sequence[float],
    chunk: int = CHUNK,
) -> Votes:
    """The classes of queries for every k and temperature, in one pass over the bank.

    The memory needed besides the arguments does not grow with the bank: `CHUNK` × `BLOCK` similarities.

    Args:
        bank: (n, D) L2-normalised features with known labels; with several processes, this one's share.
        bank_labels: (n,) int64 in [0, num_classes).
        queries: (M, D) L2-normalised features to classify, the same on every process.
        num_classes: Number of classes.
        ks: Numbers of neighbours; with fewer bank features than k, all of them vote.
        temperatures: Softness of the weights, above 0.
        chunk: Queries handled at a time.
    """
    found: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temperatures}
    for part in torch.split(queries, chunk):
        neighbours = nearest(bank, bank_labels, part, max(ks))
        for (k, temperature), predictions in found.items():
            predictions.append(neighbours.vote(k, temperature, num_classes))
    return {key: torch.cat(predictions) for key, predictions in found.items()}


def knn_predict(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    k: int,
    temperature: float,
    chunk: int = CHUNK,
) -> Tensor:
    """(M,) int64 labels of (M, D) queries by the vote of their k nearest neighbours among the (N, D) bank features.

    Neither needs to be normalised; the other arguments are those of `knn_votes`.
    """
    bank, queries = torch.nn.functional.normalize(bank, dim=1), torch.nn.functional.normalize(queries, dim=1)
    votes = knn_votes(
        bank, bank_labels, queries, num_classes=num_classes, ks=[k], temperatures=[temperature], chunk=chunk
    )
    return votes[k, temperature]


def normalize_(features: Tensor) -> Tensor:
    """L2-normalise the rows of (N, D) features in place: a second bank would not fit where one just fits."""
    return torch.nn.functional.normalize(features, dim=1, out=features)


def top1(predicted: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of (N,) predicted against (N,) true labels."""
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
    ks: Sequence[int],
    temperatures: Sequence[float],
    normalization: Normalization = "imagenet",
    interpolation: Interpolation = "bilinear",
) -> tuple[Votes, Tensor]:
    """Classify the query images by kNN on the trunk's features, with the bank's images as labelled neighbours.

    With several processes the bank stays shared out: each process looks for neighbours in its own share.

    Args: as `extract_features` and `knn_votes` take them.

    Returns:
        For every k and temperature (M,) predicted labels, and (M,) true labels, of all processes' queries, in the order of
        the images.
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
            interpolation=interpolation,
            gather=source is queries,
        )
        for source in (bank, queries)
    )
    num_classes = len(bank.images.classes)
    votes = knn_votes(
        normalize_(features), labels, normalize_(asked), num_classes=num_classes, ks=ks, temperatures=temperatures
    )
    return votes, answers
