from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, VICRegLoss
from lightly.loss.swav_loss import sinkhorn as lightly_sinkhorn
from torch import Tensor, nn

from mixmask.engine.backbones import BackboneRecipe
from mixmask.engine.heads import mlp
from mixmask.engine.randomness import generator
from mixmask.pretrain.batch_loss import BatchLossFramework
from mixmask.pretrain.diagnostics import feature_std
from mixmask.pretrain.framework import Framework, FrameworkRecipe, cosine_momentum
from mixmask.pretrain.frameworks.barlow_twins import BarlowTwinsRecipe
from mixmask.pretrain.frameworks.byol import BYOLRecipe
from mixmask.pretrain.frameworks.densecl import DenseCL, DenseCLRecipe
from mixmask.pretrain.frameworks.dino import DINO, DINORecipe
from mixmask.pretrain.frameworks.moco import MoCo, MoCoRecipe
from mixmask.pretrain.frameworks.mocov3 import MoCoV3Recipe
from mixmask.pretrain.frameworks.simclr import SimCLR, SimCLRRecipe
from mixmask.pretrain.frameworks.simsiam import SimSiamRecipe
from mixmask.pretrain.frameworks.swav import SwAV, SwAVRecipe, sinkhorn
from mixmask.pretrain.frameworks.vicreg import VICRegRecipe
from mixmask.pretrain.mixture import Mixture, mixture_loss

MOCO = MoCoRecipe(kind="mocov2", dim=8, queue_size=16, momentum=0.9, temperature=0.2, bn_splits=2)
RECIPES: dict[str, FrameworkRecipe] = {
    "moco": MOCO,
    "simclr": SimCLRRecipe(dim=8, projector_width=16, temperature=0.3),
    "byol": BYOLRecipe(dim=8, projector_width=16, momentum=0.9),
    "simsiam": SimSiamRecipe(dim=8, projector_layers=2),
    "mocov3": MoCoV3Recipe(dim=8, projector_width=16, momentum=0.9, temperature=0.3),
    "swav": SwAVRecipe(dim=8, projector_width=16, prototypes=12, num_small=2, small_crop=8, queue_size=8),
    "dino": DINORecipe(dim=8, projector_width=16, outputs=12, momentum=0.9, num_small=2, small_crop=8),
    "densecl": DenseCLRecipe(dim=8, queue_size=16, momentum=0.9, temperature=0.2, bn_splits=2, dense_weight=0.4),
    "barlowtwins": BarlowTwinsRecipe(dim=8, projector_width=16),
    "vicreg": VICRegRecipe(dim=8, projector_width=16),
}
BACKBONE = BackboneRecipe(arch="resnet18", stem="cifar")


def build(name: str) -> Framework:
    torch.manual_seed(0)
    return RECIPES[name].build(BACKBONE)


@pytest.fixture
def moco() -> MoCo:
    framework = build("moco")
    assert isinstance(framework, MoCo)
    return framework


