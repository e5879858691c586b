"""Reading checkpoint files without running what is in them."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.errors import CheckpointError


def read_tensors(path: Path) -> Any:
    """Read a ``.safetensors`` file or a ``torch.save`` file, tensors and plain containers only.

    Raises:
        CheckpointError: If the file is missing, truncated, or a pickle that needs more than tensors and containers.
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, a checkpoint file was expected")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), None)
        if reason is None:
            raise CheckpointError(f"{path}: truncated or not a checkpoint") from None
        raise CheckpointError(f"{path}: refused, it holds more than tensors and plain containers ({reason})") from None
    except Exception as error:  # torch's reader raises anything at all on a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({reason})") from None


def digest(path: Path) -> str:
    """Twelve hexadecimal digits of the file's content: the identity of a checkpoint that has no fingerprint."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            content.update(chunk)
    return content.hexdigest()[:12]
