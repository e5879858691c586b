"""Stand-ins for the functions and classes that a pickle names.

Unpickling a file calls whatever functions it names, so a downloaded checkpoint could run any code. Here, tensors,
arrays and plain containers are made by functions of this module, and everything else becomes an `Inert` object. No
stand-in acts on anything but its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from mixmask.transfer.checkpoints.stored import Storage, Stored, array, odd

REBUILDS = "torch._utils._rebuild_"
# Modules with functions that can act on the machine. A pickle that names one of these is refused as a whole.
ACTING = re.compile(
    r"_codecs|_ctypes|_io|_operator|_pickle|_posixsubprocess|_thread|_winapi|asyncio|atexit|bdb|builtins|cPickle|cProfile"
    r"|cloudpickle|code|codecs|codeop|commands|ctypes|dill|fcntl|fileinput|ftplib|gc|glob|http|imp|importlib|inspect|io"
    r"|joblib|linecache|marshal|mmap|multiprocessing|nt|ntpath|numpy|operator|os|pdb|pickle|pip|pkgutil|platform|posix"
    r"|posixpath|profile|pty|requests|resource|runpy|select|selectors|setuptools|shelve|shutil|site|smtplib|socket|sqlite3"
    r"|ssl|subprocess|sys|tarfile|telnetlib|tempfile|threading|timeit|torch|trace|urllib|webbrowser|zipfile|zipimport"
)
# Exceptions: types and settings of those modules, which are safe to replace by `Inert` classes.
HARMLESS = re.compile(
    r"builtins\.(dict|list|tuple|set|frozenset|int|long|float|complex|bool|str|unicode|basestring|bytearray|object|slice|range"
    r"|xrange|type|min|max|sum|len|abs|round|any|all|sorted|NoneType|NotImplemented|Ellipsis|[A-Z]\w*(Error|Exception|Warning))"
    r"|numpy\.(bool_?|[a-z]+\d+_?|str_|bytes_|object_|number|floating|integer|generic|longlong|intc|double|single)"
    r"|numpy\.(dtypes|random)\..+"
    r"|torch\.(strided|sparse_\w+|channels_last(_3d)?|contiguous_format|preserve_format|per_\w+_affine|Tensor|Generator|device)"
    r"|torch\.(optim|nn|amp|cuda\.amp|utils\.data|distributed|fx|ao|quantization|_C\._distributed_c10d)\..+"
    r"|torch\.serialization\._get_layout|torch\._C\.\w+"
    r"|multiprocessing\.context\.\w+|asyncio\.\w+\.[A-Z]\w+|inspect\._empty|threading\.[A-Z]\w+"
)
# Modules that Python 2 called otherwise.
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections", "__builtins__": "builtins"}
DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Refused(Exception):
    """A pickle names something that no checkpoint needs; the message is that name."""


class Damaged(Exception):
    """A file that cannot be read as a checkpoint; the message says why."""


class Inert:
    """Stands for an object that is not created: it records what the pickle puts into it, and does nothing.

    Attributes:
        label: The name of the real class or function.
        parts: The arguments of its constructor, then appended elements.
        items: The entries that were set by key.
        state: What ``__setstate__`` would have received.
    """

    label = ""

    def __init__(self, *arguments: object) -> None:
        self.parts: list[object] = list(arguments)
        self.items: dict[object, object] = {}
        self.state: object = None

    def __repr__(self) -> str:
        """Its class."""
        return f"<{self.label}>"


def inert(label: str) -> type[Inert]:
    """A new `Inert` class with this label."""
    return type("Inert", (Inert,), {"label": label})


class Made:
    """Wraps a function of this module that replaces one of torch, NumPy or Python."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., object]) -> None:
        self.make = make


STORAGES: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}
QUANTISED = ("QInt8Storage", "QUInt8Storage", "QInt32Storage", "QUInt4x2Storage", "QUInt2x4Storage")


class StorageKind:
    """The class of a storage; ``dtype`` is None for quantised numbers."""

    def __init__(self, name: str) -> None:
        self.dtype = STORAGES.get(name)


