"""Recognise a checkpoint's layout by its tensor names, and account for every tensor.

Nothing is dropped silently: a `TensorReport` says of each tensor that it is part of the trunk, or why it is left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mixmask.engine.backbones import BackboneRecipe, build_trunk
from mixmask.engine.config import checked_recipe
from mixmask.engine.errors import CheckpointError, ConfigError
from mixmask.engine.late import torch
from mixmask.engine.wording import did_you_mean
from mixmask.transfer.checkpoints.layouts import ANYWHERE, HEAD, TWIN, Layout, known_layouts
from mixmask.transfer.checkpoints.names import (
    COUNTER,
    DETECTRON2,
    SEQUENTIAL,
    TORCHVISION,
    TRANSFORMERS,
    ListedNames,
    Names,
    unwrapped,
)
from mixmask.transfer.checkpoints.stored import Stored

NAMINGS = (TORCHVISION, SEQUENTIAL, DETECTRON2, TRANSFORMERS)


@dataclass(frozen=True)
class Reading:
    """The user's choices for a checkpoint that its keys alone do not identify.

    Attributes:
        layout: The name of a layout; None recognises it by the keys.
        prefix: Everything before the trunk's names. Tensors without this prefix are left out, whatever they are.
        arch: A network of timm (``timm/convnext_tiny``), which is not recognised by its names, as a ResNet is.
    """

    layout: str | None = None
    prefix: str | None = None
    arch: str | None = None


BY_KEYS = Reading()


@dataclass(frozen=True)
class TensorReport:
    """How each tensor of a checkpoint was used.

    Attributes:
        layout: The layout that was recognised, and why.
        used: Source name to trunk name.
        left_out: Source name to reason.
        unknown: Source names that nothing explains.
        filled: Trunk names that the source does not store and whose value is known (batch counters: 0).
        warnings: Suspicious properties that are not errors.
        notes: Lines for the user about what was not read, and what was removed from names (`Contents.notes`).
    """

    layout: str
    used: Mapping[str, str]
    left_out: Mapping[str, str]
    unknown: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A few lines for the user."""
        weights = sum(1 for name in self.used.values() if not name.endswith(COUNTER))
        lines = [
            f"layout    {self.layout}",
            f"trunk     {weights} tensors, and {len(self.used) - weights} batch counters",
        ]
        for reason, count in Counter(self.left_out.values()).items():
            example = next(name for name, why in self.left_out.items() if why == reason)
            lines.append(f"left out  {count} × {reason} ({example}{' …' if count > 1 else ''})")
        if self.unknown:
            lines.append(f"unknown   {len(self.unknown)}: {some(self.unknown)}")
        if self.filled:
            lines.append(f"filled    {len(self.filled)} batch counters that the source does not store, with 0")
        return "\n".join([*lines, *self.notes, *(f"warning   {text}" for text in self.warnings)])


def some(names: Sequence[str], num: int = 4) -> str:
    """The first of many names, and how many more there are."""
    return ", ".join(names[:num]) + (f" … and {len(names) - num} more" if len(names) > num else "")


# --- recognising -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoundLayout:
    """A layout found in a file: the trunk's prefix, its naming scheme, and by which keys it was recognised."""

    layout: Layout
    prefix: str
    names: Names
    why: str


def recognise(tensors: Mapping[str, Stored], reading: Reading, path: Path) -> FoundLayout:
    """Find the layout of a file's tensors.

    Raises:
        CheckpointError: If no layout fits, one fits in several places, or the one that the user named does not fit.
    """
    listed = None if reading.arch is None else (ListedNames(trunk_names(named_recipe(reading.arch))),)
    if reading.prefix is not None:
        return _given_prefix(tensors, unwrapped(reading.prefix), listed or NAMINGS, path)
    known = {layout.name: layout for layout in known_layouts()}
    if reading.layout is not None and reading.layout not in known:
        hint = did_you_mean(reading.layout, known)
        raise CheckpointError(f"--as {reading.layout}: valid: {', '.join(known)}. {hint}".rstrip())
    for layout in known_layouts() if reading.layout is None else (known[reading.layout],):
        signs = [next((name for name in tensors if re.fullmatch(sign, name)), None) for sign in layout.signs]
        # A layout that the user names is tried even without its signs.
        if None in signs and reading.layout is None:
            continue
        places = list(_places(tensors, layout.trunk, listed or layout.namings))
        if len(places) > 1:
            raise CheckpointError(
                f"{path}: the layout '{layout.name}' fits in more than one place: "
                f"{', '.join(repr(prefix) for prefix, _ in places)}; choose with --prefix"
            )
        if places:
            prefix, names = places[0]
            by = " and ".join(f"'{sign}'" for sign in [f"{prefix}{names.anchor}", *signs] if sign is not None)
            because = "as you said" if reading.layout is not None else f"by {by}"
            return FoundLayout(layout, prefix, names, f"{layout.name}: {layout.about} ({because})")
    raise CheckpointError(_unrecognised(tensors, reading, path))


