from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from mixmask.engine.augment import (
    AugmentRecipe,
    Photometric,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply_photometric,
    draw_photometric,
    gaussian_blur,
    grayscale,
    solarize,
)
from mixmask.engine.crops import CropRecipe, crop_and_flip, draw_crop, draw_crops
from mixmask.engine.normalization import normalize
from mixmask.engine.randomness import generator

TOLERANCE = 1 / 255


@pytest.fixture
def images() -> Tensor:
    rng = torch.Generator().manual_seed(0)
    random = torch.rand(4, 3, 20, 24, generator=rng)
    grey = torch.rand(1, 1, 20, 24, generator=rng).expand(1, 3, 20, 24)
    black_and_white = torch.cat([torch.zeros(1, 3, 20, 24), torch.ones(1, 3, 20, 24)])
    return torch.cat([random, grey, black_and_white])


def test_jitter_operations_are_torchvisions(images: Tensor) -> None:
    factors = torch.linspace(0.3, 1.7, len(images))
    shifts = torch.linspace(-0.5, 0.5, len(images))
    for i, (factor, shift) in enumerate(zip(factors.tolist(), shifts.tolist())):
        pairs = [
            (adjust_brightness(images, factors)[i], TF.adjust_brightness(images[i], factor)),
            (adjust_contrast(images, factors)[i], TF.adjust_contrast(images[i], factor)),
            (adjust_saturation(images, factors)[i], TF.adjust_saturation(images[i], factor)),
            (adjust_hue(images, shifts)[i], TF.adjust_hue(images[i], shift)),
            (grayscale(images)[i], TF.rgb_to_grayscale(images[i])),
        ]
        for ours, theirs in pairs:
            assert (ours - theirs).abs().max() < TOLERANCE


