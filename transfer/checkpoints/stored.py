"""Tensors that stand in a file and are read when they are needed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixmask.engine.errors import CheckpointError

MAX_SIDES = 64  # the most dimensions that torch takes

Bytes = Callable[[int, int], bytes]  # the bytes of a storage: (first, number)


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
        """Shape and number format."""
        return self.odd or f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def odd(what: str) -> Stored:
    """Something that stands where a tensor could, and is none that can be read."""

    def read() -> Tensor:
        raise CheckpointError(f"is {what}")

    return Stored((), None, read, what)


def whole(tensor: Tensor) -> Stored:
    """A tensor that is in memory already."""
    return Stored(tuple(tensor.shape), tensor.dtype, lambda: tensor)


@dataclass(frozen=True)
class Storage:
    """The numbers behind one or several tensors of ``torch.save``.

    Attributes:
        dtype: The format of its numbers.
        size: How many bytes it has.
        content: Gives some of its bytes.
    """

    dtype: torch.dtype
    size: int
    content: Bytes

    def tensor(
        self, offset: object, shape: Sequence[object], strides: Sequence[object], dtype: torch.dtype | None = None
    ) -> Stored:
        """A view of the storage, as ``torch.as_strided``.

        Raises:
            ValueError: If it does not lie within the storage.
        """
        kind = dtype or self.dtype
        sides, steps = _counts(shape), _counts(strides)
        if not isinstance(offset, int) or offset < 0 or len(sides) != len(steps) or len(sides) > MAX_SIDES:
            raise ValueError("a tensor with impossible sizes")
        empty = 0 in sides
        span = 0 if empty else 1 + sum((side - 1) * step for side, step in zip(sides, steps, strict=True))
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
        ValueError: If bytes and shape do not fit, or a side is no number.
    """
    sides = _counts(tuple(shape))
    flat = np.frombuffer(content, dtype)
    values = flat.reshape(sides, order="F" if fortran else "C")
    if (dtype.kind == "f" and dtype.itemsize > 8) or dtype.kind not in "fiub":
        return odd(f"an array of numpy's {dtype}")

    def read() -> Tensor:
        native = np.array(values, dtype=dtype.newbyteorder("="), order="C")  # a copy that may be written to
        return torch.from_numpy(native).reshape(sides)

    return Stored(sides, torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype, read)
