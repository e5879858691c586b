"""Runs code on tensors that claim to be on a GPU, on machines without one, and finds what would make a GPU wait.

Operations that touch such a tensor compute shapes only (torch's FakeTensorMode); draws and other host tensors are real.
What needs a value on the host (``.item()``, a boolean mask, ``nonzero``) or a copy that blocks is an error, with the line
that asked for it. Waits inside an operation are not seen (``svdvals`` looks at its solver's status). The backward pass
cannot run: autograd's engine wants a real device.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

pytest.importorskip("triton", reason="triton comes with torch's builds for GPUs")

from mixmask.engine import photometric_kernels

aten = torch.ops.aten
KERNELS_OF = {"mixmask.photometric.default": 4}  # operations that start several kernels
GPU = torch.device("cuda:0")

NEED_VALUES = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.equal.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
# Operations that start nothing on the device: views, sizes, empty memory.
FREE = ("prim.", "aten.view", "aten._unsafe_view", "aten.permute", "aten.transpose", "aten.t.", "aten.expand", "aten.slice.",
        "aten.select.", "aten.squeeze", "aten.unsqueeze", "aten.detach", "aten.alias", "aten.as_strided", "aten.split",
        "aten.unbind", "aten.chunk", "aten.empty", "aten.diagonal", "aten.unfold", "aten.lift_fresh", "aten.new_empty",
        "aten._reshape_alias", "aten.is_pinned", "aten.view_as")  # fmt: skip


Generator = torch.Generator


class _OnTheHost(Generator):
    """A generator that was asked for on the GPU."""

    def __new__(cls, device: object = "cpu") -> _OnTheHost:
        return super().__new__(cls)


class Blocked(AssertionError):
    """Something that a GPU, or the host, would have to wait for, or that mixes devices."""

    def __init__(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/mixmask/" in frame.filename]
        place = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "?"
        super().__init__(f"{what} at {place}")


class Pretend(TorchDispatchMode):
    """Counts operations on pretended tensors by name, and refuses those that block."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.started: Counter[str] = Counter()

    @property
    def kernels(self) -> int:
        """Operations that start work on the device."""
        return sum(count * KERNELS_OF.get(name, 1) for name, count in self.started.items() if not name.startswith(FREE))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        pretended = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        device = kwargs.get("device")
        aimed = None if device is None else torch.device(device).type
        if not pretended and aimed != "cuda":
            return func(*args, **kwargs)
        self._refuse(func, args, kwargs, tensors, bool(pretended), aimed)
        self.started[str(func)] += 1
        if isinstance(kwargs.get("generator"), Generator):
            kwargs["generator"] = None  # shapes need no draws

        def pretended_too(leaf: Any) -> Any:
            real = isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor)
            return self.fake.from_tensor(leaf) if real else leaf

        with self.fake:
            args, kwargs = tree_map(pretended_too, (args, kwargs))
            return func(*args, **kwargs)

    def _refuse(
        self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor], any_fake: bool, aimed: str | None
    ) -> None:
        if func in NEED_VALUES and any_fake:
            raise Blocked(f"{func} needs a value of the device")
        if func is aten.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1]):
            raise Blocked("a boolean mask needs values of the device")
        if any_fake and aimed == "cpu":
            raise Blocked(f"{func} copies to the host")
        host = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor) and tensor.ndim]
        if host and func in COPIES:
            if not (kwargs.get("non_blocking") or (len(args) > 2 and args[2])):
                raise Blocked(f"{func} is a blocking copy to the device")
        elif host:
            raise Blocked(
                f"{func} mixes devices ({', '.join(str(tuple(tensor.shape)) for tensor in host)} are on the host)"
            )


@contextlib.contextmanager
def pretend() -> Iterator[Pretend]:
    """A machine with one GPU, for the code inside."""
    lazy, pin, usable = torch.cuda._lazy_init, Tensor.pin_memory, photometric_kernels.usable
    torch.cuda._lazy_init = lambda: None
    Tensor.pin_memory = lambda self, *_: self
    torch.Generator = _OnTheHost
    photometric_kernels.usable = lambda device: True
    try:
        with Pretend() as mode:
            yield mode
    finally:
        torch.cuda._lazy_init, Tensor.pin_memory = lazy, pin
        torch.Generator = Generator
        photometric_kernels.usable = usable


def moved(module: nn.Module, mode: Pretend) -> nn.Module:
    """The module with its parameters and buffers on the pretended GPU."""

    def there(tensor: Tensor) -> Tensor:
        with mode.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=GPU)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(there(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = there(buffer)
    return module


def images(mode: Pretend, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on the pretended GPU."""
    with mode.fake:
        return torch.empty(shape, dtype=dtype, device=GPU)
