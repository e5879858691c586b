"""Walk nested containers, and name every tensor in them by its path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mixmask.engine.wording import printable
from mixmask.transfer.checkpoints.stand_ins import Damaged, Inert, LateArray
from mixmask.transfer.checkpoints.stored import Stored, odd

MAX_TENSORS = 100_000
MAX_DEPTH = 100
MAX_NAME = 1000


def every_tensor(content: object) -> Iterator[tuple[str, Stored]]:
    """Every tensor and array in nested containers with its name: keys and list indices, joined by dots.

    Dictionaries of other libraries count as dictionaries, and a network that was pickled whole counts as its state
    dict. Any other object that holds tensors is given as one odd tensor, because their meaning in it is not known.

    Raises:
        Damaged: If the containers are nested too deeply or hold too many tensors (a shared one counts once per
            reference), or a name is too long.
    """
    yield from _Walk().leaves(content, "", 0)


def joined(where: str, key: object) -> str:
    """The name of what is stored under ``key`` in the container named ``where``.

    Raises:
        Damaged: If the name has more than `MAX_NAME` characters, or the key is an integer beyond 64 bits.
    """
    if isinstance(key, int) and not isinstance(key, bool) and abs(key) >= 1 << 63:
        raise Damaged(f"an integer of {key.bit_length():,} bits as a key")
    text = printable(key if isinstance(key, str) else repr(key) if isinstance(key, bytes | tuple) else str(key))
    name = f"{where}.{text}" if where else text
    if len(name) > MAX_NAME:
        raise Damaged(f"a name of {len(name):,} characters, which begins with {name[:80]}")
    return name


class _Walk:
    def __init__(self) -> None:
        self.known: dict[int, bool] = {}  # id of a container: whether it holds a tensor; each is visited once
        self.num = 0

    def holds(self, content: object, depth: int) -> bool:
        """Whether a value is a tensor or holds one at any depth."""
        if _tensor(content) is not None:
            return True
        if not isinstance(content, dict | list | tuple | Inert):
            return False
        if depth > MAX_DEPTH:
            raise Damaged(f"containers nested more than {MAX_DEPTH} deep")
        if id(content) not in self.known:
            self.known[id(content)] = False  # until it is known: ends the recursion if it contains itself
            self.known[id(content)] = any(self.holds(part, depth + 1) for part in _parts(content))
        return self.known[id(content)]

    def leaves(self, content: object, where: str, depth: int) -> Iterator[tuple[str, Stored]]:
        """The tensors in ``content``, whose own name is ``where``."""
        tensor = _tensor(content)
        if tensor is not None:
            self.num += 1
            if self.num > MAX_TENSORS:
                raise Damaged(f"more than {MAX_TENSORS:,} tensors, counting one as often as it is referred to")
            yield where, tensor
            return
        if not self.holds(content, depth):
            return
        if depth > MAX_DEPTH:  # a container within itself
            raise Damaged(f"containers nested more than {MAX_DEPTH} deep")
        entries = self._entries(content, depth)
        if entries is None:
            assert isinstance(content, Inert)
            yield (
                where or content.label,
                odd(f"an object of the class {printable(content.label)[:100]} that holds tensors"),
            )
            return
        for key, part in entries:
            yield from self.leaves(part, joined(where, key), depth + 1)

    def _entries(self, content: object, depth: int) -> Iterable[tuple[object, object]] | None:
        """Keys and values of a container; None for an object whose contents have no known meaning."""
        if isinstance(content, list | tuple):
            return enumerate(content)
        if isinstance(content, dict):
            return _without_none(content)
        assert isinstance(content, Inert)
        network = _of_network(content.state)
        if network is not None:
            return network
        if any(self.holds(part, depth + 1) for part in (*content.parts, content.state)):
            return None
        return _without_none(content.items)


def _tensor(content: object) -> Stored | None:
    return content.value if isinstance(content, LateArray) else content if isinstance(content, Stored) else None


def _parts(content: object) -> Iterable[object]:
    if isinstance(content, dict):
        return content.values()
    if isinstance(content, Inert):
        return (*content.parts, *content.items.values(), content.state)
    return content if isinstance(content, list | tuple) else ()


def _without_none(items: dict[object, object]) -> Iterator[tuple[object, object]]:
    """The entries of a dictionary without its None values; if most values are tensors, a None becomes an odd tensor."""
    tensors = sum(_tensor(value) is not None for value in items.values())
    for key, value in items.items():
        if value is not None:
            yield key, value
        elif 2 * tensors > len(items):
            yield key, odd("None where a tensor should be")


def _of_network(state: object) -> list[tuple[object, object]] | None:
    """Parameters, buffers and children of a pickled ``nn.Module``, as ``state_dict()`` has them; None for others."""
    if not isinstance(state, dict):
        return None
    parts = [state.get(name) for name in ("_parameters", "_buffers", "_modules")]
    if not all(isinstance(part, dict) for part in parts):
        return None
    left_out = state.get("_non_persistent_buffers_set")
    if isinstance(left_out, Inert):  # a set, as older pickles have it
        left_out = left_out.parts[0] if left_out.parts else ()
    hidden = set(map(str, left_out)) if isinstance(left_out, list | tuple) else set()
    return [
        (key, value)
        for part in parts
        if isinstance(part, dict)
        for key, value in part.items()
        if value is not None and str(key) not in hidden
    ]
