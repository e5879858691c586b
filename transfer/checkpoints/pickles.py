"""Reading a pickle without running it.

A pickle is a program that calls functions by their names. Here no name leads to the function it means. Tensors, arrays and
plain containers are made by functions of this module; whatever else is named becomes an `Inert` object, which records
what is put into it and does nothing. Names that only an attack asks for end the reading.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import IO, Any, ClassVar

import numpy as np
import torch

from transfer.checkpoints.stored import Storage, Stored, array, odd

MAX_OPERATIONS = 2_000_000  # the checkpoint of a ResNet-152 with its optimizer takes 100,000
MAX_BITS = 4096  # of an integer; states of random generators have 128

# Modules whose functions act on the machine: what names one of them is no checkpoint.
ACTING = frozenset(
    [
        "_codecs",
        "_ctypes",
        "_io",
        "_operator",
        "_pickle",
        "_posixsubprocess",
        "_thread",
        "_winapi",
        "asyncio",
        "atexit",
        "bdb",
        "builtins",
        "cPickle",
        "cProfile",
        "cloudpickle",
        "code",
        "codecs",
        "codeop",
        "commands",
        "ctypes",
        "dill",
        "fcntl",
        "fileinput",
        "ftplib",
        "gc",
        "glob",
        "http",
        "imp",
        "importlib",
        "inspect",
        "io",
        "joblib",
        "linecache",
        "marshal",
        "mmap",
        "multiprocessing",
        "nt",
        "ntpath",
        "numpy",
        "operator",
        "os",
        "pdb",
        "pickle",
        "pip",
        "pkgutil",
        "platform",
        "posix",
        "posixpath",
        "profile",
        "pty",
        "requests",
        "resource",
        "runpy",
        "select",
        "selectors",
        "setuptools",
        "shelve",
        "shutil",
        "site",
        "smtplib",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "sys",
        "tarfile",
        "telnetlib",
        "tempfile",
        "threading",
        "timeit",
        "torch",
        "trace",
        "urllib",
        "webbrowser",
        "zipfile",
        "zipimport",
    ]
)
# Parts of those modules that are mere types and settings.
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
_Unpickler: Any = pickle._Unpickler  # Python's own in Python: every operation of it can be replaced
REBUILDS = "torch._utils._rebuild_"
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections", "__builtins__": "builtins"}


class Refused(Exception):
    """A pickle that names what no checkpoint needs; the text is the name."""


class Damaged(Exception):
    """A pickle that makes no sense; the text says why."""


class Inert:
    """Stands for an object that was not made: it keeps what the pickle puts into it.

    Attributes:
        label: The name of its class or function.
        parts: Everything that was put into it: arguments, state, elements.
        items: What was put under keys.
        state: What its class would have been given to restore itself from.
    """

    label = ""

    def __new__(cls, *arguments: object, **named: object) -> Inert:
        """Take any arguments."""
        made = object.__new__(cls)
        made.parts = [*arguments, *named.values()]
        made.items = {}
        made.state = None
        return made

    parts: list[object]
    items: dict[object, object]
    state: object

    def __init__(self, *arguments: object, **named: object) -> None:
        del arguments, named

    def __repr__(self) -> str:
        """Its class."""
        return f"<{self.label}>"


class Made:
    """A function of this module that stands for one of torch, numpy or Python."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[..., object]) -> None:
        self.make = make


class _DType:
    """The description of a number format; ``real`` is None where it is none of numbers and truth values."""

    def __init__(self, code: object = "", *flags: object) -> None:
        del flags
        self.code, self.order = str(code)[:20], ""

    def real(self) -> np.dtype[np.generic] | None:
        if not re.fullmatch(r"[<>|=]?[biuf]\d{1,2}|\?", self.code, re.ASCII):
            return None
        try:
            return np.dtype(f"{self.order}{self.code.lstrip('<>|=')}")
        except TypeError:
            return None


class _Array:
    """An array whose bytes and shape come later."""

    value: Stored | None = None

    def take(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Damaged("an array without its content")
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DType):
            raise Damaged("an array without its number format")
        real = dtype.real()
        if real is None:
            self.value = odd(f"an array of objects or texts (numpy.dtype {dtype.code!r})")
        elif isinstance(data, bytes | bytearray | str) and isinstance(shape, tuple):
            self.value = array(_latin(data), real, shape, bool(fortran))
        else:
            raise Damaged("an array without its content")


