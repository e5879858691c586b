"""Metrics of embedding quality during training: spread, effective rank, alignment, uniformity."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# Below either of these values of `feature_std` and `rank_me`, a run is reported as collapsed.
COLLAPSED_STD = 0.05
COLLAPSED_RANK = 1.5
SETTLED = 100  # before this step, the embeddings are still close to each other from the initialisation


@torch.no_grad()
def feature_std(embedding: Tensor) -> Tensor:
    """Mean standard deviation of the components of (N, dim) unit vectors times √dim.

    1 for directions spread evenly over the sphere, 0 for a collapsed encoder (arXiv:2011.10566, section 4.1).
    """
    spread: Tensor = embedding.std(dim=0).mean() * embedding.shape[1] ** 0.5
    return spread


@torch.no_grad()
def rank_me(embedding: Tensor) -> Tensor:
    """RankMe (arXiv:2210.02885, equation 1): exp of the entropy of the normalised singular values of (N, dim) embeddings.

    Between 1 (all on one line) and min(N, dim); NaN if an embedding is not finite. It is computed on one batch here, so
    compare it within a run.
    """
    sound = torch.isfinite(embedding).all()  # on the device: the singular values are all that the host waits for
    values = torch.linalg.svdvals(embedding.float().nan_to_num(0.0, 0.0, 0.0))
    # 1e-7 is the ε of equation 1; it keeps the logarithm finite.
    shares = values / values.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(shares * shares.log()).sum()).where(sound, torch.nan)


@torch.no_grad()
def alignment(query: Tensor, key: Tensor) -> Tensor:
    """Mean squared distance of positive pairs of unit vectors, in [0, 4] (arXiv:2005.10242, equation 1 with α = 2)."""
    return (query - key).square().sum(dim=1).mean()


@torch.no_grad()
def uniformity(embedding: Tensor) -> Tensor:
    """log of the mean of exp(-2 · squared distance) over pairs (arXiv:2005.10242, equation 2 with t = 2); at most 0."""
    return torch.pdist(embedding.float()).square().mul(-2).exp().mean().log()


def diagnose(query: Tensor, key: Tensor) -> dict[str, Tensor]:
    """All metrics of (N, dim) queries and their keys; the rows are normalised to unit length first."""
    query, key = F.normalize(query.float(), dim=1), F.normalize(key.float(), dim=1)
    return {
        "feature_std": feature_std(query),
        "rank_me": rank_me(query),
        "alignment": alignment(query, key),
        "uniformity": uniformity(query),
    }


def collapse_warning(line: Mapping[str, float], step: int) -> str | None:
    """A warning if the log line of ``step`` shows a collapsed encoder, else None."""
    std, rank = line.get("feature_std"), line.get("rank_me")
    if step < SETTLED or std is None or rank is None or (std >= COLLAPSED_STD and rank >= COLLAPSED_RANK):
        return None
    return (
        f"the embeddings have collapsed (feature_std {std:.3f}, 1 is a full spread; effective rank {rank:.1f}). Likely "
        f"causes: a learning rate too high or without warm-up, a momentum too low, a queue much longer than the run, or "
        f"too few images per group of batch statistics"
    )
