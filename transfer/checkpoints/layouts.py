"""Recognising a checkpoint's layout by its keys, and turning it into a trunk under torchvision's names.

Nothing is dropped in silence: an `Account` says of every tensor of the source whether it is the trunk's, and if not, why
it was left out. A tensor that is neither expected nor explained, or a trunk tensor without a source, is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backbones import (
    RESNETS,
    BackboneInfo,
    BackboneRecipe,
    build_trunk,
    check_trunk_state,
    is_backbone_file,
    load_backbone,
)
from engine.errors import CheckpointError
from transfer.checkpoints.safe_read import digest, read_tensors

COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Layout:
    """A way in which a framework names its tensors.

    Attributes:
        name: For messages.
        prefix: What stands before the trunk's names.
        heads: Patterns (after the prefix) of tensors that belong to the projection or classification head.
        others: Patterns of full names that belong to other parts, with the reason why they are left out.
    """

    name: str
    prefix: str
    heads: tuple[str, ...] = (r"fc\..*",)
    others: tuple[tuple[str, str], ...] = ()


LAYOUTS = (
    Layout(
        "MoCo (also Un-Mix and MixMask)",
        "module.encoder_q.",
        others=(
            (r"module\.encoder_k\..*", "momentum encoder"),
            (r"module\.queue(_ptr)?", "queue of negatives"),
        ),
    ),
    Layout("plain torchvision or timm", ""),
)


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a source.

    Attributes:
        layout: The layout that was recognised, and why.
        used: Source name to trunk name.
        left_out: Source name to reason.
        filled: Trunk names that the source does not store and that have a defined value (counters).
    """

    layout: str
    used: Mapping[str, str]
    left_out: Mapping[str, str]
    filled: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines for the user."""
        weights = sum(1 for name in self.used.values() if not name.endswith(COUNTER))
        lines = [
            f"layout    {self.layout}",
            f"trunk     {weights} tensors, and {len(self.used) - weights} batch counters",
        ]
        for reason, count in Counter(self.left_out.values()).items():
            lines.append(f"left out  {count} × {reason}")
        if self.filled:
            lines.append(f"filled    {len(self.filled)} batch counters that the source does not store, with 0")
        return "\n".join(lines)


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read: a complete trunk, where it comes from, and the account of its tensors."""

    path: Path
    state: dict[str, Tensor]
    info: BackboneInfo
    account: Account


def read_source(path: Path) -> Source:
    """Read a trunk from this project's backbone file or from a checkpoint of a known layout.

    Raises:
        CheckpointError: If the file is damaged, its layout is unknown, a tensor is unexpected or missing, has a wrong
            shape, or is not finite.
    """
    if path.is_file() and path.suffix == ".safetensors" and is_backbone_file(path):
        state, info = load_backbone(path)
        account = Account("this project's backbone file (by its metadata)", {name: name for name in state}, {})
    else:
        if path.is_file() and path.name == "backbone.safetensors":
            load_backbone(path)  # for its message: a truncated file of ours is not a file of another layout
        state, info, account = _from_layout(path)
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path}: values that are not finite in {', '.join(broken[:5])}")
    return Source(path, state, info, account)


def _from_layout(path: Path) -> tuple[dict[str, Tensor], BackboneInfo, Account]:
    content = read_tensors(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        kinds = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(f"{path}: no dictionary of tensors and no 'state_dict' in it (found: {kinds})")
    tensors: dict[str, Tensor] = dict(content)
    layout = next((known for known in LAYOUTS if f"{known.prefix}conv1.weight" in tensors), None)
    if layout is None:
        raise CheckpointError(
            f"{path}: unknown layout, no 'conv1.weight' behind any known prefix "
            f"({', '.join(repr(known.prefix) for known in LAYOUTS)}). Its first keys: {', '.join(list(tensors)[:4])}"
        )
    state, account = _sort(tensors, layout, path)
    recipe = _architecture(state, path)
    with torch.device("meta"):
        expected = list(build_trunk(recipe).state_dict())
    filled = tuple(name for name in expected if name not in state and name.endswith(COUNTER))
    state.update({name: torch.zeros((), dtype=torch.int64) for name in filled})
    check_trunk_state(state, recipe, str(path))
    content_digest = digest(path)
    info = BackboneInfo(
        arch=recipe.arch,
        stem=recipe.stem,
        framework=_framework(layout, tensors),
        method="unknown",
        fingerprint=content_digest,
        lineage=content_digest,
    )
    ordered = {name: state[name] for name in expected}
    return ordered, info, Account(account.layout, account.used, account.left_out, filled)


def _sort(tensors: Mapping[str, Tensor], layout: Layout, path: Path) -> tuple[dict[str, Tensor], Account]:
    state: dict[str, Tensor] = {}
    used: dict[str, str] = {}
    left_out: dict[str, str] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in layout.others if re.fullmatch(pattern, name)), None)
        if reason is not None:
            left_out[name] = reason
        elif not name.startswith(layout.prefix):
            unknown.append(name)
        else:
            short = name[len(layout.prefix) :]
            if any(re.fullmatch(pattern, short) for pattern in layout.heads):
                left_out[name] = "head"
            else:
                used[name] = short
                state[short] = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
    if unknown:
        raise CheckpointError(
            f"{path}: tensors that the layout '{layout.name}' does not explain: {', '.join(unknown[:5])}"
        )
    seen = f"{layout.name} (by '{layout.prefix}conv1.weight')"
    return state, Account(seen, used, left_out)


def _architecture(state: Mapping[str, Any], path: Path) -> BackboneRecipe:
    """The known architecture with the same tensor names; the stem by the first convolution's size."""
    names = {name for name in state if not name.endswith(COUNTER)}
    closest, fewest = "", len(names) + 1000
    for arch in RESNETS:
        recipe = BackboneRecipe.model_validate(
            {
                "arch": arch,
                "stem": "cifar" if tuple(state["conv1.weight"].shape[2:]) == (3, 3) else "standard",
            }
        )
        with torch.device("meta"):
            expected = {name for name in build_trunk(recipe).state_dict() if not name.endswith(COUNTER)}
        if names == expected:
            return recipe
        missing, unexpected = sorted(expected - names), sorted(names - expected)
        if len(missing) + len(unexpected) < fewest:
            fewest = len(missing) + len(unexpected)
            closest = f"closest is {arch}, with missing {missing[:3]} and unexpected {unexpected[:3]}"
    raise CheckpointError(f"{path}: not a trunk of {' or '.join(RESNETS)}: {closest}")


def _framework(layout: Layout, tensors: Mapping[str, Tensor]) -> str:
    if not layout.prefix:
        return "unknown"
    return "mocov2" if f"{layout.prefix}fc.2.weight" in tensors else "moco"
