"""What this machine has and lacks."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import warnings
from importlib import metadata
from pathlib import Path

from mixmask.engine.builtin_configs import configs_folder
from mixmask.engine.config import read_config
from mixmask.engine.errors import RunFailure, UserError

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pandas",
    "pydantic",
    "safetensors",
    "pycocotools",
    "submitit",
    "matplotlib",
    "tensorboard",
    "wandb",
)


def examine() -> str:
    """A report with one fact per line; where something is missing, the line says how to get it."""
    return "\n".join([*_versions(), *_devices(), *_engines(), *_cluster(), *_data()])


def _versions() -> list[str]:
    lines = [f"python        {platform.python_version()}"]
    for name in PACKAGES:
        try:
            lines.append(f"{name:<13} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f'{name:<13} missing: pip install "{name}"')
    return lines


def _devices() -> list[str]:
    import torch

    from mixmask.engine.precision import fast_bf16

    def speed(device: torch.device) -> str:
        return "fast, use precision=bf16" if fast_bf16(device) else "not computed by the hardware, use precision=fp32"

    lines = [
        f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads; bf16: {speed(torch.device('cpu'))}"
    ]
    for number in range(torch.cuda.device_count()):
        gigabytes = torch.cuda.get_device_properties(number).total_memory / 2**30
        name = torch.cuda.get_device_name(number)
        lines.append(f"gpu {number}         {name}, {gigabytes:.0f} GiB; bf16: {speed(torch.device('cuda', number))}")
    if not torch.cuda.is_available():
        lines.append("gpu           none that torch sees")
    return lines


def _engines() -> list[str]:
    from mixmask.transfer.detection.engines.detectron2_config import INSTALL

    lines = ["detection     engine torchvision: ready"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("detectron2.engine")
        lines.append("detection     engine detectron2: ready")
    except Exception as error:  # whatever its import raises is the answer to the question
        lines.append(f"detection     engine detectron2: does not import ({error}). To install it: {INSTALL}")
    return lines


def _cluster() -> list[str]:
    from mixmask.launch.slurm import slurm_cli

    if shutil.which("sbatch") is None:
        return ["slurm         no sbatch here: mixmask launch takes --cluster local or inline"]
    try:  # what `mixmask launch` asks first
        slurm_cli.queued()
        version = slurm_cli.run(["sbatch", "--version"]).strip()
    except (UserError, RunFailure) as error:
        return [f"slurm         {error}"]
    return [f"slurm         {version}: mixmask launch submits to it"]


def _data() -> list[str]:
    roots: dict[str, str] = {}
    for path in sorted(
        [*(configs_folder() / "pretrain").glob("*.yaml"), *(configs_folder() / "transfer").glob("*.yaml")]
    ):
        tree, _ = read_config(path)
        roots[str(tree["data"]["root"])] = str(tree["data"]["name"])
    lines = []
    for root, name in sorted(roots.items()):
        state = "found" if Path(root).exists() else "not there: give its place with data.root=PATH"
        lines.append(f"data          {name}: {root} {state}")
    return lines
