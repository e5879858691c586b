"""Read a trunk, under torchvision's names, from a checkpoint of any known layout.

Loading is strict: a tensor that no rule explains is an error, and so is a missing trunk tensor.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mixmask.engine.backbones import (
    HEAD,
    RESNETS,
    BackboneInfo,
    BackboneRecipe,
    check_trunk_state,
    is_backbone_file,
    load_backbone,
    load_backbone_and_head,
)
from mixmask.engine.errors import CheckpointError
from mixmask.engine.late import torch
from mixmask.transfer.checkpoints.names import COUNTER, DETECTRON2
from mixmask.transfer.checkpoints.stored import Stored
from mixmask.transfer.checkpoints.tensor_report import (
    BY_KEYS,
    FoundLayout,
    Reading,
    TensorReport,
    named_recipe,
    recognise,
    some,
    sort_tensors,
    trunk_names,
    twins,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read.

    Attributes:
        path: The file.
        state: The state dict of the complete trunk.
        info: Its architecture and where it comes from.
        tensor_report: How each tensor of the file was used, or why it was left out.
        labelled: Whether the file's metadata gives framework and method; if not, the framework is guessed from tensor
            names.
        head: The state dict of the projection head that ``info.head`` describes; empty if the file has none.
    """

    path: Path
    state: dict[str, Tensor]
    info: BackboneInfo
    tensor_report: TensorReport
    labelled: bool = False
    head: dict[str, Tensor] = field(default_factory=dict)


def read_source(path: Path, reading: Reading = BY_KEYS) -> Source:
    """Read a trunk from this project's backbone file or from a checkpoint of a known layout.

    Raises:
        CheckpointError: If the file is damaged, its layout is unknown, a tensor is unexpected or missing, has a wrong
            shape, or is not finite.
    """
    if path.is_file() and path.suffix == ".safetensors" and is_backbone_file(path):
        state, head, info = load_backbone_and_head(path)
        beside = {f"{HEAD}{name}": "projection head (kNN's features: head)" for name in head}
        tensor_report = TensorReport(
            "this project's backbone file (by its metadata)", {name: name for name in state}, beside
        )
        labelled = True
    else:
        if path.is_file() and path.name == "backbone.safetensors":
            load_backbone(path)  # for its message: a file of this name is ours and damaged, not of another layout
        state, info, tensor_report = _foreign(path, reading)
        labelled, head = False, {}
    broken = [name for name, tensor in {**state, **head}.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path}: values that are not finite in {', '.join(broken[:5])}")
    return Source(
        path,
        state,
        info,
        replace(tensor_report, warnings=(*tensor_report.warnings, *_fresh_statistics(state))),
        labelled,
        head,
    )


def origin(framework: str, method: str) -> str:
    """How a network was pretrained, in words, and for a foreign file how to label what it does not say."""
    known = [what for what in (framework, method) if what != "unknown"]
    if method != "unknown":
        return ", ".join(known)
    said = f"{framework} (by the tensors' names); " if known else ""
    return f"{said}the file does not name its method: framework=… and method=… label its results"


def inspect(path: Path, reading: Reading = BY_KEYS, every: bool = False) -> tuple[str, CheckpointError | None]:
    """Describe a checkpoint for the user, and return the error that prevents its conversion, if there is one.

    Args:
        path: The file.
        reading: How to read it.
        every: List every tensor with its shape and what becomes of it.

    Raises:
        CheckpointError: If the file cannot be read at all.
    """
    from mixmask.transfer.checkpoints.safe_read import read_tensors

    lines = [f"file      {path} ({path.stat().st_size / 1e6:,.1f} MB)"] if path.is_file() else []
    problem: CheckpointError | None = None
    tensors: dict[str, Stored] = {}
    tensor_report: TensorReport | None = None
    try:
        source = read_source(path, reading)
        tensor_report = source.tensor_report
        size = sum(tensor.numel() for name, tensor in source.state.items() if not name.endswith(COUNTER))
        lines.append(f"network   {source.info.arch}, {source.info.stem} stem, {size / 1e6:.1f} M numbers")
        lines.append(f"made by   {origin(source.info.framework, source.info.method)}")
    except CheckpointError as error:
        problem = error
    if tensor_report is None or every:
        tensors = read_tensors(path).tensors
    if tensor_report is None:
        try:
            tensor_report = sort_tensors(tensors, recognise(tensors, reading, path))
        except CheckpointError:
            lines.append(f"tensors   {len(tensors)}: {some(list(tensors), 8)}")
    if tensor_report is not None:
        lines.append(tensor_report.summary())
    for name, tensor in tensors.items() if every else ():
        fate = "unknown"
        if tensor_report is not None:
            fate = tensor_report.used.get(name) or tensor_report.left_out.get(name) or fate
        lines.append(f"  {name}  {tensor}  {fate}")
    return "\n".join(lines), problem


