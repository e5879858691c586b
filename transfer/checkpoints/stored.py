"""Tensors in a file, whose values are read lazily."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixmask.engine.errors import CheckpointError
from mixmask.engine.late import torch

if TYPE_CHECKING:
    from torch import Tensor

MAX_SIDES = 64  # torch's own limit on the number of dimensions

Bytes = Callable[[int, int], bytes]  # (offset, number of bytes) to bytes of a storage


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        shape: Its sides.
        dtype: Its numbers' format; None where ``odd`` says that it is no ordinary tensor.
        read: Reads it.
        odd: What stands there instead of an ordinary tensor, in words; empty for an ordinary one.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], Tensor]
    odd: str = ""

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __str__(self) -> str:
        """Shape and dtype, or what it is instead of an ordinary tensor."""
        return self.odd or f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def odd(what: str) -> Stored:
    """A placeholder for a tensor that cannot be read as an ordinary one; ``what`` says what it is."""

    def read() -> Tensor:
        raise CheckpointError(f"is {what}")

    return Stored((), None, read, what)


@dataclass(frozen=True)
class Storage:
    """The values behind one or several tensors of a file of ``torch.save``.

    Attributes:
        dtype: The dtype of the values.
        size: The size in bytes.
        content: Reads some of its bytes.
    """

    dtype: torch.dtype
    size: int
    content: Bytes

    def tensor(
        self, offset: object, shape: Sequence[object], strides: Sequence[object], dtype: torch.dtype | None = None
    ) -> Stored:
        """A view of the storage, as ``torch.as_strided``; ``offset`` and ``strides`` count elements.

        Raises:
            ValueError: If the view reaches beyond the storage.
        """
        kind = dtype or self.dtype
        sides, steps = _counts(shape), _counts(strides)
        if not isinstance(offset, int) or offset < 0 or len(sides) != len(steps) or len(sides) > MAX_SIDES:
            raise ValueError("a tensor with impossible sizes")
        empty = 0 in sides
        span = 0 if empty else 1 + sum((side - 1) * step for side, step in zip(sides, steps, strict=True))
        # With strides of 0, a small file could claim a tensor of any size.
        if not empty and math.prod(sides) > span:
            return odd(
                f"a tensor of {math.prod(sides):,} numbers of which only {span:,} are stored (expanded, not copied)"
            )
        if (offset + span) * kind.itemsize > self.size:
            raise ValueError("a tensor that is larger than its storage")

        def read() -> Tensor:
            if empty:
                return torch.empty(sides, dtype=kind)
            raw = self.content(offset * kind.itemsize, span * kind.itemsize)
            if len(raw) != span * kind.itemsize:
                raise CheckpointError("is cut off")
            return torch.frombuffer(bytearray(raw), dtype=kind).as_strided(sides, steps)

        return Stored(sides, kind, read)


def _counts(values: Sequence[object]) -> tuple[int, ...]:
    if not isinstance(values, tuple | list):
        raise ValueError("a tensor with impossible sizes")
    counts = tuple(value for value in values if isinstance(value, int) and 0 <= value < 1 << 62)
    if len(counts) != len(values):
        raise ValueError("a tensor with impossible sizes")
    return counts


def array(content: bytes, dtype: np.dtype[np.generic], shape: Sequence[object], fortran: bool) -> Stored:
    """An array of numbers whose bytes are in memory.

    Raises:
        ValueError: If the bytes do not fit the shape, or a dimension is no valid size.
    """
    sides = _counts(tuple(shape))
    flat = np.frombuffer(content, dtype)
    values = flat.reshape(sides, order="F" if fortran else "C")
    # torch has no counterpart of NumPy's long double.
    if (dtype.kind == "f" and dtype.itemsize > 8) or dtype.kind not in "fiub":
        return odd(f"an array of numpy's {dtype}")

    def read() -> Tensor:
        native = np.array(values, dtype=dtype.newbyteorder("="), order="C")  # a copy that may be written to
        return torch.from_numpy(native).reshape(sides)

    return Stored(sides, torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype, read)
