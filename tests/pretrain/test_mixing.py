from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from mixmask.pretrain.mixture import Mixture, Rows, draw_mixtures, mix_by_mask, mixture_loss, reverse_permutation
from mixmask.pretrain.mixtures.erase import Erase, erase
from mixmask.pretrain.mixtures.mixmask import MixMask
from mixmask.pretrain.mixtures.mixmask_unmix import MixMaskUnMix
from mixmask.pretrain.mixtures.none import NoMix
from mixmask.pretrain.mixtures.unmix import UnMix, cut_box


def numbered(num: int, size: int = 12) -> Tensor:
    """Image i has the value i everywhere."""
    return torch.arange(float(num)).view(num, 1, 1, 1).expand(num, 3, size, size).contiguous()


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 7), per_sample=st.booleans(), seed=st.integers(0, 10_000))
def test_mixture_and_switch_per_pixel_for_any_permutation(num: int, per_sample: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    images = torch.randn(num, 3, 5, 6, generator=rng)
    masks = torch.rand(num if per_sample else 1, 1, 5, 6, generator=rng) < 0.5
    partner = torch.randperm(num, generator=rng)
    mixed = mix_by_mask(images, masks, partner)
    mixture = Mixture("x", mixed, torch.zeros(num), partner)
    masks = masks.expand(num, 1, 5, 6)
    for i in range(num):
        for y in range(5):
            for x in range(6):
                source = i if masks[i, 0, y, x] else int(partner[i])
                assert torch.equal(mixed[i, :, y, x], images[source, :, y, x])
    for i in range(num):  # the switch image of i: i is where that mixture's mask is 0
        j = int(mixture.inverse_perm[i])
        outside = ~masks[j, 0]
        assert torch.equal(mixed[j][:, outside], images[i][:, outside])


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(2, 9),
    size=st.integers(8, 24),
    grid=st.integers(2, 8),
    ratio=st.floats(0.05, 0.95) | st.just((0.0, 1.0)) | st.just((0.25, 0.75)),
    mask=st.sampled_from(["block", "discrete"]),
    per=st.sampled_from(["batch", "sample"]),
    exact=st.booleans(),
    partner=st.sampled_from(["reverse", "random"]),
    seed=st.integers(0, 10_000),
)
def test_lambda_is_the_area_that_was_drawn(
    num: int, size: int, grid: int, ratio: Any, mask: Any, per: Any, exact: bool, partner: Any, seed: int
) -> None:
    recipe = MixMask(grid=grid, ratio=ratio, mask=mask, mask_per=per, exact_ratio=exact, partner=partner)
    (mixture,) = draw_mixtures(recipe, numbered(num, size), random.Random(seed))
    assert sorted(mixture.perm.tolist()) == list(range(num))
    for i in range(num):
        other = int(mixture.perm[i])
        values = set(mixture.images[i].unique().tolist())
        assert values <= {float(i), float(other)}
        if other != i:
            kept = float((mixture.images[i, 0] == i).double().mean())
            assert float(mixture.lam[i]) == pytest.approx(kept, abs=1e-6)
            assert 0 < kept < 1
    if per == "batch":
        assert len(set(mixture.lam.tolist())) == 1
    if exact and not isinstance(ratio, tuple) and size % grid == 0:
        goal = min(max(round(ratio * grid * grid), 1), grid * grid - 1)
        assert mixture.lam.tolist() == pytest.approx([goal / grid**2] * num, abs=1e-6)


def test_masks_per_sample_differ_and_per_batch_do_not() -> None:
    masks, own = MixMask(grid=8, mask_per="sample").draw_masks("block", 16, 16, 16, random.Random(0))
    assert masks.shape == (16, 1, 16, 16)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 10
    assert own.shape == (16,)
    masks, own = MixMask(grid=8).draw_masks("block", 16, 16, 16, random.Random(0))
    assert masks.shape == (1, 1, 16, 16)
    assert own.shape == (1,)