def _places(tensors: Mapping[str, Stored], trunk: str, namings: Sequence[Names]) -> Iterator[tuple[str, Names]]:
    """The prefixes at which a trunk could begin, each with its naming scheme."""
    for naming in namings:
        whole = re.compile(f"({trunk}){re.escape(naming.anchor)}")
        for name, tensor in tensors.items():
            found = whole.fullmatch(name)
            # A convolution's weight: a linear layer may have the same name (``0.weight``).
            if found and tensor.ndim == 4:
                yield found[1], naming.among(_behind(tensors, found[1]))


def _behind(tensors: Mapping[str, Stored], prefix: str) -> list[str]:
    return [name[len(prefix) :] for name in tensors if name.startswith(prefix)]


def _given_prefix(tensors: Mapping[str, Stored], prefix: str, namings: Sequence[Names], path: Path) -> FoundLayout:
    own = _behind(tensors, prefix)
    names = next((naming.among(own) for naming in namings if naming.anchor in own), None)
    if names is None:
        there = f"there stand {some(own)}" if own else "no tensor's name begins so"
        raise CheckpointError(
            f"{path}: no first convolution ({', '.join(n.anchor for n in namings)}) behind the prefix {prefix!r}: {there}. "
            f"{_candidates(tensors)}"
        )
    layout = Layout("given", "", "", others=((rf"(?!{re.escape(prefix)}).*", "outside the given prefix"),))
    return FoundLayout(layout, prefix, names, f"trunk behind the given prefix '{prefix}'")


def _candidates(tensors: Mapping[str, Stored]) -> str:
    """Where in a file a ResNet's first convolution could be."""
    found = sorted({name[: -len(n.anchor)] for n in NAMINGS for name in tensors if _begins_network(name, n, tensors)})
    places = ", ".join(repr(prefix) for prefix in found[:5])
    return f"A first convolution stands behind {places}" if places else "No tensor in it is named like one"


def _begins_network(name: str, naming: Names, tensors: Mapping[str, Stored]) -> bool:
    """Whether a tensor is a first convolution on RGB images, and not that of a momentum copy."""
    named = name == naming.anchor or name.endswith(f".{naming.anchor}")
    copied = re.search(r"encoder_k\.|momentum|target|_ema\b", name) is not None
    return named and not copied and tensors[name].ndim == 4 and tensors[name].shape[1] == 3


def _unrecognised(tensors: Mapping[str, Stored], reading: Reading, path: Path) -> str:
    if reading.layout is not None:
        try:
            found = recognise(tensors, replace(reading, layout=None), path)
            looks = f"; it looks like '{found.layout.name}', leave --as out"
        except CheckpointError:
            looks = ""
        return f"{path}: the layout '{reading.layout}' does not fit{looks}. {_candidates(tensors)}"
    family = _family(tensors)
    if family is not None:
        return f"{path}: {family}"
    groups = Counter(".".join(name.split(".")[:3]) for name in tensors)
    shown = ", ".join(f"{group} (×{count})" for group, count in groups.most_common(6))
    return (
        f"{path}: unknown layout: no trunk where one of {', '.join(known.name for known in known_layouts())} has it. "
        f"{_candidates(tensors)}. `mixmask convert {path} own.safetensors --to mixmask --prefix PREFIX` takes what stands "
        f"behind a prefix, and the result goes anywhere. Its tensors: {shown}"
    )


