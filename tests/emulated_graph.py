"""A CUDA graph without a GPU: operations on CPU tensors are recorded and replayed as a CUDA graph would replay them.

A replay starts the same operations on the same memory, with the numbers of the host as they were. So a step that reads
something else than the memory, which it is given anew, is wrong from the next step on. As on a GPU, recording does not
change any tensor, and it is an error to ask for a value on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
aten = torch.ops.aten


def tensors_of(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]


class Recorded(TorchDispatchMode):
    """Keeps every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self.own: set[int] = set()  # storages that were made inside
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was there, and a copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for one in tensors_of((args, kwargs)):
            where = one.untyped_storage()._cdata
            if where not in self.own and where not in self.before:
                self.before[where] = one, one.detach().clone()
        found = func(*args, **kwargs)
        known = {one.untyped_storage()._cdata for one in tensors_of((args, kwargs))}
        self.own |= {one.untyped_storage()._cdata for one in tensors_of(found)} - known
        self.operations.append((func, args, kwargs, found))
        return found


class EmulatedGraph:
    """What `engine.recording.CUDAGraph` is on a GPU."""

    made = 0
    replays = 0

    def __init__(self) -> None:
        self.recorded = Recorded()

    def rehearse(self, work: Callable[[], T]) -> T:
        return work()

    def record(self, work: Callable[[], T]) -> T:
        EmulatedGraph.made += 1
        with self.recorded:
            result = work()
        with torch.no_grad():
            for one, copy in self.recorded.before.values():
                one.detach().copy_(copy)
        return result

    @torch.no_grad()
    def replay(self) -> None:
        EmulatedGraph.replays += 1
        for func, args, kwargs, result in self.recorded.operations:
            given = {one.untyped_storage()._cdata for one in tensors_of((args, kwargs))}
            for old, new in zip(tensors_of(result), tensors_of(func(*args, **kwargs)), strict=True):
                if old.untyped_storage()._cdata not in given:
                    old.detach().copy_(new)