def _latin(data: bytes | bytearray | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else bytes(data)


def _reconstruct(*arguments: object) -> _Array:
    del arguments
    return _Array()


def _from_buffer(content: Any, dtype: object, shape: object, order: object) -> _Array:
    made = _Array()
    made.take((1, shape, dtype, order == "F", bytes(content)))
    return made


def _scalar(dtype: object, content: object = b"") -> object:
    real = dtype.real() if isinstance(dtype, _DType) else None
    if real is None or not isinstance(content, bytes | str):
        return None
    return np.frombuffer(_latin(content), real)[0].item()


def _dtype(*arguments: object) -> _DType:
    return _DType(*arguments)


def _mapping(*arguments: object) -> dict[object, object]:
    """An ordered or default dictionary: what stands last are pairs or another dictionary."""
    content: dict[object, object] = {}
    given = arguments[-1] if arguments else ()
    pairs = given.items() if isinstance(given, dict) else given
    for pair in pairs if isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Damaged("a dictionary of what are no pairs")
        content[_key(pair[0])] = pair[1]
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
    """A parameter is its tensor; a tensor of another device is the array that it was copied to."""
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
    if isinstance(owner, Inert) or (isinstance(owner, type) and issubclass(owner, Inert)):
        return _inert(f"{_label(owner)}.{str(name)[:100]}")()
    raise Refused("builtins.getattr")


def _old_object(kind: object = None, base: object = None, state: object = None) -> object:
    if not (isinstance(kind, type) and issubclass(kind, Inert)):
        raise Refused("copyreg._reconstructor")
    made = kind(base)
    if isinstance(state, dict):
        made.items.update(state)
    return made


# What is carried out, by its name in pickles of torch 0.4 to 2, numpy 1 and 2, Python 2 and 3.
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


def _inert(label: str) -> type[Inert]:
    return type("Inert", (Inert,), {"label": label})


def _key(key: object) -> Hashable:
    """A key that can be hashed at once: nested tuples could be made to take for ever."""
    plain = key is None or isinstance(key, str | int | float | bytes | torch.dtype | Inert | type | Made)
    if plain or (isinstance(key, tuple) and all(isinstance(one, str | int | float | None) for one in key)):
        return key
    raise Damaged("a dictionary with a key that is no name or number")


class Reader(_Unpickler):  # type: ignore[misc]
    """Restores containers, `Stored` tensors and arrays, and `Inert` objects from a pickle.

    Args:
        file: Where the pickle begins; of a known end, so that no length in it can ask for more than there is.
        storage: Gives the storage that a tensor's description names (what torch calls its persistent id).
        embedded: Gives the storage that a plain pickle of a tensor carries as a file of torch within it.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def __init__(
        self,
        file: IO[bytes],
        storage: Callable[[Any], object] | None = None,
        embedded: Callable[[bytes], object] | None = None,
    ) -> None:
        _require_bounded(file)
        super().__init__(file, encoding="latin1")
        self.storage = storage
        self.embedded = embedded
        self.kinds: dict[str, Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; see the module's text.

        Raises:
            Refused: If it names what acts on the machine.
        """
        module = OLD_MODULES.get(module, module)
        full = f"{module}.{name}"
        if full in KNOWN:
            return KNOWN[full]
        if full == "torch.storage._load_from_bytes" and self.embedded is not None:
            return Made(self.embedded)
        last = name.rpartition(".")[2]
        if module.partition(".")[0] == "torch" and last in (*STORAGES, *QUANTISED):
            return StorageKind(last)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.partition(".")[0] in ACTING and not HARMLESS.fullmatch(full):
            raise Refused(full)
        return self.kinds.setdefault(full, _inert(full))

    def persistent_load(self, pid: Any) -> object:
        """The storage of a tensor."""
        if self.storage is None:
            raise Damaged("a tensor's description outside a file of torch")
        return self.storage(pid)

    def get_extension(self, code: int) -> None:
        """Codes of a private registry mean nothing here."""
        raise Damaged(f"extension code {code}")

    def _call(self, function: object, arguments: object) -> object:
        if not isinstance(arguments, tuple):
            raise Damaged("a call without arguments")
        if isinstance(function, Made):
            try:
                return function.make(*arguments)
            except (TypeError, ValueError, OverflowError) as error:
                raise Damaged(str(error)) from None
        if isinstance(function, type) and issubclass(function, Inert):
            return function(*arguments)
        if isinstance(function, Inert):
            return _inert(f"{function.label}()")(*arguments)
        raise Damaged("a call of what is no function")

    def load_reduce(self) -> None:
        """Call a function, which is one of ours or does nothing."""
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj(self) -> None:
        """Make an object, which is one of ours or does nothing."""
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        """As `load_newobj`, with named arguments."""
        named = self.stack.pop()
        arguments = self.stack.pop()
        values = tuple(named.values()) if isinstance(named, dict) else ()
        self.stack[-1] = self._call(self.stack[-1], (*arguments, *values) if isinstance(arguments, tuple) else None)

    def _instantiate(self, klass: object, arguments: Sequence[object]) -> None:
        self.append(self._call(klass, tuple(arguments)))

    def load_build(self) -> None:
        """Give an object its state."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, _Array):
            try:
                made.take(state)
            except ValueError as error:
                raise Damaged(str(error)) from None
        elif isinstance(made, _DType):
            made.order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else ""
        elif isinstance(made, Inert):
            made.state = state
        elif not isinstance(made, dict | Stored | type(None)):  # metadata of a state dict, attributes of a tensor
            raise Damaged("a state for what has none")

    def load_setitem(self) -> None:
        """Put one value under a key."""
        value = self.stack.pop()
        key = self.stack.pop()
        self._put(self.stack[-1], (key, value))

    def load_setitems(self) -> None:
        """Put values under keys."""
        items = self.pop_mark()
        self._put(self.stack[-1], items)

    def _put(self, target: object, items: Sequence[object]) -> None:
        if not isinstance(target, dict | Inert):
            raise Damaged("keys for what is no dictionary")
        content: dict[Any, Any] = target if isinstance(target, dict) else target.items
        for index in range(0, len(items) - 1, 2):
            content[_key(items[index])] = items[index + 1]

    def load_dict(self) -> None:
        """A dictionary from what stands on the stack."""
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        self._put(made, items)
        self.append(made)

    def load_append(self) -> None:
        """Add one element to a list."""
        value = self.stack.pop()
        self._add(self.stack[-1], [value])

    def load_appends(self) -> None:
        """Add elements to a list."""
        items = self.pop_mark()
        self._add(self.stack[-1], items)

    def _add(self, target: object, values: Sequence[object]) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Inert):
            target.parts.extend(values)
        else:
            raise Damaged("elements for what is no list")

    def load_empty_set(self) -> None:
        """A set is never needed: a list of its elements stands for it."""
        self.append([])

    def load_frozenset(self) -> None:
        """As `load_empty_set`, made at once; it may be a key."""
        self.append(_inert("builtins.frozenset")(*self.pop_mark()))


for _code, _method in (
    (pickle.REDUCE, Reader.load_reduce),
    (pickle.NEWOBJ, Reader.load_newobj),
    (pickle.NEWOBJ_EX, Reader.load_newobj_ex),
    (pickle.BUILD, Reader.load_build),
    (pickle.SETITEM, Reader.load_setitem),
    (pickle.SETITEMS, Reader.load_setitems),
    (pickle.DICT, Reader.load_dict),
    (pickle.APPEND, Reader.load_append),
    (pickle.APPENDS, Reader.load_appends),
    (pickle.EMPTY_SET, Reader.load_empty_set),
    (pickle.ADDITEMS, Reader.load_appends),
    (pickle.FROZENSET, Reader.load_frozenset),
):
    Reader.dispatch[_code[0]] = _method


def _require_bounded(file: IO[bytes]) -> None:
    """Look through the operations of a pickle before any is carried out."""
    start, number = file.tell(), 0
    try:
        for _, argument, _ in pickletools.genops(file):
            number += 1
            if number > MAX_OPERATIONS:
                raise Damaged(f"a pickle of more than {MAX_OPERATIONS:,} operations")
            if isinstance(argument, int) and argument.bit_length() > MAX_BITS:
                raise Damaged(f"an integer of {argument.bit_length():,} bits")
    except (ValueError, OverflowError, MemoryError) as error:
        raise Damaged(str(error).splitlines()[0] if str(error) else "cut off") from None
    file.seek(start)


def load(
    file: IO[bytes],
    storage: Callable[[Any], object] | None = None,
    embedded: Callable[[bytes], object] | None = None,
) -> tuple[Any, tuple[str, ...]]:
    """Read the pickle that begins where the file stands; the file is then at its end.

    Returns:
        What it holds, and the names of the classes for which `Inert` objects stand.

    Raises:
        Refused: If the pickle names what acts on the machine.
        Damaged: If it makes no sense.
    """
    reader = Reader(file, storage, embedded)
    try:
        return reader.load(), tuple(name for name in reader.kinds if not name.startswith("builtins."))
    except (Refused, Damaged):
        raise
    except Exception as error:  # pickle's own reader raises anything at all on a damaged file
        raise Damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