class NumberFormat:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: object = "", *flags: object) -> None:
        del flags
        self.code, self.order = str(code)[:20], ""

    def real(self) -> np.dtype[np.generic] | None:
        """The NumPy dtype, or None if the code is not that of a bool, integer or float type."""
        if not re.fullmatch(r"[<>|=]?[biuf]\d{1,2}|\?", self.code, re.ASCII):
            return None
        try:
            return np.dtype(f"{self.order}{self.code.lstrip('<>|=')}")
        except TypeError:
            return None


class LateArray:
    """An array that a pickle creates empty (NumPy's ``_reconstruct``) and fills later, with its state."""

    value: Stored | None = None

    def take(self, state: object) -> None:
        """Set shape, dtype and bytes from the state that NumPy pickles.

        Raises:
            Damaged: If the state is not that of an array.
            ValueError: If the bytes do not fit the shape.
        """
        if not isinstance(state, tuple) or len(state) != 5:
            raise Damaged("an array without its content")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, NumberFormat):
            raise Damaged("an array without its number format")
        real = dtype.real()
        if real is None:
            self.value = odd(f"an array of objects or texts (numpy.dtype {dtype.code!r})")
        elif isinstance(data, bytes | bytearray | str) and isinstance(shape, tuple):
            self.value = array(_latin(data), real, shape, bool(fortran))
        else:
            raise Damaged("an array without its content")


def _latin(data: bytes | bytearray | str) -> bytes:
    # Python 2 pickled bytes as str, which is decoded as latin1.
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _reconstruct(*arguments: object) -> LateArray:
    del arguments
    return LateArray()


def _from_buffer(content: Any, dtype: object, shape: object, order: object) -> LateArray:
    made = LateArray()
    made.take((1, shape, dtype, order == "F", bytes(content)))
    return made


def _scalar(dtype: object, content: object = b"") -> object:
    real = dtype.real() if isinstance(dtype, NumberFormat) else None
    if real is None or not isinstance(content, bytes | str):
        return None
    return np.frombuffer(_latin(content), real)[0].item()


def _dtype(*arguments: object) -> NumberFormat:
    return NumberFormat(*arguments)


def _mapping(*arguments: object) -> dict[object, object]:
    """``OrderedDict`` or ``defaultdict``: the last argument is a dictionary or a list of pairs."""
    content: dict[object, object] = {}
    given = arguments[-1] if arguments else ()
    pairs = given.items() if isinstance(given, dict) else given
    for pair in pairs if isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Damaged("a dictionary of what are no pairs")
        content[key_of(pair[0])] = pair[1]
    return content


def _bytes(content: object = b"", *coding: object) -> bytes:
    del coding
    if not isinstance(content, bytes | str):
        raise Damaged("bytes of what is no text")
    return _latin(content)


def _size(sides: object = ()) -> object:
    return tuple(sides) if isinstance(sides, list | tuple) else sides


def _tensor(storage: object, offset: object = 0, shape: object = (), strides: object = (), *rest: object) -> object:
    dtype = next((value for value in rest if isinstance(value, torch.dtype)), None)
    if isinstance(storage, Stored):  # an odd storage: quantised numbers
        return storage
    if not isinstance(storage, Storage) or not isinstance(shape, Sequence) or not isinstance(strides, Sequence):
        raise Damaged("a tensor without its numbers")
    return storage.tensor(offset, shape, strides, dtype)


def _first(*arguments: object) -> object:
    """For ``nn.Parameter`` and tensors of other devices, whose first argument is a tensor or array with the values."""
    return arguments[0] if arguments else None


def _subclass(make: object, kind: object, arguments: object, state: object = None) -> object:
    del state
    if isinstance(make, Made) and isinstance(arguments, tuple):
        return make.make(*arguments)
    return odd(f"a tensor of the class {_label(kind)}")


