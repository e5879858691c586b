"""What the tests with malicious pickles share. No sample is ever unpickled by Python: its bytes go to our reader alone."""

from __future__ import annotations

import io
import pickle
import pickletools
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from mixmask.engine.errors import CheckpointError
from mixmask.transfer.checkpoints.pickles import load
from mixmask.transfer.checkpoints.safe_read import Contents, read_tensors
from mixmask.transfer.checkpoints.stand_ins import Damaged, Inert, LateArray, Made, NumberFormat, Refused, StorageKind
from mixmask.transfer.checkpoints.stored import Storage, Stored

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3)}
# What reading a file may do. Anything else that Python reports meanwhile, such as an import, was done by the file.
QUIET = {"open", "mmap.__new__", "object.__getattr__", "builtins.id"}
OURS = (Inert, Made, StorageKind, NumberFormat, LateArray, Stored, Storage, torch.dtype)

_seen: list[tuple[str, str]] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None:
        _seen.append((event, str(arguments[0]) if arguments else ""))


sys.addaudithook(_watch)


@contextmanager
def watched(path: Path | None = None) -> Iterator[list[tuple[str, str]]]:
    """What the interpreter reports inside, without reading ``path``; known after the block."""
    global _seen
    acts: list[tuple[str, str]] = []
    seen = _seen = []
    try:
        yield acts
    finally:
        _seen = None
        acts += [one for one in seen if one[0] not in QUIET or (one[0] == "open" and one[1] != str(path))]


def get_ready(folder: Path) -> None:
    """Read something, so that what our reader imports for the first time is not taken for the doing of a sample."""
    path = with_weights(pickle.dumps([]), folder / "ready.pth")
    assert path is not None
    read_tensors(path)


def read(path: Path) -> Contents | None:
    """What our reader makes of a file, None if it refuses; nothing may happen meanwhile."""
    contents = None
    with watched(path) as acts, suppress(CheckpointError):
        contents = read_tensors(path)
    assert not acts, (path.name, acts)
    return contents


def unpickled(content: bytes) -> Any:
    """What our reader makes of a pickle, None if it refuses: plain values and stand-ins only."""
    result = None
    with watched() as acts, suppress(Damaged, Refused):
        result = load(io.BytesIO(content))[0]
    assert not acts, acts
    _require_plain(result)
    return result


def _require_plain(result: object) -> None:
    waiting, before = [result], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in before:
            continue
        before.add(id(value))
        if isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, Inert):
            waiting += [*value.parts, *value.items.keys(), *value.items.values(), value.state]
        elif isinstance(value, list | tuple):
            waiting += value
        else:
            plain = value is None or isinstance(value, (str, bytes, bytearray, int, float, *OURS))
            assert plain or (isinstance(value, type) and issubclass(value, Inert)), value


def program(content: bytes) -> bytes | None:
    """A pickle with POP for each STOP: what follows is read as if nothing had been there. None if it is malformed."""
    changed, stream = bytearray(content), io.BytesIO(content)
    try:
        while stream.tell() < len(content):
            *_, (_, _, place) = pickletools.genops(stream)
            assert place is not None
            changed[place : place + 1] = pickle.POP
    except ValueError:
        return None
    return bytes(changed)


def with_weights(content: bytes, path: Path) -> Path | None:
    """Write a file of torch whose pickle runs another one first, and then gives ``WEIGHTS``: a network with a backdoor."""
    before = program(content)
    if before is None:
        return None
    torch.save(WEIGHTS, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, before + record if name.endswith("/data.pkl") else record)
    return path


class Plain(pickle.Unpickler):
    """Python's own, without names: a pickle of numbers, texts and containers."""

    def find_class(self, module: str, name: str) -> Any:
        raise LookupError(f"{module}.{name}")