def test_blur_is_torchvisions(images: Tensor) -> None:
    sigmas = torch.linspace(0.1, 2.0, len(images))
    ours = gaussian_blur(images, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        assert (ours[i] - TF.gaussian_blur(images[i], [17, 17], [sigma, sigma])).abs().max() < TOLERANCE


def test_a_batch_is_augmented_sample_by_sample_in_the_drawn_order(images: Tensor) -> None:
    recipe = AugmentRecipe(crop=24, hue=0.3)
    draws = draw_photometric(recipe, len(images), generator(3))
    batch = apply_photometric(images, draws)
    for i in range(len(images)):
        image = images[i]
        if draws.jitter[i]:
            operations = (
                lambda x, i=i: TF.adjust_brightness(x, float(draws.brightness[i])),
                lambda x, i=i: TF.adjust_contrast(x, float(draws.contrast[i])),
                lambda x, i=i: TF.adjust_saturation(x, float(draws.saturation[i])),
                lambda x, i=i: TF.adjust_hue(x, float(draws.hue[i])),
            )
            for number in draws.order[i].tolist():
                image = operations[number](image)
        if draws.grayscale[i]:
            image = TF.rgb_to_grayscale(image, num_output_channels=3)
        if draws.blur[i]:
            image = TF.gaussian_blur(image, [17, 17], [float(draws.sigma[i])] * 2)
        assert (batch[i] - image).abs().max() < TOLERANCE


def test_draws_have_the_recipes_distribution() -> None:
    recipe = AugmentRecipe()
    draws = draw_photometric(recipe, 20_000, generator(0))
    assert draws.jitter.double().mean() == pytest.approx(0.8, abs=0.01)
    assert draws.grayscale.double().mean() == pytest.approx(0.2, abs=0.01)
    assert draws.blur.double().mean() == pytest.approx(0.5, abs=0.012)
    for values, low, high in (
        (draws.brightness, 0.6, 1.4),
        (draws.contrast, 0.6, 1.4),
        (draws.saturation, 0.6, 1.4),
        (draws.hue, -0.1, 0.1),
        (draws.sigma, 0.1, 2.0),
    ):
        assert low <= float(values.min()) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < float(values.max()) <= high
        assert float(values.mean()) == pytest.approx((low + high) / 2, abs=0.02 * (high - low))
    for position in range(4):
        counts = torch.bincount(draws.order[:, position], minlength=4).double() / 20_000
        assert (counts - 0.25).abs().max() < 0.015


def test_photometric_does_not_change_its_input(images: Tensor) -> None:
    before = images.clone()
    Photometric(AugmentRecipe(crop=24))(images, generator(0), slice(0, len(images)), len(images))
    assert torch.equal(images, before)


def test_a_samples_augmentation_depends_on_its_row_and_not_on_who_has_it(images: Tensor) -> None:
    photometric = Photometric(AugmentRecipe(crop=24))
    num = len(images)
    whole = photometric(images, generator(0), slice(0, num), num)
    for rows in (slice(0, 3), slice(3, num)):
        part = photometric(images[rows], generator(0), rows, num)
        assert torch.allclose(part, whole[rows], atol=1e-6)


def test_crops_drawn_one_by_one_and_together_have_one_distribution() -> None:
    recipe = CropRecipe(scale=(0.2, 1.0))
    rng = random.Random(0)
    single = torch.tensor([draw_crop(90, 120, recipe, rng) for _ in range(8000)]).double()
    together = draw_crops(torch.tensor([[90, 120]] * 8000), recipe.scale, recipe.aspect, generator(0)).double()
    assert single[:, 4].mean() == pytest.approx(recipe.flip, abs=0.02)
    for column in range(4):
        for share in (0.1, 0.25, 0.5, 0.75, 0.9):
            a, b = single[:, column].quantile(share), together[:, column].quantile(share)
            assert abs(float(a - b)) <= 2.5
    top, left, height, width, _ = single.T
    assert bool((top >= 0).all() and (left >= 0).all())
    assert bool((top + height <= 90).all() and (left + width <= 120).all())


def test_crop_and_flip_is_crop_then_resize_then_flip() -> None:
    pixels = torch.randint(0, 256, (6, 3, 16, 18), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    crops = draw_crops(torch.tensor([[16, 18]] * 6), (0.2, 1.0), (0.75, 1.33), generator(1))
    flips = torch.tensor([True, False] * 3)
    ours = crop_and_flip(pixels, crops, flips, 20)
    for i, (top, left, height, width) in enumerate(crops.tolist()):
        image = TF.resized_crop(pixels[i].float() / 255, top, left, height, width, [20, 20], antialias=False)
        expected = TF.horizontal_flip(image) if flips[i] else image
        assert (ours[i] - expected).abs().max() < 1e-4


def test_crops_lie_inside_and_have_the_asked_area_and_aspect() -> None:
    sizes = torch.tensor([[200, 300]] * 4000)
    crops = draw_crops(sizes, (0.2, 1.0), (3 / 4, 4 / 3), generator(0)).double()
    top, left, height, width = crops.T
    assert bool((top >= 0).all() and (left >= 0).all())
    assert bool((top + height <= 200).all() and (left + width <= 300).all())
    area, aspect = height * width / 60_000, width / height
    assert float(area.min()) > 0.19
    assert float(area.max()) <= 1
    assert float(aspect.min()) > 0.73
    assert float(aspect.max()) < 1.37


def test_an_image_that_no_crop_fits_gets_the_central_one() -> None:
    together = draw_crops(torch.tensor([[10, 400]]), (0.9, 1.0), (3 / 4, 4 / 3), generator(0))[0].tolist()
    single = draw_crop(10, 400, CropRecipe(scale=(0.9, 1.0)), random.Random(0))
    for top, left, height, width in (together, single[:4]):
        assert (top, height) == (0, 10)
        assert width == round(10 * 4 / 3)
        assert left == (400 - width) // 2
    tall = draw_crop(400, 10, CropRecipe(scale=(0.9, 1.0)), random.Random(0))
    assert tall[1:4] == (0, round(10 / (3 / 4)), 10)


def test_normalisation_is_imagenets() -> None:
    image = torch.full((1, 3, 2, 2), 0.5)
    assert normalize(image)[0, :, 0, 0].tolist() == pytest.approx(
        [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    )


@pytest.mark.parametrize("flip", [False, True])
def test_bicubic_crops_are_pillows(flip: bool) -> None:
    """To the rounding of Pillow's eight-bit result."""
    images = torch.randint(0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crops = draw_crops(torch.full((6, 2), 32), (0.2, 1.0), (3 / 4, 4 / 3), generator(0, "x"))
    ours = crop_and_flip(images, crops, torch.full((6,), flip), 32, "bicubic")
    for i, (top, left, height, width) in enumerate(crops.tolist()):
        cut = Image.fromarray(images[i, :, top : top + height, left : left + width].permute(1, 2, 0).numpy())
        resized = torch.from_numpy(np.array(cut.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1) / 255
        assert (ours[i] - (resized.flip(-1) if flip else resized)).abs().max() < 1.6 / 255


def test_a_normalisation_is_of_its_data_set() -> None:
    image = torch.full((1, 3, 2, 2), 0.5)
    assert torch.allclose(normalize(image)[0, 0, 0, 0], torch.tensor((0.5 - 0.485) / 0.229))
    assert torch.allclose(normalize(image, "cifar10")[0, 2, 0, 0], torch.tensor((0.5 - 0.4465) / 0.2010))
    recipe = AugmentRecipe(jitter_probability=0, grayscale_probability=0, blur_probability=0, normalization="cifar100")
    seen = Photometric(recipe)(image, generator(0, "x"), slice(0, 1), 1)
    assert torch.allclose(seen, normalize(image, "cifar100"))


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_solarisation_is_pillows_and_changes_no_other_draw(probability: float) -> None:
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    ours = solarize(values.float() / 255)
    assert torch.equal((ours * 255).round().to(torch.uint8), TF.solarize(values, 128))
    plain = draw_photometric(AugmentRecipe(), 40, torch.Generator().manual_seed(0))
    recipe = AugmentRecipe(solarize_probability=probability)
    drawn = draw_photometric(recipe, 40, torch.Generator().manual_seed(0))
    for name in ("jitter", "order", "hue", "blur", "sigma"):
        assert torch.equal(getattr(plain, name), getattr(drawn, name))
    assert not plain.solarize.any()
    assert probability in (0.5, float(drawn.solarize.float().mean()))
