"""Reading checkpoint files without running what is in them.

A pickle is a program; these readers carry out only what makes tensors, arrays and plain containers. What else it asks for
is refused by its name.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import pickle
import re
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


class _DType:
    """The description of a number format in a pickle; only numbers and truth values are admitted."""

    def __init__(self, code: str, *flags: object) -> None:
        del flags
        if not re.fullmatch(r"[<>|=]?[biuf]\d+|\?", str(code)):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
        self.code, self.order = str(code), ""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1] if state[1] in ("<", ">") else ""

    def real(self) -> np.dtype[Any]:
        return np.dtype(f"{self.order}{self.code.lstrip('<>|=')}")


class _Array:
    """An array in a pickle: what numpy itself would restore from bytes, it is given as bytes and shape."""

    def __init__(self, *arguments: object) -> None:
        del arguments
        self.value = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes | str):
            raise pickle.UnpicklingError("GLOBAL numpy.ndarray of objects")
        content = data.encode("latin1") if isinstance(data, str) else data
        flat = np.frombuffer(content, dtype.real()).copy()  # which may be written to, as torch wants it
        self.value = flat.reshape(tuple(int(side) for side in shape), order="F" if fortran else "C")


def _from_buffer(content: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", bytes(content)))
    return array


def _scalar(dtype: _DType, content: bytes | str) -> float:
    data = content.encode("latin1") if isinstance(content, str) else content
    return float(np.frombuffer(data, dtype.real())[0])


class _NoArray:
    """What a pickle calls numpy.ndarray; the arrays are made by `_Array`."""


def _encode(text: str, coding: str) -> bytes:
    if coding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the coding {coding!r}")
    return text.encode("latin1")


def _no_bytes(*content: object) -> bytes:
    if content:
        raise pickle.UnpicklingError("GLOBAL bytes")
    return b""


# Names in pickles of numpy 1 and 2, and what is carried out instead: numpy's own functions trust their input.
ARRAYS: dict[str, Any] = {
    **{f"{module}.multiarray._reconstruct": _Array for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray.scalar": _scalar for module in ("numpy.core", "numpy._core")},
    **{f"{module}.numeric._frombuffer": _from_buffer for module in ("numpy.core", "numpy._core")},
    "numpy.ndarray": _NoArray,
    "numpy.dtype": _DType,
    "_codecs.encode": _encode,
    "__builtin__.bytes": _no_bytes,
    "collections.OrderedDict": collections.OrderedDict,
}


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
        if asked is None and "weights_only" in str(error):  # torch's words, with advice that is not ours
            raise CheckpointError(
                f"{path}: refused or damaged: it is no file of tensors and plain containers"
            ) from None
        if asked is None:
            raise CheckpointError(f"{path}: truncated or not a checkpoint") from None
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
    allowed: list[Any] = [argparse.Namespace, collections.defaultdict, *inert, *arrays]
    with torch.serialization.safe_globals(allowed):
        return _restored(torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)))


def _arrays(path: Path) -> Any:
    with path.open("rb") as file:
        return _restored(_ArraysOnly(file, encoding="latin1").load())


def _restored(content: Any) -> Any:
    if isinstance(content, _Array):
        return content.value
    if isinstance(content, dict):
        return {key: _restored(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_restored(value) for value in content]
    return content


def digest(path: Path) -> str:
    """Twelve hexadecimal digits of the file's content: the identity of a checkpoint that has no fingerprint."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            content.update(chunk)
    return content.hexdigest()[:12]