def _wrapper(kind: object = None, *rest: object) -> Stored:
    del rest
    label = _label(kind)
    advice = "; gather it before saving (full_state_dict=True)" if label.endswith("DTensor") else ""
    return odd(f"one process's part of a tensor of the class {label}{advice}")


def _label(kind: object) -> str:
    return str(getattr(kind, "label", "unknown")) if isinstance(kind, Inert | type) else "unknown"


def _odd(what: str) -> Callable[..., object]:
    return lambda *arguments: odd(what)


def _attribute(owner: object = None, name: object = "", *rest: object) -> object:
    # Of a stand-in, getattr gives another stand-in. Of anything else it could reach real code.
    if isinstance(owner, Inert) or (isinstance(owner, type) and issubclass(owner, Inert)):
        return inert(f"{_label(owner)}.{str(name)[:100]}")()
    raise Refused("builtins.getattr")


def _old_object(kind: object = None, base: object = None, state: object = None) -> object:
    if not (isinstance(kind, type) and issubclass(kind, Inert)):
        raise Refused("copyreg._reconstructor")
    made = kind(base)
    if isinstance(state, dict):
        made.items.update(state)
    return made


# The functions that are replaced, by their names in pickles of torch 0.4 to 2, NumPy 1 and 2, Python 2 and 3.
KNOWN: dict[str, Made] = {
    name: Made(make)
    for names, make in (
        (("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"), _reconstruct),
        (("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _scalar),
        (("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), _from_buffer),
        (("numpy.ndarray",), _reconstruct),
        (("numpy.dtype",), _dtype),
        (("_codecs.encode", "builtins.bytes"), _bytes),
        (("collections.OrderedDict", "collections.defaultdict"), _mapping),
        (("torch.Size",), _size),
        ((f"{REBUILDS}tensor", f"{REBUILDS}tensor_v2", f"{REBUILDS}tensor_v3"), _tensor),
        ((f"{REBUILDS}parameter", f"{REBUILDS}parameter_with_state", f"{REBUILDS}device_tensor_from_numpy"), _first),
        ((f"{REBUILDS}device_tensor_from_cpu_tensor", f"{REBUILDS}xla_tensor"), _first),
        (("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"), _subclass),
        ((f"{REBUILDS}wrapper_subclass",), _wrapper),
        ((f"{REBUILDS}meta_tensor_no_storage",), _odd("a tensor without numbers (of the device 'meta')")),
        ((f"{REBUILDS}sparse_tensor", f"{REBUILDS}sparse_csr_tensor"), _odd("a sparse tensor")),
        ((f"{REBUILDS}nested_tensor",), _odd("a nested tensor")),
        ((f"{REBUILDS}qtensor",), _odd("a quantised tensor")),
        (("builtins.getattr",), _attribute),
        (("copyreg._reconstructor",), _old_object),
    )
    for name in names
}


def stand_in(module: str, name: str) -> object:
    """The stand-in for a name: a function of this module, a dtype, a storage class, or an `Inert` class.

    Raises:
        Refused: If the name belongs to a module that can act on the machine.
    """
    module = OLD_MODULES.get(module, module)
    full = f"{module}.{name}"
    if full in KNOWN:
        return KNOWN[full]
    if full in DTYPES:
        return DTYPES[full]
    root, last = module.partition(".")[0], name.rpartition(".")[2]
    if root == "torch" and last in (*STORAGES, *QUANTISED):
        return StorageKind(last)
    if ACTING.fullmatch(root) and not HARMLESS.fullmatch(full):
        raise Refused(full)
    return inert(full)


def key_of(key: object) -> Hashable:
    """Let a dictionary key of a simple type pass: hashing deeply nested tuples can be made to take forever.

    Raises:
        Damaged: If the key is of another type.
    """
    plain = key is None or isinstance(key, str | int | float | bytes | torch.dtype | Inert | type | Made)
    if plain or (isinstance(key, tuple) and all(isinstance(one, str | int | float | None) for one in key)):
        return key
    raise Damaged("a dictionary with a key that is no name or number")