def test_a_ratio_from_a_range_is_uniform() -> None:
    recipe = MixMask(grid=16, mask="discrete", ratio=(0.25, 0.75), exact_ratio=True)
    own = torch.cat([recipe.draw_masks("discrete", 1, 16, 16, random.Random(seed))[1] for seed in range(2000)])
    assert float(own.min()) >= 0.25
    assert float(own.max()) <= 0.75
    quarters = torch.histc(own, 4, 0.25, 0.75) / 2000
    assert (quarters - 0.25).abs().max() < 0.04


def test_reverse_is_the_default_and_its_own_inverse() -> None:
    (mixture,) = draw_mixtures(MixMask(grid=4), numbered(6), random.Random(0))
    assert mixture.perm.tolist() == [5, 4, 3, 2, 1, 0]
    assert torch.equal(mixture.inverse_perm, mixture.perm)


def test_mixmask_upon_unmix_draws_different_or_the_same_pairs() -> None:
    images = numbered(32)
    unmix, mixmask = draw_mixtures(MixMaskUnMix(grid=4), images, random.Random(0))
    assert (unmix.name, mixmask.name) == ("unmix", "mixmask")
    assert unmix.perm.tolist() == reverse_permutation(32)
    assert not torch.equal(mixmask.perm, unmix.perm)
    unmix, mixmask = draw_mixtures(MixMaskUnMix(grid=4, permutation="same"), images, random.Random(0))
    assert torch.equal(mixmask.perm, unmix.perm)
    assert draw_mixtures(NoMix(), images, random.Random(0)) == []


