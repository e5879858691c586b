"""MoCo: its queue, its shuffled keys, its groups of batch statistics, and its symmetric form."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mixmask.engine.randomness import generator
from mixmask.pretrain.frameworks.moco import MoCoRecipe
from mixmask.pretrain.frameworks.moco.network import MoCo
from mixmask.pretrain.mixture import draw_mixtures, mixture_loss
from mixmask.pretrain.mixtures.mixmask_unmix import MixMaskUnMix
from mixmask.pretrain.split_batch_norm import SplitBatchNorm2d, fold_statistics, split_layers, spread_statistics
from tests.pretrain.small_frameworks import BACKBONE, MOCO, build, slow_info_nce

# --- MoCo ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def moco() -> MoCo:
    framework = build("moco")
    assert isinstance(framework, MoCo)
    return framework


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(batch=st.sampled_from([1, 2, 4, 8, 16]), steps=st.integers(1, 40))
def test_queue_is_first_in_first_out_and_wraps(batch: int, steps: int) -> None:
    framework = build("moco")
    assert isinstance(framework, MoCo)
    framework.queue.fill_(-1)
    for step in range(steps):
        framework.fresh.append(torch.full((batch, 8), float(step)))
        framework.after_step(0)
    newest = [float(max(steps - 1 - age // batch, -1)) for age in range(16)]
    end = (steps * batch) % 16
    assert int(framework.queue_position) == end
    found = [float(framework.queue[(end - 1 - age) % 16, 0]) for age in range(16)]
    assert found == newest


def test_keys_enter_the_queue_after_the_step_only(moco: MoCo) -> None:
    before = moco.queue.clone()
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    keys = [
        moco.forward_views(views, views, generator(0)).keys[0] for _ in range(2)
    ]  # two parts of an accumulated batch
    assert torch.equal(moco.queue, before)
    moco.after_step(0)
    assert torch.equal(moco.queue[:8], torch.cat(keys))
    assert torch.equal(moco.queue[8:], before[8:])


def test_keys_come_back_in_order(moco: MoCo) -> None:
    """In eval mode a key depends on its own image alone, so the shuffle must leave no trace."""
    moco.eval()
    images = torch.randn(6, 3, 16, 16)
    keys = moco.key(images, generator(5))
    for i in range(6):
        alone: Tensor = F.normalize(moco.key_encoder(images[i : i + 1]), dim=1)
        assert torch.allclose(keys[i : i + 1], alone, atol=1e-5)


def test_shuffle_changes_the_groups_of_batch_statistics(moco: MoCo) -> None:
    moco.train()
    images = torch.randn(8, 3, 16, 16)
    assert not torch.allclose(moco.key(images, generator(1)), moco.key(images, generator(2)), atol=1e-4)


@pytest.mark.parametrize("together", [False, True])  # as on CPUs, and as on GPUs
@pytest.mark.parametrize("channels_last", [False, True])
def test_split_batch_norm_is_batch_norm_per_group(channels_last: bool, together: bool) -> None:
    torch.manual_seed(0)
    split, plain = SplitBatchNorm2d(3, 4), nn.BatchNorm2d(3)
    with torch.no_grad():
        split.weight.normal_()
        split.bias.normal_()
    images = torch.randn(8, 3, 5, 5) * 2 + 1
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    groups, means, variances = [], [], []
    inputs = [images.clone().requires_grad_() for _ in range(2)]
    for part in inputs[0].chunk(4):
        own = nn.BatchNorm2d(3)
        own.load_state_dict(split.state_dict())
        groups.append(own(part))
        means.append(own.running_mean)
        variances.append(own.running_var)
    expected, actual = torch.cat(groups), split.together(inputs[1]) if together else split(inputs[1])
    assert torch.allclose(actual, expected, atol=1e-6)
    assert actual.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    split.fold()
    assert int(split.num_batches_tracked) == 1
    assert torch.allclose(split.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(split.running_var, torch.stack(variances).mean(0), atol=1e-6)
    upstream = torch.randn_like(expected)
    (expected * upstream).sum().backward()
    (actual * upstream).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, atol=1e-5)
    plain.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(images), plain.eval()(images))


def test_groups_of_statistics_are_folded_whenever_somebody_looks() -> None:
    torch.manual_seed(0)
    layers = [SplitBatchNorm2d(width, 2) for width in (3, 5, 3, 5)]
    one_by_one, together = nn.ModuleList(layers[:2]), nn.ModuleList(layers[2:])

    def forward(number: int) -> None:
        torch.manual_seed(number)
        for one, other in zip(one_by_one, together, strict=True):
            assert isinstance(one, SplitBatchNorm2d)
            assert isinstance(other, SplitBatchNorm2d)
            images = torch.randn(4, one.num_features, 6, 6) + 2
            assert torch.allclose(one.one_by_one(images), other.together(images), atol=1e-6)

    def same() -> bool:
        pairs = zip(one_by_one.state_dict().values(), together.state_dict().values(), strict=True)
        return all(torch.allclose(one.float(), other.float(), atol=1e-6) for one, other in pairs)

    for number in range(3):  # several forward passes in a step
        forward(number)
    fold_statistics(split_layers(together))
    spread_statistics(split_layers(together))
    assert same()
    assert [int(count) for name, count in together.state_dict().items() if "tracked" in name] == [3, 3]
    forward(3)
    assert same()  # state_dict folds
    forward(4)
    saved = {name: value.clone() for name, value in one_by_one.state_dict().items()}
    forward(5)
    for model in (one_by_one, together):
        model.load_state_dict(saved)  # replaces what has not been folded
    assert same()
    forward(6)
    assert same()
    forward(7)
    together.eval()
    assert all(isinstance(layer, SplitBatchNorm2d) and layer.apart is None for layer in together)
    assert same()
    copied = copy.deepcopy(together.train())
    together = copied
    forward(8)
    assert same()


def test_moco_refuses_what_does_not_divide() -> None:
    with pytest.raises(ValueError, match="is not a multiple of batch_size 10"):
        MOCO.check_batch(10, 1, 1)
    with pytest.raises(ValueError, match="leaves 1 image per group"):
        MOCO.check_batch(2, 1, 1)
    with pytest.raises(ValueError, match="cannot be split in 8 equal groups"):
        MoCoRecipe(queue_size=24, bn_splits=8).check_batch(12, 1, 1)
    MOCO.check_batch(16, 2, 2)
    with pytest.raises(ValueError, match="2 groups cannot be shared by 3 processes"):
        MOCO.check_batch(16, 1, 3)


# --- symmetric MoCo --------------------------------------------------------------------------------------------------


def slow_symmetric(moco: MoCo, first: Tensor, second: Tensor, mixed: Tensor, partner: list[int], lam: float) -> float:
    """Un-Mix's published CIFAR form, image by image: both views ask, the mixture of view 1 meets both keys, all is added."""

    def embed(encoder: nn.Module, images: Tensor) -> Tensor:
        return F.normalize(encoder(images), dim=1)

    total = 0.0
    queue, temperature = moco.queue, moco.recipe.temperature
    for asking, answering in ((first, second), (second, first)):
        query, key = embed(moco.query_encoder, asking), embed(moco.key_encoder, answering)
        mixtures = embed(moco.query_encoder, mixed)
        inverse = [partner.index(i) for i in range(len(partner))]
        clean = slow_info_nce(query, key, queue, temperature)
        own = slow_info_nce(mixtures, key, queue, temperature)
        switched = slow_info_nce(mixtures[inverse], key, queue, temperature)
        for terms, weight in ((clean, 1.0), (own, lam), (switched, 1 - lam)):
            total += weight * sum(terms) / len(terms)
    return total


