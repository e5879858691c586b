"""The names of a pyramid's tensors in Detectron2: the trunk under ``backbone.bottom_up``, then ``backbone.fpn_…``."""

from __future__ import annotations

import re

from mixmask.transfer.checkpoints.names import from_detectron2, to_detectron2

STAGES = {"stem.0.": "conv1.", "stem.1.": "bn1.", **{f"res{n + 1}.": f"layer{n}." for n in range(1, 5)}}
PARTS = {"inner": "lateral", "layer": "output"}
LEAF = {"0": "", "1": "norm."}
TRUNK, PYRAMID = "backbone.trunk.", "backbone.fpn."
THEIR_TRUNK, THEIR_PYRAMID = "backbone.bottom_up.", "backbone.fpn_"


def pyramid_to_detectron2(name: str, first: int) -> str | None:
    """Detectron2's name of a tensor of a `Pyramid`; None if the name is none of it.

    Args:
        name: Our name, which begins with ``backbone.``.
        first: The level of the finest map: 2 for stride 4.
    """
    if name.startswith(TRUNK):
        own = name.removeprefix(TRUNK)
        stage = next((new + own[len(old) :] for old, new in STAGES.items() if own.startswith(old)), None)
        return None if stage is None else THEIR_TRUNK + to_detectron2(stage)
    block = re.fullmatch(r"backbone\.fpn\.(inner|layer)_blocks\.([0-9])\.([01])\.(\w+)", name)
    if block:
        return f"{THEIR_PYRAMID}{PARTS[block[1]]}{int(block[2]) + first}.{LEAF[block[3]]}{block[4]}"
    extra = re.fullmatch(r"backbone\.fpn\.extra_blocks\.(p[67]\.\w+)", name)
    return f"backbone.top_block.{extra[1]}" if extra else None


def pyramid_from_detectron2(name: str, first: int) -> str | None:
    """The inverse of `pyramid_to_detectron2`."""
    if name.startswith(THEIR_TRUNK):
        trunk = from_detectron2(name.removeprefix(THEIR_TRUNK))
        return TRUNK + next(ours + trunk[len(old) :] for ours, old in STAGES.items() if trunk.startswith(old))
    block = re.fullmatch(r"backbone\.fpn_(lateral|output)([2-5])\.(norm\.)?(\w+)", name)
    if block:
        part = next(ours for ours, theirs in PARTS.items() if theirs == block[1])
        return f"{PYRAMID}{part}_blocks.{int(block[2]) - first}.{1 if block[3] else 0}.{block[4]}"
    extra = re.fullmatch(r"backbone\.top_block\.(p[67]\.\w+)", name)
    return f"{PYRAMID}extra_blocks.{extra[1]}" if extra else None
