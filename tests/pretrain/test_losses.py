"""Losses of the frameworks, number by number in float64, and against lightly's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from torch import Tensor, nn

from mixmask.pretrain.batch_loss import BatchLossFramework
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.densecl.network import DenseCL
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.frameworks.simclr.network import SimCLR
from tests.pretrain.small_frameworks import BACKBONE, RECIPES, build, dot, embeddings, rows, slow_info_nce


def slow_nt_xent(first: Tensor, second: Tensor, temperature: float) -> list[float]:
    """Equation 1 and algorithm 1 of the SimCLR paper: the mean of l(i, j) and l(j, i) of each image."""
    views = [*first, *second]
    num = len(first)

    def one(i: int, j: int) -> float:
        total = sum(math.exp(dot(views[i], views[k]) / temperature) for k in range(2 * num) if k != i)
        return -math.log(math.exp(dot(views[i], views[j]) / temperature) / total)

    return [(one(i, i + num) + one(i + num, i)) / 2 for i in range(num)]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(num=st.integers(1, 5), seed=st.integers(0, 1000))
def test_moco_loss(num: int, seed: int) -> None:
    framework = build("moco").double()
    assert isinstance(framework, MoCo)
    query, key = rows(num, 8, seed), rows(num, 8, seed + 1)
    assert framework.loss(query, key).tolist() == pytest.approx(slow_info_nce(query, key, framework.queue, 0.2))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(num=st.integers(2, 5), seed=st.integers(0, 1000))
def test_simclr_loss(num: int, seed: int) -> None:
    framework = build("simclr")
    first, second = rows(num, 8, seed), rows(num, 8, seed + 1)
    ours = (framework.loss(first, second) + framework.loss(second, first)) / 2
    assert ours.tolist() == pytest.approx(slow_nt_xent(first, second, 0.3))


def test_byol_and_simsiam_losses() -> None:
    query, key = rows(5, 8, 0), rows(5, 8, 1)
    distances = [sum((float(a) - float(b)) ** 2 for a, b in zip(q, k)) for q, k in zip(query, key)]
    assert build("byol").loss(query, key).tolist() == pytest.approx([2 * distance for distance in distances])
    cosines = [-dot(q, k) for q, k in zip(query, key)]
    assert build("simsiam").loss(query, key).tolist() == pytest.approx(cosines)


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "densecl"])  # its rows have another form
def test_loss_gradients(name: str) -> None:
    framework = build(name).double()
    query, key = rows(3, 8, 0).requires_grad_(), rows(3, 8, 1).requires_grad_(framework.keys_have_gradient)
    assert torch.autograd.gradcheck(
        lambda q, k: framework.loss(F.normalize(q, dim=1), F.normalize(k, dim=1)), (query, key)
    )


def test_lightly_agrees_on_moco_and_simclr(moco: MoCo) -> None:
    moco.double()
    query, key = rows(6, 8, 0), rows(6, 8, 1)
    theirs = NTXentLoss(temperature=0.2, memory_bank_size=(16, 8))
    theirs.memory_bank.bank = moco.queue.clone()
    theirs.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.int64)
    assert float(moco.loss(query, key).mean()) == pytest.approx(float(theirs(query, key)), rel=1e-6)
    simclr = build("simclr")
    ours = (simclr.loss(query, key) + simclr.loss(key, query)).mean() / 2
    assert float(ours) == pytest.approx(float(NTXentLoss(temperature=0.3)(query, key)), rel=1e-6)


def slow_barlow_twins(first: Tensor, second: Tensor, weight: float) -> float:
    """Equations 1 and 2 of the Barlow Twins paper, number by number."""
    num, dim = first.shape

    def normalised(view: Tensor) -> list[list[float]]:
        columns = []
        for column in view.T.tolist():
            mean = sum(column) / num
            spread = math.sqrt(sum((value - mean) ** 2 for value in column) / num + 1e-5)
            columns.append([(value - mean) / spread for value in column])
        return columns

    one, other = normalised(first), normalised(second)
    total = 0.0
    for i in range(dim):
        for j in range(dim):
            c = sum(a * b for a, b in zip(one[i], other[j])) / num
            total += (1 - c) ** 2 if i == j else weight * c * c
    return total


def slow_vicreg(first: Tensor, second: Tensor) -> float:
    """Equations 1 to 6 of the VICReg paper, with the factors of its code."""
    num, dim = first.shape
    distance = sum((float(a) - float(b)) ** 2 for a, b in zip(first.flatten(), second.flatten())) / (num * dim)
    hinges, products = 0.0, 0.0
    for view in (first, second):
        columns = [[value - sum(column) / num for value in column] for column in view.T.tolist()]
        for i in range(dim):
            variance = sum(value * value for value in columns[i]) / (num - 1)
            hinges += max(0.0, 1 - math.sqrt(variance + 1e-4)) / dim
            for j in range(dim):
                if i != j:
                    products += (sum(a * b for a, b in zip(columns[i], columns[j])) / (num - 1)) ** 2 / dim
    return 25 * distance + 25 * hinges / 2 + products


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(num=st.integers(2, 6), seed=st.integers(0, 1000))
def test_losses_of_a_batch(num: int, seed: int) -> None:
    query, key = embeddings(num, seed), embeddings(num, seed + 1)
    for name, slow in (("barlowtwins", slow_barlow_twins(query, key, 0.0051)), ("vicreg", slow_vicreg(query, key))):
        assert build(name).loss(query, key).tolist() == pytest.approx([slow] * num, rel=1e-6), name


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(num=st.integers(3, 6), seed=st.integers(0, 1000), share=st.floats(0.01, 1))
def test_the_mixed_loss_of_a_batch(num: int, seed: int, share: float) -> None:
    """The properties that make it the counterpart of equation 6."""
    query, key = embeddings(num, seed), embeddings(num, seed + 1)
    lam = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for name in ("barlowtwins", "vicreg"):
        framework = build(name)
        assert isinstance(framework, BatchLossFramework)
        whole = float(framework.loss(query, key)[0])
        same = framework.mixed_loss(query, key, torch.full((num,), share, dtype=torch.float64))
        assert float(same) == pytest.approx(share * whole, rel=1e-6)
        # An image twice is an image with twice the weight.
        double = torch.cat([query, query[:1]]), torch.cat([key, key[:1]])
        weights = torch.cat([torch.full((1,), 2.0, dtype=torch.float64), torch.ones(num - 1, dtype=torch.float64)])
        if name == "barlowtwins":
            twice = framework.mixed_loss(query, key, weights / 2) * num
            listed = framework.mixed_loss(*double, torch.full((num + 1,), 0.5, dtype=torch.float64)) * (num + 1)
            assert float(twice) == pytest.approx(float(listed), rel=1e-6)
        # One of which nothing is seen changes nothing.
        lam[0] = 0
        moved = query.clone()
        moved[0] += 5
        assert float(framework.mixed_loss(moved, key, lam)) == pytest.approx(
            float(framework.mixed_loss(query, key, lam)), rel=1e-6
        )
        nothing = framework.mixed_loss(query, key, torch.zeros(num, dtype=torch.float64))
        assert float(nothing) == 0


def test_lightly_agrees_on_barlow_twins_and_vicreg() -> None:
    query, key = embeddings(12, 0), embeddings(12, 1)
    ours = build("vicreg").loss(query, key)[0]
    assert float(ours) == pytest.approx(float(VICRegLoss()(query, key)), rel=1e-6)
    # It takes the unbiased variance in the normalisation, and 5e-3.
    ours = BarlowTwinsRecipe(dim=8, projector_width=16, off_diagonal=5e-3).build(BACKBONE).loss(query, key)[0]
    assert float(ours) == pytest.approx(float(BarlowTwinsLoss()(query, key)), rel=1e-3)


@pytest.mark.slow
def test_densecl_loss_place_by_place() -> None:
    """Equations 1 to 4 of the DenseCL paper, for each image and each of its places."""
    framework = build("densecl").eval()
    assert isinstance(framework, DenseCL)
    rng = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 3, 32, 48, generator=rng) for _ in range(2)]
    query, key = framework.query(images[0]).detach(), framework.answer(images[1]).detach()

    def of(encoder: Any, projector: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        last = nn.Sequential(*[*encoder.trunk.children()][:-2])(pictures)  # without pooling and classifier
        return encoder(pictures), projector(last).flatten(2), last.flatten(2)

    with torch.no_grad():
        asked = of(framework.query_encoder, framework.dense_projector, images[0])
        answered = of(framework.key_encoder, framework.dense_key_projector, images[1])
    ours = framework.loss(query, key)
    for row in range(3):
        q, k = (F.normalize(side[0][row], dim=0) for side in (asked, answered))
        whole = slow_info_nce(q[None], k[None], framework.queue[:, :8], 0.2)[0]
        places = []
        for place in range(asked[1].shape[2]):
            near = [
                dot(F.normalize(asked[2][row, :, place], dim=0), F.normalize(answered[2][row, :, other], dim=0))
                for other in range(answered[1].shape[2])
            ]
            partner = near.index(max(near))
            dense = F.normalize(asked[1][row, :, place], dim=0), F.normalize(answered[1][row, :, partner], dim=0)
            places += slow_info_nce(dense[0][None], dense[1][None], framework.queue[:, 8:], 0.2)
        wanted = 0.6 * whole + 0.4 * sum(places) / len(places)
        assert float(ours[row]) == pytest.approx(wanted, rel=1e-5)
    means = F.normalize(answered[1].mean(dim=2), dim=1)
    assert torch.allclose(framework.negative(key)[:, 8:], means, atol=1e-6)


def test_mocov3_loss() -> None:
    """Algorithm 1: 2τ times the cross-entropy of each direction; the keys of the other images are the negatives."""
    query, key = rows(5, 8, 0), rows(5, 8, 1)
    logits = [[dot(q, k) / 0.3 for k in key] for q in query]
    wanted = [4 * 0.3 * (math.log(sum(map(math.exp, row))) - row[number]) for number, row in enumerate(logits)]
    assert build("mocov3").loss(query, key).tolist() == pytest.approx(wanted)


def test_loss_is_fp32_inside_autocast(moco: MoCo) -> None:
    query, key = rows(4, 8, 0).float(), rows(4, 8, 1).float()
    plain = moco.loss(query, key)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(moco.loss(query, key), plain)


def test_simclr_counts_itself_out(moco: MoCo) -> None:
    """The similarity of an anchor with itself is no negative: with one image there is nothing but the positive."""
    framework = build("simclr")
    assert isinstance(framework, SimCLR)
    query = rows(1, 8, 0)
    assert framework.loss(query, rows(1, 8, 1)).tolist() == pytest.approx([0])
