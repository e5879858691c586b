"""Find the tensors of a checkpoint file without running any code that it contains.

A file holds nested containers. A tensor's name is its full path through them:
``state_dict.module.encoder_q.conv1.weight``.
"""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mixmask.engine.errors import CheckpointError
from mixmask.engine.wording import printable
from mixmask.transfer.checkpoints.containers import every_tensor, joined
from mixmask.transfer.checkpoints.names import WRAPPERS, unwrapped
from mixmask.transfer.checkpoints.pickles import load
from mixmask.transfer.checkpoints.stand_ins import Damaged, Refused
from mixmask.transfer.checkpoints.stored import Stored, odd
from mixmask.transfer.checkpoints.torch_files import Pickled, embedded, is_legacy, is_zip, read_legacy, read_zip

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a checkpoint file holds.

    Attributes:
        tensors: Every tensor by its name: its path through the containers, without `WRAPPERS`.
        classes: Names of the classes whose objects were replaced by `Inert` stand-ins.
        wrappers: How often each wrapper of `WRAPPERS` was removed from a name.
    """

    tensors: dict[str, Stored]
    classes: tuple[str, ...] = ()
    wrappers: Mapping[str, int] | None = None

    def notes(self) -> list[str]:
        """What was not read, and what was removed from names: lines for the user."""
        said = []
        if self.classes:
            shown = ", ".join(printable(name)[:100] for name in self.classes[:6])
            more = f" … and {len(self.classes) - 6} more" if len(self.classes) > 6 else ""
            said.append(f"not made  objects of {len(self.classes)} classes: {shown}{more}")
        if self.wrappers:
            counts = ", ".join(f"{name} ({count} ×)" for name, count in self.wrappers.items())
            said.append(f"wrappers  left out of the names: {counts}")
        return said


def read_tensors(path: Path) -> Contents:
    """Find the tensors of a ``.safetensors`` file, a ``torch.save`` file, or a pickle (Detectron2's ``.pkl``).

    Values are read lazily, by `Stored.read`.

    Raises:
        CheckpointError: If the file is missing or damaged, holds no tensors or two of the same name, or is a pickle
            that names a function that could act on the machine (the message says which).
    """
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, a checkpoint file was expected")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file")
    if path.suffix == ".safetensors":
        return _named(list(_safetensors(path)), (), path)
    try:
        pickled = _pickled(path)
        leaves = list(every_tensor(pickled.content))
    except Refused as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors, arrays and plain containers: {printable(str(error))[:200]}. "
            f"Nothing of it was run. If you trust the file, load it with its own code and save its state dict alone"
        ) from None
    except Damaged as error:
        raise CheckpointError(f"{path}: truncated or not a checkpoint ({printable(str(error))[:300]})") from None
    except RecursionError:
        raise CheckpointError(f"{path}: its containers are nested too deeply") from None
    except MemoryError:
        raise CheckpointError(f"{path}: needs more memory than there is") from None
    return _named(leaves, pickled.classes, path)


def _named(leaves: list[tuple[str, Stored]], classes: tuple[str, ...], path: Path) -> Contents:
    wrappers = Counter(found for name, _ in leaves for found in WRAPPERS.findall(name))
    tensors = {unwrapped(name): stored for name, stored in leaves}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors")
    if len(tensors) < len(leaves):
        count = Counter(unwrapped(name) for name, _ in leaves)
        twice = [name for name, number in count.items() if number > 1]
        more = f" … and {len(twice) - 4} more" if len(twice) > 4 else ""
        raise CheckpointError(
            f"{path}: several tensors have the same path through its containers: {', '.join(twice[:4])}{more}"
        )
    return Contents(tensors, classes, wrappers)


def _pickled(path: Path) -> Pickled:
    if is_zip(path):
        return read_zip(path)
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise Damaged("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            content: Any = mapped  # an mmap reads like a file, which its type does not say
            if is_legacy(path):
                return read_legacy(content, path)
            if content[:2] == b"\x1f\x8b":
                raise Damaged("compressed with gzip; unpack it first")
            if content[257:262] == b"ustar":
                raise Damaged("a tar archive: unpack it first, or save it again with torch of today")
            return Pickled(*load(content, embedded=embedded))


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        file: Any = safe_open(path, framework="pt")
        with file:
            names = list(file.keys())
            parts = {name: file.get_slice(name) for name in names}
            described = {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({printable(str(error))[:300]})") from None

    def reader(name: str) -> Any:
        def read() -> torch.Tensor:
            # Opened again for each tensor: the file above is closed once the names are known.
            with safe_open(path, framework="pt") as again:
                tensor: torch.Tensor = again.get_tensor(name)
            return tensor

        return read

    for name in names:
        shape, code = described[name]
        dtype = DTYPES.get(code)
        yield (
            joined("", name),
            Stored(shape, dtype, reader(name)) if dtype else odd(f"a tensor of the format {printable(code)}"),
        )


def digest(path: Path) -> str:
    """Twelve hexadecimal digits of the file's content: the identity of a checkpoint that has no fingerprint."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            content.update(chunk)
    return content.hexdigest()[:12]
