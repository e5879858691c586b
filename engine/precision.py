"""Devices and number formats."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from mixmask.engine.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
DeviceName = Literal["auto", "cpu", "cuda"]


def resolve_device(name: DeviceName) -> torch.device:
    """The device a recipe's ``device`` means on this machine; ``auto`` takes a GPU if there is one.

    Raises:
        ConfigError: If a GPU was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but torch sees no GPU; use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_precision(device: torch.device, precision: Precision) -> None:
    """Refuse a format that a device can only emulate, hundreds of times slower.

    Raises:
        ConfigError: For fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision: fp16 needs a GPU; on a CPU use bf16 (if `mixmask doctor` calls it fast) or fp32")


def memory_of(device: torch.device) -> int:
    """Bytes of memory that a device has: the GPU's own, or this machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(parts: Mapping[str, int], device: torch.device, what: str) -> None:
    """Refuse what needs more memory than there is.

    Args:
        parts: Bytes of each thing that must be there at the same time, by its name and the keys it depends on.
        device: Where it must be.
        what: For the message.

    Raises:
        ConfigError: With the largest part and its keys.
    """
    needed, there = sum(parts.values()), memory_of(device)
    if needed > there:
        largest = max(parts, key=lambda name: parts[name])
        raise ConfigError(
            f"{what}: needs at least {_gib(needed)} of memory, {device} has {_gib(there)}. Most of it, "
            f"{_gib(parts[largest])}, goes to {largest}"
        )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on the device, without making the host wait for the device's work so far."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def autocast(device: torch.device, precision: Precision) -> Any:
    """Context in which matrix products and convolutions run in ``precision``; parameters stay fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 is computed by the hardware and therefore worth choosing."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.backends.cpu.get_cpu_capability()
    flags = ""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "AVX512" in capabilities and ("amx_bf16" in flags or "avx512_bf16" in flags)
