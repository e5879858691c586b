from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.randomness import generator
from pretrain.mixing import MixMask, Mixture, draw_mixture, mix_by_mask, mixture_loss, reverse_permutation


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 7), seed=st.integers(0, 10_000))
def test_mixture_and_switch_per_pixel_for_any_permutation(num: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, 5, 6, generator=draws)
    mask = torch.rand(5, 6, generator=draws) < 0.5
    partner = torch.randperm(num, generator=draws)
    own = float(mask.double().mean())
    mixture = mix_by_mask(images, mask, own, partner)
    for i in range(num):
        for y in range(5):
            for x in range(6):
                source = i if mask[y, x] else int(partner[i])
                assert torch.equal(mixture.images[i, :, y, x], images[source, :, y, x])
    for i in range(num):  # the switch image of i: i is where the mask is 0
        switched = mixture.images[mixture.switched[i]]
        assert torch.equal(switched[:, ~mask], images[i][:, ~mask])


def test_reverse_permutation_is_its_own_inverse() -> None:
    images = torch.randn(6, 3, 8, 8)
    mixture = draw_mixture(MixMask(grid=4), images, generator(0))
    assert torch.equal(mixture.partner, torch.tensor([5, 4, 3, 2, 1, 0]))
    assert torch.equal(mixture.switched, mixture.partner)


def test_lambda_is_the_area_that_was_drawn() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 9, 9)
    for seed in range(20):
        mixture = draw_mixture(MixMask(grid=4, ratio=0.3), images, generator(seed))
        kept = (mixture.images[0, 0] == 0).double().mean()
        assert torch.allclose(mixture.own.double(), kept, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 8), own=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_mixing_with_itself_gives_the_clean_loss(num: int, own: float, seed: int) -> None:
    losses = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    identity = torch.arange(num)
    mixture = Mixture(torch.zeros(num, 3, 1, 1), torch.full((num,), own, dtype=torch.float64), identity)
    assert torch.allclose(mixture_loss(losses, losses[mixture.switched], mixture), losses.mean())


def test_mixture_loss_against_a_loop_with_a_lambda_per_sample() -> None:
    draws = torch.Generator().manual_seed(1)
    num = 5
    own, partner = torch.rand(num, generator=draws), torch.randperm(num, generator=draws)
    table = torch.rand(num, num, generator=draws)  # loss of mixture i against key j
    mixture = Mixture(torch.zeros(num, 3, 1, 1), own, partner)
    expected = 0.0
    for i in range(num):
        expected += float(own[i] * table[i, i] + (1 - own[i]) * table[i, partner[i]]) / num
    key = torch.arange(num)
    actual = mixture_loss(table[key, key], table[mixture.switched, key], mixture)
    assert abs(float(actual) - expected) < 1e-6


def test_without_the_switch_term_only_the_own_part_counts() -> None:
    mixture = Mixture(torch.zeros(2, 3, 1, 1), torch.tensor([0.25, 0.25]), reverse_permutation(2, torch.device("cpu")))
    assert float(mixture_loss(torch.tensor([4.0, 8.0]), None, mixture)) == 1.5
