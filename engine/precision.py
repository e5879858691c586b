"""Devices, their memory, and number formats."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from mixmask.engine.errors import ConfigError
from mixmask.engine.late import torch

Precision = Literal["fp32", "bf16", "fp16"]
DeviceName = Literal["auto", "cpu", "cuda"]


def resolve_device(name: DeviceName) -> torch.device:
    """The torch device for a recipe's ``device``; ``auto`` takes a GPU if there is one.

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


def available_cores() -> int:
    """The cores that this process may use: a SLURM job often gets fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_of(device: torch.device) -> int:
    """Total memory of a device in bytes: the GPU's, or for the CPU the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_memory(parts: Mapping[str, int], device: torch.device, what: str) -> None:
    """Refuse work that needs more memory than the device has.

    Args:
        parts: Bytes of everything that must be in memory at the same time. A part's key says what it is, and which
            config keys determine its size.
        device: The device whose memory is used.
        what: What needs the memory, for the message.

    Raises:
        ConfigError: If it does not fit; names the largest part.
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


def autocast(device: torch.device, precision: Precision) -> Any:
    """Context in which matrix products and convolutions run in ``precision``; parameters stay fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware computes bf16 natively, so that it is worth choosing."""
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