# Networks that are not recognised as a known ResNet, by names that only they have: (regular expression, message).
FAMILIES = (
    (
        r"(.*\.)?(conv1_w|res[2-5]_[0-9]+_branch2[abc]_w)",
        "has Caffe2's names, as Detectron2's models of MSRA and Detectron (R-50.pkl): they take BGR images, have the "
        "stride in the first 1×1 convolution of a block and folded statistics. That is another network than "
        "torchvision's ResNet, and is not converted",
    ),
    (
        r"(.*\.)?(cls_token|pos_embed(ding)?s?|blocks\.[0-9]+\.attn\..*|encoder\.layers?\.[\w.]*attention\..*"
        r"|layers\.[0-9]+\.blocks\.[0-9]+\.attn\..*)",
        "is a transformer, by {name}. This suite evaluates ConvNets",
    ),
    (
        r"(.*\.)?(downsample_layers\.0\.0\.weight|stem\.[01]\.weight|stages\.[0-9]+\.blocks\.[0-9]+\.\w+.*)",
        "is no ResNet of torchvision: by {name}, it looks like a ConvNeXt or another network of timm. If timm has it, "
        "name it: --arch timm/NAME, for example --arch timm/convnext_tiny (and --prefix, if something stands before "
        "timm's names)",
    ),
    (
        r"(.*\.)?(conv1\.[036]\.weight|stem\.conv[\w.]*\.weight|layer1\.0\.(se|aa|attn)\..*|layer1\.0\.conv[12]\.aa\..*)",
        "is a variant of the ResNet, by {name}. If timm has it, name it: --arch timm/NAME, for example "
        "--arch timm/resnet50d (and --prefix, if something stands before timm's names)",
    ),
)


def _family(tensors: Mapping[str, Stored]) -> str | None:
    for pattern, text in FAMILIES:
        name = next((name for name in tensors if re.fullmatch(pattern, name)), None)
        if name is not None:
            return text.format(name=name)
    return None


# --- sorting ---------------------------------------------------------------------------------------------------------


def sort_tensors(tensors: Mapping[str, Stored], found: FoundLayout) -> TensorReport:
    """Sort every tensor: part of the trunk, left out for a reason, or unknown."""
    used: dict[str, str] = {}
    left_out: dict[str, str] = {}
    unknown: list[str] = []
    rules = [(re.compile(pattern), reason) for pattern, reason in (*found.layout.others, *ANYWHERE)]
    for name in tensors:
        short = name[len(found.prefix) :] if name.startswith(found.prefix) else None
        ours = found.names.trunk_name(short) if short is not None else None
        if ours is None and found.names is DETECTRON2:
            ours = _in_detector(name, found)
        if ours is not None:
            used[name] = ours
            continue
        reason = next((why for pattern, why in rules if pattern.fullmatch(name)), None)
        if reason is None and short is not None and found.names.is_beyond(short):
            reason = HEAD
        if reason is None:
            unknown.append(name)
        else:
            left_out[name] = reason
    return TensorReport(found.why, used, left_out, tuple(unknown))


def twins(found: FoundLayout, left_out: Mapping[str, str]) -> dict[str, str]:
    """Tensors that a file holds under two names: from the name that is left out to the one that is used."""
    patterns = [pattern for pattern, reason in found.layout.others if reason is TWIN]
    matches = ((name, re.fullmatch(pattern, name)) for name in left_out for pattern in patterns)
    return {name: f"{found.prefix}{match['same']}" for name, match in matches if match is not None}


def _in_detector(name: str, found: FoundLayout) -> str | None:
    """Our name for a tensor of ``roi_heads.res5``, where a C4 detector keeps the trunk's last stage; None for others.

    The head's extra norm is not part of the trunk.
    """
    whole = re.fullmatch(r"(.*?)roi_heads\.(res5\..*)", name)
    return found.names.trunk_name(whole[2]) if whole and found.prefix == f"{whole[1]}backbone." else None


def named_recipe(arch: str) -> BackboneRecipe:
    """The network that ``--arch`` names.

    Raises:
        CheckpointError: If there is none of this name.
    """
    try:
        return checked_recipe(BackboneRecipe, {"arch": arch}, "--arch")
    except ConfigError as error:
        raise CheckpointError(error.one_line()) from None


def trunk_names(recipe: BackboneRecipe) -> list[str]:
    """The tensor names of a trunk, in the order of its state dict."""
    # Only names are needed: the meta device allocates nothing.
    with torch.device("meta"):
        return list(build_trunk(recipe).state_dict())
