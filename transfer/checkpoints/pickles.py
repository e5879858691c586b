"""Read a pickle without running it.

A pickle is a program that calls functions by name. Here, no name resolves to the real function. Tensors, arrays and
plain containers are made by functions of `stand_ins`; every other name becomes an `Inert` object, which records what is
put into it and does nothing. A name that only an attack needs stops the reading.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Sequence
from typing import IO, Any, ClassVar

from mixmask.transfer.checkpoints.stand_ins import (
    Damaged,
    Inert,
    LateArray,
    Made,
    NumberFormat,
    Refused,
    inert,
    key_of,
    stand_in,
)
from mixmask.transfer.checkpoints.stored import Stored

MAX_OPERATIONS = 2_000_000  # the checkpoint of a ResNet-152 with its optimizer takes 100,000
MAX_BITS = 4096  # of an integer; states of random generators have 128
_Unpickler: Any = pickle._Unpickler  # the pure Python one: each of its opcodes can be overridden


class Reader(_Unpickler):  # type: ignore[misc]
    """Restores containers, `Stored` tensors and arrays, and `Inert` objects from a pickle.

    Args:
        file: Positioned at the pickle, with a known end: no length in it can ask for more bytes than there are.
        storage: Maps the persistent id of a tensor to its storage.
        embedded: Reads the storage that a plain pickle of a tensor embeds as a file of torch.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(_Unpickler.dispatch)

    def __init__(
        self,
        file: IO[bytes],
        storage: Callable[[Any], object] | None = None,
        embedded: Callable[[bytes], object] | None = None,
    ) -> None:
        _require_bounded(file)
        # What NumPy and torch need for pickles of Python 2.
        super().__init__(file, encoding="latin1")
        self.storage = storage
        self.embedded = embedded
        self.named: dict[str, object] = {}  # name: its stand-in

    @property
    def classes(self) -> tuple[str, ...]:
        """The names that `Inert` classes stand for, without those of Python's own types."""
        labels = (kind.label for kind in self.named.values() if isinstance(kind, type) and issubclass(kind, Inert))
        return tuple(label for label in labels if not label.startswith("builtins."))

    def find_class(self, module: str, name: str) -> object:
        """The stand-in for a name; pickle's own method would import it.

        Raises:
            Refused: If the name belongs to a module that can act on the machine.
        """
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes" and self.embedded is not None:
            return Made(self.embedded)
        if full not in self.named:
            self.named[full] = stand_in(module, name)
        return self.named[full]

    def persistent_load(self, pid: Any) -> object:
        """The storage that a persistent id names."""
        if self.storage is None:
            raise Damaged("a tensor's description outside a file of torch")
        return self.storage(pid)

    def get_extension(self, code: int) -> None:
        """Refuse the codes of ``copyreg``'s registry, which mean something only to the program that wrote them."""
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
            return inert(f"{function.label}()")(*arguments)
        raise Damaged("a call of what is no function")

    def load_reduce(self) -> None:
        """REDUCE and NEWOBJ: call a stand-in function, or create an `Inert` object."""
        arguments = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], arguments)

    def load_newobj_ex(self) -> None:
        """As `load_reduce`, with named arguments."""
        named = self.stack.pop()
        arguments = self.stack.pop()
        values = tuple(named.values()) if isinstance(named, dict) else ()
        self.stack[-1] = self._call(self.stack[-1], (*arguments, *values) if isinstance(arguments, tuple) else None)

    def _instantiate(self, klass: object, arguments: Sequence[object]) -> None:
        self.append(self._call(klass, tuple(arguments)))

    def load_build(self) -> None:
        """BUILD: set the state of an object."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, LateArray):
            try:
                made.take(state)
            except ValueError as error:
                raise Damaged(str(error)) from None
        elif isinstance(made, NumberFormat):
            made.order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") else ""
        elif isinstance(made, Inert):
            made.state = state
        # The metadata of a state dict and the attributes of a tensor are ignored.
        elif not isinstance(made, dict | Stored | type(None)):
            raise Damaged("a state for what has none")

    def load_setitem(self) -> None:
        """Put one value under a key."""
        value, key = self.stack.pop(), self.stack.pop()
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
            content[key_of(items[index])] = items[index + 1]

    def load_dict(self) -> None:
        """DICT: make a dictionary of the keys and values on the stack."""
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        self._put(made, items)
        self.append(made)

    def load_append(self) -> None:
        """Add one element to a list."""
        value = self.stack.pop()
        self._add(self.stack[-1], (value,))

    def load_appends(self) -> None:
        """APPENDS and ADDITEMS: add elements to a list, which also stands for a set."""
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
        """EMPTY_SET: no tensor needs a set, so a list of the elements stands for it."""
        self.append([])

    def load_frozenset(self) -> None:
        """FROZENSET: an `Inert` object with the elements; unlike a list, it can be a dictionary key."""
        self.append(inert("builtins.frozenset")(*self.pop_mark()))


Reader.dispatch.update(
    {
        code[0]: method
        for code, method in (
            (pickle.REDUCE, Reader.load_reduce),
            (pickle.NEWOBJ, Reader.load_reduce),
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
        )
    }
)


def _require_bounded(file: IO[bytes]) -> None:
    """Check the number of operations and the size of integers, before any operation is carried out."""
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
    """Read the pickle at the file's current position, and leave the file right behind it.

    Returns:
        The content, and the names of the classes that `Inert` objects stand for.

    Raises:
        Refused: If the pickle names something that can act on the machine.
        Damaged: If it cannot be read.
    """
    reader = Reader(file, storage, embedded)
    try:
        return reader.load(), reader.classes
    except (Refused, Damaged):
        raise
    except Exception as error:  # pickle's own reader raises anything at all on a damaged file
        raise Damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
