"""Recognising a checkpoint's layout by its keys, and turning it into a trunk under torchvision's names.

Nothing is dropped in silence: an `Account` says of every tensor of the source whether it is the trunk's, and if not, why
it was left out. A tensor that nothing explains, or a trunk tensor without a source, is an error.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
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
from transfer.checkpoints.layouts import ANYWHERE, HEAD, LAYOUTS, Layout
from transfer.checkpoints.names import COUNTER, DETECTRON2, SEQUENTIAL, TORCHVISION, ListedNames, Names
from transfer.checkpoints.safe_read import digest, read_tensors

HEADS = re.compile(r"(fc|heads?|classifier|projector|projection|projetion|projection_head|predictor|mlp|linear)\..*")
NAMINGS = (TORCHVISION, SEQUENTIAL, DETECTRON2)


@dataclass(frozen=True)
class Reading:
    """How to read what the keys alone do not say.

    Attributes:
        layout: The name of a layout; None recognises it.
        prefix: All that stands before the trunk's names; tensors elsewhere are left out on the user's word.
        arch: A network of timm (``timm/convnext_tiny``), whose names say nothing; ResNets are recognised.
    """

    layout: str | None = None
    prefix: str | None = None
    arch: str | None = None


@dataclass(frozen=True)
class Account:
    """What became of every tensor of a source.

    Attributes:
        layout: The layout that was recognised, and why.
        used: Source name to trunk name.
        left_out: Source name to reason.
        unknown: Source names that nothing explains.
        filled: Trunk names that the source does not store and that have a defined value (counters).
        warnings: What is odd and no error.
    """

    layout: str
    used: Mapping[str, str]
    left_out: Mapping[str, str]
    unknown: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

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
            lines.append(f"unknown   {len(self.unknown)}: {_some(self.unknown)}")
        if self.filled:
            lines.append(f"filled    {len(self.filled)} batch counters that the source does not store, with 0")
        return "\n".join([*lines, *(f"warning   {text}" for text in self.warnings)])


@dataclass(frozen=True)
class Source:
    """A checkpoint that has been read.

    Attributes:
        path: The file.
        state: The complete trunk.
        info: Where it comes from.
        account: What became of every tensor.
        labelled: Whether the file itself says its framework and method; else the framework is a guess from names.
    """

    path: Path
    state: dict[str, Tensor]
    info: BackboneInfo
    account: Account
    labelled: bool = False


def read_source(path: Path, reading: Reading = Reading()) -> Source:
    """Read a trunk from this project's backbone file or from a checkpoint of a known layout.

    Raises:
        CheckpointError: If the file is damaged, its layout is unknown, a tensor is unexpected or missing, has a wrong
            shape, or is not finite.
    """
    if path.is_file() and path.suffix == ".safetensors" and is_backbone_file(path):
        state, info = load_backbone(path)
        account = Account("this project's backbone file (by its metadata)", {name: name for name in state}, {})
        labelled = True
    else:
        if path.is_file() and path.name == "backbone.safetensors":
            load_backbone(path)  # for its message: a truncated file of ours is not a file of another layout
        state, info, account = _foreign(path, reading)
        labelled = False
    broken = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{path}: values that are not finite in {', '.join(broken[:5])}")
    return Source(
        path, state, info, replace(account, warnings=(*account.warnings, *_fresh_statistics(state))), labelled
    )


def inspect(path: Path, reading: Reading = Reading(), every: bool = False) -> tuple[str, CheckpointError | None]:
    """What a checkpoint holds, in words, and what keeps it from being converted, if anything does.

    Args:
        path: The file.
        reading: How to read it.
        every: List every tensor with its shape and what becomes of it.

    Raises:
        CheckpointError: If the file cannot be read at all.
    """
    lines = [f"file      {path} ({path.stat().st_size / 1e6:,.1f} MB)"] if path.is_file() else []
    problem: CheckpointError | None = None
    tensors: dict[str, Tensor] = {}
    account: Account | None = None
    try:
        source = read_source(path, reading)
        account = source.account
        size = sum(tensor.numel() for name, tensor in source.state.items() if not name.endswith(COUNTER))
        kind = f"{source.info.arch}, {source.info.stem} stem, {source.info.framework}, {source.info.method}"
        lines.append(f"network   {kind}, {size / 1e6:.1f} M numbers")
    except CheckpointError as error:
        problem = error
    if account is None or every:
        tensors = _all_tensors(path)
    if account is None:
        try:
            account = _sort(tensors, _recognise(tensors, reading, path))
        except CheckpointError:
            lines.append(f"tensors   {len(tensors)}: {_some(list(tensors), 8)}")
    if account is not None:
        lines.append(account.summary())
    for name, tensor in tensors.items() if every else ():
        fate = "unknown"
        if account is not None:
            fate = account.used.get(name) or account.left_out.get(name) or fate
        lines.append(f"  {name}  {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}  {fate}")
    return "\n".join(lines), problem


def _foreign(path: Path, reading: Reading) -> tuple[dict[str, Tensor], BackboneInfo, Account]:
    tensors = _all_tensors(path)
    found = _recognise(tensors, reading, path)
    account = _sort(tensors, found)
    if account.unknown:
        outside = not any(name.startswith(found.prefix) for name in account.unknown)
        remedy = f". --prefix {found.prefix!r} leaves out all that stands elsewhere" if outside else ""
        raise CheckpointError(
            f"{path}: {len(account.unknown)} tensors that the layout '{found.layout.name}' does not explain: "
            f"{_some(account.unknown)}{remedy}"
        )
    twice = [ours for ours, count in Counter(account.used.values()).items() if count > 1]
    if twice:
        both = [theirs for theirs, ours in account.used.items() if ours == twice[0]]
        raise CheckpointError(f"{path}: {len(twice)} trunk tensors have two sources each, for example {_some(both)}")
    state = {ours: _plain(tensors[theirs]) for theirs, ours in account.used.items()}
    recipe = _architecture(state, path) if reading.arch is None else _named(reading.arch)
    expected = _expected(recipe)
    filled = tuple(name for name in expected if name not in state and name.endswith(COUNTER))
    state.update({name: torch.zeros((), dtype=torch.int64) for name in filled})
    check_trunk_state(state, recipe, str(path))
    content_digest = _identity(path, found.prefix, recipe)
    framework = found.layout.framework
    if framework == "moco" and f"{found.prefix}fc.2.weight" in tensors:
        framework = "mocov2"
    info = BackboneInfo(
        arch=recipe.arch,
        stem=recipe.stem,
        framework=framework,
        method="unknown",
        fingerprint=content_digest,
        lineage=content_digest,
    )
    warnings = _assumptions(found, recipe)
    return {name: state[name] for name in expected}, info, replace(account, filled=filled, warnings=warnings)


def _identity(path: Path, prefix: str, recipe: BackboneRecipe) -> str:
    """A file may hold several networks: which one was taken is part of what it is."""
    return hashlib.sha256(f"{digest(path)} {prefix} {recipe.arch}".encode()).hexdigest()[:12]


def _all_tensors(path: Path) -> dict[str, Tensor]:
    listed = list(_tensors(read_tensors(path)))
    tensors = dict(listed)
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if len(tensors) < len(listed):
        twice = [name for name, count in Counter(name for name, _ in listed).items() if count > 1]
        raise CheckpointError(f"{path}: several tensors have the same way through its containers: {_some(twice)}")
    return tensors


def _tensors(content: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor and array in nested containers, with its way through them."""
    if isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, np.ndarray) and content.dtype.kind in "fiub":
        yield where, torch.from_numpy(np.ascontiguousarray(content)).reshape(content.shape)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, f"{where}.{key}" if where else str(key))
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from _tensors(value, f"{where}.{number}" if where else str(number))