def _foreign(path: Path, reading: Reading) -> tuple[dict[str, Tensor], BackboneInfo, TensorReport]:
    from mixmask.transfer.checkpoints.safe_read import read_tensors

    contents = read_tensors(path)
    tensors = contents.tensors
    try:
        found = recognise(tensors, reading, path)
    except CheckpointError:
        _refuse_odd(tensors, list(tensors), path)
        raise
    tensor_report = replace(sort_tensors(tensors, found), notes=tuple(contents.notes()))
    _refuse_odd(tensors, [*tensor_report.used, *tensor_report.unknown], path)
    if tensor_report.unknown:
        outside = not any(name.startswith(found.prefix) for name in tensor_report.unknown)
        remedy = f". --prefix {found.prefix!r} leaves out all that stands elsewhere" if outside else ""
        raise CheckpointError(
            f"{path}: {len(tensor_report.unknown)} tensors that the layout '{found.layout.name}' does not explain: "
            f"{some(tensor_report.unknown)}{remedy}"
        )
    twice = [ours for ours, count in Counter(tensor_report.used.values()).items() if count > 1]
    if twice:
        both = [theirs for theirs, ours in tensor_report.used.items() if ours == twice[0]]
        raise CheckpointError(f"{path}: {len(twice)} trunk tensors have two sources each, for example {some(both)}")
    other = {name: tensors[name].dtype for name, ours in tensor_report.used.items() if not ours.endswith(COUNTER)}
    odd = [
        f"{name} ({str(dtype).removeprefix('torch.')})"
        for name, dtype in other.items()
        if dtype is None or not dtype.is_floating_point
    ]
    if odd:
        raise CheckpointError(f"{path}: weights that are no floating-point numbers: {some(odd)}")
    _require_equal_twins(tensors, found, tensor_report, path)
    state = {ours: _plain(_read(tensors[theirs], theirs, path)) for theirs, ours in tensor_report.used.items()}
    recipe = _architecture(state, path) if reading.arch is None else named_recipe(reading.arch)
    # A ResNet's first convolution tells how many channels the images have.
    if recipe.arch in RESNETS and state["conv1.weight"].ndim == 4:
        recipe = recipe.model_copy(update={"in_channels": state["conv1.weight"].shape[1]})
    expected = trunk_names(recipe)
    # Detectron2's files and those of old torch have no counters. BatchNorm with a fixed momentum does not use them.
    filled = tuple(name for name in expected if name not in state and name.endswith(COUNTER))
    state.update({name: torch.zeros((), dtype=torch.int64) for name in filled})
    check_trunk_state(state, recipe, str(path))
    content_digest = _identity(path, found.prefix, recipe)
    framework = found.layout.framework
    # MoCo v2's head is an MLP (fc.0, fc.2); v1's is one linear layer (fc).
    if framework == "moco" and f"{found.prefix}fc.2.weight" in tensors:
        framework = "mocov2"
    info = BackboneInfo(
        arch=recipe.arch,
        stem=recipe.stem,
        in_channels=recipe.in_channels,
        framework=framework,
        method="unknown",
        fingerprint=content_digest,
        lineage=content_digest,
    )
    warnings = _assumptions(found, recipe)
    return {name: state[name] for name in expected}, info, replace(tensor_report, filled=filled, warnings=warnings)


def _identity(path: Path, prefix: str, recipe: BackboneRecipe) -> str:
    """Fingerprint of a foreign trunk. A file may hold several networks, so the prefix is part of it."""
    from mixmask.transfer.checkpoints.safe_read import digest

    return hashlib.sha256(f"{digest(path)} {prefix} {recipe.arch}".encode()).hexdigest()[:12]