def rows(num: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


# --- losses, number by number in float64 -----------------------------------------------------------------------------


def slow_info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> list[float]:
    """Equation 1 of the MoCo paper."""
    losses = []
    for q, k in zip(query, key):
        positive = math.exp(dot(q, k) / temperature)
        total = positive + sum(math.exp(dot(q, other) / temperature) for other in queue)
        losses.append(-math.log(positive / total))
    return losses


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


def embeddings(num: int, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num, 8, generator=rng, dtype=torch.float64) * torch.rand(8, generator=rng, dtype=torch.float64)


@settings(max_examples=20, deadline=None)
@given(num=st.integers(2, 6), seed=st.integers(0, 1000))
def test_losses_of_a_batch(num: int, seed: int) -> None:
    query, key = embeddings(num, seed), embeddings(num, seed + 1)
    for name, slow in (("barlowtwins", slow_barlow_twins(query, key, 0.0051)), ("vicreg", slow_vicreg(query, key))):
        assert build(name).loss(query, key).tolist() == pytest.approx([slow] * num, rel=1e-6), name


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


def slow_sinkhorn(similarity: list[list[float]], epsilon: float, iterations: int) -> list[list[float]]:
    """Algorithm 1 of the SwAV paper, appendix A, number by number."""
    codes = [[math.exp(value / epsilon) for value in row] for row in similarity]
    num, clusters = len(codes), len(codes[0])
    for _ in range(iterations):
        for cluster in range(clusters):
            total = sum(row[cluster] for row in codes)
            for row in codes:
                row[cluster] /= total * clusters
        for row in codes:
            total = sum(row)
            row[:] = [value / total / num for value in row]
    return [[value * num for value in row] for row in codes]


@settings(max_examples=25, deadline=None)
@given(num=st.integers(1, 6), clusters=st.integers(2, 5), seed=st.integers(0, 10**6), iterations=st.integers(1, 4))
def test_sinkhorn(num: int, clusters: int, seed: int, iterations: int) -> None:
    similarity = torch.rand(num, clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = sinkhorn(similarity, 0.05, iterations)
    assert ours.flatten().tolist() == pytest.approx(
        [code for row in slow_sinkhorn(similarity.tolist(), 0.05, iterations) for code in row]
    )
    assert ours.sum(dim=1).tolist() == pytest.approx([1.0] * num)
    theirs = lightly_sinkhorn(similarity.clone(), iterations=iterations, epsilon=0.05, gather_distributed=False)
    torch.testing.assert_close(ours, theirs)


def swapped(predictions: list[Tensor], codes: list[Tensor]) -> Tensor:
    """Each full view's code, predicted by every other view (SwAV equation 1, DINO equation 3), number by number."""
    terms = []
    for number, code in enumerate(codes):
        for view, prediction in enumerate(predictions):
            if view != number:
                terms.append([
                    -sum(c * math.log(p) for c, p in zip(codes_of, probabilities))
                    for codes_of, probabilities in zip(code.tolist(), (prediction / 0.1).softmax(dim=1).tolist())
                ])  # fmt: skip
    return torch.tensor(terms).mean(dim=0)


def test_small_views_predict_both_codes() -> None:
    rng = torch.Generator().manual_seed(0)
    full = [torch.randn(5, 3, 16, 16, generator=rng) for _ in range(2)]
    small = [torch.randn(5, 3, 8, 8, generator=rng) for _ in range(2)]
    for name in ("swav", "dino"):
        framework = build(name).eval()
        clean = framework.forward_views((*full, *small), (full[0], full[1]), generator(0))
        predictions = [framework.query(view).detach() for view in (*full, *small)]
        if isinstance(framework, DINO):
            codes = [((framework.teacher.cosines(framework.teacher(v))) / 0.04).softmax(dim=1).detach() for v in full]
        else:
            codes = [sinkhorn(prediction, 0.05, 3) for prediction in predictions[:2]]
        assert torch.allclose(clean.losses.detach(), swapped(predictions, codes), atol=1e-4)
        assert torch.allclose(clean.keys[0], codes[1], atol=1e-4)


def test_the_queue_of_swav_helps_to_make_codes_when_it_is_full() -> None:
    recipe = SwAVRecipe(dim=8, projector_width=16, prototypes=12, num_small=0, queue_size=6, queue_starts=0.2)
    torch.manual_seed(0)
    framework = recipe.build(BACKBONE)
    assert isinstance(framework, SwAV)
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    for progress, filled in ((0.1, 0), (0.3, 4), (0.5, 6)):
        clean = framework.forward_views((views[0], views[1]), (views[0], views[1]), generator(0))
        assert clean.partner is not None
        newest, before = clean.partner, framework.queue.clone()
        framework.after_step(progress)
        assert framework.filled == filled
        if filled:
            assert torch.equal(framework.queue[1, :4], newest)
            assert torch.equal(framework.queue[1, 4:], before[1, :2])
    similarity = framework._similarity(torch.cat([framework.queue[1], newest]))
    codes = framework.eval()._codes([newest, newest])
    assert torch.allclose(codes[1], sinkhorn(similarity, 0.05, 3)[6:])
    assert not torch.allclose(codes[1], sinkhorn(similarity[6:], 0.05, 3), atol=1e-3)


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_prototypes_stay_for_the_first_share(name: str) -> None:
    framework = build(name)
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    weight = next(p for n, p in framework.named_parameters() if n.endswith("prototypes.weight") and p.requires_grad)
    for progress, frozen in ((0.0, True), (0.5, False)):
        framework.progress = progress
        framework.forward_views(views, views, generator(0)).losses.mean().backward()
        framework.before_step()
        assert (weight.grad is None) is frozen
    framework.after_step(0.5)
    if name == "swav":
        assert weight.norm(dim=1).tolist() == pytest.approx([1.0] * 12, abs=1e-6)


def test_the_centre_and_the_temperature_of_dino() -> None:
    framework = build("dino")
    assert isinstance(framework, DINO)
    assert [framework.teacher_temperature(share) for share in (0, 0.03125, 0.0625, 0.9)] == pytest.approx(
        [0.04, 0.055, 0.07, 0.07]
    )
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    framework.forward_views(views, views, generator(0))
    mean = framework.fresh[0].clone()
    framework.after_step(0.1)
    assert torch.allclose(framework.center, 0.1 * mean)
    with pytest.raises(ValueError, match="the teacher must be sharper than the student"):
        DINORecipe(teacher_temperature=0.1)


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


def test_lightly_agrees_on_dino() -> None:
    """Its loss also takes outputs and a centre; with two views of each side both are equation 3."""
    framework = build("dino")
    student = [embeddings(5, seed).float() for seed in (1, 2)]
    teacher = [embeddings(5, seed).float() for seed in (3, 4)]
    keys = [(one / 0.04).softmax(dim=1) for one in teacher]
    ours = (framework.loss(student[0], keys[1]) + framework.loss(student[1], keys[0])).mean() / 2
    theirs = DINOLoss(output_dim=8, teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=1)
    assert float(ours) == pytest.approx(float(theirs(teacher, student, epoch=0)), rel=1e-5)


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


# --- every framework -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_clean_loss_is_put_together_from_its_parts(name: str) -> None:
    framework = build(name).eval()  # in eval mode an embedding depends on its own image alone
    first, second = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    clean = framework.forward_views((first, second), (first, second), generator(0))
    q1, q2 = framework.query(first), framework.query(second)
    if clean.partner is None:
        assert torch.allclose(clean.query, q1, atol=1e-5)
    if isinstance(framework, DenseCL):
        key = framework.answer(second)
        expected = framework.loss(q1, key)
    elif name == "swav":
        # Both views' codes, each predicted from the other view (equation 1).
        code, key = (sinkhorn(q.detach(), 0.05, 3) for q in (q1, q2))
        expected = (framework.loss(q2, code) + framework.loss(q1, key)) / 2
    elif isinstance(framework, DINO):
        answers = [framework.teacher.cosines(framework.teacher(view)) for view in (first, second)]
        k1, key = (((answer - framework.center) / 0.04).softmax(dim=1) for answer in answers)
        expected = (framework.loss(q1, key) + framework.loss(q2, k1)) / 2
    elif name == "moco":
        key = F.normalize(framework.key_encoder(second), dim=1)
        expected = framework.loss(q1, key)
    elif name == "simclr":
        key = q2
        expected = (framework.loss(q1, q2) + framework.loss(q2, q1)) / 2
    elif isinstance(framework, BatchLossFramework):
        key = q2
        expected = framework.loss(q1, q2)
    else:
        slow: Any = {"byol": "target", "mocov3": "momentum_encoder", "simsiam": "encoder"}[name]
        encoder = framework.get_submodule(slow)
        k1, key = F.normalize(encoder(first), dim=1), F.normalize(encoder(second), dim=1)
        expected = (framework.loss(q1, key) + framework.loss(q2, k1)) / 2
        if name == "byol":  # the paper's: the squared distances of both directions, added
            assert torch.allclose(expected, ((q1 - key) ** 2).sum(1) + ((q2 - k1) ** 2).sum(1), atol=1e-5)
    assert torch.allclose(clean.losses, expected, atol=1e-5)
    assert torch.allclose(clean.keys[0], key, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_mixed_with_itself_gives_the_clean_loss(name: str) -> None:
    framework = build(name).eval()
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    clean = framework.forward_views((images, images), (images, images), generator(0))
    mixture = Mixture("x", images, torch.rand(4), torch.arange(4))
    mixed = framework.query(mixture.images)
    losses = framework.loss(mixed, clean.keys[0]), framework.loss(mixed, clean.keys[0][mixture.perm])
    assert float(mixture_loss(*losses, mixture)) == pytest.approx(float(clean.losses.mean()), abs=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_an_erased_query_is_compared_with_clean_keys(name: str) -> None:
    framework = build(name).eval()
    first, second = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    hidden = torch.zeros_like(first)
    whole = framework.forward_views((first, second), (first, second), generator(0))
    erased = framework.forward_views((hidden, hidden), (first, second), generator(0))
    assert torch.allclose(erased.keys[0], whole.keys[0], atol=1e-5)
    if erased.partner is None:
        assert torch.allclose(erased.query, framework.query(hidden), atol=1e-5)
    else:
        assert whole.partner is not None
        assert torch.allclose(erased.partner, whole.partner, atol=1e-5)
        assert not torch.allclose(erased.query, whole.query)
    assert not torch.allclose(erased.losses, whole.losses)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_reach_what_is_trained_and_nothing_else(name: str) -> None:
    framework = build(name).train()
    views = (torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16))
    framework.forward_views(views, views, generator(0)).losses.mean().backward()
    for parameter_name, parameter in framework.named_parameters():
        slow = parameter_name.startswith(("key_encoder", "target", "momentum_encoder", "teacher", "dense_key"))
        assert parameter.requires_grad is not slow
        assert (parameter.grad is None) is slow, parameter_name


def test_simsiam_stops_the_gradient_of_its_keys() -> None:
    framework = build("simsiam")
    query, key = rows(3, 8, 0).requires_grad_(), rows(3, 8, 1).requires_grad_()
    framework.loss(query, key).sum().backward()
    assert query.grad is not None
    assert key.grad is None


def test_simsiam_keys_are_the_same_whether_or_not_they_are_computed_apart() -> None:
    framework = build("simsiam").train()
    first, second = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    together = framework.forward_views((first, second), (first, second), generator(0))
    apart = framework.forward_views((first.clone(), second.clone()), (first, second), generator(0))
    assert torch.allclose(together.losses, apart.losses, atol=1e-5)


def test_moving_averages_follow_their_formula(moco: MoCo) -> None:
    byol = build("byol")
    for framework, fast, slow, momentum in (
        (moco, "query_encoder", "key_encoder", 0.9),
        (byol, "online", "target", cosine_momentum(0.9, 0.25)),
    ):
        quick, lazy = framework.get_submodule(fast), framework.get_submodule(slow)
        with torch.no_grad():
            for parameter in quick.parameters():
                parameter.add_(1.0)
        before = [p.clone() for p in lazy.parameters()]
        framework.after_step(0.25)
        for old, new, target in zip(before, lazy.parameters(), quick.parameters()):
            assert torch.allclose(new, momentum * old + (1 - momentum) * target, atol=1e-6)


def test_cosine_momentum_rises_to_one() -> None:
    assert cosine_momentum(0.99, 0) == pytest.approx(0.99)
    assert cosine_momentum(0.99, 0.5) == pytest.approx(0.995)
    assert cosine_momentum(0.99, 1) == 1


# --- heads --------------------------------------------------------------------------------------------


def test_heads_have_the_layers_of_their_papers() -> None:
    def layers(module: nn.Module) -> list[str]:
        names = []
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                names.append(f"{layer.in_features}-{layer.out_features}")
            elif isinstance(layer, nn.BatchNorm1d):
                names.append("bn" if layer.affine else "bn-plain")
            elif isinstance(layer, nn.ReLU):
                names.append("relu")
        return names

    assert layers(mlp([4, 3, 2], norm=False)) == ["4-3", "relu", "3-2"]
    dino = build("dino").get_submodule("student.projector")
    assert [type(layer).__name__ for layer in dino] == [
        "Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"
    ]  # fmt: skip
    barlow = layers(build("barlowtwins").get_submodule("encoder.projector"))
    assert barlow == ["512-16", "bn", "relu", "16-16", "bn", "relu", "16-8"]
    last = build("vicreg").get_submodule("encoder.projector.6")
    assert isinstance(last, nn.Linear)
    assert last.bias is None
    assert layers(build("mocov3").get_submodule("encoder.projector")) == ["512-16", "bn", "relu", "16-8", "bn-plain"]
    simclr, byol, simsiam = (build(name) for name in ("simclr", "byol", "simsiam"))
    assert layers(simclr.get_submodule("encoder.projector")) == ["512-16", "bn", "relu", "16-8", "bn"]
    assert layers(byol.get_submodule("online.projector")) == ["512-16", "bn", "relu", "16-8"]
    assert layers(byol.get_submodule("predictor")) == ["8-16", "bn", "relu", "16-8"]
    assert layers(simsiam.get_submodule("encoder.projector")) == ["512-512", "bn", "relu", "512-8", "bn-plain"]
    assert layers(simsiam.get_submodule("predictor")) == ["8-2", "bn", "relu", "2-8"]


def test_simclr_counts_itself_out(moco: MoCo) -> None:
    """The similarity of an anchor with itself is no negative: with one image there is nothing but the positive."""
    framework = build("simclr")
    assert isinstance(framework, SimCLR)
    query = rows(1, 8, 0)
    assert framework.loss(query, rows(1, 8, 1)).tolist() == pytest.approx([0])


LEARNERS: dict[str, FrameworkRecipe] = {
    "swav": SwAVRecipe(dim=16, projector_width=64, prototypes=12, num_small=0, freeze_prototypes=0),
    "dino": DINORecipe(dim=16, projector_width=64, outputs=16, num_small=0, momentum=0.9, freeze_prototypes=0),
    "barlowtwins": BarlowTwinsRecipe(dim=16, projector_width=64),
    "vicreg": VICRegRecipe(dim=16, projector_width=64),
    "mocov3": MoCoV3Recipe(dim=16, projector_width=64, momentum=0.9, temperature=0.2),
    "densecl": DenseCLRecipe(dim=16, queue_size=64, momentum=0.9, bn_splits=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNERS)
def test_images_are_learnt_by_heart_without_collapse(name: str) -> None:
    """After some steps on the same images with noise, the loss has fallen and the embeddings are spread."""
    torch.manual_seed(0)
    framework = LEARNERS[name].build(BackboneRecipe(arch="resnet18")).train()
    optimizer = torch.optim.AdamW([p for p in framework.parameters() if p.requires_grad], lr=1e-3)
    rng = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 32, 32, generator=rng)
    losses, steps = [], 24
    for step in range(steps):
        framework.progress = step / steps
        views = tuple(images + 0.3 * torch.randn(images.shape, generator=rng) for _ in range(2))
        clean = framework.forward_views(views, views, generator(0, step))
        loss = clean.losses.mean()
        optimizer.zero_grad()
        loss.backward()
        framework.before_step()
        optimizer.step()
        framework.after_step((step + 1) / steps)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * max(losses)
    assert float(feature_std(F.normalize(clean.query.detach(), dim=1))) > 0.5
