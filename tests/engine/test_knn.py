from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmask.engine.knn import knn_predict, top1


def slow_predict(bank, labels, query, num_classes: int, k: int, temperature: float) -> int:
    """Section 3.4 of Wu et al., one number at a time."""

    def unit(v):
        norm = math.sqrt(sum(x * x for x in v))
        return [x / norm for x in v]

    q = unit(query)
    similarities = [(sum(a * b for a, b in zip(unit(row), q)), label) for row, label in zip(bank, labels)]
    nearest = sorted(similarities, key=lambda pair: -pair[0])[:k]
    votes = [0.0] * num_classes
    for similarity, label in nearest:
        votes[label] += math.exp(similarity / temperature)
    return max(range(num_classes), key=lambda c: votes[c])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_against_a_loop(seed: int, k: int, temperature: float) -> None:
    rng = torch.Generator().manual_seed(seed)
    bank = torch.randn(10, 4, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 3, (10,), generator=rng)
    queries = torch.randn(5, 4, generator=rng, dtype=torch.float64)
    ours = knn_predict(bank, labels, queries, num_classes=3, k=k, temperature=temperature, chunk=2).tolist()
    expected = [slow_predict(bank.tolist(), labels.tolist(), q, 3, k, temperature) for q in queries.tolist()]
    assert ours == expected


def test_scale_of_features_does_not_matter() -> None:
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(20, 4, generator=rng), torch.randn(8, 4, generator=rng)
    labels = torch.randint(0, 3, (20,), generator=rng)
    scales = torch.rand(20, 1, generator=rng) + 0.1
    one = knn_predict(bank, labels, queries, num_classes=3, k=5, temperature=0.1)
    two = knn_predict(bank * scales, labels, queries * 7, num_classes=3, k=5, temperature=0.1)
    assert torch.equal(one, two)


def test_accuracy_is_in_percent() -> None:
    bank = torch.eye(4)
    labels = torch.arange(4)
    queries = torch.eye(4)[[0, 1, 2, 2]]
    predicted = knn_predict(bank, labels, queries, num_classes=4, k=1, temperature=0.1)
    accuracy = top1(predicted, torch.tensor([0, 1, 2, 3]))
    assert accuracy == pytest.approx(75.0)