@pytest.mark.parametrize("permutation", ["same", "different"])
def test_symmetric_moco_is_unmixs_published_form(permutation: str) -> None:
    recipe = MOCO.model_copy(update={"symmetric": True, "bn_splits": 1})
    torch.manual_seed(0)
    moco = recipe.build(BACKBONE).eval()  # in eval mode an embedding depends on its own image alone
    assert moco.asks_with_both_views
    first, second = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    mix = MixMaskUnMix(grid=4, permutation=permutation)
    for mixture in draw_mixtures(mix, first, random.Random(0)):
        clean = moco.forward_views((first, second), (first, second), generator(0))
        assert len(clean.keys) == 2
        mixed = moco.query(mixture.images)
        ours = float(clean.losses.mean()) + sum(
            float(mixture_loss(moco.loss(mixed, key), moco.loss(mixed, key[mixture.perm]), mixture))
            for key in clean.keys
        )
        slow = slow_symmetric(moco, first, second, mixture.images, mixture.perm.tolist(), float(mixture.lam[0]))
        assert ours == pytest.approx(slow, rel=1e-5)


def test_both_views_keys_enter_the_symmetric_queue() -> None:
    moco = MOCO.model_copy(update={"symmetric": True}).build(BACKBONE).train()
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    clean = moco.forward_views(views, views, generator(0))
    moco.after_step(0)
    assert torch.equal(moco.queue[:8], torch.cat([clean.keys[1], clean.keys[0]]))  # view 1's keys first
    with pytest.raises(ValueError, match=r"the 32 keys of a step \(batch_size 16, symmetric\); valid: 32, 64"):
        MoCoRecipe(queue_size=48, symmetric=True, bn_splits=1).check_batch(16, 1, 1)
