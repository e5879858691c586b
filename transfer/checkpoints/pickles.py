"""Reading a pickle without running it.

A pickle is a program that calls functions by their names. Here no name leads to the function it means. Tensors, arrays and
plain containers are made by functions of `stand_ins`; whatever else is named becomes an `Inert` object, which records what
is put into it and does nothing. Names that only an attack asks for end the reading.
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
_Unpickler: Any = pickle._Unpickler  # Python's own in Python: every operation of it can be replaced


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
        self.named: dict[str, object] = {}  # what stands for each name

    @property
    def classes(self) -> tuple[str, ...]:
        """The names for which `Inert` classes stand."""
        labels = (kind.label for kind in self.named.values() if isinstance(kind, type) and issubclass(kind, Inert))
        return tuple(label for label in labels if not label.startswith("builtins."))

    def find_class(self, module: str, name: str) -> object:
        """What stands for a name; see `stand_in`.

        Raises:
            Refused: If it names what acts on the machine.
        """
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes" and self.embedded is not None:
            return Made(self.embedded)
        if full not in self.named:
            self.named[full] = stand_in(module, name)
        return self.named[full]

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
            return inert(f"{function.label}()")(*arguments)
        raise Damaged("a call of what is no function")

    def load_reduce(self) -> None:
        """Call a function or make an object, which is one of ours or does nothing."""
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
        """Give an object its state."""
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
        elif not isinstance(made, dict | Stored | type(None)):  # metadata of a state dict, attributes of a tensor
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
        """A dictionary from what stands on the stack."""
        items = self.pop_mark()
        made: dict[Any, Any] = {}
        self._put(made, items)
        self.append(made)

    def load_append(self) -> None:
        """Add one element to a list."""
        value = self.stack.pop()
        self._add(self.stack[-1], (value,))

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
        return reader.load(), reader.classes
    except (Refused, Damaged):
        raise
    except Exception as error:  # pickle's own reader raises anything at all on a damaged file
        raise Damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
