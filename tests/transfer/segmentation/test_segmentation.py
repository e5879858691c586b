from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.segmentation import fcn_resnet50

from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.errors import ConfigError, DataError
from mixmask.engine.predictions import PIXELS, PixelCounts
from mixmask.engine.randomness import generator
from mixmask.evaluate.comparison import compare_runs
from mixmask.transfer import stage
from mixmask.transfer.protocols.segmentation import SegmentRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.segmentation.batches import augmented, fitted, training_batches
from mixmask.transfer.segmentation.dataset import IGNORED
from mixmask.transfer.segmentation.evaluation import count_pixels, logits_of, metrics_of, windows
from mixmask.transfer.segmentation.kinds import open_segmentation
from mixmask.transfer.segmentation.network import FCN, DilatedResNet, check_backbone
from mixmask.transfer.segmentation.recipe import AuxiliaryRecipe, HeadRecipe, SegmentationAugment
from tests.transfer.segmentation.small_sets import data_of, make_folders

CONFIG = """
protocol: segment
name: small
data: {name: small, root: ROOT, train: [train], test: [val], num_workers: 0}
batch_size: 4
iterations: 6
lr: 0.02
head: {channels: 16, num_conv: 1}
auxiliary: {channels: 8}
augment: {resize: [96, 64], crop: 48}
checkpoint_every: 2
"""


def plan(root: Path, tmp_path: Path, backbone: Path, *overrides: str) -> stage.TransferPlan:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("ROOT", str(root)))
    recipe = load_transfer_recipe(config, [f"backbone={backbone}", *overrides])
    return stage.plan(recipe, tmp_path / "runs")