def _plain(tensor: Tensor) -> Tensor:
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()


def _some(names: Sequence[str], num: int = 4) -> str:
    return ", ".join(names[:num]) + (f" … and {len(names) - num} more" if len(names) > num else "")


# --- recognising -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A layout in a file: where its trunk stands, how it is named, and by what it was recognised."""

    layout: Layout
    prefix: str
    names: Names
    why: str


def _recognise(tensors: Mapping[str, Tensor], reading: Reading, path: Path) -> _Found:
    listed = None if reading.arch is None else (ListedNames(_expected(_named(reading.arch))),)
    if reading.prefix is not None:
        return _given_prefix(tensors, reading.prefix, listed or NAMINGS, path)
    known = {layout.name: layout for layout in LAYOUTS}
    if reading.layout is not None and reading.layout not in known:
        near = difflib.get_close_matches(reading.layout, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise CheckpointError(f"--as {reading.layout}: valid: {', '.join(known)}{hint}")
    for layout in LAYOUTS if reading.layout is None else (known[reading.layout],):
        signs = [next((name for name in tensors if re.fullmatch(sign, name)), None) for sign in layout.signs]
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
            return _Found(layout, prefix, names, f"{layout.name}: {layout.about} ({because})")
    raise CheckpointError(_unrecognised(tensors, reading, path))


def _places(tensors: Mapping[str, Tensor], trunk: str, namings: Sequence[Names]) -> Iterator[tuple[str, Names]]:
    """Where a trunk could begin, and how its tensors are named there."""
    for naming in namings:
        whole = re.compile(f"({trunk}){re.escape(naming.anchor)}")
        for name, tensor in tensors.items():
            found = whole.fullmatch(name)
            if found and tensor.ndim == 4:
                yield found[1], naming.among(_behind(tensors, found[1]))


def _behind(tensors: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name[len(prefix) :] for name in tensors if name.startswith(prefix)]


def _given_prefix(tensors: Mapping[str, Tensor], prefix: str, namings: Sequence[Names], path: Path) -> _Found:
    own = _behind(tensors, prefix)
    names = next((naming.among(own) for naming in namings if naming.anchor in own), None)
    if names is None:
        there = f"there stand {_some(own)}" if own else "no tensor's name begins so"
        raise CheckpointError(
            f"{path}: no first convolution ({', '.join(n.anchor for n in namings)}) behind the prefix {prefix!r}: {there}. "
            f"{_candidates(tensors)}"
        )
    layout = Layout("given", "", "", others=((rf"(?!{re.escape(prefix)}).*", "outside the given prefix"),))
    return _Found(layout, prefix, names, f"trunk behind the given prefix '{prefix}'")


def _candidates(tensors: Mapping[str, Tensor]) -> str:
    """Where in a file a ResNet's first convolution could be."""
    found = sorted({name[: -len(n.anchor)] for n in NAMINGS for name in tensors if _begins_network(name, n, tensors)})
    places = ", ".join(repr(prefix) for prefix in found[:5])
    return f"A first convolution stands behind {places}" if places else "No tensor in it is named like one"


def _begins_network(name: str, naming: Names, tensors: Mapping[str, Tensor]) -> bool:
    named = name == naming.anchor or name.endswith(f".{naming.anchor}")
    copied = re.search(r"encoder_k\.|momentum|target|_ema\b", name) is not None
    return named and not copied and tensors[name].ndim == 4 and tensors[name].shape[1] == 3


def _unrecognised(tensors: Mapping[str, Tensor], reading: Reading, path: Path) -> str:
    if reading.layout is not None:
        try:
            found = _recognise(tensors, replace(reading, layout=None), path)
            looks = f"; it looks like '{found.layout.name}', leave --as out"
        except CheckpointError:
            looks = ""
        return f"{path}: the layout '{reading.layout}' does not fit{looks}. {_candidates(tensors)}"
    groups = Counter(".".join(name.split(".")[:3]) for name in tensors)
    shown = ", ".join(f"{group} (×{count})" for group, count in groups.most_common(6))
    return (
        f"{path}: unknown layout: no trunk where one of {', '.join(known.name for known in LAYOUTS)} has it. "
        f"{_candidates(tensors)}. `mixmask convert {path} own.safetensors --to mixmask --prefix PREFIX` takes what stands "
        f"behind a prefix, and the result goes anywhere. Its tensors: {shown}"
    )


# --- sorting ---------------------------------------------------------------------------------------------------------


def _sort(tensors: Mapping[str, Tensor], found: _Found) -> Account:
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
        if reason is None and short is not None and (found.names.is_beyond(short) or HEADS.fullmatch(short)):
            reason = HEAD
        if reason is None:
            unknown.append(name)
        else:
            left_out[name] = reason
    return Account(found.why, used, left_out, tuple(unknown))


def _in_detector(name: str, found: _Found) -> str | None:
    """A whole C4 detector keeps the last stage in the regions' head; its extra normalisation is not the trunk's."""
    whole = re.fullmatch(r"(.*?)roi_heads\.(res5\..*)", name)
    return found.names.trunk_name(whole[2]) if whole and found.prefix == f"{whole[1]}backbone." else None


def _named(arch: str) -> BackboneRecipe:
    try:
        return BackboneRecipe.model_validate({"arch": arch})
    except ValueError as error:
        raise CheckpointError(f"--arch {arch}: {str(error).splitlines()[2].strip()}") from None


def _expected(recipe: BackboneRecipe) -> list[str]:
    with torch.device("meta"):
        return list(build_trunk(recipe).state_dict())


def _architecture(state: Mapping[str, Tensor], path: Path) -> BackboneRecipe:
    """The known architecture with the same tensor names; the stem by the first convolution's size."""
    names = {name for name in state if not name.endswith(COUNTER)}
    small = "conv1.weight" in state and tuple(state["conv1.weight"].shape[2:]) == (3, 3)
    closest, fewest = "", len(names) + 1000
    for arch in RESNETS:
        recipe = BackboneRecipe.model_validate({"arch": arch, "stem": "cifar" if small else "standard"})
        expected = {name for name in _expected(recipe) if not name.endswith(COUNTER)}
        if names == expected:
            return recipe
        missing, unexpected = sorted(expected - names), sorted(names - expected)
        if len(missing) + len(unexpected) < fewest:
            fewest = len(missing) + len(unexpected)
            closest = f"closest is {arch}, with missing {missing[:3]} and unexpected {unexpected[:3]}"
    raise CheckpointError(f"{path}: not a trunk of {' or '.join(RESNETS)}: {closest}")


def _assumptions(found: _Found, recipe: BackboneRecipe) -> tuple[str, ...]:
    """What the tensors do not show and had to be taken for granted."""
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
    means = [name for name in state if name.endswith("running_mean")]
    fresh = [
        name.removesuffix(".running_mean")
        for name in means
        if not bool(state[name].any()) and bool((state[name.replace("running_mean", "running_var")] == 1).all())
    ]
    if not fresh:
        return ()
    return (
        f"{len(fresh)} of {len(means)} batch normalisations have the statistics of initialisation ({_some(fresh, 2)}): "
        f"this network never saw a batch in training mode, or its statistics were not saved",
    )
