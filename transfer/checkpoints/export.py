"""Writing a trunk in the formats of other libraries, and reading it back to be sure."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Literal, get_args

import torch
import torchvision
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from engine.backbones import TIMM, BackboneInfo, build_trunk
from engine.errors import CheckpointError
from engine.storage import require_output_file, write_atomic
from transfer.checkpoints.layouts import COUNTER, Source

Target = Literal["detectron2", "torchvision", "timm"]
TARGETS: tuple[Target, ...] = get_args(Target)
SUFFIXES = {
    "detectron2": (".pkl",),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors",),
}


def to_detectron2(name: str) -> str:
    """Detectron2's name of a trunk tensor: ``layer1.0.bn1.weight`` is ``res2.0.conv1.norm.weight``.

    Raises:
        KeyError: If the name is not a ResNet trunk's.
    """
    stem = re.fullmatch(r"(conv1|bn1)\.(\w+)", name)
    if stem:
        return f"stem.conv1.{'norm.' if stem[1] == 'bn1' else ''}{stem[2]}"
    block = re.fullmatch(r"layer([1-4])\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)", name)
    if not block:
        raise KeyError(name)
    stage, index, kind, number, leaf = block.groups()
    where = f"res{int(stage) + 1}.{index}"
    if kind == "downsample.":
        return f"{where}.shortcut.{'norm.' if number == '1' else ''}{leaf}"
    return f"{where}.conv{number}.{'norm.' if kind == 'bn' else ''}{leaf}"


def from_detectron2(name: str) -> str:
    """The inverse of `to_detectron2`.

    Raises:
        KeyError: If the name is not a Detectron2 ResNet's.
    """
    stem = re.fullmatch(r"stem\.conv1\.(norm\.)?(\w+)", name)
    if stem:
        return f"{'bn1' if stem[1] else 'conv1'}.{stem[2]}"
    block = re.fullmatch(r"res([2-5])\.(\d+)\.(conv(\d)|shortcut)\.(norm\.)?(\w+)", name)
    if not block:
        raise KeyError(name)
    stage, index, part, number, norm, leaf = block.groups()
    where = f"layer{int(stage) - 1}.{index}"
    if part == "shortcut":
        return f"{where}.downsample.{1 if norm else 0}.{leaf}"
    return f"{where}.{'bn' if norm else 'conv'}{number}.{leaf}"


def check_export(source: Source, out: Path, target: Target) -> None:
    """Refuse what `export` could not write.

    Raises:
        UserError: If the suffix does not fit, the file is a folder or the source, or the stem cannot be expressed.
    """
    if out.suffix not in SUFFIXES[target]:
        raise CheckpointError(f"{out}: --to {target} writes {' or '.join(SUFFIXES[target])} files")
    require_output_file(out)
    if out.resolve() == source.path.resolve():
        raise CheckpointError(f"{out}: is the source itself; name another file")
    if source.info.arch.startswith(TIMM) and target != "timm":
        raise CheckpointError(f"{source.path}: is {source.info.arch}, which {target} does not have; use --to timm")
    if source.info.stem == "cifar":
        raise CheckpointError(
            f"{source.path}: has the CIFAR stem (3×3, stride 1, no max-pooling), which {target}'s ResNets do not have"
        )


def export(source: Source, out: Path, target: Target) -> str:
    """Write a trunk for another library, after its bytes have been read back and compared.

    Args:
        source: What was read.
        out: The file to write; its suffix must fit the target.
        target: ``detectron2`` (a pickle of numpy arrays under Detectron2's names), ``torchvision`` (a state dict for
            ``torchvision.models``, without ``fc``) or ``timm`` (the same tensors as safetensors, for ``num_classes=0``).

    Returns:
        What was written and verified, in words.

    Raises:
        UserError: As `check_export`, or if the bytes do not read back equal; then nothing is written.
    """
    check_export(source, out, target)
    if target == "detectron2":
        return _write_detectron2(source.state, out)
    return _write_plain(source.state, source.info, out, target)


def _write_detectron2(state: dict[str, Tensor], out: Path) -> str:
    model = {to_detectron2(name): tensor.numpy() for name, tensor in state.items() if not name.endswith(COUNTER)}
    counters = len(state) - len(model)
    payload = pickle.dumps({"model": model, "__author__": "mixmask", "matching_heuristics": True}, protocol=4)
    written = pickle.loads(payload)["model"]  # our own bytes, made above
    back = {from_detectron2(name): torch.from_numpy(array) for name, array in written.items()}
    different = [name for name, tensor in back.items() if not torch.equal(tensor, state[name])]
    if different or len(back) + counters != len(state):
        raise CheckpointError(f"{out}: does not read back equal ({', '.join(different[:5]) or 'tensors are missing'})")
    write_atomic(out, lambda file: file.write(payload))
    return (
        f"{out}: {len(model)} tensors under Detectron2's names, read back equal; "
        f"left out {counters} × batch counter, which Detectron2 does not load"
    )


def _write_plain(state: dict[str, Tensor], info: BackboneInfo, out: Path, target: Target) -> str:
    if out.suffix == ".safetensors":
        payload = save_safetensors(state, metadata={"format": "pt"})
        back = load_safetensors(payload)
    else:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getvalue()
        back = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    if target == "timm":
        import timm

        theirs = timm.create_model(info.arch.removeprefix(TIMM), pretrained=False, num_classes=0)
    else:
        theirs = getattr(torchvision.models, info.arch)(weights=None)
        theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(back, strict=True)
    ours = build_trunk(info.recipe)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((theirs.eval()(images) - ours.eval()(images)).abs().max())
    if difference > 1e-5:
        raise CheckpointError(f"{out}: {target}'s {info.arch} gives other features (largest difference {difference:g})")
    write_atomic(out, lambda file: file.write(payload))
    return f"{out}: {len(state)} tensors; {target}'s {info.arch} loads them strictly and gives the same features"
