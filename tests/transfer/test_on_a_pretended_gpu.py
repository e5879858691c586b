"""Steps of the transfer protocols on tensors that claim to be on a GPU: nothing waits, and no devices are mixed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mixmask.engine.array_images import ArrayImages
from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.builtin_configs import config_file
from mixmask.engine.crops import CropRecipe
from mixmask.engine.features import outputs_of
from mixmask.engine.knn import knn_votes
from mixmask.engine.loader import BatchPlan, ResidentSource, StreamSource
from mixmask.engine.normalization import _constants
from mixmask.pretrain.diagnostics import diagnose
from mixmask.transfer.classifier import Classifier
from mixmask.transfer.detection.data.batches import DetectionBatch
from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.detectors.c4.network import C4Detector
from mixmask.transfer.detection.detectors.retinanet.network import RetinaNet
from mixmask.transfer.detection.engines.torchvision import to_device
from mixmask.transfer.detection.layers.pyramid_rcnn import PyramidRCNN
from mixmask.transfer.detection.network import Detector
from mixmask.transfer.detection.recipe import DetectRecipe
from mixmask.transfer.probe import Probe
from mixmask.transfer.probes import Probes
from mixmask.transfer.protocols.segmentation import SegmentRecipe
from mixmask.transfer.recipe import load_transfer_recipe
from mixmask.transfer.segmentation.network import FCN
from tests.pretend_gpu import GPU, images, moved, pretend
from tests.transfer.detection.small_recipes import COCO, VOC, with_detector, with_pyramid

RESNET = BackboneRecipe(arch="resnet18")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_constants_of_other_tests() -> Iterator[None]:
    _constants.cache_clear()
    yield
    _constants.cache_clear()


def stored(num: int, side: int) -> ArrayImages:
    pixels = torch.zeros(num, 3, side, side, dtype=torch.uint8)
    paths = tuple(Path(f"{number}.png") for number in range(num))
    return ArrayImages(paths, torch.zeros(num, dtype=torch.int64), ("a", "b"), Path("nowhere"), pixels)


def test_twenty_six_probes_on_one_trunk() -> None:
    rates = [10**-power for power in range(13)]
    probes = [Probe(rate, 0.0, norm) for rate in rates for norm in (False, True)]
    with pretend() as mode:
        model = moved(Probes(build_trunk(RESNET), 10, probes), mode)
        assert isinstance(model, Probes)
        model.train()
        mode.started.clear()
        with torch.no_grad():
            model.loss(model.features(images(mode, 8, 3, 64, 64)), images(mode, 8, dtype=torch.int64))
            trunk_and_loss = mode.kernels
            model.bury(0)
    assert trunk_and_loss < 400
    assert mode.kernels - trunk_and_loss < 70  # two tensors of each probe, and a few for all


def test_finetuning_from_streamed_and_resident_images() -> None:
    with pretend() as mode, torch.no_grad():
        model = moved(Classifier(build_trunk(RESNET), 10).train(), mode)
        for source in (StreamSource(stored(8, 40), 0, GPU), ResidentSource(stored(8, 40), torch.device("cpu"))):
            if isinstance(source, ResidentSource):
                source.device, source.pixels = GPU, images(mode, 8, 3, 40, 40, dtype=torch.uint8)
                source.labels = images(mode, 8, dtype=torch.int64)
            batch = next(source.training(BatchPlan(8, 4, True, 0), [CropRecipe(crop=64)], 0, 1))
            assert batch.views[0].device == batch.labels.device == GPU
            F.cross_entropy(model(batch.views[0].float()), batch.labels)


def test_features_and_neighbours() -> None:
    with pretend() as mode:
        trunk = moved(build_trunk(RESNET).eval(), mode)
        found = outputs_of(
            "features", trunk, StreamSource(stored(6, 40), 0, GPU), GPU, batch_size=4, resize=36, crop=32, precision="bf16",
            normalization="imagenet", interpolation="bilinear",
        )  # fmt: skip
        assert [(tuple(output.shape), output.device) for output, _ in found] == [((4, 512), GPU), ((2, 512), GPU)]
        bank, labels = images(mode, 70_000, 64), images(mode, 70_000, dtype=torch.int64)
        votes = knn_votes(bank, labels, images(mode, 600, 64), num_classes=10, ks=[20, 200], temperatures=[0.1])
        assert votes[20, 0.1].device == GPU


def test_diagnostics_ask_for_no_values_themselves() -> None:
    with pretend() as mode:
        found = diagnose(images(mode, 32, 16), images(mode, 32, 16))
    assert {value.device for value in found.values()} == {GPU}


@pytest.mark.parametrize("name", ["c4", "fpn", "retinanet"])
def test_detectors_up_to_the_choice_of_boxes(name: str, tmp_path: Path) -> None:
    """What follows depends on values: which boxes are kept."""
    text = {"c4": VOC, "fpn": with_pyramid(COCO), "retinanet": with_detector(VOC, "detector: {kind: retinanet}")}[name]
    file = tmp_path / "config.yaml"
    file.write_text(text.replace("ROOT", "nowhere"))
    recipe = load_transfer_recipe(file, ["backbone=nowhere.safetensors"])
    assert isinstance(recipe, DetectRecipe)
    backbone = BackboneRecipe(arch="resnet50")
    detector = recipe.detector.build(backbone, build_trunk(backbone).state_dict(), 20, recipe.masks)
    with pretend() as mode, torch.no_grad():
        moved(detector, mode)
        pictures = [images(mode, 3, 64, 96, dtype=torch.uint8), images(mode, 3, 80, 64, dtype=torch.uint8)]
        first = dense(detector, pictures)
        assert first.device == GPU
        assert first.shape[0] == 2


def dense(detector: Detector, pictures: list[Tensor]) -> Tensor:
    """The first map's scores."""
    if isinstance(detector, RetinaNet):
        return detector.predict(pictures)[1][0]
    assert isinstance(detector, C4Detector | PyramidRCNN)
    return detector.rpn(detector.maps(pictures)).logits[0]


def test_targets_of_detectors_are_copied_without_waiting() -> None:
    target = Targets(torch.rand(2, 4), torch.zeros(2, dtype=torch.int64), [], torch.rand(2, 17, 3))
    with pretend():
        _, (there,) = to_device(DetectionBatch([torch.zeros(3, 8, 8)], [target]), GPU)
    assert there.boxes.device == there.labels.device == GPU


@pytest.mark.parametrize("config", ["segment_voc", "segment_cityscapes"])
def test_segmentation(config: str) -> None:
    recipe = load_transfer_recipe(
        config_file(Path(config), "transfer"), ["backbone=nowhere.safetensors", "data.root=nowhere"]
    )
    assert isinstance(recipe, SegmentRecipe)
    backbone = BackboneRecipe(arch="resnet50")
    network = FCN(
        backbone, build_trunk(backbone).state_dict(), 5, output_stride=recipe.output_stride,
        align_corners=recipe.align_corners, head=recipe.head, auxiliary=recipe.auxiliary,
    )  # fmt: skip
    with pretend() as mode, torch.no_grad():
        moved(network.train(), mode)
        pixels, labels = (images(mode, *shape, dtype=torch.uint8) for shape in ((2, 3, 65, 65), (2, 65, 65)))
        losses = recipe.losses(network, pixels, labels, images(mode, 2, 65, 65, dtype=torch.bool))
    assert {loss.device for loss in losses.values()} == {GPU}