def _refuse_odd(tensors: Mapping[str, Stored], names: Sequence[str], path: Path) -> None:
    """Refuse tensors that cannot be read as ordinary ones: sparse, quantised, sharded …"""
    strange = [name for name in names if tensors[name].odd]
    if strange:
        more = f" (and {len(strange) - 1} more such places)" if len(strange) > 1 else ""
        raise CheckpointError(f"{path}: refused: {strange[0]} is {tensors[strange[0]].odd}{more}")


def _require_equal_twins(
    tensors: Mapping[str, Stored], found: FoundLayout, tensor_report: TensorReport, path: Path
) -> None:
    """Before one of two names of a tensor is dropped, check that both hold the same values."""
    for name, taken in twins(found, tensor_report.left_out).items():
        if taken in tensor_report.used and not torch.equal(
            _read(tensors[name], name, path), _read(tensors[taken], taken, path)
        ):
            raise CheckpointError(
                f"{path}: {name} and {taken} should be one tensor under two names, but differ; choose with --prefix"
            )


def _read(stored: Stored, name: str, path: Path) -> Tensor:
    try:
        return stored.read()
    except (CheckpointError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {name} {str(error).splitlines()[0]}") from None


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _architecture(state: Mapping[str, Tensor], path: Path) -> BackboneRecipe:
    """The known architecture with exactly these tensor names; a 3×3 first convolution means the CIFAR stem."""
    names = {name for name in state if not name.endswith(COUNTER)}
    small = "conv1.weight" in state and tuple(state["conv1.weight"].shape[2:]) == (3, 3)
    closest, fewest = "", len(names) + 1000
    for arch in RESNETS:
        recipe = BackboneRecipe.model_validate({"arch": arch, "stem": "cifar" if small else "standard"})
        expected = {name for name in trunk_names(recipe) if not name.endswith(COUNTER)}
        if names == expected:
            return recipe
        missing, unexpected = sorted(expected - names), sorted(names - expected)
        if len(missing) + len(unexpected) < fewest:
            fewest = len(missing) + len(unexpected)
            closest = f"closest is {arch}, with missing {missing[:3]} and unexpected {unexpected[:3]}"
    raise CheckpointError(f"{path}: not a trunk of {' or '.join(RESNETS)}: {closest}")


def _assumptions(found: FoundLayout, recipe: BackboneRecipe) -> tuple[str, ...]:
    """Warnings about what tensors do not show and had to be assumed: strides, padding, the order of colour channels."""
    taken = []
    if recipe.stem == "cifar":
        padding = (
            "; solo-learn pads by 2, so features at the borders differ" if found.layout.name == "solo-learn" else ""
        )
        taken.append(f"the 3×3 stem is taken to have stride 1, padding 1 and a ReLU, without pooling{padding}")
    if found.names is DETECTRON2:
        taken.append(
            "taken to be trained on RGB with the stride in the 3×3 convolutions (STRIDE_IN_1X1 False); Detectron2's own "
            "models from Caffe weights are not, and are then another network"
        )
    return tuple(taken)


def _fresh_statistics(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Warn about BatchNorm layers whose running statistics are those of initialisation (mean 0, variance 1)."""
    means = [name for name in state if name.endswith("running_mean")]
    fresh = [
        name.removesuffix(".running_mean")
        for name in means
        if not bool(state[name].any()) and bool((state[name.replace("running_mean", "running_var")] == 1).all())
    ]
    if not fresh:
        return ()
    folded = [name for name in fresh if f"{name}.bias" in state and bool(state[f"{name}.bias"].any())]
    if len(fresh) == len(means) and len(folded) == len(means):
        return (
            "every batch normalisation has a trained bias and the statistics of initialisation, as in models converted from "
            "Caffe (MSRA's ResNet-50): those take BGR images and have the stride in the first 1×1 convolution, and are then "
            "another network than the one written here",
        )
    return (
        f"{len(fresh)} of {len(means)} batch normalisations have the statistics of initialisation ({some(fresh, 2)}): "
        f"this network never saw a batch in training mode, or its statistics were not saved",
    )