# --- views -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(20, 90), width=st.integers(20, 90), seed=st.integers(0, 999), jitter=st.booleans(),
    most=st.sampled_from([None, 0.6]),
)  # fmt: skip
def test_pixels_and_labels_move_together(height: int, width: int, seed: int, jitter: bool, most: float | None) -> None:
    """Every pixel's grey value is its label: it still is after resizing, cropping and flipping, away from edges."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(0, 4, (3, 3)), np.ones((30, 30), dtype=np.int64))[:height, :width].astype(np.uint8)
    image = torch.from_numpy(np.repeat(labels[None] * 60, 3, axis=0))
    recipe = SegmentationAugment(resize=(128, 64), crop=40, jitter=jitter, most_of_one_class=most)
    pixels, found, real = augmented(image, torch.from_numpy(labels), recipe, generator(seed, "view"))
    assert pixels.shape == (3, 40, 40)
    assert found.shape == real.shape == (40, 40)
    assert (found[~real] == IGNORED).all()
    assert (pixels[:, ~real] == 0).all()
    assert set(found[real].tolist()) <= {0, 1, 2, 3}
    if not jitter:
        # Bilinear and nearest sampling differ at edges only.
        same = (pixels[0].float() / 60).round() == found
        assert float(same[real].float().mean()) > 0.7
    again = augmented(image, torch.from_numpy(labels), recipe, generator(seed, "view"))
    assert all(torch.equal(one, other) for one, other in zip((pixels, found, real), again))


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((500, 375), (2049, 513), (684, 513)),
        ((2048, 1024), (2049, 1025), (2049, 1025)),
        ((1000, 100), (2049, 513), (2049, 205)),
    ],
)
def test_images_fit_the_long_and_the_short_side(
    size: tuple[int, int], bounds: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fitted(*size, bounds) == expected


def test_batches_do_not_depend_on_where_the_run_starts(tmp_path: Path) -> None:
    train, _ = open_segmentation(data_of(make_folders(tmp_path / "data")))
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("ROOT", str(tmp_path / "data")))
    recipe = load_transfer_recipe(config, ["backbone=b"])
    assert isinstance(recipe, SegmentRecipe)
    whole, rest = list(training_batches(train, recipe, 0, 0)), list(training_batches(train, recipe, 0, 4))
    assert len(whole) == 6
    assert all(torch.equal(a, b) for one, other in zip(whole[4:], rest, strict=True) for a, b in zip(one, other))


# --- network ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_network_is_torchvisions_fcn_resnet50() -> None:
    """Same weights, same logits, training mode with its auxiliary head included (dropout apart)."""
    torch.manual_seed(0)
    theirs = fcn_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True).eval()
    state = dict(theirs.backbone.state_dict())
    head = HeadRecipe(channels=512, num_conv=1, concat_input=False, dropout=0)
    side = AuxiliaryRecipe(channels=256, num_conv=1, concat_input=False, dropout=0)
    ours = FCN(
        BackboneRecipe(arch="resnet50"), state, 5, output_stride=8, align_corners=False, head=head, auxiliary=side
    ).eval()  # fmt: skip
    for own, other in ((ours.head, theirs.classifier), (ours.auxiliary, theirs.aux_classifier)):
        assert own is not None
        own.convs[0].load_state_dict(torch.nn.Sequential(*list(other)[:3]).state_dict())
        own.classifier.load_state_dict(other[4].state_dict())
    images = torch.randn(2, 3, 65, 97)
    with torch.no_grad():
        wanted = theirs(images)
        torch.testing.assert_close(ours(images)[0], wanted["out"], rtol=1e-4, atol=1e-5)
        assert ours(images)[1] is None
        ours.train()
        for module in ours.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        torch.testing.assert_close(ours(images)[1], wanted["aux"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("arch", "stride"), [("resnet18", 8), ("resnet18", 16), ("resnet50", 16)])
def test_dilation_keeps_the_resolution(arch: str, stride: int) -> None:
    trunk = build_trunk(BackboneRecipe.model_validate({"arch": arch}))
    before, last = DilatedResNet(trunk, stride).eval()(torch.randn(1, 3, 64, 96))
    assert last.shape[2:] == (64 // stride, 96 // stride)
    assert before.shape[2:] == ((8, 12) if stride == 8 else (4, 6))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["timm/convnext_atto", "timm/resnet18d", "timm/regnetx_002"])
@pytest.mark.parametrize("stride", [8, 16])
def test_trunks_of_timm_are_dilated_and_all_of_them_is_trained(arch: str, stride: int) -> None:
    recipe = BackboneRecipe(arch=arch)
    check_backbone(recipe, stride)
    state = build_trunk(recipe).state_dict()
    network = FCN(
        recipe, state, 3, output_stride=stride, align_corners=False, head=HeadRecipe(channels=8), auxiliary=AuxiliaryRecipe()
    )  # fmt: skip
    logits, auxiliary = network(torch.randn(2, 3, 64, 96))
    assert auxiliary is not None
    (logits.sum() + auxiliary.sum()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []
    kept = network.trunk.state_dict()
    assert all(
        torch.equal(tensor, state[name.removeprefix("trunk.")])
        for name, tensor in kept.items()
        if "running" not in name and "num_batches" not in name
    )


@pytest.mark.parametrize(
    ("arch", "stem", "message"),
    [("resnet18", "cifar", "standard stem"), ("timm/mobilenetv3_small_050", "standard", "can have output stride 8")],
)
def test_trunks_that_cannot_be_dilated_are_refused(arch: str, stem: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_backbone(BackboneRecipe.model_validate({"arch": arch, "stem": stem}), 8)


# --- evaluation ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 4), classes=st.integers(2, 5), seed=st.integers(0, 999))
def test_miou_is_its_definition(num: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    answers = rng.integers(0, classes, (num, 7, 9))
    labels = np.where(rng.random((num, 7, 9)) < 0.2, IGNORED, rng.integers(0, classes, (num, 7, 9)))
    rows = [
        [one.numpy() for one in count_pixels(torch.from_numpy(a), torch.from_numpy(b).to(torch.uint8), classes)]
        for a, b in zip(answers, labels)
    ]
    table = np.array(rows)
    counts = PixelCounts("x", table[:, 0], table[:, 1], table[:, 2])
    found = metrics_of(counts, [str(label) for label in range(classes)])
    values = []
    for label in range(classes):
        both = sum(int(a == label and b == label) for a, b in zip(answers.flat, labels.flat))
        either = sum(int((a == label or b == label) and b != IGNORED) for a, b in zip(answers.flat, labels.flat))
        if either:
            values.append(100 * both / either)
            assert found[f"IoU/{label}"] == pytest.approx(values[-1])
        else:
            assert f"IoU/{label}" not in found
    assert found["mIoU"] == pytest.approx(sum(values) / len(values))
    right = [a == b for a, b in zip(answers.flat, labels.flat) if b != IGNORED]
    assert found["pixel_accuracy"] == pytest.approx(100 * sum(right) / len(right))
    weights = rng.integers(0, 3, num).astype(float)
    if weights.sum():
        repeated = [table[place] for place in range(num) for _ in range(int(weights[place]))]
        again = PixelCounts("x", *(np.array(repeated)[:, part] for part in range(3)))
        assert counts.mean_iou(weights) == pytest.approx(again.mean_iou(), nan_ok=True)


def test_windows_cover_every_pixel_and_are_averaged() -> None:
    assert windows(20, 8, 6) == [0, 6, 12]
    assert windows(5, 8, 6) == [0]
    assert windows(21, 8, 6) == [0, 6, 12, 13]

    class Ramp(FCN):
        """Its logits are the pixels' own positions in the window."""

        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.num_classes, self.align_corners = 1, False

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.arange(images.shape[3]).float().expand(1, 1, images.shape[2], -1), None

    found = logits_of(Ramp(), torch.zeros(1, 3, 8, 12), (8, 12), 8, 4)[0, 0]
    assert found[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7]  # columns 4 to 7 are the mean of two windows


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_learns_and_its_record_says_how_well(tmp_path: Path, resnet18: Path) -> None:
    root = make_folders(tmp_path / "data", num=12)
    ready = plan(root, tmp_path, resnet18, "iterations=60", "lr=0.05", "auxiliary=null")
    record = stage.run(ready)
    assert record.protocol == "segment"
    assert record.metrics["mIoU"] > 35  # of four classes; chance is about 14
    assert {f"IoU/{name}" for name in ready.test.classes} <= record.metrics.keys()
    counts = PixelCounts.read(ready.run.path / PIXELS)
    assert counts.mean_iou() == pytest.approx(record.metrics["mIoU"])
    other = stage.run(plan(root, tmp_path, resnet18, "iterations=4", "seed=1"))
    assert other.metrics["mIoU"] < record.metrics["mIoU"]
    folders = sorted((tmp_path / "runs" / "transfer").iterdir())
    (found,) = compare_runs(*folders)
    assert found.metric == "mIoU"
    assert found.low <= found.value <= found.high
    assert abs(found.value) == pytest.approx(record.metrics["mIoU"] - other.metrics["mIoU"])


