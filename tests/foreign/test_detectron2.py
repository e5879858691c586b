# ruff: noqa: E402 -- Detectron2 is imported only if it is there
"""The layers of our torchvision engine in the place of Detectron2's in its own tests (facebookresearch/detectron2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.foreign.clones import clone, module_of

ROOT = clone("detectron2", "d2")
pytest.importorskip("detectron2", reason="Detectron2 cannot be imported")

from detectron2.modeling.proposal_generator import RPN as TheirRPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.modeling.roi_heads import StandardROIHeads as TheirHeads
from detectron2.structures import Boxes, Instances

from mixmask.engine.schedule import step_factor, warmup_factor
from mixmask.transfer.detection.detector import Targets
from mixmask.transfer.detection.layers import boxes as our_boxes
from mixmask.transfer.detection.layers import pyramid
from mixmask.transfer.detection.layers.anchors import Anchors
from mixmask.transfer.detection.layers.boxes import clip_boxes, decode_boxes, encode_boxes, match
from mixmask.transfer.detection.layers.heads import BoxHead
from mixmask.transfer.detection.layers.pyramid import pool_from_levels
from mixmask.transfer.detection.layers.recipes import RoIRecipe, RPNRecipe
from mixmask.transfer.detection.layers.roi_heads import RoIHeads, SampledBoxes, rasterise
from mixmask.transfer.detection.layers.rpn import RPN, WEIGHTS, Regions


def theirs(name: str, **ours: Any) -> Any:
    """One of their test modules, with what it imports replaced by ours."""
    # Not installed, and not needed by what is run: of the model zoo and of PointRend.
    lacking = [key for key in ("pkg_resources", "cv2") if importlib.util.find_spec(key) is None]
    module = module_of(ROOT / "tests" / f"{name}.py", {key: ModuleType(key) for key in lacking})
    for key, value in ours.items():
        assert hasattr(module, key), key
        setattr(module, key, value)
    return module


def run(tests: Any, *names: str) -> None:
    for name in names:
        torch.manual_seed(0)
        case = tests(name)
        case.setUp()
        getattr(case, name)()


@pytest.fixture(autouse=True)
def _not_scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """TorchScript is not our subject: what a test has compiled is run as it is."""
    monkeypatch.setattr(torch.jit, "script", lambda what: what)


def generators(targets: Sequence[object]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in targets]


def targets_of(instances: Sequence[Any]) -> list[Targets]:
    return [
        Targets(one.gt_boxes.tensor, one.gt_classes if one.has("gt_classes") else torch.zeros(len(one)).long(), [])
        for one in instances
    ]


class OurAnchors:
    def __init__(self, cfg: Any, shapes: Sequence[Any]) -> None:
        own = cfg.MODEL.ANCHOR_GENERATOR
        self.anchors = Anchors([shape.stride for shape in shapes], own.SIZES, own.ASPECT_RATIOS[0])

    def __call__(self, features: Sequence[Tensor]) -> list[Boxes]:
        return [Boxes(one) for one in self.anchors(features)]


def test_anchors() -> None:
    module = theirs("modeling/test_anchor_generator", DefaultAnchorGenerator=OurAnchors)
    run(module.TestAnchorGenerator, "test_default_anchor_generator")


class OurTransform:
    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = weights

    def get_deltas(self, reference: Tensor, target: Tensor) -> Tensor:
        return encode_boxes(reference, target, self.weights)

    def apply_deltas(self, deltas: Tensor, reference: Tensor) -> Tensor:
        return decode_boxes(deltas, reference, self.weights)


def test_box_coding() -> None:
    module = theirs("modeling/test_box2box_transform", Box2BoxTransform=OurTransform)
    run(module.TestBox2BoxTransform, "test_reconstruction", "test_apply_deltas_tracing")


def test_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    def matcher(thresholds: Sequence[float], labels: Sequence[int], allow_low_quality_matches: bool) -> Any:
        assert list(labels) == [0, -1, 1]

        def matched(overlaps: Tensor) -> tuple[Tensor, Tensor]:
            monkeypatch.setattr(our_boxes, "box_iou", lambda truth, boxes: overlaps)
            truth, boxes = (torch.zeros(num, 4) for num in overlaps.shape)
            low, high = thresholds
            return match(truth, boxes, negative_below=low, positive_from=high, keep_best=allow_low_quality_matches)

        return matched

    run(theirs("modeling/test_matcher", Matcher=matcher).TestMatcher, "test_scriptability")


def test_overlaps() -> None:
    module = theirs("structures/test_boxes", pairwise_iou=lambda one, two: our_boxes.box_iou(one.tensor, two.tensor))
    run(module.TestBoxIOU, "test_pairwise_iou")


def test_polygons() -> None:
    def drawn(polygons: list[Any], height: int, width: int) -> Any:
        return torch.from_numpy(rasterise(polygons, [0, 0, width, height], height)).bool()

    run(theirs("structures/test_masks", polygons_to_bitmask=drawn).TestBitMask, "test_get_bounding_box")


class OurRPN(TheirRPN):
    """Theirs, so that its parameters are those that their test draws; what it computes is ours."""

    def forward(self, images: Any, features: Any, gt_instances: Any = None) -> Any:
        head = self.rpn_head
        channels, strides = head.conv.in_channels, self.anchor_generator.strides
        recipe = RPNRecipe(
            batch_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            nms_threshold=self.nms_thresh,
        )
        rpn = RPN(channels, strides, [list(recipe.anchor_sizes)], recipe).train(self.training)
        for own, other in zip(
            (rpn.conv, rpn.objectness, rpn.deltas), (head.conv, head.objectness_logits, head.anchor_deltas)
        ):
            own.load_state_dict({"weight": other.weight, "bias": other.bias})
        regions = rpn([features[name] for name in self.in_features])
        proposals = rpn.proposals(regions, images.image_sizes)
        found = [self._instances(*one, regions) for one in zip(range(len(proposals)), proposals, images.image_sizes)]
        targets = targets_of(gt_instances)
        losses = rpn.losses(regions, targets, generators(targets))
        return found, {"loss_rpn_cls": losses["rpn_objectness"], "loss_rpn_loc": losses["rpn_box"]}

    def _instances(self, image: int, proposals: Tensor, size: tuple[int, int], regions: Regions) -> Instances:
        """With the logits of the proposals, which ours does not give."""
        anchors, logits, deltas = regions.joined()
        every = clip_boxes(decode_boxes(deltas[image], anchors, WEIGHTS), *size)
        same = torch.isclose(proposals[:, None], every, atol=1e-4).all(dim=2)  # several, where they are clipped
        best = torch.where(same, logits[image], -torch.inf).amax(dim=1)
        return Instances(size, proposal_boxes=Boxes(proposals), objectness_logits=best)


def test_rpn() -> None:
    run(theirs("modeling/test_rpn", RPN=OurRPN).RPNTest, "test_rpn")


class GivenHeads(RoIHeads):
    """Ours with given logits and deltas."""

    def __init__(self, num_classes: int, logits: Tensor, deltas: Tensor) -> None:
        super().__init__(num_classes, RoIRecipe())
        self.given = logits, deltas

    def vectors(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, None]:
        return self.given[0], None

    def predict(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return self.given

    for_masks = RoIHeads.for_keypoints


class OurOutputs(FastRCNNOutputLayers):
    """Theirs, so that its parameters are those that their test draws; its losses are ours."""

    def losses(self, predictions: tuple[Tensor, Tensor], proposals: Sequence[Any]) -> dict[str, Tensor]:
        found = [SampledBoxes(one.proposal_boxes.tensor, one.gt_classes, torch.arange(len(one))) for one in proposals]
        losses = GivenHeads(self.num_classes, *predictions).losses([], targets_of(proposals), found)
        return {"loss_cls": losses["roi_class"], "loss_box_reg": losses["roi_box"]}


def test_losses_of_regions() -> None:
    run(theirs("modeling/test_fast_rcnn", FastRCNNOutputLayers=OurOutputs).FastRCNNTest, "test_fast_rcnn")


class OneMapHeads(RoIHeads):
    """Ours on a single map, with a box head of two layers."""

    def __init__(self, their: Any) -> None:
        super().__init__(their.num_classes, RoIRecipe(batch_per_image=their.batch_size_per_image))
        (self.side, _), layers = their.box_pooler.output_size, their.box_head.fcs
        width = layers[0].out_features
        channels = layers[0].in_features // self.side**2
        self.head = BoxHead(channels, self.side, num_conv=0, conv_dim=1, num_fc=2, fc_dim=width, norm=False)
        self.add_predictors(width)
        own = (self.head.get_submodule("fc1"), self.head.get_submodule("fc2"), self.classifier, self.regressor)
        for one, other in zip(
            own, (*layers, their.box_predictor.cls_score, their.box_predictor.bbox_pred), strict=True
        ):
            one.load_state_dict(other.state_dict())

    def vectors(self, maps: Sequence[Tensor], boxes: list[Tensor]) -> tuple[Tensor, None]:
        return self.head(pool_from_levels([*maps * 4], boxes, self.side)), None

    for_masks = RoIHeads.for_keypoints


class OurHeads(TheirHeads):
    """As `OurRPN`; without masks, which their test draws as pixels and ours takes as polygons only."""

    def forward(self, images: Any, features: Any, proposals: Any, targets: Any = None) -> Any:
        ours, wanted = OneMapHeads(self), targets_of(targets)
        sampled = ours.sample([one.proposal_boxes.tensor for one in proposals], wanted, generators(wanted))
        losses = ours.losses([features[name] for name in self.in_features], wanted, sampled)
        return [], {"loss_cls": losses["roi_class"], "loss_box_reg": losses["roi_box"]}


def test_heads_on_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals, sampling, pooling, the head and the losses."""
    monkeypatch.setattr(pyramid, "CANONICAL_LEVEL", 100)  # every box is clamped to the coarsest map
    monkeypatch.setattr(pyramid, "STRIDES", (1, 1, 1, 16))
    module = theirs("modeling/test_roi_heads", StandardROIHeads=OurHeads)
    monkeypatch.setattr("detectron2.modeling.proposal_generator.build.PROPOSAL_GENERATOR_REGISTRY", {"RPN": OurRPN})
    run(module.ROIHeadsTest, "test_roi_heads")


class OurMultiplier:
    """The rate of a step, as our engine sets it: fixed by milestones, times the warm-up."""

    def __init__(self, optimizer: torch.optim.Optimizer, factors: Any, steps: int) -> None:
        self.optimizer, (self.milestones, self.gamma, self.start, share) = optimizer, factors
        self.warmup, self.number = round(share * steps), -1
        self.base = optimizer.param_groups[0]["lr"]
        self.step()

    def step(self) -> None:
        self.number += 1
        factor = step_factor(self.number, self.milestones, self.gamma)
        self.optimizer.param_groups[0]["lr"] = self.base * factor * warmup_factor(self.number, self.warmup, self.start)


def test_learning_rate() -> None:
    def steps(values: list[float], milestones: list[int], num_updates: int) -> tuple[list[int], float]:
        return milestones, values[1] / values[0]

    def warmed(factors: tuple[list[int], float], start: float, share: float) -> tuple[list[int], float, float, float]:
        return *factors, start, share

    module = theirs(
        "test_scheduler", LRMultiplier=OurMultiplier, WarmupParamScheduler=warmed, MultiStepParamScheduler=steps
    )
    run(module.TestScheduler, "test_warmup_multistep")
