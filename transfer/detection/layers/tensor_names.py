"""The names of detectors' tensors here and in Detectron2: what several detectors share."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mixmask.transfer.checkpoints.names import from_detectron2, to_detectron2

RPN_AND_BOXES = {
    "rpn.conv.": "proposal_generator.rpn_head.conv.",
    "rpn.objectness.": "proposal_generator.rpn_head.objectness_logits.",
    "rpn.deltas.": "proposal_generator.rpn_head.anchor_deltas.",
    "roi_heads.classifier.": "roi_heads.box_predictor.cls_score.",
    "roi_heads.regressor.": "roi_heads.box_predictor.bbox_pred.",
    "roi_heads.mask_head.": "roi_heads.mask_head.",
    "roi_heads.keypoint_head.": "roi_heads.keypoint_head.",
}


def renamed(name: str, table: Mapping[str, str]) -> str | None:
    """The name with its beginning replaced by the table; None if no beginning in the table is the name's."""
    return next((new + name[len(old) :] for old, new in table.items() if name.startswith(old)), None)


def reversed_names(table: Mapping[str, str]) -> dict[str, str]:
    """The table in the other direction."""
    return {new: old for old, new in table.items()}


# --- a pyramid: the trunk under ``backbone.bottom_up``, then ``backbone.fpn_…`` ----------------------------------------

STAGES = {"stem.0.": "conv1.", "stem.1.": "bn1.", **{f"res{n + 1}.": f"layer{n}." for n in range(1, 5)}}
PARTS = {"inner": "lateral", "layer": "output"}
TRUNK, THEIR_TRUNK = "backbone.trunk.", "backbone.bottom_up."


def pyramid_to_detectron2(name: str, first: int) -> str | None:
    """Detectron2's name of a tensor of a `Pyramid`; None if the name is none of it.

    Args:
        name: Our name, which begins with ``backbone.``.
        first: The level of the finest map: 2 for stride 4.
    """
    if name.startswith(TRUNK):
        stage = renamed(name.removeprefix(TRUNK), STAGES)
        return None if stage is None else THEIR_TRUNK + to_detectron2(stage)
    block = re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.([0-9])\.([01])\.(\w+)", name)
    if block:
        norm = "norm." if block[3] == "1" else ""
        return f"backbone.fpn_{PARTS[block[1]]}{int(block[2]) + first}.{norm}{block[4]}"
    extra = re.fullmatch(r"backbone\.fpn\.extra_blocks\.(p[67]\.\w+)", name)
    return f"backbone.top_block.{extra[1]}" if extra else None


def pyramid_from_detectron2(name: str, first: int) -> str | None:
    """The inverse of `pyramid_to_detectron2`."""
    if name.startswith(THEIR_TRUNK):
        stage = renamed(from_detectron2(name.removeprefix(THEIR_TRUNK)), reversed_names(STAGES))
        return None if stage is None else TRUNK + stage
    block = re.fullmatch(r"backbone\.fpn_(lateral|output)([2-5])\.(norm\.)?(\w+)", name)
    if block:
        part = reversed_names(PARTS)[block[1]]
        return f"backbone.fpn.{part}_blocks.{int(block[2]) - first}.{1 if block[3] else 0}.{block[4]}"
    extra = re.fullmatch(r"backbone\.top_block\.(p[67]\.\w+)", name)
    return f"backbone.fpn.extra_blocks.{extra[1]}" if extra else None
