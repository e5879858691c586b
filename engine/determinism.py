"""Kernels whose result does not depend on the order in which a GPU's threads finish."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator

from mixmask.engine.errors import ConfigError
from mixmask.engine.late import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS is deterministic only with workspaces of a fixed size


@contextlib.contextmanager
def deterministic_kernels(on: bool) -> Iterator[None]:
    """Let torch use deterministic kernels only, while the context lasts; a no-op if not ``on``.

    Without it, some of a GPU's kernels add numbers in another order every time, and cuDNN may choose other algorithms. The
    same run on the same kind of GPU then agrees to rounding; with it, to the bit (with three or more processes, a resumed
    run only to rounding: DistributedDataParallel regroups gradients). On a CPU runs in fp32 agree to the bit
    in any case; in bf16 oneDNN's convolutions may round differently from time to time, whatever is set. `mixmask bench`
    measures what it costs.

    Raises:
        ConfigError: If an operation has no deterministic kernel; the message names it.
    """
    if not on:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")  # read when the first matrix product starts
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if "CUBLAS_WORKSPACE_CONFIG" in str(error):  # of some versions of torch, if matrix products ran before
            raise ConfigError(
                f"deterministic: true: this version of torch wants {WORKSPACE}=:4096:8 in the environment before it starts"
            ) from error
        found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
        if found is None:
            raise
        raise ConfigError(
            f"deterministic: true: {found.group(1)} has no deterministic kernel on this device; set deterministic: false"
        ) from error
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