def test_memory_order_is_kept() -> None:
    images = torch.randn(4, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    for recipe in (MixMask(grid=4), MixMask(grid=4, mask_per="sample"), UnMix(unmix_prob=0), UnMix(unmix_prob=1)):
        (mixture,) = draw_mixtures(recipe, images, random.Random(0))
        assert mixture.images.is_contiguous(memory_format=torch.channels_last)
    for fill in ("zero", "noise"):
        erased = erase(Erase(grid=4, fill=fill), images, random.Random(0))
        assert erased.is_contiguous(memory_format=torch.channels_last)


# --- Un-Mix ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(height=st.integers(2, 64), width=st.integers(2, 64), keep=st.floats(0, 1), data=st.data())
def test_the_box_is_clipped_and_lambda_is_what_it_leaves(height: int, width: int, keep: float, data: Any) -> None:
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    top, bottom, left, right, left_over = cut_box(height, width, keep, y, x)
    assert 0 <= top <= bottom <= height
    assert 0 <= left <= right <= width
    inside = sum(
        1 for row in range(height) for column in range(width) if top <= row < bottom and left <= column < right
    )
    assert left_over == pytest.approx(1 - inside / (height * width))
    half_height, half_width = int(height * (1 - keep) ** 0.5) // 2, int(width * (1 - keep) ** 0.5) // 2
    assert (top, bottom) == (max(y - half_height, 0), min(y + half_height, height))
    assert (left, right) == (max(x - half_width, 0), min(x + half_width, width))


def test_unmix_is_mixup_with_its_probability_and_lambda_uniform() -> None:
    images = numbered(4, 16)
    mixups, kept = 0, []
    for seed in range(1500):
        (mixture,) = draw_mixtures(UnMix(unmix_prob=0.3), images, random.Random(seed))
        own = float(mixture.lam[0])
        first, values = mixture.images[0, 0], mixture.images[0].unique().tolist()
        if len(values) == 1 and values[0] not in (0.0, 3.0):  # one blended value: 0 · λ + 3 · (1 - λ)
            mixups += 1
            assert values[0] == pytest.approx(3 * (1 - own), abs=1e-5)
            kept.append(own)
        else:
            assert float((first == 0).double().mean()) == pytest.approx(own, abs=1e-6)
            rows, columns = (first == 3).any(1).nonzero(), (first == 3).any(0).nonzero()
            if len(rows):  # the partner's pixels are one full box
                box = first[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                assert bool((box == 3).all())
    assert mixups / 1500 == pytest.approx(0.3, abs=0.04)
    quarters = torch.histc(torch.tensor(kept), 4, 0, 1) / len(kept)
    assert (quarters - 0.25).abs().max() < 0.07


# --- loss ------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 8), own=st.floats(0.05, 0.95), seed=st.integers(0, 1000))
def test_mixing_with_itself_gives_the_clean_loss(num: int, own: float, seed: int) -> None:
    losses = torch.rand(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    identity = torch.arange(num)
    mixture = Mixture("x", torch.zeros(num, 3, 1, 1), torch.full((num,), own, dtype=torch.float64), identity)
    assert torch.allclose(mixture_loss(losses, losses[mixture.perm], mixture), losses.mean())


@settings(max_examples=30, deadline=None)
@given(num=st.integers(2, 8), seed=st.integers(0, 1000))
def test_mixture_loss_against_a_loop_with_a_lambda_per_sample(num: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    own, partner = torch.rand(num, generator=rng), torch.randperm(num, generator=rng)
    table = torch.rand(num, num, generator=rng)  # loss of mixture i against key j
    mixture = Mixture("x", torch.zeros(num, 3, 1, 1), own, partner)
    expected = 0.0
    for i in range(num):  # mixture i shows i with its λ and its partner with 1 - λ
        expected += float(own[i] * table[i, i] + (1 - own[i]) * table[i, partner[i]]) / num
    key = torch.arange(num)
    actual = mixture_loss(table[key, key], table[key, mixture.perm], mixture)
    assert abs(float(actual) - expected) < 1e-6
    as_in_equation_6 = (own * table[key, key]).mean() + ((1 - own) * table[key, partner]).mean()
    inverse = mixture.inverse_perm  # the paper's order: mixture p⁻¹(j) against key j
    assert float(((1 - own[inverse]) * table[inverse, key]).mean() + (own * table[key, key]).mean()) == pytest.approx(
        float(as_in_equation_6)
    )


def test_without_the_switch_term_only_the_own_part_counts() -> None:
    partner = torch.tensor(reverse_permutation(2))
    mixture = Mixture("x", torch.zeros(2, 3, 1, 1), torch.tensor([0.25, 0.25]), partner)
    assert float(mixture_loss(torch.tensor([4.0, 8.0]), None, mixture)) == 1.5


# --- erasing ---------------------------------------------------------------------------------------------------------


def test_erasing_hides_cells_behind_zeros_or_noise() -> None:
    images = torch.full((8, 3, 32, 32), 5.0)
    erased = erase(Erase(grid=4, mask=("random",), fill="zero", ratio=0.5, exact_ratio=True), images, random.Random(0))
    assert set(erased.unique().tolist()) == {0.0, 5.0}
    assert float((erased == 5).double().mean()) == 0.5
    assert torch.equal(erased[:, 0], erased[:, 1])  # all channels alike
    assert not torch.equal(erased[0], erased[1])  # each image its own
    noisy = erase(Erase(grid=4, mask=("random",), exact_ratio=True, fill="noise"), images, random.Random(0))
    hidden = noisy[noisy != 5]
    assert len(hidden) == images.numel() // 2
    assert float(hidden.mean()) == pytest.approx(0, abs=0.05)
    assert float(hidden.std()) == pytest.approx(1, abs=0.05)


def test_channelwise_masks_differ_between_channels() -> None:
    images = torch.full((2, 3, 16, 16), 5.0)
    erased = erase(Erase(grid=8, mask=("channelwise",)), images, random.Random(0))
    assert not torch.equal(erased[0, 0], erased[0, 1])


def test_one_of_the_named_patterns_is_drawn() -> None:
    recipe = Erase(grid=8, mask=("random", "focal", "channelwise"))
    seen = set()
    for seed in range(60):
        masks = erase(recipe.model_copy(update={"fill": "zero"}), torch.ones(1, 3, 8, 8), random.Random(seed)) == 1
        kept = masks[0, 0].nonzero()
        box = (kept.amax(0) - kept.amin(0) + 1).prod()
        seen.add(
            "channelwise"
            if bool((masks[0, 0] != masks[0, 1]).any())
            else "focal"
            if int(box) == len(kept)
            else "random"
        )
    assert seen == {"random", "focal", "channelwise"}


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, [0.7, 0.2], [0.5, 0.5], [-0.1, 0.5]])
def test_ratios_that_mean_nothing_are_refused(ratio: Any) -> None:
    with pytest.raises(ValidationError, match="ratio must"):
        MixMask.model_validate({"ratio": ratio})


# --- groups ----------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    recipe=st.sampled_from(
        [MixMask(grid=4, mask_groups=4), MixMask(grid=4, mask_groups=4, mask_per="sample", partner="random"),
         UnMix(mask_groups=4), MixMaskUnMix(grid=4, mask_groups=4)]
    ),
    processes=st.sampled_from([2, 4]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_the_processes_rows_are_mixed_as_one_process_mixes_them(recipe: Any, processes: int, seed: int) -> None:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    whole = draw_mixtures(recipe, images, random.Random(seed))
    each = 16 // processes
    for rank in range(processes):
        mine = slice(rank * each, (rank + 1) * each)
        parts = draw_mixtures(recipe, images[mine], random.Random(seed), Rows(rank * each, each, 16))
        for part, complete in zip(parts, whole, strict=True):
            assert not part.across
            assert torch.equal(part.images, complete.images[mine])
            assert torch.equal(part.lam, complete.lam[mine])
            assert torch.equal(part.perm + rank * each, complete.perm[mine])
            if complete.mask is not None:
                assert part.mask is not None
                assert torch.equal(part.mask, complete.mask[mine])


def test_each_group_has_a_mask_and_partners_of_its_own() -> None:
    (mixture,) = draw_mixtures(MixMask(grid=8, mask_groups=4), numbered(16, 16), random.Random(0))
    assert mixture.mask is not None
    groups = [mixture.mask[start : start + 4] for start in (0, 4, 8, 12)]
    assert all(bool((group == group[:1]).all()) for group in groups)
    assert len({tuple(group[0].flatten().tolist()) for group in groups}) == 4
    assert mixture.perm.tolist() == [3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12]


@pytest.mark.parametrize(
    "recipe", [Erase(grid=4), Erase(grid=4, mask_per="batch", mask_groups=2, mask=("channelwise",))]
)
def test_erasing_is_the_same_on_any_number_of_processes(recipe: Erase) -> None:
    images = torch.randn(8, 3, 16, 16)
    whole = erase(recipe, images, random.Random(3))
    for rank in range(2):
        mine = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(erase(recipe, images[mine], random.Random(3), Rows(4 * rank, 4, 8)), whole[mine])


def test_groups_that_do_not_divide_the_batch_are_refused() -> None:
    from mixmask.pretrain.recipe import PretrainRecipe

    tree: dict[str, Any] = {
        "name": "x", "data": {"name": "x", "root": "/x"}, "optimizer": {"kind": "sgd", "lr": 0.1}, "epochs": 1,
        "batch_size": 16, "framework": {"kind": "simsiam"},
    }  # fmt: skip
    PretrainRecipe.model_validate({**tree, "mix": {"kind": "mixmask", "mask_groups": 8}})
    for groups, accumulate in ((3, 1), (16, 1), (8, 2)):
        with pytest.raises(ValidationError, match=f"mix.mask_groups {groups}: .* cannot be split in {groups} equal"):
            PretrainRecipe.model_validate(
                {**tree, "accumulate": accumulate, "mix": {"kind": "mixmask", "mask_groups": groups}}
            )
