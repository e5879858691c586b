"""Reading checkpoint files without running what is in them.

A pickle is a program; these readers carry out only what makes tensors, arrays and plain containers. What else it asks for
is refused by its name.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from engine.errors import CheckpointError

LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before version 1.6: a pickled magic number


class _Inert:
    """Stands for an object of a library that is not needed: it keeps nothing and does nothing."""

    def __init__(self, *arguments: object, **named: object) -> None:
        del arguments, named

    def __setstate__(self, state: object) -> None:
        del state


# Settings that training scripts save beside the tensors. They are not read: something inert takes their place.
INERT = (
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.nodes.AnyNode",
    "vissl.utils.hydra_config.AttrDict",
    "vissl.config.attr_dict.AttrDict",
    "pathlib.PosixPath",
    "typing.Any",
)

_reconstruct = np.empty(0).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]

# Names in pickles of numpy 1 and 2, and what they mean.
ARRAYS: dict[str, Any] = {
    **{f"{module}.multiarray._reconstruct": _reconstruct for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray.scalar": _scalar for module in ("numpy.core", "numpy._core")},
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": lambda text, coding: text.encode("latin1") if coding == "latin1" else _unknown_coding(coding),
    "collections.OrderedDict": collections.OrderedDict,
}


def _unknown_coding(coding: object) -> bytes:
    raise pickle.UnpicklingError(f"bytes in the coding {coding!r}")


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What a global in the pickle stands for; anything but arrays and containers is refused."""
        full = f"{module}.{name}"
        if full in ARRAYS:
            return ARRAYS[full]
        raise pickle.UnpicklingError(f"GLOBAL {full}")


def read_tensors(path: Path) -> Any:
    """Read a ``.safetensors`` file, a ``torch.save`` file, or a pickle of numpy arrays (Detectron2's ``.pkl``).

    Files of torch's zip format and safetensors are mapped: what is not used is not read.

    Raises:
        CheckpointError: If the file is missing, truncated, or a pickle that asks for more than tensors, arrays and
            containers; the message names what it asks for.
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
        if zipfile.is_zipfile(path) or _starts_with(path, LEGACY_TORCH):
            return _torch_file(path)
        return _arrays(path)
    except pickle.UnpicklingError as error:
        asked = next((line.split("GLOBAL", 1)[1] for line in str(error).splitlines() if "GLOBAL" in line), None)
        if asked is None:
            raise CheckpointError(f"{path}: truncated or not a checkpoint ({_first_line(error)})") from None
        name = asked.split(" was not")[0].strip()
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors, arrays and plain containers: {name}. Nothing of it was run. If "
            f"you trust the file, load it with its own code and save its state dict alone"
        ) from None
    except Exception as error:  # torch's reader raises anything at all on a damaged file
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _torch_file(path: Path) -> Any:
    inert = [(type(name.rsplit(".", 1)[1], (_Inert,), {}), name) for name in INERT]
    arrays = [(value, name) for name, value in ARRAYS.items() if not name.startswith("collections")]
    kinds = [(type(np.dtype(code)), f"numpy.dtypes.{type(np.dtype(code)).__name__}") for code in "?bBhHiIlLefd"]
    allowed: list[Any] = [argparse.Namespace, collections.defaultdict, *inert, *arrays, *kinds]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _arrays(path: Path) -> Any:
    with path.open("rb") as file:
        return _ArraysOnly(file, encoding="latin1").load()


def digest(path: Path) -> str:
    """Twelve hexadecimal digits of the file's content: the identity of a checkpoint that has no fingerprint."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            content.update(chunk)
    return content.hexdigest()[:12]
