"""Write a trunk in the formats of other libraries, and verify each file by loading it with that library."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from mixmask.engine.backbones import TIMM, BackboneRecipe, build_trunk, load_backbone, save_backbone
from mixmask.engine.errors import CheckpointError
from mixmask.engine.late import torch, torchvision
from mixmask.engine.storage import require_output_file, write_atomic
from mixmask.transfer.checkpoints.names import COUNTER, from_detectron2, to_detectron2
from mixmask.transfer.checkpoints.source import Source

if TYPE_CHECKING:
    from torch import Tensor, nn

Target = Literal["detectron2", "torchvision", "timm", "mixmask"]
TARGETS: tuple[Target, ...] = get_args(Target)
SUFFIXES = {
    "detectron2": (".pkl",),
    "torchvision": (".pth", ".pt", ".safetensors"),
    "timm": (".safetensors",),
    "mixmask": (".safetensors",),
}
STAGES = ("layer1", "layer2", "layer3", "layer4")
TOLERANCE = 1e-5  # relative to the largest feature (or to 1, if that is larger)


def check_export(source: Source, out: Path, target: Target) -> None:
    """Refuse what `export` could not write.

    Raises:
        UserError: If the suffix does not fit the target, the file is a folder or the source itself, or the target has
            no such stem or architecture.
    """
    if out.suffix not in SUFFIXES[target]:
        raise CheckpointError(f"{out}: --to {target} writes {' or '.join(SUFFIXES[target])} files")
    require_output_file(out)
    if out.resolve() == source.path.resolve():
        raise CheckpointError(f"{out}: is the source itself; name another file")
    require_known_network(source.info.recipe, target, str(source.path))


def require_known_network(backbone: BackboneRecipe, target: Target, where: str) -> None:
    """Refuse a network that the target library does not have.

    Args:
        backbone: The network.
        target: The library.
        where: The file or config that the network comes from, for the message.

    Raises:
        CheckpointError: If the target has no such stem or architecture.
    """
    if target == "mixmask":
        return
    if backbone.in_channels != 3:
        raise CheckpointError(
            f"{where}: takes images of {backbone.in_channels} channels, and {target}'s networks take RGB; mixmask's "
            f"own file is the only form of it"
        )
    if backbone.arch.startswith(TIMM) and target != "timm":
        raise CheckpointError(f"{where}: is {backbone.arch}, which {target} does not have; convert it to timm")
    if backbone.stem == "cifar":
        raise CheckpointError(
            f"{where}: has the CIFAR stem (3×3, stride 1, no max-pooling), which {target}'s ResNets do not have. "
            f"Convert it to mixmask, leave the conversion out, or pretrain with backbone.stem=standard"
        )


def export(source: Source, out: Path, target: Target, verify: bool = True) -> str:
    """Write a trunk for another library. The file gets its final name only after that library has read it back.

    Args:
        source: The checkpoint that was read.
        out: The file to write; its suffix must fit the target.
        target: ``detectron2`` (a pickle of numpy arrays under Detectron2's names), ``torchvision`` (a state dict for
            ``torchvision.models``, without ``fc``), ``timm`` (the same tensors as safetensors, for ``num_classes=0``) or
            ``mixmask`` (this project's own file, which every stage takes).
        verify: Load the written file with the target library and compare features with the source's on a fixed input.

    Returns:
        What was written and verified, in words.

    Raises:
        UserError: As `check_export`, or if the file gives other tensors or features; then nothing is written.
    """
    check_export(source, out, target)
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because os.replace is atomic only within one file system.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        written = Path(folder) / out.name
        said = WRITERS[target](source, written)
        said += f"; {VERIFIERS[target](source, written)}" if verify else "; not verified"
        os.replace(written, out)
    return f"{out}: {said}"


# --- writing ---------------------------------------------------------------------------------------------------------


def write_detectron2(path: Path, state: Mapping[str, Tensor]) -> int:
    """Write a trunk as Detectron2's ``MODEL.WEIGHTS``, without the batch counters; returns the number of tensors."""
    model = {to_detectron2(name): tensor.numpy() for name, tensor in state.items() if not name.endswith(COUNTER)}
    # Makes Detectron2 match names by suffix: ``res5.…`` then finds ``roi_heads.res5.…`` in a C4 detector.
    content = {"model": model, "__author__": "mixmask", "matching_heuristics": True}
    write_atomic(path, lambda file: pickle.dump(content, file, protocol=4))
    return len(model)


def _write_detectron2(source: Source, out: Path) -> str:
    num = write_detectron2(out, source.state)
    counters = len(source.state) - num
    return f"{num} tensors under Detectron2's names without {counters} batch counters, which it does not load"


def _write_plain(source: Source, out: Path) -> str:
    if out.suffix == ".safetensors":
        from safetensors.torch import save

        payload = save(source.state, metadata={"format": "pt"})
        write_atomic(out, lambda file: file.write(payload))
    else:
        write_atomic(out, lambda file: torch.save(source.state, file))
    return f"{len(source.state)} tensors"


def _write_own(source: Source, out: Path) -> str:
    save_backbone(out, source.state, source.info, source.head)
    return f"{len(source.state)} tensors with where they come from"


WRITERS: dict[Target, Callable[[Source, Path], str]] = {
    "detectron2": _write_detectron2,
    "torchvision": _write_plain,
    "timm": _write_plain,
    "mixmask": _write_own,
}

# --- reading back ----------------------------------------------------------------------------------------------------


def _verify_torchvision(source: Source, written: Path) -> str:
    theirs: Any = getattr(torchvision.models, source.info.arch)(weights=None)
    # The file has no classifier; features are compared, not logits.
    theirs.fc = torch.nn.Identity()
    from safetensors.torch import load_file

    state = load_file(written) if written.suffix == ".safetensors" else torch.load(written, weights_only=True)
    theirs.load_state_dict(state, strict=True)
    _require_same_features(source, theirs, written)
    return f"torchvision's {source.info.arch} loads them strictly and gives the same features"


def _verify_timm(source: Source, written: Path) -> str:
    import timm

    name = source.info.arch.removeprefix(TIMM)
    _require_same_features(source, timm.create_model(name, num_classes=0, checkpoint_path=str(written)), written)
    return f"timm's {name} loads them strictly and gives the same features"


def _verify_own(source: Source, written: Path) -> str:
    state, info = load_backbone(written)
    trunk = build_trunk(info.recipe)
    trunk.load_state_dict(state, strict=True)
    _require_same_features(source, trunk, written)
    return "they load strictly and give the same features"


def _verify_detectron2(source: Source, written: Path) -> str:
    from mixmask.transfer.checkpoints.safe_read import read_tensors

    arrays = read_tensors(written).tensors
    back = {from_detectron2(name.removeprefix("model.")): stored.read() for name, stored in arrays.items()}
    expected = {name: tensor for name, tensor in source.state.items() if not name.endswith(COUNTER)}
    different = [n for n in expected.keys() | back.keys() if n not in back or not torch.equal(back[n], expected[n])]
    if different:
        raise CheckpointError(f"{written.name}: does not read back equal ({', '.join(different[:5])})")
    try:
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.modeling.backbone.resnet import BasicStem, ResNet
    except ImportError:
        return "they read back equal; Detectron2 does not import here, so its own ResNet was not asked"
    depth = int(source.info.arch.removeprefix("resnet"))
    theirs = ResNet(
        BasicStem(norm="BN"),
        # torchvision's bottlenecks have the stride in the 3×3 convolution. Basic blocks do not take the option.
        ResNet.make_default_stages(depth, norm="BN", **({} if depth < 50 else {"stride_in_1x1": False})),
        out_features=["res2", "res3", "res4", "res5"],
    )
    DetectionCheckpointer(theirs.eval()).load(str(written))
    ours, images = _trunk(source), _images()
    with torch.no_grad():
        found: dict[str, Tensor] = theirs(images)
        features: Tensor = ours.maxpool(ours.relu(ours.bn1(ours.conv1(images))))
        for number, stage in enumerate(STAGES, start=2):
            features = ours.get_submodule(stage)(features)
            _require_close(found[f"res{number}"], features, written, f"Detectron2's res{number}")
    return "Detectron2's own ResNet loads them and gives the same features at res2 … res5"


VERIFIERS: dict[Target, Callable[[Source, Path], str]] = {
    "detectron2": _verify_detectron2,
    "torchvision": _verify_torchvision,
    "timm": _verify_timm,
    "mixmask": _verify_own,
}


def _images() -> Tensor:
    return torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def _trunk(source: Source) -> Any:
    trunk = build_trunk(source.info.recipe)
    trunk.load_state_dict(source.state)
    return trunk.eval()


def _require_same_features(source: Source, theirs: nn.Module, written: Path) -> None:
    with torch.no_grad():
        _require_close(theirs.eval()(_images()), _trunk(source)(_images()), written, "the library's network")


def _require_close(found: Tensor, wanted: Tensor, written: Path, where: str) -> None:
    difference, scale = float((found - wanted).abs().max()), max(1.0, float(wanted.abs().max()))
    # `not <=` instead of `>`: NaN is refused, too.
    if not difference <= TOLERANCE * scale:
        raise CheckpointError(
            f"{written.name}: {where} gives other features than the source (largest difference {difference:g}, largest "
            f"feature {scale:g}); nothing was written"
        )