@pytest.mark.parametrize(
    "text", ["data.layout=voc2", "evaluation.window=40", "augment.resize=[32, 64]", "augment.factor=[2, 1]"]
)
def test_values_that_make_no_sense_are_refused(text: str, tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(ConfigError):
        plan(make_folders(tmp_path / "data"), tmp_path, resnet18, text)


def test_too_few_images_for_a_batch_are_refused(tmp_path: Path, resnet18: Path) -> None:
    with pytest.raises(DataError, match="8 training images, and batch_size is 9"):
        plan(make_folders(tmp_path / "data"), tmp_path, resnet18, "batch_size=9")


@pytest.mark.slow
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, resnet18: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folders(tmp_path / "data")
    whole = stage.run(plan(root, tmp_path, resnet18))
    (tmp_path / "other").mkdir()
    ready = plan(root, tmp_path / "other", resnet18)
    seen = 0
    original = SegmentRecipe.losses

    def dying(self: SegmentRecipe, *given: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 5:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(SegmentRecipe, "losses", dying)
    with pytest.raises(BaseException):  # noqa: B017
        stage.run(ready)
    again = stage.run(plan(root, tmp_path / "other", resnet18))
    assert again.metrics == pytest.approx({name: whole.metrics[name] for name in again.metrics}, abs=1e-9)


def test_the_rate_falls_as_published(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("ROOT", "x"))
    poly = load_transfer_recipe(config, ["backbone=b", "iterations=20000", "lr=0.01"])
    assert isinstance(poly, SegmentRecipe)
    for step in (0, 1, 777, 19999):
        wanted = (0.01 - 1e-4) * (1 - step / 20000) ** 0.9 + 1e-4  # mmcv's PolyLrUpdaterHook
        assert poly.lr * poly.factor(step) == pytest.approx(wanted)
    step_form = load_transfer_recipe(config, ["backbone=b", "schedule=step", "milestones=[3, 5]", "gamma=0.1"])
    assert isinstance(step_form, SegmentRecipe)
    assert [step_form.factor(step) for step in range(6)] == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01])


def test_the_loss_is_divided_by_what_the_recipe_says(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("ROOT", "x"))

    class Fixed(FCN):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.zeros(len(images), 4, *images.shape[2:]), None

    labels = torch.full((2, 4, 4), IGNORED, dtype=torch.uint8)
    labels[0] = 1
    pixels, real = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.ones(2, 4, 4, dtype=torch.bool)
    for key, wanted in (("true", math.log(4) / 2), ("false", math.log(4))):
        recipe = load_transfer_recipe(config, ["backbone=b", f"ignored_in_mean={key}"])
        assert isinstance(recipe, SegmentRecipe)
        assert float(recipe.losses(Fixed(), pixels, labels, real)["loss"]) == pytest.approx(wanted)
